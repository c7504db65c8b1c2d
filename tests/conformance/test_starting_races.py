"""Starts that meet other clients: lost replies, keys whose owners are deleted, and one key twice in a transaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from old_runs import meddling, use

from streamline_pool import InvalidStateError, Run, StoreUnavailableError, Streamline
from streamline_pool.protocol.operations import Op
from streamline_pool.storage.store import Store


@pytest.fixture
def orders(app: Streamline) -> Any:
    return app.workflow("orders", steps={"reserve": lambda ctx: ctx.input, "charge": lambda ctx: "charged"})


class LostReply(Store):
    """The first insert is stored, then `meddle` is called, and the caller gets an error instead of the reply."""

    meddle: Callable[[str], object]
    lost = 0

    def run(self, op: Op, session: Any = None) -> Any:
        answer = super().run(op, session)
        if op.name == "insert_runs" and not self.lost:
            self.lost += 1
            stored = self.collection("runs").find_one({})
            self.meddle(stored["_id"])
            raise StoreUnavailableError("a fault of this test", transient=True)
        return answer


# --- lost replies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["start", "start_many"])
@pytest.mark.parametrize("operation", ["pause", "cancel", "rewind_to", "execute"])
def test_a_start_whose_reply_was_lost_knows_its_run_after_other_clients_changed_it(
    app: Streamline, make_app: Callable[..., Streamline], orders: Any, operation: str, call: str
) -> None:
    """The caller would start the order again under another id, and it would be executed twice."""
    others = make_app().workflow("orders", steps=dict.fromkeys(("reserve", "charge"), lambda ctx: 1))
    store = use(app, LostReply(app.where, app.env))
    arguments = ("reserve",) if operation == "rewind_to" else ()
    store.meddle = lambda run_id: getattr(others, operation)(run_id, *arguments)
    run: Run = orders.start({"n": 1}) if call == "start" else orders.start_many([{"n": 1}])[0]
    assert (store.lost, run.input) == (1, {"n": 1})
    assert (run.paused, run.status) == {
        "pause": (True, "running"), "cancel": (False, "cancelled"), "rewind_to": (False, "running"), "execute": (False, "done"),
    }[operation]  # fmt: skip
    assert app.runs.count_documents({}) == 1


def test_no_later_operation_changes_the_id_of_the_start(app: Streamline, orders: Any) -> None:
    run = orders.start(1)
    first = run.document["startId"]
    orders.pause(run.id)
    orders.resume(run.id)
    orders.execute(run.id)
    orders.rewind_to(run.id, "charge")
    assert orders.cancel(run.id).document["startId"] == first


def test_a_run_of_an_earlier_version_without_the_id_of_its_start_works_and_keeps_its_run_id(app: Streamline, orders: Any) -> None:
    orders.start(1, run_id="mine")
    app.runs.update_one({}, {"$unset": {"startId": ""}, "$set": {"lastAct": "x"}})
    with pytest.raises(InvalidStateError, match="a run with id 'mine' exists already"):
        orders.start(2, run_id="mine")
    assert orders.execute("mine").status == "done"


# --- keys and ids that become free ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["start", "start_many"])
def test_a_key_whose_owner_is_deleted_after_the_insert_was_refused_is_taken_over(app: Streamline, orders: Any, call: str) -> None:
    """Otherwise the call fails with INVALID_STATE for an id that it has just made, and stores nothing."""
    owner = orders.start("old", idempotency_key="k")
    meddling(app, "get_runs_by_key", lambda: app.runs.delete_one({"_id": owner.id}))
    if call == "start":
        new = orders.start("new", idempotency_key="k")
    else:
        new = orders.start_many(["other", "new"], idempotency_keys=["l", "k"])[1]
    assert (new.input, new.id != owner.id) == ("new", True)
    assert app.runs.count_documents({"idempotencyKey": "k", "input": "new"}) == 1
    assert orders.execute(new.id).status == "done"


def test_an_id_whose_run_is_deleted_after_the_insert_was_refused_is_taken_over(app: Streamline, orders: Any) -> None:
    orders.start("old", run_id="mine")
    meddling(app, "get_run", lambda: app.runs.delete_one({"_id": "mine"}))
    assert orders.start("new", run_id="mine").input == "new"


def test_a_key_that_is_taken_and_freed_all_the_time_ends_in_a_clear_error(app: Streamline, orders: Any) -> None:
    """The call must not repeat without end, and must not say that a fresh id exists already."""
    owner = orders.start("old", idempotency_key="k").to_dict()

    class Busy(Store):
        def run(self, op: Op, session: Any = None) -> Any:
            if op.name == "insert_runs":
                self.collection("runs").replace_one({"_id": owner["_id"]}, owner, upsert=True)
            if op.name == "get_runs_by_key":
                self.collection("runs").delete_one({"_id": owner["_id"]})
            return super().run(op, session)

    use(app, Busy(app.where, app.env))
    with pytest.raises(InvalidStateError, match=r"key 'k'.*5 inserts were refused.*start again later"):
        orders.start("new", idempotency_key="k")
    assert app.runs.count_documents({}) == 0


def test_a_unique_index_of_the_users_own_is_not_taken_for_a_used_id(app: Streamline, orders: Any) -> None:
    """Such a start is refused each time, also within a transaction, so it must not be repeated."""
    orders.start({"order": 5})
    app.runs.create_index("context.order", unique=True)
    with pytest.raises(StoreUnavailableError, match=r"insert_runs: MongoDB refuses: .*context\.order"):
        orders.start({"order": 5})
    with app.client.start_session() as session, pytest.raises(StoreUnavailableError, match="MongoDB refuses"):
        session.with_transaction(lambda session: orders.start({"order": 5}, session=session))


# --- transactions ---------------------------------------------------------------------------------------------------


def in_transaction(app: Streamline, work: Callable[[Any], Any]) -> tuple[Any, int]:
    """The result of `work(session)` in a transaction of PyMongo's own kind, and how many times it was called."""
    called = 0

    def counted(session: Any) -> Any:
        nonlocal called
        called += 1
        assert called < 5, "the transaction is repeated without end"
        return work(session)

    with app.client.start_session() as session:
        return session.with_transaction(counted), called


