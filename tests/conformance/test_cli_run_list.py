"""`streamline-pool runs list`: filters, pages, and what it does in a database with many runs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cli_shell import Shell
from pymongo import MongoClient

from streamline_pool import Streamline, ValidationError, WorkflowNotFoundError
from streamline_pool.client.run_lists import LARGE, RunPage, SlowList, finding_slow_list, indexing_lists, listing_runs
from streamline_pool.protocol.run_list import LIST_FIELDS, Cursor, RunFilter
from streamline_pool.protocol.run_list import list_runs as list_runs_operation
from support import shown

NOW = datetime.now(UTC).replace(microsecond=0)


def document(run_id: str, age_h: float = 1, **fields: Any) -> dict[str, Any]:
    at = NOW - timedelta(hours=age_h)
    plain: dict[str, Any] = {
        "workflowId": "orders",
        "version": "1",
        "status": "done",
        "queue": "default",
        "context": {},
        "tags": [],
        "userId": None,
    }
    return {"_id": run_id, **plain, "createdAt": at, "updatedAt": at, "error": None, **fields}


@pytest.fixture
def stored(mongodb_uri: str, database: str) -> Iterator[Any]:
    """The collection of runs."""
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        yield client[database]["workflow_runs"]


def ids(shell: Shell, *words: str) -> list[str]:
    return [run["_id"] for run in shell.json("runs", "list", *words)]


def page(app: Streamline, limit: int = 20, after: str | None = None, seconds_max: float = 10.0, **filters: Any) -> RunPage:
    return app.connections.drive(listing_runs(RunFilter(**filters), limit=limit, after=after, seconds_max=seconds_max))


def found(app: Streamline, **filters: Any) -> str:
    return " ".join(run["_id"] for run in page(app, **filters).runs)


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_list_is_filtered_by_what_an_operator_knows(shell: Shell, stored: Any) -> None:
    """At three in the morning an operator has a customer's number, an error code and a rough time, and no Python."""
    error = {"code": "WORKER_CRASHED", "message": "3 workers were lost"}
    stored.insert_many(
        [
            document("a", 1, userId="ann", tags=["urgent", "eu"], context={"customer": 42}),
            document("b", 2, status="failed", error=error, context={"customer": "42"}),
            document("c", 30, workflowId="mail", queue="fast", tags=["eu"], context={"order": {"id": 7}}),
        ]
    )
    assert ids(shell, "--user", "ann", "--since", "90m", "--tag", "eu", "--tag", "urgent", "--status", "done") == ["a"]
    assert ids(shell, "--context", "customer=42") == ["a", "b"], "the number and the text"
    assert ids(shell, "--context", 'customer="42"', "--error-code", "worker_crashed") == ["b"]
    assert ids(shell, "--context", "context.order.id=7", "--workflow", "mail", "--queue", "fast", "--until", "1d") == ["c"]
    since, until = (NOW - timedelta(hours=3)).isoformat(), (NOW - timedelta(hours=1)).isoformat()
    assert ids(shell, "--since", since, "--until", until) == ["b"], "the begin is included, the end is not"
    assert "No such runs." in shell("runs", "list", "--user", "bob").stderr


