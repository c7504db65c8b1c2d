"""The database of the nemesis: a private server, a private set of three, or one that the user names. Owns its set-up and its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamline_pool import Streamline, embedded
from streamline_pool.embedded import EmbeddedServer
from streamline_pool.embedded.wire import run_command

from .ledger import real_monotonic

__all__ = ["ChaosServer", "NotOurs", "ask", "can_mount", "given_server", "private_server", "replica_set"]

_SET = "rs0"
_MARKER = "streamline_chaos"  # the collection by which a database of the nemesis is known
_ELECTION_MS = 2_000
_TMPFS_MIB = 1200


@dataclass(slots=True, kw_only=True)
class ChaosServer:
    """The members, and where they are. `owned` is empty if the user named the server."""

    addresses: list[str]  # "host:port"
    set_name: str = _SET
    owned: list[EmbeddedServer] = field(default_factory=list)
    disks: dict[int, Path] = field(default_factory=dict)  # port of a member → the small file system that has its data
    given_uri: str = ""

    @property
    def can_be_proxied(self) -> bool:
        """The proxy reads what clients and members say, and replaces the members' addresses: not with TLS, nor without a set."""
        plain = not re.search(r"[?&](tls|ssl)=true|^mongodb\+srv:", self.given_uri, re.IGNORECASE)
        return plain and bool(self.addresses)

    def uri(self, addresses: list[str] | None = None) -> str:
        """The URI for clients of these addresses, by default the members' own."""
        if not self.given_uri:
            return f"mongodb://{','.join(addresses or self.addresses)}/?replicaSet={self.set_name}"
        if addresses is None:
            return self.given_uri
        return re.sub(r"^(mongodb://(?:[^@/]*@)?)[^/?]+", rf"\g<1>{','.join(addresses)}", self.given_uri)

    def primary(self, timeout_s: float = 60.0) -> EmbeddedServer:
        """The member of ours that is primary now. Waits for an election."""
        deadline = real_monotonic() + timeout_s
        while real_monotonic() < deadline:
            for member in self.owned:
                if member.pid and self._says_primary(member):
                    return member
            time.sleep(0.1)
        raise RuntimeError(f"no member of the set became primary within {timeout_s:g} s")

    @staticmethod
    def _says_primary(member: EmbeddedServer) -> bool:
        try:
            return bool(ask(member, hello=1).get("isWritablePrimary"))
        except OSError:
            return False

    def wait_whole(self, timeout_s: float = 120.0) -> None:
        """Return when every member is primary or secondary, and one is primary."""
        deadline = real_monotonic() + timeout_s
        while real_monotonic() < deadline:
            with contextlib.suppress(OSError):
                states = {one["stateStr"] for one in ask(self.primary(timeout_s), replSetGetStatus=1)["members"]}
                if states <= {"PRIMARY", "SECONDARY"}:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"not every member of the set came back within {timeout_s:g} s")


def ask(member: EmbeddedServer, **command: Any) -> dict[str, Any]:
    """Run a command on one member, by a connection of its own."""
    with socket.create_connection(("127.0.0.1", member.port), 5.0) as connection:
        return run_command(connection, **command)


@contextlib.contextmanager
def private_server(folder: Path, *, small_disk: bool) -> Iterator[ChaosServer]:
    """One private mongod."""
    with contextlib.ExitStack() as stack:
        member, disk = _member(stack, folder, 0, small_disk, initiate=True)
        disks = {member.port: disk} if disk is not None else {}
        yield ChaosServer(addresses=[f"127.0.0.1:{member.port}"], owned=[member], disks=disks)


@contextlib.contextmanager
def replica_set(folder: Path, *, small_disk: bool) -> Iterator[ChaosServer]:
    """A private replica set of three members."""
    with contextlib.ExitStack() as stack:
        pairs = [_member(stack, folder, number, small_disk, initiate=False) for number in range(3)]
        owned = [member for member, _ in pairs]
        addresses = [f"127.0.0.1:{member.port}" for member in owned]
        members = [{"_id": number, "host": address} for number, address in enumerate(addresses)]
        ask(owned[0], replSetInitiate={"_id": _SET, "members": members, "settings": {"electionTimeoutMillis": _ELECTION_MS}})
        server = ChaosServer(addresses=addresses, owned=owned, disks={member.port: disk for member, disk in pairs if disk is not None})
        server.wait_whole()
        yield server


@contextlib.contextmanager
def given_server(uri: str, database: str) -> Iterator[ChaosServer]:
    """The user's server. The database must be empty or that of an earlier nemesis, or NotOurs. It is dropped before and after.

    StoreUnavailableError if the server does not answer.
    """
    with Streamline(uri, database=database) as app:
        app.server_info()
        names = app.client[database].list_collection_names()
        if names and _MARKER not in names:
            raise NotOurs(
                f"the database {database!r} has collections ({', '.join(sorted(names)[:5])}) that no earlier run of this command has made: "
                "name one that does not exist yet. Everything in it will be deleted."
            )
        app.client.drop_database(database)
        app.client[database][_MARKER].insert_one({"_id": "made by streamline-pool chaos; everything here may be deleted"})
        hello = app.client.admin.command("hello")
        yield ChaosServer(addresses=list(hello.get("hosts", [])), set_name=str(hello.get("setName", "")), given_uri=uri)
        app.client.drop_database(database)


class NotOurs(Exception):
    """The database holds something else."""


def _member(
    stack: contextlib.ExitStack, folder: Path, number: int, small_disk: bool, *, initiate: bool
) -> tuple[EmbeddedServer, Path | None]:
    data = folder / f"member{number}"
    data.mkdir(mode=0o700)
    disk = data if small_disk and _mounted(stack, data) else None
    program = folder / "mongod"
    if not program.exists():  # set later, the parameter counts only from the TTL monitor's next turn on, in a minute
        quick = "--setParameter ttlMonitorSleepSecs=1 --setParameter shutdownTimeoutMillisForSignaledShutdown=200"
        program.write_text(f'#!/bin/sh\nexec "{embedded.find_mongod()}" "$@" {quick}\n')
        program.chmod(0o700)
    return stack.enter_context(embedded.start(data, mongod=program, initiate=initiate)), disk


def can_mount() -> bool:
    """Whether this process may mount a file system. It is tried."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    folder = tempfile.mkdtemp(prefix="streamline-chaos-mount-")
    try:
        with contextlib.ExitStack() as stack:
            return _mounted(stack, Path(folder), mib=1)
    finally:
        os.rmdir(folder)


def _mounted(stack: contextlib.ExitStack, folder: Path, mib: int = _TMPFS_MIB) -> bool:
    """Mount a small file system in memory; it is unmounted with the stack."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "streamline-chaos", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return False
    stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], capture_output=True, check=False)
    return True
