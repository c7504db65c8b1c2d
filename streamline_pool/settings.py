"""The public path of the settings: `from streamline_pool.settings import Settings`. Owns nothing; see config/settings.py."""

from streamline_pool.config.settings import *
from streamline_pool.config.settings import __all__ as __all__
