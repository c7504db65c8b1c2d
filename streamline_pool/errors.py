"""The public path of every error: `from streamline_pool.errors import WorkflowError`. Owns nothing; see domain/errors.py."""

from streamline_pool.domain.errors import *  # noqa: F403 -- the public names are listed in that module's `__all__`
from streamline_pool.domain.errors import __all__ as __all__
