"""Drives one run that this process holds, from its claim to the write that ends the holding.

Owns handlers and their context, attempts, fenced group commits, lease renewal and self-fencing.
It must never choose which run to hold: `worker/` and `client/` do that and hand over the claimed document.
It must never enter a handler after the lease's deadline.
"""
