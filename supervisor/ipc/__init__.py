"""What crosses a pipe between the supervisor and its children, and how the bytes get across.

Owns the message records, their wire form, and a child's channel.
It must never know what a message leads to, and it must never use pickle.
"""
