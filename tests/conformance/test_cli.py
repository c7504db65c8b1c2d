"""The command, run as users run it: every exit code, every bad input, and answers that scripts can read.

No test here may see a traceback for something a user can mend, nor a password anywhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from support import eventually

SCRIPT = Path(sys.executable).with_name("streamline-pool")
COMMAND = [str(SCRIPT)] if SCRIPT.exists() else [sys.executable, "-m", "streamline_pool.supervisor.cli"]
REPOSITORY = Path(__file__).resolve().parents[2]
NOWHERE = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200"  # nothing listens on port 1

SHOP = """
from streamline_pool import Streamline

app = Streamline()
orders = app.workflow("orders", defaults={"retries": 1})

@orders.step
def reserve(ctx):
    return {"reserved": ctx.input}

@orders.step
def charge(ctx):
    if ctx.input == "broke":
        raise ValueError("card refused")
    return "charged"

slow = app.workflow("slow", version="2.0.0", queue="mail")

@slow.step
def nap(ctx):
    ctx.sleep(3600)
"""


class Shell:
    """A folder with an application in it, and the command run there."""

    def __init__(self, folder: Path, environ: Mapping[str, str]) -> None:
        self.folder = folder
        self.environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("STREAMLINE_")},
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            **environ,
        }
        (folder / "shop.py").write_text(SHOP)

    def __call__(self, *words: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *words], cwd=self.folder, env={**self.environ, **environ}, input=stdin, capture_output=True, text=True, timeout=50
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def json(self, *words: str, code: int = 0) -> Any:
        """The one document on standard output."""
        done = self(*words, "--json")
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    def start_pool(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*COMMAND, *words], cwd=self.folder, env=self.environ, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def offline(tmp_path: Path) -> Shell:
    """For what must be told without a database: its address is one where nothing listens."""
    return Shell(tmp_path, {"STREAMLINE_MONGODB_URI": NOWHERE})


@pytest.fixture
def shell(tmp_path: Path, mongodb_uri: str, database: str) -> Shell:
    environ = {
        "STREAMLINE_MONGODB_URI": mongodb_uri,
        "STREAMLINE_DATABASE": database,
        "STREAMLINE_APP": "shop:app",
        "STREAMLINE_WORKERS": "1",
    }
    return Shell(tmp_path, environ)


@pytest.fixture
def pool(shell: Shell) -> Iterator[subprocess.Popen[str]]:
    """A pool that is ready."""
    process = shell.start_pool()
    try:
        assert process.stderr is not None
        wait_for_line(process, "ready")
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def wait_for_line(process: subprocess.Popen[str], word: str) -> str:
    """All that was said up to the line with `word`."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if word in line:
            return "".join(seen)
    raise AssertionError(f"the pool ended before it said {word!r}: {''.join(seen)}")


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_wrong_flag_is_2_and_a_wrong_variable_or_file_is_78(offline: Shell) -> None:
    """A service manager must not restart for ever what only a person can mend, and scripts tell typos from set-ups."""
    assert offline("--workers", "many").returncode == 2
    done = offline(STREAMLINE_WORKERS="many")
    assert (done.returncode, done.stderr) == (78, "Error: STREAMLINE_WORKERS: expected a whole number, found 'many'\n")
    (offline.folder / "pyproject.toml").write_text("[tool.streamline-pool]\nworkers = 'many'\n")
    assert offline("check").returncode == 78
    assert offline("--workers", "2", "--print-config").returncode == 78, "a wrong file is wrong even where a flag overrides it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wrkers = 3", "unknown key 'wrkers'; did you mean workers?"),
        ("workers = ", "is not valid TOML"),
        ("lease = 0", "lease: expected a duration"),
    ],
)
def test_a_bad_file_is_78_and_named(offline: Shell, text: str, said: str) -> None:
    (offline.folder / "streamline-pool.toml").write_text(text)
    done = offline("runs", "list")
    assert done.returncode == 78
    assert done.stderr.startswith("Error: streamline-pool.toml: ")
    assert said in done.stderr


@pytest.mark.parametrize(
    "words", [("--no-such-option",), ("no-such-command",), ("runs", "show"), ("start",), ("runs", "list", "--status", "odd")]
)
def test_wrong_usage_is_2(offline: Shell, words: tuple[str, ...]) -> None:
    assert offline(*words).returncode == 2


