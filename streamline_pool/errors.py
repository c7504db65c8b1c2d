"""The public path of every error: `from streamline_pool.errors import WorkflowError`. Owns nothing; see domain/errors.py."""

from streamline_pool.domain.errors import *
from streamline_pool.domain.errors import __all__ as __all__
