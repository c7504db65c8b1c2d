"""What a process receives at its start: its settings, and its environment (clock, ids, randomness).

Owns the settings with their sources, the parsing of their values, and `Env`, through which tests control time.
It must never know what a run is, and it must never open a connection.
Every function that needs a clock, an id or a random number takes an `Env` from its caller.
"""
