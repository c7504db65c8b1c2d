"""Hooks: a secret token that answers one wait, once, from any process; every other token changes nothing."""

from __future__ import annotations

import os
import random
import signal
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import bson
import pytest
from other_program import other_program
from stored_runs import stored, until_step
from waiting_app import evidence, waiting_pool
from workers import check_invariants, run_until_idle

from streamline_pool import (
    HookTokenError,
    InvalidStateError,
    LeaseLostError,
    PayloadTooLargeError,
    Run,
    Streamline,
    ValidationError,
    Workflow,
    create_hook,
    is_timeout,
)
from streamline_pool.engine.hooks import hash_token
from streamline_pool.protocol.answers import answer_hook
from support import eventually, present


class Offering:
    """A workflow whose first step creates a hook and waits. `tokens` are those of its hooks, oldest first."""

    def __init__(self, app: Streamline, *, name: str = "offering", expires_in: Any = None, timeout: Any = None) -> None:
        self.tokens: list[str] = []

        def offer(ctx: Any) -> None:
            self.tokens.append(create_hook(ctx, "sign here", expires_in=expires_in).token)
            ctx.wait("sign here", timeout=timeout)

        self.workflow: Workflow = app.workflow(name, steps={"offer": offer, "use": lambda ctx: ctx.get_output("offer")})

    def begin(self, **options: Any) -> tuple[Run, str]:
        run = self.workflow.execute(self.workflow.start(**options).id)
        assert present(run.step("offer").waiting_for)["type"] == "webhook"
        return run, self.tokens[-1]


def refused(app: Streamline, token: Any) -> None:
    """The token must be refused, and nothing in the database may change."""
    before = list(app.runs.find().sort("_id", 1))
    with pytest.raises(HookTokenError) as caught:
        app.resume_hook(token, "from a stranger")
    assert (caught.value.code, caught.value.http_status) == ("HOOK_TOKEN_INVALID", 401)
    assert list(app.runs.find().sort("_id", 1)) == before


def test_a_token_answers_its_wait_and_the_run_goes_on(app: Streamline) -> None:
    offering = Offering(app)
    run, token = offering.begin()
    result = app.resume_hook(token, {"signed": True})
    assert (result.run_id, result.run.id, result.run.step("offer").output) == (run.id, run.id, {"signed": True})
    done = offering.workflow.execute(run.id)
    assert (done.status, done.output, len(offering.tokens)) == ("done", {"signed": True}, 1)
    check_invariants([done.to_dict()])


def test_an_async_handler_makes_a_hook_without_await(app: Streamline) -> None:
    tokens: list[str] = []

    async def offer(ctx: Any) -> None:
        hook = create_hook(ctx, "sign here")
        assert hook.path == "/hooks/" + hook.token
        tokens.append(hook.token)
        ctx.wait("sign here")

    workflow = app.workflow("w", steps={"offer": offer})
    run = workflow.execute(workflow.start().id)
    assert app.resume_hook(tokens[0], "yes").run_id == run.id


@pytest.mark.parametrize("run_id", ["plain", "order.5/ключ ~?#%", "\U0001f600" * 25, "x" * 100])
def test_what_is_stored_of_a_token_does_not_answer_anything(app: Streamline, run_id: str) -> None:
    """A reader of the database, of a dump or of a log must not be able to answer a wait with what is stored."""
    offering = Offering(app)
    run, token = offering.begin(run_id=run_id)
    secret = token.rpartition(".")[2]
    assert secret.encode() not in bson.encode(stored(app, run))
    (hook,) = stored(app, run)["steps"][0]["hooks"]
    for stolen in (hook["hash"].hex(), f"{run_id}.{hook['hash'].hex()}", token[: -len(secret)] + hook["hash"].hex()):
        refused(app, stolen)
    assert app.resume_hook(token, 1).run_id == run_id


def test_a_token_is_accepted_once(app: Streamline) -> None:
    offering = Offering(app)
    run, token = offering.begin()
    app.resume_hook(token, "first")
    refused(app, token)
    assert offering.workflow.execute(run.id).output == "first"
    refused(app, token)


def test_a_token_that_is_not_exactly_it_changes_nothing(app: Streamline) -> None:
    offering = Offering(app)
    (one, token), (other, others) = offering.begin(), offering.begin()
    name, _, secret = token.rpartition(".")
    flipped = "B" if secret[-1] == "A" else "A"
    wrong: list[Any] = [
        f"{name}.{secret[:-1]}{flipped}", f"{name}.{secret}A", f"{name}.{secret[:-1]}", f"{name}.{others.rpartition('.')[2]}",
        f"{other.id}.{secret}", f"unknown.{secret}", token.swapcase(), f"~{token}", f"{token} ", f"/hooks/{token}", name, "", None, 5,
        {"$ne": None}, "x" * 10_000,
    ]  # fmt: skip
    for bad in wrong:
        refused(app, bad)
    assert app.resume_hook(token, "still good").run_id == one.id


