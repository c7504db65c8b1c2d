"""Events: what happened, published after it became durable, to subscribers in this process and in the whole cluster.

Owns the event record (event.py), the bus of one process (bus.py), the publisher that sends events to other processes
(publisher.py), and the stream that receives them (stream.py, subscription.py, ledger.py, mailbox.py).
It must never affect a run: a slow or failing subscriber loses events, and the engine goes on.
"""