def test_each_filter_counts_by_itself_and_all_together(app: Streamline, stored: Any) -> None:
    error = {"code": "WORKER_CRASHED", "message": "3 workers were lost"}
    stored.insert_many(
        [
            document("a", 1, userId="ann", tags=["urgent", "eu"], context={"customer": 42}),
            document("b", 2, status="failed", error=error, context={"customer": "42"}),
            document("c", 30, workflowId="mail", queue="fast", tags=["eu"]),
        ]
    )
    assert found(app) == "a b c"
    assert (found(app, user_id="ann"), found(app, user_id="bob")) == ("a", "")
    assert (found(app, tags=["eu"]), found(app, tags=["eu", "urgent"])) == ("a c", "a")
    assert (found(app, workflow_id="mail"), found(app, queue="default"), found(app, status="failed")) == ("c", "a b", "b")
    assert (found(app, error_code="WORKER_CRASHED"), found(app, error_code="STEP_FAILED")) == ("b", "")
    assert (found(app, error_code="WORKER_CRASHED", status="done"), found(app, tags=["eu"], queue="fast")) == ("", "c")
    assert found(app, context={"context.customer": ["42"]}) == "b"
    assert found(app, created_from=NOW - timedelta(hours=2), created_before=NOW - timedelta(hours=1)) == "b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--status", "finished"), "'finished' is not one of 'draft'"),
        (("--error-code", "OOPS"), "--error-code OOPS: there is no such code; there are WORKFLOW_NOT_FOUND"),
        (("--context", "customer"), "--context customer: expected NAME=VALUE"),
        (("--context", "=42"), "expected NAME=VALUE"),
        (("--context", "a..b=1"), "--context: 'context.a..b' is not a field"),
        (("--context", "$where=1"), "is not a field"),
        (("--context", "a=[1]"), "a list or document cannot be compared"),
        (("--context", "a=1", "--context", "context.a=2"), "given twice"),
        (("--user", ""), "user: an empty text"),
        (("--tag", ""), "tag: an empty text"),
        (("--workflow", ""), "workflow: an empty text"),
        (("--since", "yesterday"), "--since yesterday: expected an age such as 30m, 2h or 7d"),
        (("--until", "99999999999d"), "--until 99999999999d: expected an age"),
        (("--since", "1h", "--until", "2h"), "is not before"),
        (("--limit", "0"), "0 is not in the range"),
        (("--after", ""), "a run id is text of 1 to 100 characters"),
    ],
    ids=shown,
)
def test_what_no_run_can_match_is_refused(shell: Shell, words: tuple[str, ...], told: str) -> None:
    """An empty list would be taken for an answer."""
    done = shell("runs", "list", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pages_hold_every_run_once_also_among_runs_of_one_instant(shell: Shell, stored: Any) -> None:
    """`start_many` stores a thousand runs with one createdAt. A page that begins in the middle of them must not skip any."""
    stored.insert_many([*(document(f"t-{number}", 5) for number in range(5)), document("new", 1), document("old", 9)])
    everything = ["new", "t-4", "t-3", "t-2", "t-1", "t-0", "old"]
    assert ids(shell) == everything
    first = shell("runs", "list", "--limit", "3")
    assert [line.split()[0] for line in first.stdout.splitlines()] == ["RUN", *everything[:3]]
    assert first.stderr == "There are more runs. For the next page, repeat the command with: --after t-3\n"
    assert ids(shell, "--limit", "3", "--after", "t-3") == everything[3:6]
    last = shell("runs", "list", "--limit", "3", "--after", "t-0")
    assert ([line.split()[0] for line in last.stdout.splitlines()], last.stderr) == (["RUN", "old"], "")
    paged = shell("runs", "list", "--limit", "3", "--json")
    assert (len(json.loads(paged.stdout)), paged.stderr) == (3, ""), "one array of stored documents, and nothing else"


def test_a_page_after_a_run_that_was_deleted_is_5(shell: Shell) -> None:
    done = shell("runs", "list", "--after", "gone")
    assert (done.returncode, done.stdout) == (5, "")
    assert "there is no run 'gone' after which a page could begin" in done.stderr


def test_a_page_size_that_ends_with_the_list_promises_no_further_page(app: Streamline, stored: Any) -> None:
    stored.insert_many([document("a", 1), document("b", 2), document("odd", createdAt=None)])
    assert page(app, limit=3).after is None
    assert page(app, limit=2).after == "b"
    with pytest.raises(ValidationError, match="its createdAt is None"):
        page(app, after="odd")
    with pytest.raises(WorkflowNotFoundError):
        page(app, after="nowhere")


# --- many runs ------------------------------------------------------------------------------------------------------


def fill(stored: Any) -> None:
    many = (document(f"m-{number:05}", number / 1000, tags=["bulk"]) for number in range(LARGE + 1))
    stored.insert_many(list(many), ordered=False)


@pytest.mark.slow
def test_a_list_without_an_index_says_which_one_to_make(shell: Shell, stored: Any) -> None:
    """A query that reads five million runs slows every pool down. It must not happen by a list that looks harmless."""
    fill(stored)
    listed = shell("runs", "list", "--tag", "bulk", "--limit", "1")
    assert listed.stdout.splitlines()[1].split()[0] == "m-00000"
    assert "No index serves this list by tag: MongoDB may read all of about 10,001 runs, for at most 10 s" in listed.stderr
    assert "Make the index once: streamline-pool init-db --index tag\n" in listed.stderr
    made = shell("init-db", "--index", "tag", "--index", "created", "--index", "context.customer")
    assert made.returncode == 0, made.stderr
    assert made.stdout.rstrip().endswith("streamline_list_tags, streamline_list_createdAt, streamline_list_context.customer")
    assert shell("runs", "list", "--tag", "bulk", "--limit", "10000").stderr.startswith("There are more runs.")
    quiet = shell("runs", "list", "--limit", "1", "--json")
    assert (len(json.loads(quiet.stdout)), quiet.stderr) == (1, "")
    wrong = shell("init-db", "--index", "colour")
    assert (wrong.returncode, "index 'colour': there are tag, user," in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_which_lists_need_an_index(app: Streamline, stored: Any) -> None:
    def slow(**filters: Any) -> str | None:
        answer: SlowList | None = app.connections.drive(finding_slow_list(RunFilter(**filters)))
        return None if answer is None else answer.field

    assert slow(user_id="ann") is None, "there is no collection yet"
    stored.insert_one(document("a"))
    assert slow(user_id="ann") is None, "few runs need no index"
    fill(stored)
    assert (slow(), slow(user_id="ann"), slow(status="done"), slow(error_code="STEP_FAILED")) == ("created", "user", "status", "error-code")
    assert slow(context={"context.customer": [42]}, user_id="ann") == "context.customer"
    assert slow(created_from=NOW) == "created"
    app.setup_indexes(context_fields=["customer"])
    few = [slow(user_id="ann"), slow(workflow_id="mail"), slow(status="failed"), slow(context={"context.customer": [42]})]
    assert few == [None] * 4, "an index that begins with the filter, and few runs match"
    assert slow(error_code="STEP_FAILED") is None, "it implies the status"
    assert (slow(workflow_id="orders"), slow(status="done")) == ("workflow", "status"), "all runs match, and would be sorted"
    assert slow(workflow_id="orders", user_id="ann") is None, "few runs match one of the two"
    assert (slow(tags=["bulk"]), slow(), slow(queue="default")) == ("tag", "created", "queue")
    app.connections.drive(indexing_lists(["created"]))
    assert (slow(), slow(created_from=NOW), slow(tags=["bulk"], created_from=NOW)) == (None, None, None)
    assert slow(workflow_id="orders") is None, "many match, so a search by age finds them at once"
    assert (slow(tags=["bulk"]), slow(tags=["bulk"], created_before=NOW)) == ("tag", "tag")
    app.connections.drive(indexing_lists(["tag"]))
    assert slow(tags=["bulk"]) is None
    stored.drop_index("streamline_list_createdAt")
    stored.create_index([("createdAt", 1)])
    assert slow() == "created", "without the id the index does not have the order of the list, and all runs would be read and sorted"
    stored.create_index([("queue", 1)], sparse=True)
    assert slow(queue="default") == "queue", "such an index does not hold every run"


@pytest.mark.slow
def test_a_page_reads_no_more_runs_than_it_has(app: Streamline, stored: Any) -> None:
    """With its index, the hundredth page of five million runs costs what the first one costs."""
    error = {"code": "STEP_FAILED", "message": ""}
    common: dict[str, Any] = {"userId": "ann", "error": error, "status": "failed", "context": {"customer": 42}, "tags": ["x"]}
    stored.insert_many([document(f"m-{number:03}", number // 10, **common) for number in range(300)])
    filters: dict[str, dict[str, Any]] = {
        "tag": {"tags": ["x"]},
        "user": {"user_id": "ann"},
        "error-code": {"error_code": "STEP_FAILED"},
        "workflow": {"workflow_id": "orders"},
        "queue": {"queue": "default"},
        "status": {"status": "failed"},
        "created": {},
        "context.customer": {"context": {"context.customer": [42, "42"]}},
    }
    assert set(filters) == {*LIST_FIELDS, "context.customer"}
    for field, after in itertools.product(filters, (None, Cursor(NOW - timedelta(hours=20), "m-205"))):
        [index] = app.connections.drive(indexing_lists([field]))
        op = list_runs_operation(RunFilter(**filters[field]), limit=10, after=after)
        stats = stored.find(op.filter).sort(list(op.sort)).limit(10).explain()["executionStats"]
        assert stats["nReturned"] == 10
        assert stats["totalDocsExamined"] <= 20, (field, after)  # the page, and at most the ten runs of the cursor's instant
        assert found(app, **filters[field]).split()[0] == "m-009"
        stored.drop_index(index)


def test_a_list_that_takes_too_long_is_given_up(app: Streamline, stored: Any) -> None:
    fill(stored)
    with pytest.raises(TimeoutError, match="MongoDB has not found the runs"):
        page(app, tags=["none", "such"], seconds_max=0.001)
