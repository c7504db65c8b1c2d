"""The supervisor process: starts, watches, replaces and stops the children of one pool.

Owns the pure decisions over one `state` (`decide` dispatches, `upkeep` holds the rules), and the loop that performs them.
A decision must never do I/O, and the loop must never decide.
It must never open a connection to MongoDB, because it forks.
"""
