"""The stream of the log never waits for its reader, keeps what fits later, and counts what it loses."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import socket
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from streamline_pool.supervisor.log_stream import KEPT_BYTES_MAX, WAIT_MAX_S, LogStream
from streamline_pool.supervisor.logs import flush_logs, never_wait_for_readers, setup_logging, show, wait_for_readers_again

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
    stream = LogStream(open(fd, "w", closefd=False))  # noqa: SIM115 -- closed with its descriptor
    OPENED.append(stream)
    return stream


FILLING = "f" * 4095 + "\n"


def filled(fd: int) -> LogStream:
    """A stream into a pipe that is full."""
    os.write(fd, FILLING.encode())
    return opened(fd)


@pytest.fixture(autouse=True)
def _close_what_was_opened() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


@contextmanager
def open_ends(make: Callable[[], Ends]) -> Iterator[Ends]:
    reading, writing = make()
    os.set_blocking(reading, False)
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):
            os.close(fd)


@pytest.fixture(params=[a_pipe, a_socket, a_terminal])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """The reading and the writing end of something that holds a few KiB."""
    with open_ends(request.param) as opened:
        yield opened


@pytest.fixture
def pipe() -> Iterator[Ends]:
    with open_ends(a_pipe) as opened:
        yield opened


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
    assert stream.lost == 0


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
    stream = filled(writing)
    kept = KEPT_BYTES_MAX // len(LINE)
    for _ in range(kept + 7):
        stream.write(LINE)
    assert stream.lost == 7
    assert not stream.may_report_lost(), "there is no room to say so"

    assert read_all(reading, stream).decode() == FILLING + LINE * kept
    assert stream.may_report_lost()
    stream.write(LINE)
    assert read_all(reading, stream).decode() == LINE


def test_a_reader_that_reads_loses_no_line_of_a_burst(pipe: Ends) -> None:
    reading, writing = pipe
    os.set_blocking(reading, True)
    stream = opened(writing)
    got: list[int] = []

    def read() -> None:
        while sum(got) < 4000 * len(LINE):
            got.append(len(os.read(reading, 65536)))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(4000):
        stream.write(LINE)
        stream.flush()
    stream.drain(10.0)
    reader.join(30)
    assert (sum(got), stream.lost) == (4000 * len(LINE), 0)


def test_a_writer_whose_reader_does_not_read_waits_a_tenth_of_its_time_at_most(pipe: Ends) -> None:
    stream = filled(pipe[1])
    begun = time.monotonic()
    waited, turns = 0.0, 0
    while time.monotonic() < begun + 1.0 or turns < 5000:
        turns += 1
        before = time.monotonic()
        stream.write(LINE)
        stream.flush()
        waited += time.monotonic() - before if stream.lost else 0.0
    assert stream.lost > 100
    assert stream._wait_s < WAIT_MAX_S / 2, "it has waited"


@pytest.mark.parametrize("size", [KEPT_BYTES_MAX + 1, 3 * KEPT_BYTES_MAX])
def test_a_text_of_any_size_is_written_if_nothing_is_kept(pipe: Ends, tmp_path: Path, size: int) -> None:
    reading, writing = pipe
    with (tmp_path / "log").open("wb") as file:
        for fd in (writing, file.fileno()):
            stream = opened(fd)
            stream.write("x" * size)
            stream.flush()
            assert stream.lost == 0
            assert fd != writing or len(read_all(reading, stream)) == size
    assert (tmp_path / "log").stat().st_size == size


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
    for _ in range(3):
        stream.write(LINE)
        stream.flush()
    assert stream.lost == 3
    assert not stream.may_report_lost(), "the report would be lost, too"


def test_the_end_of_a_process_waits_for_a_reader_and_not_for_ever(pipe: Ends) -> None:
    reading, writing = pipe
    stream = filled(writing)
    stream.write(LINE)
    stream.drain(0.02)
    assert (stream.lost, len(os.read(reading, 65536))) == (1, 4096)

    stream.write(LINE)
    stream.drain(60.0)
    assert os.read(reading, 65536).decode() == LINE


def test_the_end_of_a_process_waits_on_for_a_slow_reader(pipe: Ends) -> None:
    reading, writing = pipe
    os.set_blocking(reading, True)
    stream = opened(writing)
    for _ in range(800):
        stream.write(LINE)
    got: list[int] = []

    def read_slowly() -> None:
        while sum(got) < 80_000:
            time.sleep(0.05)
            got.append(len(os.read(reading, 4096)))

    reader = threading.Thread(target=read_slowly)
    reader.start()
    stream.drain(0.6)  # all of it takes a second
    reader.join(30)
    assert (sum(got), stream.lost) == (80_000, 0)


def test_a_line_that_is_logged_within_a_write_is_written_once(pipe: Ends) -> None:
    """By a signal handler or a finalizer: the handler's lock lets the same thread in."""
    reading, writing = pipe
    stream = opened(writing)
    send = stream._send

    def send_and_log(data: bytes) -> int:
        if data == b"outer\n":
            stream.write("inner\n")
            stream.flush()
        return send(data)

    stream._send = send_and_log
    stream.write("outer\n")
    stream.flush()
    assert os.read(reading, 65536) == b"outer\ninner\n"
    assert stream._kept_bytes == 0


