"""Approval over HTTP: the token of a hook becomes a link. The person with the link can answer the run, once.

    pip install ".[embedded,examples]"   # in the checkout: a private MongoDB, and Flask for the web part
    python examples/approval_http.py     # a pool, the web application, and a client in the role of the people

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program. In production the web
application and the pool are two services that share only the database.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flask import Flask, request
from werkzeug.serving import make_server

from streamline_pool import Context, Streamline, WorkflowError, create_hook, embedded

__all__ = ["app", "main", "purchase", "web"]

# --- the workflow ------------------------------------------------------------------------------------------------------

app = Streamline()
purchase = app.workflow("purchase")


@purchase.step
def approve(ctx: Context) -> None:
    hook = create_hook(ctx, "approve the purchase", expires_in=7 * 86400)
    send_mail(ctx.input["boss"], f"{ctx.input['what']} for {ctx.input['price']}: answer at {hook.path}")
    ctx.wait("approve the purchase", {"what": ctx.input["what"]})


@purchase.step
def order(ctx: Context) -> str:
    return f"{ctx.input['what']} ordered" if ctx.get_output("approve")["yes"] else f"{ctx.input['what']} refused"


def send_mail(to: str, text: str) -> None:
    """Stands for a mail service: the mails are a collection in the same database."""
    app.runs.database["mails"].insert_one({"to": to, "text": text})


# --- the web application -----------------------------------------------------------------------------------------------

web = Flask(__name__)
logging.getLogger("werkzeug").setLevel(logging.ERROR)  # an access log would contain the tokens, and its readers could answer


@web.post("/purchases")
def start_purchase() -> tuple[dict[str, Any], int]:
    run = purchase.start(request.get_json(), idempotency_key=request.headers.get("Idempotency-Key"))
    return {"run": run.id}, 202


@web.get("/purchases/<run_id>")
def show_purchase(run_id: str) -> tuple[dict[str, Any], int]:
    run = purchase.get(run_id)
    if run is None:
        return {"error": "no such purchase"}, 404
    return {"status": run.status, "output": run.output}, 200


@web.post("/hooks/<token>")
def answer(token: str) -> tuple[dict[str, Any], int]:
    return {"run": app.resume_hook(token, request.get_json()).run_id}, 200


@web.errorhandler(WorkflowError)
def explain(error: WorkflowError) -> tuple[dict[str, Any], int]:
    return {"code": error.code, "error": error.message}, error.http_status


# --- both, with a client in the role of the people ----------------------------------------------------------------------


def main() -> int:
    with embedded.serving(app) as uri, pool(uri), serving_web() as address:
        run_id = call(f"{address}/purchases", {"what": "a lamp", "price": 40, "boss": "boss@example.org"})[1]["run"]
        mail = wait_for_mail()
        print(f"the boss got: {mail.partition(': answer')[0]}")
        link = mail.rpartition(" ")[2]
        first, _ = call(f"{address}{link}", {"yes": True})
        print(f"the boss answers: {first}")
        second, problem = call(f"{address}{link}", {"yes": False})
        print(f"a second answer with the same link: {second} {problem['code']}")
        run = purchase.wait_for(run_id, timeout=30)
        status, shown = call(f"{address}/purchases/{run_id}")
        print(f"the run: {status} {shown}")
        return 0 if (first, second, run.output) == (200, 401, "a lamp ordered") else 1


def call(url: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    """Send one request with JSON. Returns the status and the decoded answer."""
    data = None if body is None else json.dumps(body).encode()
    outgoing = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 -- our own address
    try:
        with urllib.request.urlopen(outgoing, timeout=10) as reply:  # noqa: S310 -- as above
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def wait_for_mail() -> str:
    """The text of the first mail, once a worker has sent it. A pool is quick, so the program simply polls."""
    while True:
        found = app.runs.database["mails"].find_one()
        if found is not None:
            return str(found["text"])
        threading.Event().wait(0.02)


@contextlib.contextmanager
def serving_web() -> Iterator[str]:
    """Serves the web application on a free port of this machine. Yields its address."""
    server = make_server("127.0.0.1", 0, web, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def pool(uri: str) -> Iterator[None]:
    """`streamline-pool --app examples.approval_http:app`, drained at the end."""
    repository = Path(__file__).resolve().parents[1]
    environ = os.environ | {"PYTHONPATH": str(repository), "STREAMLINE_MONGODB_URI": uri}
    command = [sys.executable, "-m", "streamline_pool.supervisor.cli", "--app", "examples.approval_http:app"]
    process = subprocess.Popen([*command, "--workers", "1", "--log-level", "error"], cwd=repository, env=environ, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    raise SystemExit(main())
