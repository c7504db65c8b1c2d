"""An explorer of schedules: the real procedures on the real server, one database operation at a time, in an order that a seed decides.

Owns nothing of the product. world.py plays one schedule; `python -m tests.simulation.explorer` plays many.
"""
