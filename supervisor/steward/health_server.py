"""The HTTP server of the health port: the standard library's, in threads of the steward process.

Owns the address, and the bounds on what clients may take: time and connections. What is answered is in health.py. It has threads
of its own, so a busy event loop delays no answer, and a slow client delays no duty of the steward.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from streamline_pool.supervisor.steward.health import Answer, Exposition, Report, answer

__all__ = ["CONNECTIONS_MAX", "EXCHANGE_TIMEOUT_S", "HealthServer", "address_text"]

log = logging.getLogger("streamline_pool")

EXCHANGE_TIMEOUT_S = 5.0  # a guess: a client that takes longer to ask and to read the answer is not one of ours
CONNECTIONS_MAX = 32  # a guess: some scrapers and probes at once, and no more threads than the steward can bear
POLL_S = 0.5  # how often expired connections are looked for


class HealthServer:
    """Answers from construction until `close`. `report` is called in other threads; `exposition` as in health.py.

    `host` is an address or a name; of a name's addresses the first of IPv4 is taken, else the first. `::` stands for all addresses
    of both families. `port` 0 takes a free one. OSError: the name is unknown, the address is not this machine's, or the port is in use.
    """

    def __init__(self, host: str, port: int, report: Callable[[], Report], exposition: Exposition | None) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
        self._server = _Server(family, address, lambda path, accept: answer(path, accept, report(), exposition))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="health-port", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where it listens, such as `http://[::1]:9464`."""
        return f"http://{address_text(str(self._server.server_address[0]), self.port)}"

    @property
    def connections(self) -> int:
        """The number of connections that are open now."""
        return len(self._server.since)

    def close(self) -> None:
        """Stop listening, and end the thread. At the end of the steward nothing waits for this: the threads are daemons."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def address_text(host: str, port: int) -> str:
    """`host:port`, with the brackets that an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _Server(ThreadingHTTPServer):
    """One thread per connection, each with a deadline; beyond `CONNECTIONS_MAX` the oldest connection makes room."""

    request_queue_size = 128

    def __init__(self, family: int, address: Any, answer_to: Callable[[str, str], Answer]) -> None:
        self.address_family = family
        self.answer_to = answer_to
        self.since: dict[socket.socket, float] = {}  # open connections, oldest first: the monotonic time of their beginning
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6 and self.server_address[0] == "::":
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's: it looks up this machine's name, which takes long where no name server answers.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        for oldest in list(self.since)[: max(0, len(self.since) - CONNECTIONS_MAX + 1)]:
            self._cut_off(oldest)
        self.since[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called by `serve_forever` at least every `POLL_S`."""
        now = time.monotonic()
        for request, since in list(self.since.items()):
            if now - since > EXCHANGE_TIMEOUT_S:
                self._cut_off(request)

    def _cut_off(self, request: socket.socket) -> None:
        """Its thread reads the end of the stream, or fails to write, and closes it."""
        self.since.pop(request, None)
        with contextlib.suppress(OSError):  # closed meanwhile, by the client or by its thread
            request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self.since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 -- the base class's signature
        log.debug("health_request_failed", exc_info=True)  # a client that went away, most likely


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD. The standard library refuses every other method, and what is not HTTP."""

    server: _Server
    timeout = EXCHANGE_TIMEOUT_S  # of each read and write
    error_content_type = "text/plain; charset=utf-8"
    error_message_format = "%(message)s\n"

    def do_GET(self) -> None:
        self.wfile.write(self._head().body)

    def do_HEAD(self) -> None:
        self._head()

    def _head(self) -> Answer:
        """Send status and headers of the answer."""
        found = self.server.answer_to(self.path, self.headers.get("Accept", ""))
        self.send_response(found.status)
        self.send_header("Content-Type", found.content_type)
        self.send_header("Content-Length", str(len(found.body)))
        self.end_headers()
        return found

    def version_string(self) -> str:
        return "streamline-pool"  # not which Python this is

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""
