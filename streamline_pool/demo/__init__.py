"""`streamline-pool demo`: the pool indexes the standard library, loses a worker half-way, and is compared with a direct count.

Owns the demonstration: its workflow, the pool that it starts as a child process, and its report. It is an application like a
user's. It must never be imported by the engine, nor be needed by a pool of another application.
"""
