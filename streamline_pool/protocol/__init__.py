"""Every operation on the database as named, frozen data: filters, updates, indexes and the form of stored documents.

Owns what the stored fields mean, one file per topic, and the conversion between documents and records.
It must never do I/O and never decide what happens next: `domain/` decides, `storage/` performs.
A new query or update is a function here that returns an operation.
"""