@pytest.mark.parametrize("old_keys", [(), ("a",), ("a", "b")], ids=lambda keys: f"{len(keys)} stored before")
def test_a_key_twice_in_one_call_is_one_run_in_a_transaction_too(app: Streamline, orders: Any, old_keys: tuple[str, ...]) -> None:
    """The second insert of the key would abort the transaction, and `with_transaction` would repeat it without end."""
    for key in old_keys:
        orders.start("old", idempotency_key=key)
    keys = ["a", "b", "a", "c", "b", "a"]
    runs, called = in_transaction(app, lambda session: orders.start_many(range(6), idempotency_keys=keys, session=session))
    assert called == 1
    assert [run.input for run in runs] == ["old" if key in old_keys else keys.index(key) for key in keys]
    assert [run.id for run in runs] == [runs[keys.index(key)].id for key in keys]
    assert {run.id for run in runs} == {document["_id"] for document in app.runs.find()}
    again = orders.start_many(range(6), idempotency_keys=keys)
    assert [run.id for run in again] == [run.id for run in runs], "outside of a transaction the same"


def test_a_key_of_an_earlier_call_in_the_same_transaction_gives_its_run(app: Streamline, orders: Any) -> None:
    def twice(session: Any) -> list[str]:
        first = orders.start(1, idempotency_key="k", session=session)
        return [first.id, *(run.id for run in orders.start_many([2, 3], idempotency_keys=["k", "k"], session=session))]

    ids, called = in_transaction(app, twice)
    assert (called, len(set(ids))) == (1, 1)


def test_an_id_that_is_taken_ends_the_transaction_with_an_error(app: Streamline, orders: Any) -> None:
    orders.start(1, run_id="mine")
    with pytest.raises(InvalidStateError, match="a run with id 'mine' exists already"):
        in_transaction(app, lambda session: orders.start(2, run_id="mine", session=session))
    assert orders.get("mine").input == 1
