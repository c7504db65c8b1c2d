"""The command `streamline-pool`: its options, its sub-commands, and what it prints.

Owns the reading of options, the loading of the application, exit codes, and output for people and for programs.
It must never query MongoDB by itself: it calls `client/` and the pool.
"""