def test_print_config_is_a_file_that_can_be_used_and_names_every_source(offline: Shell) -> None:
    (offline.folder / "streamline-pool.toml").write_text('app = "shop:app"\nconcurrency = 7\nmax-rss = "512MB"\n')
    secret = "mongodb://ann:s3cret@db/x"
    done = offline("--print-config", "--queue", "a", "--queue", "b,c", STREAMLINE_MONGODB_URI=secret)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "concurrency = 7  # file: streamline-pool.toml" in lines
    assert 'queue = ["a", "b", "c"]  # flag: --queue' in lines
    assert 'mongodb-uri = "mongodb://ann:***@db/x"  # environment: STREAMLINE_MONGODB_URI' in lines
    assert "# health-port is not set  # default" in lines
    assert "s3cret" not in done.stdout + done.stderr
    config = tomllib.loads(done.stdout)
    (offline.folder / "streamline-pool.toml").write_text(done.stdout)
    again = offline.json("--print-config")
    assert {name: entry["value"] for name, entry in again.items() if name in config and name != "mongodb-uri"} == {
        name: value for name, value in config.items() if name != "mongodb-uri"
    }
    assert again["concurrency"] == {"value": 7, "source": "file", "where": "streamline-pool.toml"}


def test_print_config_shows_the_uri_in_code_where_nothing_else_names_one(offline: Shell) -> None:
    (offline.folder / "coded.py").write_text(SHOP.replace("Streamline()", 'Streamline("mongodb://ann:s3cret@coded/x", database="y")'))
    done = offline("--print-config", "--app", "coded:app", STREAMLINE_MONGODB_URI="")
    assert 'mongodb-uri = "mongodb://ann:***@coded/x"  # code: coded:app' in done.stdout.splitlines()
    assert 'database = "y"  # code: coded:app' in done.stdout.splitlines()
    broken = offline("--print-config", "--app", "nothere:app")
    assert broken.returncode == 0
    assert "there is no module 'nothere'" in broken.stderr


def test_help_names_every_option_with_its_variable_and_every_command(offline: Shell) -> None:
    from streamline_pool.settings import OPTIONS

    text = " ".join(offline("--help").stdout.split())
    for option in OPTIONS:
        assert f"--{option.name}" in text
        assert f"[env: {option.env};" in text
    for name in ("check", "demo", "doctor", "init-db", "runs", "start", "systemd", "workers"):
        assert name in text
        assert offline(name, "--help").returncode == 0 or name == "demo"
    assert offline("--version").stdout.startswith("streamline-pool ")


# --- the application ------------------------------------------------------------------------------------------------

BROKEN_APPS = {
    "missing": ("shopp:app", "", "Did you mean shop:app?"),
    "missing-attribute": ("shop:ap", "", "Streamline objects there: shop:app."),
    "file": ("shop.py:app", "", "name the module, not its file"),
    "submodule": ("shop.flows:app", "", "there is no module 'shop.flows'"),
    "not-ours": ("bad:app", "app = 3", "bad:app is a int, not a Streamline object"),
    "workflow": ("shop:orders", "", "shop:orders is the workflow 'orders'; name the Streamline object it was defined on"),
    "class": ("bad:Streamline", "from streamline_pool import Streamline", "is the class Streamline"),
    "raises": (
        "bad:app",
        "def make():\n    raise RuntimeError('no key')\nmake()",
        "RuntimeError: no key\n  bad.py:3 in <module>: make()\n  bad.py:2 in make",
    ),
    "syntax": ("bad:app", "x = 1\ndef f(:\n", "bad.py:2)\n    def f(:\n"),
    "dependency": (
        "bad:app",
        "import not_installed_anywhere",
        "bad needs the module 'not_installed_anywhere', which is not installed here",
    ),
    "exits": ("bad:app", "import sys\nsys.exit(0)", "bad called sys.exit(0) while it was imported"),
    "twice": ("bad:app", "from shop import *\napp.workflow('orders')", "'orders'"),
    "factory-arguments": ("bad:make", "def make(x): ...", "needs arguments (x)"),
    "factory-result": ("bad:make", "def make(): return None", "bad:make() returned a NoneType, not a Streamline object"),
    "factory-async": ("bad:make", "async def make(): ...", "is an async function"),
    "no-steps": ("bad:app", "from shop import app\napp.workflow('empty')", "workflow empty: it has no steps"),
    "bad-uri-in-code": ("bad:app", "from streamline_pool import Streamline\napp = Streamline('http://x')", "mongodb://"),
}


@pytest.mark.parametrize("case", BROKEN_APPS)
def test_an_application_with_a_fault_is_2_and_told_what_to_do(offline: Shell, case: str) -> None:
    path, source, said = BROKEN_APPS[case]
    (offline.folder / "bad.py").write_text(source)
    done = offline("--app", path, STREAMLINE_MONGODB_URI="" if case == "bad-uri-in-code" else NOWHERE)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert done.stdout == ""