def test_an_expired_token_is_refused_by_the_servers_clock_and_the_wait_goes_on(app: Streamline) -> None:
    offering = Offering(app, expires_in=timedelta(hours=1))
    run, token = offering.begin()
    expires_at = stored(app, run)["steps"][0]["hooks"][0]["expiresAt"]
    assert timedelta(minutes=59) < expires_at - datetime.now(UTC) <= timedelta(hours=1)
    app.runs.update_one({"_id": run.id}, {"$set": {"steps.0.hooks.0.expiresAt": datetime.now(UTC) - timedelta(seconds=1)}})
    refused(app, token)
    assert present(offering.workflow.get(run.id)).step("offer").status == "waiting"
    assert offering.workflow.resume(run.id, "in person").step("offer").output == "in person"


def test_the_databases_own_filter_holds_hash_generation_and_expiry(app: Streamline) -> None:
    """The run may change between the read and the write of an answer, so the write's own filter must decide."""
    offering = Offering(app)
    run, token = offering.begin()
    before = stored(app, run)
    past = datetime.now(UTC) - timedelta(seconds=1)
    good, gen = hash_token(token), before["waitGen"]
    wrong = [(hash_token(token + "x"), gen, None), (good, gen + 1, None), (good, gen - 1, None), (good, gen, past), (b"", gen, None)]
    for token_hash, number, expires_at in wrong:
        answer = answer_hook(run.id, "offer", number, token_hash, expires_at, "stolen", 100, "answer")
        assert app.store().run(answer) is None
        assert stored(app, run) == before
    assert app.store().run(answer_hook(run.id, "offer", gen, good, None, "mine", 100, "answer"))["steps"][0]["output"] == "mine"


def test_a_token_expires_although_no_process_checks_it(app: Streamline) -> None:
    offering = Offering(app, expires_in=0.3)
    _, early = offering.begin()
    app.resume_hook(early, "in time")
    run, late = offering.begin()
    expires_at = stored(app, run)["steps"][0]["hooks"][0]["expiresAt"]
    eventually(lambda: datetime.now(UTC) > expires_at + timedelta(milliseconds=50))
    refused(app, late)


def test_a_token_of_a_wait_that_is_over_does_not_answer_the_next_one(app: Streamline) -> None:
    """With two signatures in one run, the link of the first must not answer the second."""
    first, second = [], []

    def one(ctx: Any) -> None:
        first.append(create_hook(ctx, "sign one").token)
        ctx.wait("sign one", timeout=0.1)

    def two(ctx: Any) -> None:
        second.append(create_hook(ctx, "sign two").token)
        ctx.wait("sign two")

    workflow = app.workflow("w", steps={"one": one, "two": two})
    run = workflow.start()
    run_until_idle(app)
    waiting = present(workflow.get(run.id))
    assert (is_timeout(waiting.step("one").output), waiting.step("two").status) == (True, "waiting")
    refused(app, first[0])
    app.resume_hook(second[0], "signed")
    run_until_idle(app)
    assert present(workflow.get(run.id)).output == "signed"


def test_a_rewind_invalidates_the_hooks_of_the_steps_that_it_resets(app: Streamline) -> None:
    """A link in a mail from before the rewind must not answer the new wait."""
    offering = Offering(app)
    run, old = offering.begin()
    offering.workflow.rewind_to(run.id, "offer")
    refused(app, old)
    offering.workflow.execute(run.id)
    refused(app, old)
    app.resume_hook(offering.tokens[-1], "new")
    assert offering.workflow.execute(run.id).output == "new"


def test_a_cancelled_and_an_answered_run_have_no_open_hooks(app: Streamline) -> None:
    offering = Offering(app)
    run, token = offering.begin()
    offering.workflow.cancel(run.id)
    refused(app, token)
    run, token = offering.begin()
    offering.workflow.resume(run.id, "in person")
    refused(app, token)


@pytest.mark.parametrize("ending", ["sleep", "wait_for", "return"])
def test_a_hook_answers_nothing_but_a_wait(app: Streamline, ending: str) -> None:
    """A hook belongs to the step's next `wait`; its bearer must not be able to end a sleep or a wait for an event."""
    tokens: list[str] = []

    def offer(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "sign here").token)
        match ending:
            case "sleep":
                ctx.sleep(3600)
            case "wait_for":
                ctx.wait_for("news")

    workflow = app.workflow("w", steps={"offer": offer, "then": lambda ctx: ctx.wait("then?")})
    workflow.execute(workflow.start().id)
    refused(app, tokens[0])


