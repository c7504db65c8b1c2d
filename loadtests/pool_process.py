"""The real command as a child of a load test. When that is killed, this supervisor is, and its children end within two seconds.

Run as `python -m loadtests.pool_process PARENT_PID …`, with the options of the command. Imports nothing else of the load tests, so that
the measured pool is that of a user.
"""

from __future__ import annotations

import sys

from streamline_pool.chaos.ending import end_with_parent

__all__: list[str] = []

if __name__ == "__main__":
    end_with_parent(int(sys.argv.pop(1)))
    from streamline_pool.supervisor.cli.main import main

    main()
