"""Load tests: one module per question. Each reports its settings, its figures, and the baseline measured in the same run.

Run `python -m loadtests <question>` from the repository's root; `--help` lists the questions.
"""
