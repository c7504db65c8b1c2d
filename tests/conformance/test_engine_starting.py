"""Starting runs: what is stored, which of several callers wins, what is refused; by the blocking and the asyncio functions."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from workers import check_invariants, run_until_idle

from streamline_pool import InvalidStateError, PayloadTooLargeError, Streamline, ValidationError
from streamline_pool.protocol.codec import SERVER_TICK
from support import REPOSITORY, shown


@pytest.fixture
def orders(app: Streamline) -> Any:
    return app.workflow("orders", steps={"reserve": lambda ctx: ctx.input, "charge": lambda ctx: "charged"})


def test_a_started_run_is_stored_before_start_returns(app: Streamline, orders: Any) -> None:
    run = orders.start({"item": 5}, {"source": "web"}, user_id="u1", tags=("a", "b"), priority=3)
    stored = app.runs.find_one({"_id": run.id})
    born_at = stored.pop("bornAt")  # set by the server
    assert born_at > SERVER_TICK
    assert stored == run.to_dict(), "what start returns is what a reader finds"
    assert (run.status, run.current_step_id, run.input, run.context) == ("running", "reserve", {"item": 5}, {"item": 5})
    assert (run.meta, run.user_id, run.tags, run.priority, run.queue) == ({"source": "web"}, "u1", ("a", "b"), 3, "default")
    assert [(step.step_id, step.status, step.attempts) for step in run.steps] == [("reserve", "pending", 0), ("charge", "pending", 0)]
    assert (run.version, run.started_at, run.ended_at, run.error, run.output, run.paused) == ("1.0.0", None, None, None, None, False)
    check_invariants([stored])


def test_the_blocking_and_the_asyncio_functions_store_the_same(app: Streamline, orders: Any) -> None:
    async def start() -> list[Any]:
        runs = [await orders.start_async(1, run_id="a"), *await orders.start_many_async([1, 2])]
        await app.close_async()
        return runs

    runs = [*asyncio.run(start()), orders.start(1, run_id="b"), *orders.start_many([1, 2])]
    shapes = {tuple(sorted((name, type(value).__name__) for name, value in run.to_dict().items())) for run in runs}
    assert len(shapes) == 1
    assert [run.input for run in runs] == [1, 1, 2, 1, 1, 2]


def test_the_context_is_made_of_the_input(app: Streamline) -> None:
    made = app.workflow("made", steps={"a": lambda ctx: 1}, context=lambda input: {"url": input["u"]})
    assert made.start({"u": "x"}).context == {"url": "x"}
    with pytest.raises(KeyError):
        made.start({})
    plain = app.workflow("plain", steps={"a": lambda ctx: 1})
    given = {"a": {"b": 1}}
    assert (plain.start(given).context, plain.start([1]).context) == (given, {})


# --- when -----------------------------------------------------------------------------------------------------------


def test_a_run_with_a_start_time_is_a_draft_until_then(app: Streamline, orders: Any) -> None:
    later = orders.start(1, start_at=3600)
    soon = orders.start(2, start_at=timedelta(milliseconds=150))
    past = orders.start(3, start_at=datetime.now(UTC) - timedelta(days=1))
    assert (later.status, soon.status, past.status) == ("draft", "draft", "running")
    run_until_idle(app)
    assert [orders.get(run.id).status for run in (later, soon, past)] == ["draft", "done", "done"]
    assert orders.get(soon.id).started_at >= soon.document["wakeAt"]


def test_higher_priority_goes_first_and_equals_by_age(make_app: Callable[..., Streamline]) -> None:
    app = make_app(concurrency=1)
    seen: list[int] = []
    workflow = app.workflow("w", steps={"a": lambda ctx: seen.append(ctx.input)})
    for number, priority in enumerate([0, 5, 0, -3, 5]):
        workflow.start(number, priority=priority, start_at=timedelta(milliseconds=number) - timedelta(0))
    threading.Event().wait(0.02)  # until all of them are due
    run_until_idle(app)
    assert seen == [1, 4, 0, 2, 3]


# --- idempotency ----------------------------------------------------------------------------------------------------


def test_a_used_idempotency_key_gives_the_stored_run_whatever_the_input(orders: Any) -> None:
    first = orders.start({"n": 1}, idempotency_key="k")
    again = orders.start({"n": 2}, idempotency_key="k")
    assert (again.id, again.input) == (first.id, {"n": 1})


def test_an_idempotency_key_belongs_to_one_workflow(app: Streamline, orders: Any) -> None:
    other = app.workflow("other", steps={"a": lambda ctx: 1})
    assert orders.start(1, idempotency_key="k").id != other.start(1, idempotency_key="k").id


def test_a_key_outlives_the_end_of_its_run(app: Streamline, orders: Any) -> None:
    first = orders.start(1, idempotency_key="k")
    run_until_idle(app)
    assert orders.start(1, idempotency_key="k").status == "done"
    assert orders.start(1, idempotency_key="k").id == first.id


def test_of_twenty_threads_with_one_key_one_wins_and_all_get_its_run(app: Streamline, orders: Any) -> None:
    """A read before the insert would let two of them insert a run."""
    gate = threading.Barrier(20)

    def start(number: int) -> str:
        gate.wait()
        run: str = orders.start(number, idempotency_key="k").id
        return run

    with ThreadPoolExecutor(20) as threads:
        ids = set(threads.map(start, range(20)))
    assert len(ids) == 1
    assert app.runs.count_documents({}) == 1


def test_of_four_processes_with_one_key_on_a_new_database_one_wins(app: Streamline, mongodb_uri: str, database: str) -> None:
    """Only the unique index decides, and each process finds that it does not exist yet."""
    program = f"""