def test_no_application_is_2(offline: Shell) -> None:
    done = offline()
    assert done.returncode == 2
    assert "give --app MODULE:ATTR" in done.stderr


def test_a_client_opened_at_import_is_refused(shell: Shell, mongodb_uri: str) -> None:
    """PyMongo is not fork-safe: such a pool would hang some day, with a lock held by a thread that does not exist."""
    (shell.folder / "bad.py").write_text(
        f"from shop import app\nfrom pymongo import MongoClient\nclient = MongoClient({mongodb_uri!r})\nclient.admin.command('ping')\n"
    )
    done = shell("--app", "bad:app", "--burst")
    assert done.returncode == 2
    assert "fork" in done.stderr


def test_threads_started_at_import_are_named(shell: Shell) -> None:
    (shell.folder / "bad.py").write_text(
        "import threading\nfrom shop import app\nthreading.Thread(target=threading.Event().wait, name='metrics', daemon=True).start()\n"
    )
    assert "metrics" in shell("check", "--app", "bad:app").stderr
    assert "metrics" in shell("--app", "bad:app", "--burst").stderr


def test_factories_dotted_attributes_and_a_lone_application_are_found(shell: Shell) -> None:
    (shell.folder / "made.py").write_text("import shop\nclass box:\n    app = shop.app\ndef make():\n    return shop.app\n")
    for path in ("made:make", "made:box.app", "shop"):
        assert shell.json("check", "--app", path)["ok"] is True


# --- the database ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("--app", "shop:app"), ("check", "--app", "shop:app"), ("runs", "list"), ("workers",), ("init-db",), ("doctor",)]
)
def test_a_database_that_does_not_answer_is_3(offline: Shell, words: tuple[str, ...]) -> None:
    done = offline(*words, STREAMLINE_MONGODB_URI="mongodb://ann:s3cret@127.0.0.1:1/?serverSelectionTimeoutMS=200")
    assert done.returncode == 3, done.stderr
    assert "127.0.0.1:1" in done.stdout + done.stderr
    assert "--embedded" in done.stdout + done.stderr
    assert "s3cret" not in done.stdout + done.stderr


def test_a_wrong_password_is_3_and_says_so(shell: Shell, mongodb_uri: str) -> None:
    uri = mongodb_uri.replace("mongodb://", "mongodb://ann:s3cret@", 1)
    for words in ((), ("runs", "list")):
        done = shell("--mongodb-uri", uri, *words)
        assert done.returncode == 3
        assert "user name or password" in done.stderr
        assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize("uri", ["http://x", "mongodb://ann:s3/cret@h", "mongodb://h:99999", "mongodb://h/?tls=perhaps", "mongodb://"])
def test_a_uri_that_is_none_is_2_as_a_flag_and_78_elsewhere(offline: Shell, uri: str) -> None:
    as_flag, in_environ = offline("--mongodb-uri", uri, "runs", "list"), offline("runs", "list", STREAMLINE_MONGODB_URI=uri)
    (offline.folder / "streamline-pool.toml").write_text(f"mongodb-uri = {json.dumps(uri)}")
    in_file = offline("runs", "list", STREAMLINE_MONGODB_URI="")
    assert [as_flag.returncode, in_environ.returncode, in_file.returncode] == [2, 78, 78]
    assert "s3" not in as_flag.stderr + in_environ.stderr + in_file.stderr


@pytest.fixture
def uri_with_password(mongodb_uri: str, database: str) -> Iterator[str]:
    """A user of the test's own database; the server checks the password of whoever gives one."""
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        client[database].command("createUser", "ann", pwd="s3cret", roles=["readWrite"])
        separator = "&" if "?" in mongodb_uri else "?"
        yield mongodb_uri.replace("mongodb://", "mongodb://ann:s3cret@", 1) + f"{separator}authSource={database}"
        client[database].command("dropUser", "ann")


def test_no_password_in_the_process_list_or_the_log(shell: Shell, uri_with_password: str) -> None:
    """The argument list of every process can be read by every user of the machine."""
    process = shell.start_pool("--mongodb-uri", uri_with_password, "--log-level", "debug")
    try:
        said = wait_for_line(process, "ready")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (process.pid, *children)]
        process.terminate()
        rest = process.communicate(timeout=30)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    assert len(titles) == 3, "supervisor, steward and one worker"
    assert all(b"s3cret" not in title and b"mongodb://ann:***@" in title for title in titles)
    assert "s3cret" not in said + rest


def test_init_db_can_be_repeated(shell: Shell, mongodb_uri: str, database: str) -> None:
    first, second = shell.json("init-db"), shell.json("init-db")
    assert first == second
    assert first["database"] == database
    with MongoClient[dict[str, Any]](mongodb_uri) as client:
        assert {"workflow_runs", "workflow_hosts", "workflow_signals"} <= set(client[database].list_collection_names())
        assert client[database]["workflow_signals"].options()["capped"] is True


