"""Load tests: one module per question, each with its settings, its figures and what they are compared with in the same run.

Run `python -m loadtests <question>` from the repository's root; `--help` lists the questions.
"""
