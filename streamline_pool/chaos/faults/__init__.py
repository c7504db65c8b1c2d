"""The faults, one module per thing that fails: processes, the network, the database, the clock, resources.

Owns what each fault does and how it is undone. It must never decide when a fault has its turn, nor judge what came of it.
"""
