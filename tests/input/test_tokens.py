"""Tokens of hooks: every text but the one that is due is refused with the documented code, and nothing is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from hostile_values import TEXTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parked_runs import Waiting

from streamline_pool import HookTokenError, Streamline

CHARACTERS = "ABCxyz019_-.~"


def everything(app: Streamline) -> list[list[dict[str, Any]]]:
    """All that is stored of runs."""
    return [list(app.store().collection(name).find().sort("_id", 1)) for name in ("runs", "events", "outputs")]


def refused(app: Streamline, token: Any, payload: Any = 1) -> None:
    with pytest.raises(HookTokenError) as caught:
        app.resume_hook(token, payload)
    assert caught.value.http_status == 401
    assert str(token) not in caught.value.message or len(str(token)) < 12  # a log of errors must not become a list of tokens


def changed(token: str) -> list[str]:
    """The token with one character replaced, removed, added or moved, at each of some places."""
    places = [0, 1, token.index(".") - 1, token.index("."), token.index(".") + 1, len(token) - 1]
    other = [("A" if token[place] != "A" else "B") for place in places]
    made = [token[:place] + char + token[place + 1 :] for place, char in zip(places, other, strict=True)]
    made += [token[:place] + token[place + 1 :] for place in places]
    made += [token[:place] + "A" + token[place:] for place in places]
    made += [
        token.upper(),
        token.lower(),
        f" {token}",
        f"{token} ",
        f"{token}\n",
        f"{token}\0",
        token[::-1],
        token * 2,
        quote(token, safe=""),
    ]
    return [each for each in dict.fromkeys(made) if each != token]


NO_TOKENS: list[Any] = [*TEXTS, "", ".", "..", "x.", ".x", "x" * 10_000, "\ud800.x", None, 5, b"x.y", ["x"], {"$gt": ""}, True]


def test_no_text_but_the_token_is_taken_and_nothing_is_stored(app: Streamline, waiting: Waiting) -> None:
    run_id = waiting.parked("hook")
    token = waiting.tokens[-1]
    before = everything(app)
    for wrong in [*changed(token), *NO_TOKENS, *(f"{run_id}{text}" for text in TEXTS), *(f"{run_id}.{text}" for text in TEXTS)]:
        refused(app, wrong)
    refused(app, token[:-1], "x" * 20_000)  # a large answer is stored beside its run: not for a wrong token
    assert everything(app) == before
    assert app.resume_hook(token, 1).run.step("first").output == 1
    after = everything(app)
    refused(app, token)
    assert everything(app) == after


@pytest.mark.parametrize("ended", ["answered", "rewound", "cancelled", "another generation", "deleted"])
def test_a_token_of_a_wait_that_is_over_is_refused(app: Streamline, waiting: Waiting, ended: str) -> None:
    run_id = waiting.parked("hook")
    token = waiting.tokens[-1]
    acts: dict[str, Callable[[], Any]] = {
        "answered": lambda: waiting.workflow.resume(run_id, 1),
        "rewound": lambda: waiting.workflow.rewind_to(run_id, "first"),
        "cancelled": lambda: waiting.workflow.cancel(run_id),
        "another generation": lambda: (waiting.workflow.rewind_to(run_id, "first"), waiting.workflow.execute(run_id)),
        "deleted": lambda: app.runs.delete_one({"_id": run_id}),
    }
    acts[ended]()
    before = everything(app)
    refused(app, token)
    assert everything(app) == before


def test_the_token_of_one_run_opens_no_other(app: Streamline, waiting: Waiting) -> None:
    """Each half is checked: the run must be the token's own, and the secret the run's own."""
    runs = [waiting.parked("hook", run_id=run_id) for run_id in ("a", "b", "a.b", "$where")]
    halves = [token.rpartition(".") for token in waiting.tokens]
    before = everything(app)
    for place, (named, _, _) in enumerate(halves):
        for other, (_, _, secret) in enumerate(halves):
            if place != other:
                refused(app, f"{named}.{secret}")
                refused(app, f"{runs[place]}.{secret}")
    assert everything(app) == before
    assert [app.resume_hook(token, 1).run_id for token in waiting.tokens] == runs


@pytest.mark.parametrize("examples", [60, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_text_is_refused(app: Streamline, waiting: Waiting, examples: int) -> None:
    run_id = waiting.parked("hook")
    token = waiting.tokens[-1]
    before = everything(app)
    guesses = st.one_of(
        st.text(max_size=60),
        st.text(st.sampled_from(CHARACTERS), max_size=60),
        st.text(st.sampled_from(CHARACTERS), max_size=60).map(lambda text: f"{run_id}.{text}"),
        st.tuples(st.integers(0, len(token) - 1), st.characters()).map(lambda at: token[: at[0]] + at[1] + token[at[0] + 1 :]),
    ).filter(lambda text: text != token)

    @settings(max_examples=examples, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
    @given(guesses)
    def check(guess: str) -> None:
        refused(app, guess)

    check()
    assert everything(app) == before
