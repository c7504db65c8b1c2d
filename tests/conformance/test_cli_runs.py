"""The command and runs: starting, looking, cancelling, and the pool that works on them."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from cli_shell import COMMAND, NOWHERE, Shell, wait_for_line

from support import eventually


def test_a_run_from_start_to_end(shell: Shell, pool: subprocess.Popen[str]) -> None:
    done = shell("start", "orders", "--input", '{"sku": 7}', "--id", "o-1", "--wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "o-1"
    assert "output: charged" in done.stdout
    stored = shell.json("runs", "show", "o-1")
    assert (stored["_id"], stored["status"], stored["input"]) == ("o-1", "done", {"sku": 7})
    text = shell("runs", "show", "o-1").stdout
    assert "It was done " in text
    watched = shell("runs", "watch", "o-1")
    assert watched.returncode == 0
    assert "run done" in watched.stdout
    failed = shell("start", "orders", "--input", '"broke"', "--wait")
    assert failed.returncode == 1
    assert "card refused" in failed.stdout
    run_id = failed.stdout.splitlines()[0]
    assert shell("runs", "watch", run_id).returncode == 1
    shown = shell("runs", "show", run_id).stdout
    assert "It failed " in shown
    assert "ValueError: card refused" in shown
    assert 'in charge\n    raise ValueError("card refused")' in shown, "the traceback"


@pytest.mark.slow
def test_a_run_that_no_pool_takes_says_what_it_needs_and_can_be_cancelled(shell: Shell) -> None:
    run = shell.json("start", "slow", "--id", "s-1", "--priority", "3")
    assert (run["_id"], run["queue"], run["priority"]) == ("s-1", "mail", 3)
    assert "needs a worker that has workflow slow 2.0.0 on queue mail; no pool has been seen" in shell("runs", "show", "s-1").stdout
    waited = shell("start", "slow", "--id", "s-2", "--wait", "--timeout", "0.1")
    assert waited.returncode == 1
    assert "run s-2 has not ended within 0.1 s" in waited.stderr
    assert "no pool has been seen in the last minute" in waited.stderr, "the wait would be for ever, without a word"
    cancelled = shell.json("runs", "cancel", "s-1", "--reason", "typo")
    assert (cancelled["status"], cancelled["cancelReason"]) == ("cancelled", "typo")
    assert "It was cancelled " in shell("runs", "show", "s-1").stdout
    assert shell("runs", "cancel", "s-1").returncode == 0
    assert shell("runs", "watch", "s-1").returncode == 1


@pytest.mark.slow
def test_list_filters_and_limits(shell: Shell) -> None:
    for number in range(3):
        shell("start", "orders", "--id", f"o-{number}", "--queue", "fast" if number else "default")
    shell("start", "slow", "--id", "s-0")
    shell("runs", "cancel", "o-2")

    def ids(*words: str) -> list[str]:
        return [run["_id"] for run in shell.json("runs", "list", *words)]

    assert ids() == ["s-0", "o-2", "o-1", "o-0"]
    assert ids("--limit", "2") == ["s-0", "o-2"]
    assert ids("--workflow", "slow") == ["s-0"]
    assert ids("--queue", "fast") == ["o-2", "o-1"]
    assert ids("--status", "cancelled") == ["o-2"]
    assert ids("--status", "done") == []
    assert shell("runs", "list").stdout.splitlines()[0].split()[:3] == ["RUN", "WORKFLOW", "VERSION"]


@pytest.mark.slow
def test_an_unknown_run_is_5(shell: Shell) -> None:
    for words in (("show",), ("cancel",), ("watch",), ("pause",), ("resume",), ("rewind", "nobody")):
        done = shell("runs", *words, "nobody", "--json")
        assert (done.returncode, done.stdout) == (5, "")
        assert "nobody" in done.stderr


@pytest.mark.slow
def test_start_reads_input_from_anywhere_and_says_what_is_wrong_with_it(shell: Shell) -> None:
    (shell.folder / "in.json").write_text('{"a": 1}')
    assert shell.json("start", "orders", "--input", "@in.json")["input"] == {"a": 1}
    piped = shell("start", "orders", "--input", "-", "--json", stdin="[2]")
    assert json.loads(piped.stdout)["input"] == [2]
    for words, said in (
        (("orders", "--input", "{a: 1}"), "--input is not JSON"),
        (("orders", "--input", "@nowhere.json"), "cannot read nowhere.json"),
        (("ordres",), "no workflow 'ordres'. Did you mean orders?"),
        (("orders", "--queue", "a b"), "queue 'a b'"),
    ):
        done = shell("start", *words)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.slow
def test_a_run_is_answered_paused_resumed_and_rewound_from_the_command(shell: Shell) -> None:
    """Operators have no Python prompt at hand: whatever a program can do to a run, the command can."""
    shell("start", "asking", "--id", "a-1")
    shell("--burst")
    assert "waits for an answer (may it?). Answer it with: streamline-pool runs resume a-1" in shell("runs", "show", "a-1").stdout
    refused = shell("runs", "pause", "a-1", "--reason", "audit")
    assert refused.stdout == "run a-1 is paused\n"
    assert "It is paused (audit)" in shell("runs", "show", "a-1").stdout
    early = shell("runs", "resume", "a-1", "--payload", "true")
    assert early.returncode == 1
    assert "INVALID_STATE: run a-1 is paused" in early.stderr
    assert shell.json("runs", "resume", "a-1")["status"] == "waiting", "the wait stays unanswered"
    assert shell("runs", "resume", "a-1", "--payload", "{no").returncode == 2
    assert shell("runs", "resume", "a-1", "--payload", '{"ok": true}').stdout == "run a-1 goes on with step act\n"
    shell("--burst")
    assert shell.json("runs", "show", "a-1")["output"] == {"ok": True}
    again = shell("runs", "resume", "a-1", "--payload", "1")
    assert (again.returncode, "waits for no answer: it is done" in again.stderr) == (1, True)
    assert shell("runs", "rewind", "a-1", "ask").stdout == "run a-1 is back at step ask\n"
    assert "no step 'nowhere'" in shell("runs", "rewind", "a-1", "nowhere").stderr
    assert shell.json("runs", "show", "a-1")["steps"][1] == {"stepId": "act", "status": "pending", "attempts": 0}


@pytest.mark.slow
def test_an_idempotency_key_starts_one_run(shell: Shell) -> None:
    first = shell("start", "orders", "--idempotency-key", "k").stdout
    assert shell("start", "orders", "--idempotency-key", "k", "--input", "3").stdout == first


# --- the pool -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_burst_does_the_work_and_ends_with_0(shell: Shell) -> None:
    shell("start", "orders", "--id", "o-1")
    shell("start", "slow", "--id", "s-1")
    done = shell("--burst")
    assert done.returncode == 0, done.stderr
    assert "streamline-pool" in done.stderr
    assert "orders 1.0.0" in done.stderr
    assert "ready" in done.stderr
    assert shell.json("runs", "show", "o-1")["status"] == "done"
    assert shell.json("runs", "show", "s-1")["status"] == "waiting"
    assert "sleeps; it goes on in " in shell("runs", "show", "s-1").stdout


@pytest.mark.slow
def test_every_line_of_a_json_log_is_one_object(shell: Shell) -> None:
    """One stray line and a log collector drops, or worse, mixes up records."""
    shell("start", "orders", "--input", '"broke"')
    (shell.folder / "noisy.py").write_text("import warnings\nfrom shop import app\nwarnings.warn('odd')\n")
    done = shell("--burst", "--app", "noisy:app", "--log-format", "json")
    assert done.returncode == 0, done.stderr
    entries = [json.loads(line) for line in done.stderr.splitlines()]
    assert any("odd" in entry["event"] for entry in entries)
    assert any(entry["event"] == "ready" for entry in entries)
    for words, code in (
        (("--log-format", "json", "--no-such"), 2),
        (("--log-format", "json", "--workers", "x"), 2),
        (("--log-format=json",), 3),
    ):
        failed = shell(*words, STREAMLINE_MONGODB_URI=NOWHERE)
        assert failed.returncode == code
        assert [json.loads(line)["level"] for line in failed.stderr.splitlines()][-1] == "error"


@pytest.mark.slow
def test_workers_lists_the_processes_of_a_live_pool(shell: Shell, pool: subprocess.Popen[str]) -> None:
    found = eventually(lambda: [worker for worker in shell.json("workers") if worker["state"] == "ready"], timeout=20)
    assert len(found) == 1
    assert Path(f"/proc/{found[0]['pid']}").exists()
    assert found[0]["host"]
    assert str(found[0]["pid"]) in shell("workers").stdout


def test_a_terminated_pool_drains_and_ends_with_0(shell: Shell) -> None:
    process = shell.start_pool()
    try:
        wait_for_line(process, "ready")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert shell.json("workers") == []


@pytest.mark.slow
def test_embedded_needs_no_server_and_keeps_its_data(offline: Shell) -> None:
    """The first thing a newcomer types must work on a bare machine."""
    words = ("--embedded", "--app", "shop:app")
    started = offline(*words, "start", "orders", "--id", "o-1", STREAMLINE_MONGODB_URI="")
    assert started.returncode == 0, started.stderr
    assert offline(*words, "--burst", STREAMLINE_MONGODB_URI="").returncode == 0
    shown = offline(*words, "runs", "show", "o-1", "--json", STREAMLINE_MONGODB_URI="")
    assert json.loads(shown.stdout)["status"] == "done"
    assert offline(*words, "--mongodb-uri", NOWHERE).returncode == 2, "two servers named by flags"
    assert offline(*words[1:], "--burst", STREAMLINE_EMBEDDED="1").returncode == 78, "two servers named by variables"
    stronger = offline("runs", "list", "--mongodb-uri", NOWHERE, STREAMLINE_EMBEDDED="1", STREAMLINE_MONGODB_URI="")
    assert stronger.returncode == 3, "a flag beats a variable, so the address where nothing listens was tried"


@pytest.mark.slow
def test_a_second_command_finds_the_private_server_of_the_first(offline: Shell) -> None:
    """Two shells in one folder: a pool in one, `start` in the other. A data folder has room for one server only."""
    process = offline.start_pool("--embedded", "--app", "shop:app", "--workers", "1")
    try:
        wait_for_line(process, "ready")
        done = offline("--embedded", "start", "orders", "--wait", "--app", "shop:app")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "output: charged")
        process.terminate()
        process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert (offline.folder / ".streamline" / ".gitignore").read_text() == "*\n"
    forgotten = offline("runs", "list", STREAMLINE_MONGODB_URI="")
    assert forgotten.returncode == 0 or "was --embedded forgotten?" in forgotten.stderr, "0: something listens at the default address"
    found = offline("--embedded", "runs", "list", "--json")  # its address is out of date now, and nobody is misled by it
    assert [run["status"] for run in json.loads(found.stdout)] == ["done"]


@pytest.mark.slow
def test_a_private_server_that_is_about_to_end_is_not_used(offline: Shell) -> None:
    """A command right after one that was killed, in the same folder: the server of the first takes a moment to end."""
    for number in range(3):
        process = offline.start_pool("--embedded", "--app", "shop:app", "--workers", "1")
        try:
            wait_for_line(process, "ready")
        finally:
            process.kill()
            process.communicate()
        done = offline("--embedded", "start", "orders", "--app", "shop:app", "--id", f"o-{number}")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_private_server_of_its_own_is_nothing_to_wait_on(offline: Shell) -> None:
    """`start --wait` before there is a pool: its server would end with it, and take the pool that came to help down."""
    words = ("--embedded", "--app", "shop:app")
    waited = offline(*words, "start", "orders", "--id", "o-1", "--wait")
    assert waited.returncode == 1
    assert "run o-1 is stored, but no pool works on it" in waited.stderr
    assert offline(*words, "runs", "watch", "o-1").returncode == 1
    assert offline(*words, "--burst").returncode == 0
    assert offline(*words, "runs", "watch", "o-1").returncode == 0


@pytest.mark.slow
def test_a_pool_on_the_private_server_of_another_command_is_warned(offline: Shell) -> None:
    words = ("--embedded", "--app", "shop:app", "--workers", "1")
    pools = [offline.start_pool(*words)]
    try:
        assert "export STREAMLINE_MONGODB_URI='mongodb://127.0.0.1:" in wait_for_line(pools[0], "ready")
        pools.insert(0, offline.start_pool(*words))
        assert "it ends with the command that started it" in wait_for_line(pools[0], "ready")
    finally:
        for pool in pools:
            pool.terminate()
            pool.communicate(timeout=30)
    assert [pool.returncode for pool in pools] == [0, 0]


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_crash(shell: Shell) -> None:
    for number in range(2):
        shell("start", "orders", "--id", f"o-{number}")
    process = subprocess.Popen(
        [*COMMAND, "runs", "list", "--json"], cwd=shell.folder, env=shell.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 1
    process.stderr.close()


@pytest.mark.slow
def test_a_command_without_a_reader_or_without_standard_output_ends(shell: Shell) -> None:
    """A thread of the user's module kept the command alive for ever when its reader was gone."""
    shell("start", "orders", "--id", "o-1")
    shell("runs", "cancel", "o-1")
    with (shell.folder / "shop.py").open("a") as module:
        module.write("\nimport threading\nthreading.Thread(target=threading.Event().wait).start()\n")
    command = shlex.join(COMMAND)
    for line in (f"{command} start orders > >(true)", f"{command} runs watch o-1 >&-"):
        done = subprocess.run(["bash", "-c", line], cwd=shell.folder, env=shell.environ, stderr=subprocess.PIPE, text=True, timeout=40)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
def test_standard_output_on_a_full_disk_is_no_crash(shell: Shell) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "runs", "list", "--json"], cwd=shell.folder, env=shell.environ, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "Error: cannot write: No space left on device\n")
