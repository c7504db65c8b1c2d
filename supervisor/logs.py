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
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

import orjson

from streamline_pool.config.settings import redact_text
from streamline_pool.supervisor.log_stream import LogStream

__all__ = ["LAST_LINES_S", "JsonFormatter", "TextFormatter", "fields_of", "flush_logs", "never_wait_for_readers", "setup_logging", "show"]

log = logging.getLogger("streamline_pool")

LAST_LINES_S = 0.3  # how long a process that ends waits for the reader of its log; a guess
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
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def never_wait_for_readers() -> None:
    """From now on, in this process and its forks, no log line waits until standard error is read. See log_stream.py.

    `flush_logs` must be called now and then, because a line that found no room is written by a later call.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream without a descriptor, as in tests
                handler.setStream(LogStream(handler.stream.fileno()))


def flush_logs(wait_s: float = 0.0) -> None:
    """Write the lines that found no room before; wait at most so long for the reader. Log how many were lost."""
    for handler, stream in _log_streams():
        with handler.lock or contextlib.nullcontext():
            stream.drain(wait_s)
            lost = stream.take_lost()
        if lost:
            log.warning("log_lines_lost", extra={"lines": lost})


def show(text: str) -> None:
    """Write text that is for people, and no event, among the log lines."""
    for handler, stream in _log_streams():
        with handler.lock or contextlib.nullcontext():
            stream.write(f"{text}\n")
            stream.flush()
        return
    print(text, file=sys.stderr, flush=True)


def _log_streams() -> Iterator[tuple[logging.Handler, LogStream]]:
    for handler in logging.getLogger().handlers:
        stream = getattr(handler, "stream", None)
        if isinstance(stream, LogStream):
            yield handler, stream


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