@pytest.mark.parametrize("how", ["in the inbox", "to one", "to all"])
def test_an_early_answer_leaves_the_inbox_with_the_step_that_an_event_ends(app: Streamline, how: str) -> None:
    """An answer that no wait can take any more would occupy the inbox, which is bounded, until the run is deleted."""

    def offer(ctx: Any) -> None:
        app.resume_hook(create_hook(ctx, "sign here").token, "early")
        app.send_event("other", "of a later step", run_id=ctx.run_id)
        if how == "in the inbox":
            app.send_event("news", "by the event", run_id=ctx.run_id)
        ctx.wait_for("news")

    workflow = app.workflow("w", steps={"offer": offer, "use": lambda ctx: ctx.wait_for("later")})
    run = workflow.execute(workflow.start().id)
    if how != "in the inbox":
        assert app.send_event("news", "by the event", run_id=run.id if how == "to one" else None) == 1
        run = workflow.execute(run.id)
    assert (run.step("offer").output, run.current_step_id) == ("by the event", "use")
    assert [item["data"] for item in run.document["inbox"]] == ["of a later step"]


# --- before the wait ------------------------------------------------------------------------------------------------


def test_an_answer_before_the_wait_is_kept_for_it(app: Streamline) -> None:
    """The receiver of a link may answer before the handler that sent it has begun its wait."""

    def offer(ctx: Any) -> None:
        token = create_hook(ctx, "sign here").token
        early = app.resume_hook(token, {"$early": True})
        assert early.run.step("offer").status == "running"
        refused(app, token)
        ctx.wait("sign here")

    workflow = app.workflow("w", steps={"offer": offer, "use": lambda ctx: ctx.get_output("offer"), "next": lambda ctx: ctx.wait("next?")})
    run = workflow.execute(workflow.start().id)
    assert (run.step("offer").output, run.step("use").output) == ({"$early": True}, {"$early": True})
    assert (run.document["waitGen"], run.document["inbox"]) == (2, []), (
        "the wait was answered without being stored: it is counted, and its answer is used up"
    )


def test_an_early_answer_outlives_the_attempt_and_tokens_of_all_attempts_are_valid(app: Streamline) -> None:
    """The mail with the first attempt's link is sent already, and the attempt's failure cannot undo that."""
    tokens: list[str] = []

    def offer(ctx: Any) -> None:
        tokens.append(create_hook(ctx, "sign here").token)
        if ctx.attempt < ctx.input["attempts"]:
            if ctx.input["early"]:
                app.resume_hook(tokens[-1], "early")
            raise ConnectionError("the mail server is down")
        ctx.wait("sign here")

    workflow = app.workflow("w", steps={"offer": (offer, {"retry_delay": 0}), "use": lambda ctx: ctx.get_output("offer")})
    run = workflow.start({"attempts": 2, "early": True})
    run_until_idle(app)
    assert (present(workflow.get(run.id)).status, present(workflow.get(run.id)).output) == ("done", "early")
    for chosen in (0, 1):
        tokens.clear()
        run = workflow.start({"attempts": 2, "early": False})
        run_until_idle(app)
        app.resume_hook(tokens[chosen], f"token {chosen}")
        refused(app, tokens[1 - chosen])
        run_until_idle(app)
        assert present(workflow.get(run.id)).output == f"token {chosen}"


def test_an_early_answer_beyond_the_inbox_is_refused_and_can_be_sent_again(app: Streamline) -> None:
    def offer(ctx: Any) -> None:
        token = create_hook(ctx, "sign here").token
        for number in range(100):
            app.send_event("filler", number, run_id=ctx.run_id)
        before = app.runs.find_one({"_id": ctx.run_id})
        with pytest.raises(PayloadTooLargeError, match="100 items"):
            app.resume_hook(token, "early")
        assert app.runs.find_one({"_id": ctx.run_id}) == before
        tokens.append(token)
        ctx.wait("sign here")

    tokens: list[str] = []
    workflow = app.workflow("w", steps={"offer": offer})
    run = workflow.execute(workflow.start().id)
    assert run.status == "waiting", run.error
    assert app.resume_hook(tokens[0], "now it waits").run.step("offer").output == "now it waits"


