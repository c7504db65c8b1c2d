"""The steward process: the duties of a pool that need the database, one file per duty on one skeleton (duty.py).

Owns timers, the recovery of expired leases, signals, the host's record, the health port and the end of broadcasts.
Any number of stewards on any number of hosts may run at once; there is no leader.
It must never hold a run and never run a handler.
"""