from streamline_pool import Streamline
with Streamline({mongodb_uri!r}, database={database!r}) as app:
    print(app.workflow("w", steps={{"a": len}}).start(1, idempotency_key="k").id)
"""
    children = [subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    ids = {child.communicate(timeout=30)[0] for child in children}
    assert [child.returncode for child in children] == [0] * 4
    assert len(ids) == 1
    assert app.runs.count_documents({}) == 1


def test_start_many_keeps_the_order_and_the_keys(app: Streamline, orders: Any) -> None:
    old = orders.start("old", idempotency_key="b")
    runs = orders.start_many([0, 1, 2, 3], idempotency_keys=["a", "b", "c", "a"])
    assert [run.input for run in runs] == [0, "old", 2, 0], "a key twice in one call is one run"
    assert runs[1].id == old.id
    assert runs[3].id == runs[0].id
    assert app.runs.count_documents({}) == 3


def test_start_many_stores_nothing_if_one_input_is_bad(app: Streamline, orders: Any) -> None:
    with pytest.raises(ValidationError, match=r"VALIDATION_ERROR: input\.x: cannot store <class 'object'>"):
        orders.start_many([1, {"x": object()}, 2])
    with pytest.raises(ValidationError, match="3 inputs, but 1 idempotency_keys"):
        orders.start_many([1, 2, 3], idempotency_keys=["a"])
    assert app.runs.count_documents({}) == 0
    assert orders.start_many([]) == []


@pytest.mark.parametrize("bad", ["abc", b"abc", {"a": 1, "b": 2, "c": 3}, {"a", "b", "c"}, 3], ids=lambda bad: type(bad).__name__)
def test_what_is_no_list_is_refused_by_start_many(app: Streamline, orders: Any, bad: Any) -> None:
    """Three runs had the keys "a", "b" and "c" because a caller had given one key, and those of a set were in no order."""
    with pytest.raises(ValidationError, match="start_many: idempotency_keys: a list, not"):
        orders.start_many([1, 2, 3], idempotency_keys=bad)
    with pytest.raises(ValidationError, match="start_many: inputs: a list, not"):
        orders.start_many(bad)
    assert app.runs.count_documents({}) == 0


def test_start_many_is_split_into_commands_of_legal_size(app: Streamline, orders: Any) -> None:
    """The server accepts 16 MiB in one command, and a run is larger than its input."""
    runs = orders.start_many(range(250), {"note": "x" * 100_000})
    assert app.runs.count_documents({}) == len({run.id for run in runs}) == 250


def test_an_existing_run_id_is_refused(orders: Any) -> None:
    orders.start(1, run_id="mine")
    with pytest.raises(InvalidStateError, match="INVALID_STATE: start: a run with id 'mine' exists already"):
        orders.start(2, run_id="mine")
    assert orders.get("mine").input == 1


# --- transactions ---------------------------------------------------------------------------------------------------


def test_a_run_started_in_a_transaction_exists_only_if_that_commits(app: Streamline, orders: Any) -> None:
    with app.client.start_session() as session:
        session.start_transaction()
        gone = orders.start(1, session=session)
        assert orders.get(gone.id) is None, "no other client sees it yet"
        session.abort_transaction()
        with session.start_transaction():
            kept = orders.start(2, session=session)
    assert orders.get(gone.id) is None
    run_until_idle(app)
    assert orders.get(kept.id).status == "done"


def test_a_run_started_in_an_asyncio_transaction_too(app: Streamline, orders: Any) -> None:
    async def work() -> tuple[str, str]:
        async with app.async_client.start_session() as session:
            await session.start_transaction()
            gone = await orders.start_async(1, session=session)
            await session.abort_transaction()
            async with await session.start_transaction():
                kept = await orders.start_async(2, session=session)
        await app.close_async()
        return gone.id, kept.id

    gone, kept = asyncio.run(work())
    assert orders.get(gone) is None
    assert orders.get(kept).input == 2


def test_a_key_used_before_does_not_break_the_transaction(app: Streamline, orders: Any) -> None:
    """A duplicate key error inside a transaction would abort all of it."""
    old = orders.start(1, idempotency_key="k")
    notes = app.client[app.where.database]["notes"]
    with app.client.start_session() as session, session.start_transaction():
        assert orders.start(2, idempotency_key="k", session=session).id == old.id
        notes.insert_one({"order": old.id}, session=session)
    assert notes.count_documents({}) == 1


def test_transactions_that_race_for_one_key_are_repeated_by_their_callers(app: Streamline, orders: Any) -> None:
    """`with_transaction` repeats a transaction only after PyMongo's own error types."""
    orders.start(0)  # the collections exist
    gate = threading.Barrier(4)

    def start(number: int) -> str:
        with app.client.start_session() as session:
            gate.wait()
            run: str = session.with_transaction(lambda session: orders.start(number, idempotency_key="k", session=session).id)
            return run

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(start, range(4)))) == 1


