"""Decides which runs a worker process holds: what to claim, when, and how many at once.

Owns the demand for claims, the poller that finds due runs, and the claims of runs whose timers have fired.
It must never read a pipe or a signal: `supervisor/` calls its plain methods.
It must never change a run other than by claiming it.
"""
