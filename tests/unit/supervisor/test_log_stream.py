"""The stream of the log never waits for its reader, keeps what fits later, and counts what it loses."""

from __future__ import annotations

import fcntl
import logging
import os
import pty
import socket
import tty
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from streamline_pool.supervisor.log_stream import KEPT_BYTES_MAX, LogStream
from streamline_pool.supervisor.logs import flush_logs, never_wait_for_readers, show

LINE = "x" * 99 + "\n"


def a_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, writing


def a_socket() -> tuple[int, int]:
    reading, writing = socket.socketpair()
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    return reading.detach(), writing.detach()


def a_terminal() -> tuple[int, int]:
    reading, writing = pty.openpty()
    tty.setraw(writing)  # it makes no "\r\n" of a "\n"
    return reading, writing


Ends = tuple[int, int]
OPENED: list[Any] = []


def opened(fd: int) -> LogStream:
    """It is closed after the test."""
    stream = LogStream(fd)
    OPENED.append(stream)
    return stream


@pytest.fixture(autouse=True)
def _close_what_was_opened() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture(params=[a_pipe, a_socket, a_terminal])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """The reading and the writing end of something that holds a few KiB."""
    made: Callable[[], Ends] = request.param
    reading, writing = made()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):
            os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Ends]:
    reading, writing = a_pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):
            os.close(fd)


def read_all(fd: int, stream: LogStream) -> bytes:
    """What comes while the stream is flushed again and again, as the beats of a process do."""
    data = b""
    for _ in range(10_000):
        stream.flush()
        try:
            data += os.read(fd, 65536)
        except BlockingIOError:
            return data
    raise AssertionError("it never ends")


def test_lines_that_find_no_room_are_written_later_and_in_order(ends: Ends) -> None:
    reading, writing = ends
    stream = opened(writing)
    lines = [f"{number:06d} {LINE}" for number in range(1000)]
    for line in lines:
        stream.write(line)
        stream.flush()

    assert read_all(reading, stream).decode() == "".join(lines)
    assert stream.take_lost() == 0


def test_without_an_open_file_of_its_own_it_does_not_wait_either(pipe: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError("the pipe belongs to another user")

    monkeypatch.setattr(os, "open", refuse)
    test_lines_that_find_no_room_are_written_later_and_in_order(pipe)


def test_the_descriptor_of_other_programs_stays_as_it_is(ends: Ends) -> None:
    stream = opened(ends[1])
    stream.write(LINE)
    stream.flush()
    assert os.get_blocking(ends[1])


def test_what_is_too_much_to_keep_is_lost_and_counted(pipe: Ends) -> None:
    reading, writing = pipe
    stream = opened(writing)
    kept = KEPT_BYTES_MAX // len(LINE)
    stream.flush()
    for _ in range(kept + 7):
        stream.write(LINE)
    assert stream.take_lost() == 0, "there is no room to say so"

    assert read_all(reading, stream).decode() == LINE * kept
    assert stream.take_lost() == 7
    assert stream.take_lost() == 0
    stream.write(LINE)
    assert read_all(reading, stream).decode() == LINE


def test_a_line_is_written_whole_if_the_system_can(pipe: Ends) -> None:
    """Lines of other processes come in between otherwise. Linux writes up to 4 096 bytes whole or not at all."""
    reading, writing = pipe
    stream = opened(writing)
    for _ in range(3):
        stream.write("y" * 1999 + "\n")
    stream.flush()
    assert len(os.read(reading, 65536)) == 4000


def test_a_regular_file_has_room(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        stream = opened(file.fileno())
        stream.write(LINE)
        stream.flush()
    assert (tmp_path / "log").read_text() == LINE


def test_without_a_reader_lines_are_lost_and_no_error_is_raised(pipe: Ends) -> None:
    reading, writing = pipe
    stream = opened(writing)
    os.close(reading)
    stream.write(LINE)
    stream.flush()
    assert stream.take_lost() == 1


def test_the_end_of_a_process_waits_for_the_reader_and_not_for_ever(pipe: Ends) -> None:
    reading, writing = pipe
    stream = opened(writing)
    for _ in range(60):
        stream.write(LINE)
    stream.drain(0.02)
    assert len(os.read(reading, 65536)) == 4000
    stream.drain(60.0)
    assert len(os.read(reading, 65536)) == 2000


def test_a_fork_does_not_repeat_what_its_parent_kept(pipe: Ends) -> None:
    reading, writing = pipe
    stream = opened(writing)
    for _ in range(60):
        stream.write(LINE)
    stream.flush()
    child = os.fork()
    if child == 0:
        os.read(reading, 65536)
        stream.write("of the child\n")
        stream.flush()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 65536) == b"of the child\n"
    assert len(read_all(reading, stream)) == 2000


def test_log_lines_go_through_it_and_the_lost_ones_are_logged(pipe: Ends) -> None:
    reading, writing = pipe
    root = logging.getLogger()
    with os.fdopen(os.dup(writing), "w") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(message)s %(lines)s", defaults={"lines": ""}))
        before, root.handlers = root.handlers, [handler]
        try:
            never_wait_for_readers()
            OPENED.append(handler.stream)
            show("a stack\nof two lines")
            for number in range(4000):
                logging.getLogger("test").warning("%d %s", number, "x" * 99)
            data = b""
            for _ in range(200):
                flush_logs()
                with suppress(BlockingIOError):
                    data += os.read(reading, 65536)
        finally:
            root.handlers = before

    lines = data.decode().splitlines()
    assert lines[:2] == ["a stack", "of two lines"]
    event, lost = lines[-1].split()
    assert event == "log_lines_lost"
    assert 1000 < int(lost) == 4000 - (len(lines) - 3)
