"""Log lines on standard error, as text or as JSON. Owns their shape and the set-up of `logging`.

A log line is an event and its fields: `log.info("run_claimed", extra={"run_id": …, "token": …})`. Every line passes
through `redact_text`, so that no log line contains a password, whichever module writes it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import orjson

from streamline_pool.config.settings import redact_text
from streamline_pool.supervisor.log_stream import LogStream

__all__ = [
    "JsonFormatter",
    "TextFormatter",
    "drain_logs",
    "fields_of",
    "flush_logs",
    "never_wait_for_readers",
    "setup_logging",
    "show",
    "wait_for_readers_again",
]

log = logging.getLogger("streamline_pool")

_handlers: list[logging.StreamHandler[Any]] = []  # the one of the last `setup_logging`
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_NOISY = ("pymongo", "asyncio")  # at their INFO and DEBUG they describe themselves, not the work


class TextFormatter(logging.Formatter):
    """`12:00:01 INFO run_claimed run_id=r-17 token=3`; local time. Lines of child processes end with `process=`."""

    def __init__(self) -> None:
        super().__init__()
        self._first_pid = os.getpid()

    def format(self, record: logging.LogRecord) -> str:
        parts = [datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S"), record.levelname, _message(record)]
        parts += [f"{key}={_word(value)}" for key, value in fields_of(record).items()]
        if record.process is not None and record.process != self._first_pid:
            parts.append(f"process={record.process}")
        line = " ".join(parts)
        trace = _trace(record)
        return redact_text(f"{line}\n{trace}" if trace else line)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time` (ISO, UTC), `level`, `event`, `logger`, `process` (its writer), then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": _message(record),
            "logger": record.name,
            "process": record.process,
        }
        entry |= {(key if key not in entry else f"{key}_"): value for key, value in fields_of(record).items()}
        trace = _trace(record)
        if trace:
            entry["traceback"] = trace
        return redact_text(_dumped(entry))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What the caller passed as `extra`."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def setup_logging(log_format: str, level: str, stream: TextIO | None = None) -> None:
    """Send all logging, Python warnings and uncaught exceptions of this process and its forks to standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    _handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def never_wait_for_readers() -> None:
    """From now on, no line that this process and its forks log to standard error waits until it is read. See log_stream.py.

    `flush_logs` must be called now and then, because a line that found no room is written by a later call.
    """
    handler = _handler_of_ours()
    if handler is not None and not isinstance(handler.stream, LogStream):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor, as in tests
            handler.setStream(LogStream(handler.stream))


def wait_for_readers_again() -> None:
    """Undo `never_wait_for_readers` in this process: it is an ordinary one, which does not call `flush_logs`."""
    handler = _handler_of_ours()
    if handler is not None and isinstance(handler.stream, LogStream):
        handler.stream.close()
        handler.stream = handler.stream.plain


def flush_logs() -> None:
    """Write the lines that found no room before. Log how many were lost."""
    handler = _handler_of_ours()
    if handler is None or not isinstance(handler.stream, LogStream):
        return
    handler.flush()
    _report_lost(handler, handler.stream)


def drain_logs(patience_s: float = 0.3) -> None:
    """The same at the end of a process: wait for a reader that reads, and for another one at most so long (a guess)."""
    handler = _handler_of_ours()
    if handler is None or not isinstance(handler.stream, LogStream):
        return
    with handler.lock or contextlib.nullcontext():
        handler.stream.drain(patience_s)
    _report_lost(handler, handler.stream)


def show(text: str) -> None:
    """Write text that is for people, and no event, among the log lines."""
    handler = _handler_of_ours()
    if handler is None:
        print(text, file=sys.stderr, flush=True)
        return
    with handler.lock or contextlib.nullcontext():
        handler.stream.write(f"{text}\n")
        handler.flush()


def _report_lost(handler: logging.StreamHandler[Any], stream: LogStream) -> None:
    """To this handler alone: other ones of the application have lost nothing."""
    lost = stream.lost
    if stream.may_report_lost():
        stream.lost = 0
        handler.handle(log.makeRecord(log.name, logging.WARNING, __file__, 0, "log_lines_lost", (), None, extra={"lines": lost}))
        stream.lost += lost if stream.lost else 0  # the report is lost, too


def _handler_of_ours() -> logging.StreamHandler[Any] | None:
    """What `setup_logging` has made, wherever the application has put it since."""
    return _handlers[-1] if _handlers else None


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("streamline_pool").critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        name = args.thread.name if args.thread else "unknown"
        info = (args.exc_type, args.exc_value, args.exc_traceback)
        logging.getLogger("streamline_pool").error("uncaught_exception_in_thread", exc_info=info, extra={"thread_name": name})


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError):  # arguments that do not fit the format: show both rather than lose the line
        text = f"{record.msg} {record.args!r}"
    # A warning arrives with its source line below it; the first line says all, and one event is one line.
    return text.splitlines()[0] if record.name == "py.warnings" and text else text


def _trace(record: logging.LogRecord) -> str:
    if not record.exc_info or record.exc_info[0] is None:
        return ""
    return "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")


def _word(value: Any) -> str:
    """A field's value in a text line: bare if it is one word, a JSON document if it has parts, quoted as in JSON otherwise."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        text = _dumped(value)
        if text.isprintable() and "=" not in text:  # as it reads best; nothing in it can pass for another field
            return text
    else:
        text = str(value)
    bare = text and not any(char.isspace() or char in '"=' or not char.isprintable() for char in text)
    return text if bare else json.dumps(text, ensure_ascii=not text.isprintable())  # C1 controls drive terminals, too


def _dumped(value: Any) -> str:
    try:
        return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS).decode()
    except (TypeError, ValueError):
        # Cycles, lone surrogates, integers above 64 bits: show each value as Python does rather than lose the line.
        shown = {str(key): repr(item) for key, item in value.items()} if isinstance(value, Mapping) else repr(value)
        return json.dumps(shown)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset | tuple):
        return list(value)
    return str(value)
