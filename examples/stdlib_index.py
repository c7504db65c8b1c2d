"""The demonstration as an example: indexes the standard library, one run per file, and kills a worker meanwhile.

    python examples/stdlib_index.py              # or: make demo, or: streamline-pool demo
    python examples/stdlib_index.py --limit 200  # a sample of the files, evenly spread

Each run is `read` -> `parse` -> `save`. The workflow is in streamline_pool/demo/workflow.py, and the program around it, which starts
a private MongoDB and a pool and compares the totals, in streamline_pool/demo/program.py.
"""

from __future__ import annotations

import sys

from streamline_pool.demo.workflow import app, index

__all__ = ["app", "index"]


if __name__ == "__main__":
    from streamline_pool.supervisor.cli.main import main

    main(["demo", *sys.argv[1:]])
