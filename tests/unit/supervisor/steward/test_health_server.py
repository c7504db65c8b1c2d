"""The HTTP server of the health port, on real sockets: what it binds to, and what bad or slow clients can do to it."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator

import pytest
from pool_facts import FACTS

from streamline_pool.supervisor.steward import health_server
from streamline_pool.supervisor.steward.health import Report
from streamline_pool.supervisor.steward.health_server import HealthServer
from support import eventually

REPORT = Report(alive=True, facts=FACTS)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., HealthServer]]:
    """Makes servers on a free port. All are closed afterwards."""
    monkeypatch.setattr(health_server, "POLL_S", 0.02)  # `close` waits for the next
    made: list[HealthServer] = []

    def make(host: str = "127.0.0.1") -> HealthServer:
        made.append(HealthServer(host, 0, lambda: REPORT, None))
        return made[-1]

    yield make
    for server in made:
        server.close()


Serve = Callable[..., HealthServer]


def get(host: str, port: int, path: str = "/livez", method: str = "GET", timeout: float = 2.0) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def said(port: int, request: bytes) -> bytes:
    """Everything that the server sends to a client that sends this and then no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_it_answers_get_and_head(serve: Serve) -> None:
    port = serve().port
    assert get("127.0.0.1", port, "/readyz?verbose") == (200, "ready\n")
    assert get("127.0.0.1", port, "/nothing")[0] == 404
    head = said(port, b"HEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert b"\r\nContent-Length: 3\r\n" in head
    assert head.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "request_head", [b"\r\n\r\n", b"GET\r\n\r\n", b"\xff\xfe \x00\r\n\r\n", b"POST /livez HTTP/1.1\r\n\r\n", b"G" * 70_000]
)
def test_nonsense_gets_an_error_and_the_next_client_an_answer(serve: Serve, request_head: bytes) -> None:
    port = serve().port
    assert b" 200 " not in said(port, request_head)
    assert get("127.0.0.1", port) == (200, "ok\n")


def test_clients_that_send_nothing_do_not_keep_others_from_an_answer(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    """A port scanner holds its connections open; the orchestrator that gets no answer meanwhile would kill the pool."""
    server = serve()
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(3 * health_server.CONNECTIONS_MAX)]
    try:
        assert get("127.0.0.1", server.port) == (200, "ok\n")
        eventually(lambda: server.connections <= health_server.CONNECTIONS_MAX)
    finally:
        for client in idle:
            client.close()
    eventually(lambda: server.connections == 0)
    assert capfd.readouterr() == ("", ""), "what clients do is no news for the log"


def test_a_client_that_sends_drop_by_drop_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes within the time-out of a read, so only a deadline for the whole exchange ends it."""
    monkeypatch.setattr(health_server, "EXCHANGE_TIMEOUT_S", 0.2)
    server = serve()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.setblocking(False)

        def is_cut_off() -> bool:
            try:
                client.send(b"G")
                return client.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        eventually(is_cut_off)
    eventually(lambda: server.connections == 0)


def test_it_binds_where_it_is_told_to(serve: Serve) -> None:
    """The answers need no password, so they must not be offered to more machines than were named."""
    server = serve("127.0.0.1")
    assert server.url == f"http://127.0.0.1:{server.port}"
    with pytest.raises(OSError):
        get("127.0.0.2", server.port)
    assert get("127.0.0.2", serve("0.0.0.0").port) == (200, "ok\n")
    assert get("127.0.0.1", serve("localhost").port) == (200, "ok\n")


needs_ipv6 = pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
def test_it_binds_to_ipv6_addresses(serve: Serve) -> None:
    server = serve("::1")
    assert server.url == f"http://[::1]:{server.port}"
    assert get("::1", server.port) == (200, "ok\n")
    with pytest.raises(OSError):
        get("127.0.0.1", server.port)


@needs_ipv6
def test_the_ipv6_wildcard_takes_ipv4_too(serve: Serve) -> None:
    """Whether it does by default depends on the system."""
    port = serve("::").port
    assert (get("::1", port), get("127.0.0.1", port)) == ((200, "ok\n"), (200, "ok\n"))


def test_a_port_that_is_taken_and_an_address_that_is_not_ours_are_refused(serve: Serve) -> None:
    with pytest.raises(OSError, match="in use"):
        HealthServer("127.0.0.1", serve().port, lambda: REPORT, None)
    with pytest.raises(OSError, match="assign"):
        HealthServer("192.0.2.1", 0, lambda: REPORT, None)
