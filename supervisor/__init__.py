"""The pool: one parent process per host, its workers, its steward, and the command that runs them."""
