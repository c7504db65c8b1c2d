"""The calls that one entry into a durable function makes.

Owns their names and attempts, their records, when the function is left, and what the function sees as `ctx`.
It must never decide what becomes of the run when the function is left: outcomes.py does.
It must never let a call return before its result is durable.
"""