def test_a_default_timeout_of_sockets_does_not_matter() -> None:
    """With it, Python's sockets set O_NONBLOCK for every program that shares them, and wait for room."""
    reading, writing = a_socket()
    socket.setdefaulttimeout(5.0)
    try:
        stream = opened(writing)
        assert socket.getdefaulttimeout() == 5.0
        assert os.get_blocking(writing)
        begun = time.monotonic()
        for _ in range(1000):
            stream.write(LINE)
            stream.flush()
        assert time.monotonic() - begun < 4.0
        assert stream.lost == 0
    finally:
        socket.setdefaulttimeout(None)
        os.close(reading)
        os.close(writing)


def test_a_fork_does_not_repeat_what_its_parent_kept(pipe: Ends) -> None:
    reading, writing = pipe
    stream = opened(writing)
    for _ in range(60):
        stream.write(LINE)
    stream.flush()
    child = os.fork()
    if child == 0:
        try:
            os.read(reading, 65536)
            stream.write("of the child\n")
            stream.flush()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 65536) == b"of the child\n"
    assert len(read_all(reading, stream)) == 2000


@pytest.fixture
def logged(pipe: Ends) -> Iterator[int]:
    """The log of this process goes to a pipe, whose reading end this is."""
    reading, writing = pipe
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    with open(writing, "w", closefd=False) as file:
        root.handlers = []
        try:
            setup_logging("json", "info", file)
            never_wait_for_readers()
            yield reading
        finally:
            wait_for_readers_again()
            setup_logging("json", "info")
            root.handlers, root.level = handlers, level
            logging.captureWarnings(False)


def events(reading: int) -> list[str]:
    """What is logged, while the reader reads."""
    data = b""
    for _ in range(300):
        flush_logs()
        with suppress(BlockingIOError):
            data += os.read(reading, 65536)
    return [json.loads(line)["event"] if line.startswith(b"{") else line.decode() for line in data.splitlines()]


def test_log_lines_go_through_it_and_the_lost_ones_are_logged(logged: int) -> None:
    show("a stack\nof two lines")
    for number in range(4000):
        logging.getLogger("test").warning("%d %s", number, "x" * 99)
    before_last, last = events(logged)[:-1], events(logged)
    assert before_last[:2] == ["a stack", "of two lines"]
    assert 100 < len(before_last) < 4000
    assert last == []


def test_how_many_were_lost_is_said_once_and_to_this_log_only(logged: int) -> None:
    other = Collecting()
    logging.getLogger().addHandler(other)
    for _ in range(4000):
        logging.getLogger("test").warning("x" * 99)
    found = events(logged)
    assert found.count("log_lines_lost") == 1
    assert found[-1] == "log_lines_lost"
    assert len(other.events) == 4000


def test_a_log_that_cannot_be_written_says_later_how_much_was_lost() -> None:
    """A disk that is full for a while."""
    with open("/dev/full", "w") as full:
        stream = opened(full.fileno())
    for _ in range(10):
        stream.write(LINE)
        stream.flush()
    assert (stream.lost, stream.may_report_lost()) == (10, False)
    stream._send = len
    stream.write(LINE)
    stream.flush()
    assert (stream.lost, stream.may_report_lost()) == (10, True)


def test_log_handlers_of_the_application_stay_as_they_are(logged: int, tmp_path: Path) -> None:
    file = logging.FileHandler(tmp_path / "app.log")
    logging.getLogger().addHandler(file)
    never_wait_for_readers()
    logging.getLogger("test").warning("a line")
    flush_logs()
    assert (tmp_path / "app.log").read_text() == "a line\n"
    file.close()


def test_lines_that_are_kept_are_written_although_the_application_moves_the_handler(logged: int) -> None:
    for _ in range(100):
        logging.getLogger("test").warning("x" * 99)
    logging.getLogger().handlers = []
    assert len(events(logged)) == 100


def test_a_process_that_a_handler_forks_waits_for_its_reader(logged: int) -> None:
    """It calls no `flush_logs`, and ends at once after its last line."""
    os.set_blocking(logged, True)
    child = os.fork()
    if child == 0:
        try:
            wait_for_readers_again()
            for _ in range(1000):
                logging.getLogger("test").warning("x" * 99)
        finally:
            os._exit(0)
    lines = b""
    while lines.count(b"\n") < 1000:
        lines += os.read(logged, 65536)
    os.waitpid(child, 0)


class Collecting(logging.Handler):
    """A second handler of the application."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.events.append(record.getMessage())
