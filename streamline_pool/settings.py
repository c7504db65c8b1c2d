"""The public path of the settings: `from streamline_pool.settings import Settings`. Owns nothing; see config/settings.py."""

from streamline_pool.config.settings import *  # noqa: F403 -- the public names are listed in that module's `__all__`
from streamline_pool.config.settings import __all__ as __all__
