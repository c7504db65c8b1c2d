"""Parsers and checks of a setting's value, and the removal of passwords from text.

Owns the form of each value. A parser or check takes a value and returns it in the form that `Settings` holds, or raises
ValueError with what was found and what was expected. Options, files and precedence are in settings.py.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_plus

__all__ = [
    "app_path",
    "are_names",
    "bind_host",
    "boolean",
    "collection_prefix",
    "database_name",
    "duration",
    "has_password",
    "integer",
    "is_boolean",
    "mongodb_uri",
    "names",
    "one_of",
    "redact_text",
    "redact_uri",
    "seconds",
    "size",
    "whole",
]

_DURATION = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>ms|s|m|h|d)?", re.IGNORECASE)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d*)?)\s*(?P<unit>[kmgt]i?b?|b)?", re.IGNORECASE)
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")
_QUEUE = re.compile(r"[A-Za-z0-9_.:-]{1,100}")  # as `check_queue` in domain/definition.py
_URI = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}


def integer(raw: Any) -> int:
    """An int from a whole number or its text."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    text = raw.strip() if isinstance(raw, str) else ""
    if not re.fullmatch(r"[+-]?\d{1,30}", text):
        raise _unlike("a whole number", raw)
    return int(text)


def whole(low: int, high: int) -> Callable[[Any], int]:
    """A check: an int within `low` and `high`, both included."""

    def check(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise _unlike("a whole number", value)
        if not low <= value <= high:
            bounds = f"at least {low}" if high > 10**9 and value < low else f"from {low} to {high}"
            raise ValueError(f"expected a number {bounds}, found {_shown(value)}")
        return value

    return check


def duration(raw: Any) -> float:
    """Seconds from a number, or from text such as `30`, `1.5s`, `500ms`, `5m`, `2h`, `1d`."""
    if isinstance(raw, int | float) and not isinstance(raw, bool):
        try:
            return float(raw)
        except OverflowError:
            raise _unlike("a duration such as 30, 30s or 5m", raw) from None
    match = _DURATION.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if match is None:
        raise _unlike("a duration such as 30, 30s or 5m", raw)
    return float(match["number"]) * _DURATION_UNITS[(match["unit"] or "s").lower()]


def seconds(low: float) -> Callable[[Any], float]:
    """A check: a finite number of seconds, at least `low` and at most a year."""

    def check(value: Any) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise _unlike("a number of seconds", value)
        if not low <= value <= 366 * 86400:
            raise ValueError(f"expected a duration of at least {low:g} and at most a year, found {value:g} s")
        return float(value)

    return check


def size(raw: Any) -> int:
    """Bytes from a number, or from text: `512MB` (1000s), `512MiB` or `512M` (1024s, as Docker and systemd read it)."""
    if isinstance(raw, int) and not isinstance(raw, bool):
        found = raw
    else:
        match = _SIZE.fullmatch(raw.strip()) if isinstance(raw, str) else None
        if match is None:
            raise _unlike("a size such as 512MB, 512MiB or a number of bytes", raw)
        unit = (match["unit"] or "b").lower()
        base = 1000 if len(unit) == 2 and unit.endswith("b") else 1024
        number = float(match["number"]) * (1 if unit == "b" else base ** ("kmgt".index(unit[0]) + 1))
        found = int(number) if math.isfinite(number) else 0
    if found < 1:
        raise _unlike("a size of at least one byte that a computer can have", raw)
    return found


def boolean(raw: Any) -> bool:
    """True or false, or the usual words for them."""
    if isinstance(raw, bool):
        return raw
    word = raw.strip().lower() if isinstance(raw, str) else ""
    if word in _TRUE:
        return True
    if word in _FALSE:
        return False
    raise _unlike("true or false", raw)


def is_boolean(value: Any) -> bool:
    """A check: a bool."""
    if not isinstance(value, bool):
        raise _unlike("True or False", value)
    return value


def one_of(*allowed: str) -> Callable[[Any], str]:
    """A check: one of `allowed`, in any case."""

    def check(value: Any) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        if word not in allowed:
            raise _unlike(f"one of {', '.join(allowed)}", value)
        return word

    return check


def names(raw: Any) -> tuple[str, ...]:
    """Queue names from a list or from comma-separated text, without duplicates, in the order given."""
    parts = raw if isinstance(raw, list | tuple) else [raw]
    found: dict[str, None] = {}
    for part in parts:
        if not isinstance(part, str):
            raise _unlike("names", part)
        found.update(dict.fromkeys(word.strip() for word in part.split(",") if word.strip()))
    if not found:
        raise _unlike("at least one name", raw)
    return are_names(tuple(found))


def are_names(value: Any) -> tuple[str, ...]:
    """A check: a tuple of queue names."""
    if not isinstance(value, tuple):
        raise _unlike("a tuple of names", value)
    for name in value:
        if not isinstance(name, str) or not _QUEUE.fullmatch(name):
            raise _unlike("names of 1 to 100 letters, digits, _ . : or -", name)
    return value


def app_path(value: Any) -> str:
    """A check: `module:attribute`, both dotted names."""
    text = value.strip() if isinstance(value, str) else ""
    module, colon, attribute = text.partition(":")
    dotted = [*module.split("."), *(attribute.split(".") if colon else [])]
    if module.endswith(".py") or "/" in text:
        raise ValueError(f"expected module:attribute such as shop.flows:app, found the path {_shown(value)}; name the module, not its file")
    if not all(part.isidentifier() for part in dotted):
        raise _unlike("module:attribute such as shop.flows:app", value)
    return text


def database_name(value: Any) -> str:
    """A check: what MongoDB accepts as the name of a database."""
    if (
        not isinstance(value, str)
        or not _is_utf8(value)
        or not 0 < len(value.encode()) < 64
        or any(char in '/\\. "$*<>:|?\0' for char in value)
    ):
        raise _unlike('a database name of 1 to 63 bytes without any of / \\ . " $ * < > : | ? or spaces', value)
    return value


def _is_utf8(text: str) -> bool:
    """False for text with lone surrogates: Python reads arguments and variables that are not UTF-8 as such."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def collection_prefix(value: Any) -> str:
    """A check: letters, digits, `_`, `-` or `.`; not `system.`; short enough for any collection name."""
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}", value) or value.startswith("system."):
        raise _unlike("a prefix of 1 to 100 letters, digits, _, - or ., beginning with a letter or _", value)
    return value


def bind_host(value: Any) -> str:
    """A check: an IPv4 or IPv6 address, or a host name, on which a server may listen; without brackets and without a port."""
    text = value.strip() if isinstance(value, str) else ""
    if not (_HOST_NAME.fullmatch(text) or _is_address(text)):
        raise _unlike("an address or a host name such as 127.0.0.1, 0.0.0.0 or ::1, without a port", value)
    return text


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def mongodb_uri(value: Any) -> str:
    """A check: `mongodb://` or `mongodb+srv://` with a host. The driver checks the options."""
    text = value.strip() if isinstance(value, str) else ""
    if not _is_utf8(text):
        raise _unlike("text in UTF-8", value)
    match = _URI.fullmatch(text)
    if match is None or match["scheme"].lower() not in ("mongodb", "mongodb+srv"):
        raise _unlike("a URI that begins with mongodb:// or mongodb+srv://", value)
    authority = re.split(r"[/?]", match["rest"], maxsplit=1)[0]
    credentials, _, hosts = authority.rpartition("@")
    if "@" in credentials or credentials.count(":") > 1:
        raise ValueError(f"user name and password must be percent-encoded (urllib.parse.quote_plus), found {_shown(value)}")
    if "@" not in authority and "@" in match["rest"].partition("?")[0]:
        raise ValueError(f"a / in the user name or password must be written %2F, found {_shown(value)}")
    for host in hosts.split(","):
        _check_host(host, value)
    return text


def _check_host(host: str, value: Any) -> None:
    """`name`, `name:port`, `[v6]:port` or an encoded socket path; ValueError otherwise."""
    name, _, port = host.rpartition("]")[2].rpartition(":") if "[" in host else host.partition(":")
    if not host or (not name and "[" not in host):
        raise ValueError(f"a host name is missing in {_shown(value)}")
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"expected a port from 1 to 65535, found {port!r} in {_shown(value)}")


# The credentials of a well-formed URI end at the first "@". The hosts after it hold none of these characters.
_WELL_FORMED = re.compile(r"(?P<user>[^:@/?#]*):(?P<password>[^:@/?#]*)@(?P<after>[^@]*)")
_SECRET_OPTION = re.compile(r"(?P<key>[A-Za-z]*password|authMechanismProperties)=(?P<value>[^&\s'\"]*)", re.IGNORECASE)
_URI_IN_TEXT = re.compile(r"mongodb(?:\+srv)?://[^\s'\"<>]+", re.IGNORECASE)


def redact_uri(uri: str) -> str:
    """`uri` with `***` for the password and for secret options. Of a malformed URI it hides too much rather than too little.

    >>> redact_uri("mongodb://ann:s3cret@db1,db2/shop?tls=true")
    'mongodb://ann:***@db1,db2/shop?tls=true'
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        scheme, rest = "", uri
    match = _WELL_FORMED.fullmatch(rest)
    if match is not None:
        rest = f"{match['user']}:***@{match['after']}"
    elif "@" in rest and ":" in rest[: rest.rindex("@")]:
        # A character is not escaped, so the end of the password is unknown: hide everything up to the last "@".
        rest = "***@" + rest[rest.rindex("@") + 1 :]
    return _SECRET_OPTION.sub(r"\g<key>=***", scheme + separator + rest)


def redact_text(text: str, uri: str = "") -> str:
    """`text` with every MongoDB URI in it redacted, and with the secrets of `uri` removed everywhere.

    The last protection of log lines and error messages: drivers quote parts of a URI that they cannot parse.
    """
    for secret in _secrets(uri):
        text = text.replace(secret, "***")
    return _URI_IN_TEXT.sub(lambda match: redact_uri(match[0]), text) if "mongodb" in text.lower() else text


def _secrets(uri: str) -> list[str]:
    """The password of `uri`, encoded and decoded, longest first. Of a malformed URI: every piece that the password may consist of."""
    credentials = uri.partition("://")[2].rpartition("@")[0]
    pieces = re.split(r"[:/@?#]", credentials.partition(":")[2])
    known = {*pieces, *map(unquote_plus, pieces), credentials.partition(":")[2]}
    # Shorter pieces would remove half of the message, and such a password protects nothing.
    return sorted((piece for piece in known if len(piece) >= 3), key=len, reverse=True)


def has_password(uri: str) -> bool:
    """True if `uri` holds a secret that `redact_uri` hides."""
    return redact_uri(uri) != uri


def _unlike(expected: str, value: Any) -> ValueError:
    return ValueError(f"expected {expected}, found {_shown(value)}")


def _shown(value: Any) -> str:
    """`value` for a message: short, without passwords."""
    try:
        text = repr(redact_uri(value)) if isinstance(value, str) else repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 200 else text[:197] + "..."
