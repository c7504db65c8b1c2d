"""The pool on one host: a supervisor process, its worker processes, its steward process, and the command line.

Owns processes, pipes and signals. `pool/` decides and supervises, `steward/` does the duties that need the database,
`ipc/` moves messages between them, `cli/` is the command.
It must never query MongoDB from the supervisor process: the steward and the workers do that.
"""