def test_check_reports_application_and_database(shell: Shell, database: str) -> None:
    report = shell.json("check")
    assert report["ok"] is True
    assert report["workflows"] == [
        {"id": "orders", "version": "1.0.0", "queue": "default", "steps": ["reserve", "charge"]},
        {"id": "slow", "version": "2.0.0", "queue": "mail", "steps": ["nap"]},
    ]
    assert report["queues"] == ["default", "mail"]
    assert report["database"]["database"] == database
    assert report["database"]["topology"].startswith("replica set")
    text = shell("check").stdout
    assert "orders" in text
    assert "reserve → charge" in text
    away = shell.json("check", "--mongodb-uri", NOWHERE, code=3)
    assert (away["ok"], away["database"]["ok"]) == (False, False)


def test_doctor_finds_nothing_broken_here(shell: Shell) -> None:
    shell("init-db")
    findings = {finding["name"]: finding for finding in shell.json("doctor")}
    assert findings["application"]["state"] == "ok"
    assert findings["database"]["state"] == "ok"
    assert findings["indexes"]["state"] == "ok"
    assert findings["clock"]["state"] == "ok"
    assert "database: " in shell("doctor").stdout


# --- runs -----------------------------------------------------------------------------------------------------------


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
    assert "It failed " in shell("runs", "show", run_id).stdout


def test_a_run_that_no_pool_takes_says_what_it_needs_and_can_be_cancelled(shell: Shell) -> None:
    run = shell.json("start", "slow", "--id", "s-1", "--priority", "3")
    assert (run["_id"], run["queue"], run["priority"]) == ("s-1", "mail", 3)
    assert "needs a worker that has workflow slow 2.0.0 on queue mail; no pool has been seen" in shell("runs", "show", "s-1").stdout
    waited = shell("start", "slow", "--id", "s-2", "--wait", "--timeout", "0.1")
    assert waited.returncode == 1
    assert "run s-2 has not ended within 0.1 s" in waited.stderr
    cancelled = shell.json("runs", "cancel", "s-1", "--reason", "typo")
    assert (cancelled["status"], cancelled["cancelReason"]) == ("cancelled", "typo")
    assert "It was cancelled " in shell("runs", "show", "s-1").stdout
    assert shell("runs", "cancel", "s-1").returncode == 0
    assert shell("runs", "watch", "s-1").returncode == 1


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


def test_an_unknown_run_is_5(shell: Shell) -> None:
    for words in (("show",), ("cancel",), ("watch",)):
        done = shell("runs", *words, "nobody", "--json")
        assert (done.returncode, done.stdout) == (5, "")
        assert "nobody" in done.stderr


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


def test_an_idempotency_key_starts_one_run(shell: Shell) -> None:
    first = shell("start", "orders", "--idempotency-key", "k").stdout
    assert shell("start", "orders", "--idempotency-key", "k", "--input", "3").stdout == first


# --- the pool -------------------------------------------------------------------------------------------------------


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


def test_embedded_needs_no_server_and_keeps_its_data(offline: Shell) -> None:
    """The first thing a newcomer types must work on a bare machine."""
    words = ("--embedded", "--app", "shop:app")
    started = offline(*words, "start", "orders", "--id", "o-1", STREAMLINE_MONGODB_URI="")
    assert started.returncode == 0, started.stderr
    assert offline(*words, "--burst", STREAMLINE_MONGODB_URI="").returncode == 0
    shown = offline(*words, "runs", "show", "o-1", "--json", STREAMLINE_MONGODB_URI="")
    assert json.loads(shown.stdout)["status"] == "done"
    assert offline(*words, "--mongodb-uri", NOWHERE).returncode == 2, "two servers named by flags"


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
    found = offline("--embedded", "runs", "list", "--json")  # its address is out of date now, and nobody is misled by it
    assert [run["status"] for run in json.loads(found.stdout)] == ["done"]


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


def test_systemd_prints_a_unit_without_the_password(offline: Shell) -> None:
    done = offline("systemd", "--app", "shop:app", "--workers", "3", "--user", "shop", STREAMLINE_MONGODB_URI="mongodb://ann:s3cret@db/x")
    assert done.returncode == 0, done.stderr
    assert 'Environment="STREAMLINE_WORKERS=3"' in done.stdout
    assert "EnvironmentFile=/etc/streamline-pool.env" in done.stdout
    assert "RestartPreventExitStatus=2 78" in done.stdout
    assert "s3cret" not in done.stdout
