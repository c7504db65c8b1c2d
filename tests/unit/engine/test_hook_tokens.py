"""Hook tokens: their form for every possible run id, and what is stored of them."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.config.env import system_env
from streamline_pool.domain.errors import HookTokenError
from streamline_pool.engine.hooks import Hook, hash_token, make_token, run_id_of

SECRET = "s" * 32
ODD_IDS = [
    "run", "r", "a-b_c", "order.5", "a/b/../c", "~", "~run", "~cnVu", "a b", "a%20b", "a?b#c", "…", "ключ", "\U0001f600" * 100, "x" * 100,
    "." * 100, "\n", "a\n", "$where", "é", "e\u0301", "%2e%2e", "\u202e", "cnVu", "-", "_",
]  # fmt: skip
run_ids = st.text(min_size=1, max_size=100).filter(lambda text: "\0" not in text and text.encode("utf-8", "ignore").decode() == text)


@pytest.mark.parametrize("run_id", ODD_IDS)
def test_a_token_names_its_run_and_can_stand_in_an_address(run_id: str) -> None:
    token = make_token(run_id, SECRET)
    assert run_id_of(token) == run_id
    assert re.fullmatch(r"[A-Za-z0-9_.~-]+", token), "the characters that a URL never encodes (RFC 3986)"


@given(run_ids)
def test_a_token_yields_its_run_id_for_every_run_id(run_id: str) -> None:
    assert run_id_of(make_token(run_id, SECRET)) == run_id


@given(run_ids, run_ids)
def test_two_runs_never_share_a_token(one: str, other: str) -> None:
    """A plain run id and the encoded id of another run could be equal."""
    assert one == other or make_token(one, SECRET) != make_token(other, SECRET)


@pytest.mark.parametrize(
    "token",
    [
        "", "run", "run.", ".secret", "run.short", f"run.{SECRET}.{SECRET}", f"run.{SECRET}\n", f" run.{SECRET}", f"run/{SECRET}", None, 5,
        b"run", ["run"], f"~!.{SECRET}", f"~.{SECRET}", f"~a.{SECRET}", f"~_w.{SECRET}", f"~~cnVu.{SECRET}", f"{'r' * 2000}.{SECRET}",
        f"run.{'s' * 101}", f"ключ.{SECRET}", f"run.{SECRET}\0", f"$where.{SECRET}", {"$ne": None},
    ],
)  # fmt: skip
def test_malformed_text_is_refused_without_a_query(token: Any) -> None:
    with pytest.raises(HookTokenError) as caught:
        run_id_of(token)
    assert (caught.value.code, caught.value.http_status) == ("HOOK_TOKEN_INVALID", 401)
    assert SECRET not in str(caught.value), "errors end up in logs"


@given(st.text(max_size=1000) | st.binary(max_size=50) | st.none() | st.integers())
def test_every_text_is_a_token_or_a_hook_token_error(token: Any) -> None:
    """Strangers may send any text to the URL of a hook; it must never cause another error."""
    with contextlib.suppress(HookTokenError):
        assert isinstance(run_id_of(token), str)


def test_a_secret_has_at_least_128_random_bits_and_is_never_the_same() -> None:
    secrets = {system_env().new_secret() for _ in range(1000)}
    assert len(secrets) == 1000
    assert min(map(len, secrets)) * 6 >= 128, "six bits for each character of base 64"


def test_the_whole_token_is_hashed() -> None:
    """If only the secret were hashed, it would also be accepted for another run that a stranger names."""
    hashes = {hash_token(make_token(run_id, secret)) for run_id in ("a", "b") for secret in (SECRET, "t" * 32)}
    assert len(hashes) == 4
    assert all(len(value) == 32 and SECRET.encode() not in value for value in hashes)


def test_a_hook_is_a_token_and_its_path() -> None:
    hook = Hook("t", "/hooks/t")
    assert (hook.token, hook.path) == ("t", "/hooks/t")
