"""What an application holds: `Streamline`, its workflows, control operations and event delivery.

Owns the public methods, their checks of input, and the seam (`services`) that gives procedures a clock, ids and signals.
It must never change a run that another process holds, except by the named control operations.
It must never need a worker process: `Workflow.execute` runs one run in the calling program.
"""
