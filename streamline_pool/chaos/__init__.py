"""The nemesis: a workload over every capability, faults of processes, network, server and clock, and a judgement of what came of it.

Owns `streamline-pool chaos`: two pools, the proxies between them and the database, the ledger, the faults, and the rules by which
runs count as lost, wedged or doubled. It must never be imported by a pool of another application, and never writes to a stored run
except through the public calls that any client has.
"""
