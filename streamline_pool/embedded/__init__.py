"""A private MongoDB server for demos, tests and `--embedded`.

Owns finding, starting and stopping one `mongod`, and the watcher process that ends it when its owner has ended.
It must never be imported by the engine: a pool on a real server does not need this package.
"""

from .mongod import find_mongod
from .server import DEFAULT_DATA_DIR, EmbeddedServer, serving, start

__all__ = ["DEFAULT_DATA_DIR", "EmbeddedServer", "find_mongod", "serving", "start"]
