"""What the driver's errors mean to callers.

Owns the translation of every error that PyMongo raises. No other package knows the driver's error types.
"""

from __future__ import annotations

import asyncio
import re
from types import TracebackType

import bson.errors
import pymongo.errors

from streamline_pool.config.parsing import redact_text
from streamline_pool.config.settings import DEFAULT_MONGODB_URI
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError, WorkflowError
from streamline_pool.protocol import server_codes
from streamline_pool.protocol.too_large import document_too_large

from .target import DatabaseTarget

__all__ = ["DriverErrors", "has_code", "translate"]

_CODEC_ERRORS = (bson.errors.BSONError, UnicodeError, OverflowError)  # raised where documents are encoded or decoded
_DRIVER_ERRORS = (pymongo.errors.PyMongoError, pymongo.errors.DocumentTooLarge, OSError, *_CODEC_ERRORS)


class DriverErrors:
    """A context in which the driver's errors become this package's. `name` is the operation, for the text.

    Within a transaction, an error that makes PyMongo's `with_transaction` run the whole transaction again passes
    unchanged: only the owner of the transaction can repeat it.
    """

    __slots__ = ("_in_transaction", "_name", "_where")

    def __init__(self, name: str, where: DatabaseTarget, *, in_transaction: bool) -> None:
        self._name = name
        self._where = where
        self._in_transaction = in_transaction

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: type[BaseException] | None, exc: BaseException | None, _traceback: TracebackType | None) -> None:
        if exc is not None and _was_cancelled(exc):
            raise asyncio.CancelledError from exc
        if isinstance(exc, Exception) and _is_the_drivers(exc) and not (self._in_transaction and _repeats_transaction(exc)):
            raise translate(self._name, exc, self._where) from exc


def _was_cancelled(exc: BaseException) -> bool:
    """True for what PyMongo raises in place of CancelledError if the call is cancelled while it waits for a server.

    Its wait loses the lock then, and leaving the lock's block raises RuntimeError (seen with 4.x on Python 3.11).
    """
    return type(exc) is RuntimeError and isinstance(exc.__context__, asyncio.CancelledError) and str(exc) == "Lock is not acquired"


def _is_the_drivers(exc: Exception) -> bool:
    """Whether the driver has failed, and not the code that called it. Without a free thread it cannot open a client."""
    return isinstance(exc, _DRIVER_ERRORS) or (type(exc) is RuntimeError and "start new thread" in str(exc))


def _repeats_transaction(exc: Exception) -> bool:
    return isinstance(exc, pymongo.errors.PyMongoError) and exc.has_error_label("TransientTransactionError")


def translate(name: str, exc: Exception, where: DatabaseTarget) -> WorkflowError:
    """The error for callers of operation `name`. For StoreUnavailableError, `context["transient"]`: it may help to try again."""
    text = redact_text(re.split(r", Timeout:| \(configured timeouts:", str(exc))[0])
    code = getattr(exc, "code", None)
    if isinstance(exc, pymongo.errors.DocumentTooLarge) or code in server_codes.TOO_LARGE:
        return document_too_large(name, text)
    if code == server_codes.UNAUTHORIZED:
        return StoreUnavailableError(
            f"{name}: MongoDB at {where.shown} refuses: {text}; grant the user readWrite on database {where.database!r}", transient=False
        )
    if code == server_codes.AUTHENTICATION_FAILED:
        return StoreUnavailableError(
            f"{name}: MongoDB at {where.shown} does not accept the user name or password; check them and authSource", transient=False
        )
    if code in server_codes.INVALID_DOCUMENT or isinstance(exc, _CODEC_ERRORS):
        return ValidationError(f"{name}: MongoDB refuses the document: {text[:500]}")
    if isinstance(exc, pymongo.errors.InvalidOperation):
        return _invalid_operation(name, text)
    if isinstance(exc, pymongo.errors.ConfigurationError):
        return ValidationError(f"mongodb_uri {where.shown}: {text}")
    return _unavailable(name, exc, text, where)


def _invalid_operation(name: str, text: str) -> ValidationError:
    if text.endswith("after close"):
        return ValidationError(f"{name}: {text}; this app was closed while the call was under way: close it when all have returned")
    return ValidationError(f"{name}: {text}; use a session of this app's `client` (of `async_client` for the _async methods)")


def _unavailable(name: str, exc: Exception, text: str, where: DatabaseTarget) -> StoreUnavailableError:
    transient = not isinstance(exc, pymongo.errors.OperationFailure) or _is_transient(exc)
    hint = "; is it running, and is the address right?" if isinstance(exc, pymongo.errors.ServerSelectionTimeoutError) else ""
    if hint and where.uri == DEFAULT_MONGODB_URI:
        hint += " This is the default; STREAMLINE_MONGODB_URI names another one"
    return StoreUnavailableError(f"{name}: MongoDB at {where.shown}: {text}{hint}", transient=transient)


def _is_transient(exc: pymongo.errors.OperationFailure) -> bool:
    is_passing = exc.code in server_codes.TRANSIENT or isinstance(exc, pymongo.errors.WTimeoutError)
    return is_passing or exc.has_error_label("TransientTransactionError")


def has_code(exc: StoreUnavailableError, *codes: int) -> bool:
    """True if the server gave one of these error codes as the cause."""
    return getattr(exc.__cause__, "code", None) in codes