def test_a_session_of_another_client_is_refused_at_once(make_app: Callable[..., Streamline], orders: Any) -> None:
    with make_app().client.start_session() as session, pytest.raises(ValidationError, match="use a session of this app's `client`"):
        orders.start(1, session=session)


# --- bad arguments --------------------------------------------------------------------------------------------------

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"run_id": ""}, "1 to 100 characters"),
    ({"run_id": "x" * 101}, "1 to 100 characters"),
    ({"run_id": 5}, "1 to 100 characters"),
    ({"run_id": "\ud800"}, "run_id: cannot store this text"),
    ({"idempotency_key": ""}, "1 to 500 characters"),
    ({"idempotency_key": "\ud800"}, "idempotency_key: cannot store this text"),
    ({"priority": 1.5}, "priority"),
    ({"priority": True}, "priority"),
    ({"priority": 10**7}, "priority"),
    ({"queue": "a/b"}, "queue"),
    ({"queue": 5}, "queue"),
    ({"start_at": datetime(2026, 1, 1)}, "no time zone"),  # noqa: DTZ001 -- the point
    ({"start_at": -1}, "start_at"),
    ({"start_at": float("nan")}, "start_at"),
    ({"start_at": 1e300}, "a hundred years"),
    ({"start_at": "tomorrow"}, "start_at"),
    ({"tags": "abc"}, "sequence of texts"),
    ({"tags": 5}, "sequence of texts"),
    ({"tags": [1]}, "tags"),
    ({"tags": ["\ud800"]}, "tags: cannot store this text"),
    ({"user_id": 5}, "user_id"),
    ({"user_id": "\ud800"}, "user_id: cannot store this text"),
    ({"meta": [1]}, "meta must be a mapping"),
    ({"meta": {"a": [object()]}}, r"meta\.a\[0\]: cannot store"),
    ({"input": {"items": [1, {"when": object()}]}}, r"input\.items\[1\]\.when: cannot store <class 'object'>"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_ARGUMENTS, ids=shown)
def test_a_bad_argument_is_refused_and_nothing_is_stored(app: Streamline, orders: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        orders.start(**arguments)
    assert app.runs.count_documents({}) == 0


def test_tags_may_come_from_a_generator(orders: Any) -> None:
    assert orders.start(tags=(letter for letter in "ab")).tags == ("a", "b")


def test_an_input_that_makes_the_run_too_large_is_refused_with_the_limit(app: Streamline, orders: Any) -> None:
    """A mapping is stored twice, as input and as context, so each may use half of the document's limit."""
    with pytest.raises(PayloadTooLargeError, match=r"PAYLOAD_TOO_LARGE: start: the run would take \d+ bytes .* the limit is \d+"):
        orders.start({"x": "y" * (9 * 2**20)})
    with pytest.raises(PayloadTooLargeError, match=r"PAYLOAD_TOO_LARGE: input: \d+ bytes, and the limit is 12582912"):
        orders.start("y" * (13 * 2**20))
    assert app.runs.count_documents({}) == 0
    assert orders.start("y" * (11 * 2**20)).id


def test_steps_are_frozen_by_the_first_start(app: Streamline) -> None:
    workflow = app.workflow("w")
    workflow.step("a")(lambda ctx: 1)
    workflow.start()
    with pytest.raises(ValidationError, match="comes too late"):
        workflow.step("b")(lambda ctx: 1)


def test_a_missing_run_is_none(orders: Any) -> None:
    assert orders.get("unknown") is None
    with pytest.raises(ValidationError):
        orders.get(5)
    with pytest.raises(ValidationError):
        orders.get("\ud800")
