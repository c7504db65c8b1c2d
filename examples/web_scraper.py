"""Fetches, parses and saves every page of a small web site, one run per page. The pool ends when all runs have ended.

    python examples/web_scraper.py

The site is real: pydoc's HTML pages about modules of the standard library, which this program serves over HTTP on
127.0.0.1. The pool is the command with `--burst`. At the end the program prints what the pool has saved.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pydoc
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import streamline_pool
from streamline_pool import Context, NonRetriableError, Settings, Streamline, embedded

__all__ = ["app", "main", "scraper"]

MODULES = (
    *("ast", "base64", "bisect", "calendar", "csv", "dataclasses", "email", "enum", "fractions", "glob"),
    *("html", "http", "json", "pathlib", "shlex", "string", "tomllib", "wave", "zipfile"),
)
DATABASE = "web_scraper"


# --- the workflow ------------------------------------------------------------------------------------------------------


def fetch(ctx: Context) -> str:
    """A busy or unreachable server is retried; a page that does not exist is not."""
    try:
        with urllib.request.urlopen(ctx.context["url"], timeout=10) as reply:  # noqa: S310 -- the site is our own
            ctx.set("bytes", int(reply.headers["Content-Length"]))
            return str(reply.read().decode("utf-8"))
    except urllib.error.HTTPError as exc:
        if 400 <= exc.code < 500:
            raise NonRetriableError(f"{ctx.context['url']}: {exc.code} {exc.reason}") from exc
        raise


def parse(ctx: Context) -> dict[str, Any]:
    page = Page()
    page.feed(ctx.get_output("fetch"))
    return {"title": page.title.strip(), "links": sorted(page.links)}


def save(ctx: Context) -> str:
    """Replaces the document of an earlier attempt, so a repeated save changes nothing."""
    page = {"url": ctx.context["url"], "bytes": ctx.context["bytes"], **ctx.get_output("parse")}
    pages().replace_one({"_id": ctx.idempotency_key}, page, upsert=True)
    return str(page["title"])


app = Streamline()
scraper = app.workflow(
    "web-scraper",
    steps={"fetch": (fetch, {"timeout": 30}), "parse": parse, "save": save},
    context=lambda input: {"url": input["url"]},
)


class Page(HTMLParser):
    """Title and links of an HTML page."""

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.links: set[str] = set()
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = tag == "title"
        if tag == "a":
            self.links.update(value for name, value in attrs if name == "href" and value and not value.startswith("#"))

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title += data

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False


def pages() -> Any:
    """The collection of results, in the same database as the runs."""
    return app.runs.database["pages"]


# --- the site, and the pool that scrapes it ----------------------------------------------------------------------------


def main() -> int:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="web-scraper-")))
        address = stack.enter_context(site(folder))
        server = stack.enter_context(embedded.start(None))
        app.configure(Settings(mongodb_uri=server.uri, database=DATABASE))
        stack.enter_context(app)
        runs = scraper.start_many([{"url": f"{address}/{page.name}"} for page in sorted(folder.glob("*.html"))])
        print(f"started {len(runs)} runs; the pool works until all have ended", flush=True)
        code = pool(server.uri)
        for page in pages().find().sort("title"):
            print(f"{page['bytes']:8} bytes  {len(page['links']):3} links  {page['title']}")
        done = app.runs.count_documents({"status": "done"})
        print(f"{done} of {len(runs)} runs are done, {pages().count_documents({})} pages are saved")
        return 0 if code == 0 and done == len(runs) == pages().count_documents({}) else 1


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """Writes the pages into `folder` and serves them. Yields the address."""
    for name in MODULES:
        html = pydoc.HTMLDoc()
        page = html.page(pydoc.describe(importlib.import_module(name)), html.document(importlib.import_module(name), name))
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Files over HTTP, without a log line for each."""

    def log_message(self, format: str, *args: object) -> None:
        return


def pool(uri: str) -> int:
    """Runs `streamline-pool --app examples.web_scraper:app --burst` until it ends by itself. Returns its exit code."""
    repository = Path(__file__).resolve().parents[1]
    places = [str(Path(streamline_pool.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")}
    command = [sys.executable, "-m", "streamline_pool.supervisor.cli", "--app", "examples.web_scraper:app", "--burst"]
    command += ["--mongodb-uri", uri, "--database", DATABASE, "--workers", "2", "--log-level", "warning"]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    return subprocess.run(command, cwd=repository, env=environ, timeout=60).returncode


if __name__ == "__main__":
    raise SystemExit(main())
