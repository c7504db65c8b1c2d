"""Planted bugs in the protocol, and the command that shows which tests find each of them: `python -m tests.mutants`.

Owns the mutants and the runs over them. A proof that cannot fail is none: a mutant that no test finds is a promise without a test.
"""