def test_a_step_has_one_open_hook(app: Streamline) -> None:
    caught: list[str] = []

    def offer(ctx: Any) -> None:
        create_hook(ctx, "one")
        try:
            create_hook(ctx, "two")
        except InvalidStateError as exc:
            caught.append(exc.code)
        ctx.wait("one")

    workflow = app.workflow("w", steps={"offer": offer})
    run = workflow.execute(workflow.start().id)
    assert (caught, len(run.document["steps"][0]["hooks"])) == (["INVALID_STATE"], 1)


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_worker_that_has_lost_the_run_gets_no_token(app: Streamline, kind: str) -> None:
    """The handler would send its token to a person, and the token would never be accepted."""
    caught: list[str] = []

    def offer(ctx: Any) -> None:
        app.runs.update_one({"_id": ctx.run_id}, {"$set": {"lease.id": "another's"}, "$inc": {"token": 1}})
        try:
            create_hook(ctx, "sign here")
        except LeaseLostError as exc:
            caught.append(exc.code)

    async def offer_async(ctx: Any) -> None:
        offer(ctx)

    workflow = app.workflow("w", steps={"offer": offer if kind == "def" else offer_async})
    run = workflow.execute(workflow.start().id)
    assert caught == ["LEASE_LOST"]
    assert "hooks" not in stored(app, run)["steps"][0]


def test_an_answer_that_cannot_be_stored_uses_up_no_token(app: Streamline) -> None:
    offering = Offering(app)
    run, token = offering.begin()
    before = stored(app, run)
    with pytest.raises(ValidationError, match=r"resume_hook: payload\.a"):
        app.resume_hook(token, {"a": object()})
    assert stored(app, run) == before
    assert app.resume_hook(token).run.step("offer").output is None


def test_a_paused_run_takes_the_answer_and_goes_on_when_it_is_resumed(app: Streamline) -> None:
    offering = Offering(app)
    run, token = offering.begin()
    offering.workflow.pause(run.id)
    answered = app.resume_hook(token, "signed").run
    assert (answered.paused, answered.step("offer").output) == (True, "signed")
    run_until_idle(app)
    assert present(offering.workflow.get(run.id)).status == "running"
    offering.workflow.resume(run.id)
    run_until_idle(app)
    assert present(offering.workflow.get(run.id)).output == "signed"


# --- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_of_two_bearers_of_one_token_in_two_processes_one_is_accepted(
    client: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    """The token is known before the wait is stored, so answers from two processes arrive before, during and after that write."""
    chance = random.Random(3)
    hooked = client.workflows["hooked"]
    with (
        waiting_pool(tmp_path, mongodb_uri, database),
        other_program(mongodb_uri, database) as left,
        other_program(mongodb_uri, database) as right,
    ):
        kinds = {"early": 0, "waiting": 0}
        for _ in range(40):
            run = hooked.start()
            (entry,) = eventually(partial(evidence, client, "token", run=run.id))
            if chance.random() < 0.3:
                until_step(client, run, "offer", "waiting")
            kinds["waiting" if stored(client, run)["steps"][0]["status"] == "waiting" else "early"] += 1
            left.ask("resume_hook", entry["token"], "left")
            right.ask("resume_hook", entry["token"], "right")
            answers = {"left": left.answer(), "right": right.answer()}
            winners = [who for who, answer in answers.items() if "error" not in answer]
            losers = [answer for answer in answers.values() if "error" in answer]
            assert (len(winners), losers) == (1, [{"error": "HOOK_TOKEN_INVALID"}]), answers
            assert hooked.wait_for(run.id, timeout=20).output == winners[0]
    print(kinds)
    assert len(evidence(client, "token")) == 40


@pytest.mark.timeout(120)
def test_a_token_is_accepted_after_every_process_that_knew_it_has_ended(
    client: Streamline, mongodb_uri: str, database: str, tmp_path: Path
) -> None:
    hooked = client.workflows["hooked"]
    with waiting_pool(tmp_path / "first", mongodb_uri, database) as pool:
        runs = hooked.start_many([None] * 2)
        for run in runs:
            until_step(client, run, "offer", "waiting")
        tokens = {entry["run"]: entry["token"] for entry in evidence(client, "token")}
        for child in pool.children():
            child.kill()
        os.kill(pool.pid, signal.SIGKILL)
    with other_program(mongodb_uri, database) as other:
        without_a_pool, with_another = runs
        assert other.call("resume_hook", tokens[without_a_pool.id], "without a pool")["id"] == without_a_pool.id
        with waiting_pool(tmp_path / "second", mongodb_uri, database):
            assert other.call("resume_hook", tokens[with_another.id], "to the next")["id"] == with_another.id
            assert hooked.wait_for(without_a_pool.id, timeout=20).output == "without a pool"
            assert hooked.wait_for(with_another.id, timeout=20).output == "to the next"
        assert other.call("resume_hook", tokens[with_another.id], "again") == {"error": "HOOK_TOKEN_INVALID"}
