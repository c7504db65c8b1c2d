"""Performs operations on MongoDB, by PyMongo's synchronous API or its asyncio API.

Owns connections, read and write concerns, the server's clock, and the translation of driver errors.
It is the only package that imports PyMongo. It must never decide what a write means for a run.
It must never repeat a write by itself: the caller knows which of its writes may be repeated.
"""
