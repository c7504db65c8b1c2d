"""The public path of the settings: `from streamline_pool.settings import Settings`. Owns nothing; config/settings.py does."""

from streamline_pool.config.settings import (
    DEFAULT_MONGODB_URI,
    OPTIONS,
    ConfigFile,
    Option,
    Resolved,
    SettingError,
    Settings,
    Source,
    read_files,
    redact_text,
    redact_uri,
    resolve,
)

__all__ = [
    "DEFAULT_MONGODB_URI",
    "OPTIONS",
    "ConfigFile",
    "Option",
    "Resolved",
    "SettingError",
    "Settings",
    "Source",
    "read_files",
    "redact_text",
    "redact_uri",
    "resolve",
]
