"""The proof of reliability: measures its parts, and makes docs/reliability.md of their results.

Owns the soak, the results in `results/`, and the page. It leaves the explorer, the mutants and the nemesis to their own programs, and runs
them. Run it as `python -m tests.reliability`, or by `make reliability`.
"""
