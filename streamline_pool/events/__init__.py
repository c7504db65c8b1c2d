"""What happened, published after it became durable: to subscribers in this process and in the whole cluster.

Owns the event record, the bus of one process, the publisher that sends events to other processes, and the stream
that receives them.
It must never affect a run: a slow or failing subscriber loses events, and the engine goes on.
"""
