"""The command, run as users run it: settings from everywhere, applications with every fault, and what to do about each.

Here and in test_cli_database.py and test_cli_runs.py: no test may see a traceback for something a user can mend, nor a
password anywhere (`Shell` looks at every answer).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence

import pytest
from cli_shell import NOWHERE, SHOP, Shell

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
    private = offline("--print-config", "--embedded", STREAMLINE_MONGODB_URI="").stdout
    assert 'mongodb-uri = "mongodb://127.0.0.1:27017/streamline"  # default; not used, because embedded is on' in private.splitlines()
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
    from streamline_pool.config.settings import OPTIONS

    text = " ".join(offline("--help").stdout.split())
    for option in OPTIONS:
        assert f"--{option.name}" in text
        assert f"[env: {option.env};" in text
    for name in ("check", "cleanup", "demo", "doctor", "init-db", "runs", "start", "systemd", "workers"):
        assert name in text
        assert offline(name, "--help").returncode == 0
    assert offline("--version").stdout.startswith("streamline-pool ")


def test_systemd_prints_a_unit_without_the_password(offline: Shell) -> None:
    done = offline("systemd", "--app", "shop:app", "--workers", "3", "--user", "shop", STREAMLINE_MONGODB_URI="mongodb://ann:s3cret@db/x")
    assert done.returncode == 0, done.stderr
    assert 'Environment="STREAMLINE_WORKERS=3"' in done.stdout
    assert "EnvironmentFile=/etc/streamline-pool.env" in done.stdout
    assert "RestartPreventExitStatus=2 78" in done.stdout
    assert "s3cret" not in done.stdout


@pytest.mark.parametrize(
    ("words", "file", "code", "origin"),
    [((), "embedded = true", 78, "streamline-pool.toml"), (("--embedded",), 'mongodb-uri = "mongodb://db/x"', 2, "--embedded")],
    ids=["file", "flag"],
)
def test_systemd_refuses_a_unit_that_would_run_a_private_server(
    offline: Shell, words: Sequence[str], file: str, code: int, origin: str
) -> None:
    """The service would begin with an empty database in its own folder, and no other host would see its runs."""
    (offline.folder / "streamline-pool.toml").write_text(file)
    done = offline("systemd", "--app", "shop:app", *words, STREAMLINE_MONGODB_URI="")
    assert (done.returncode, done.stdout) == (code, "")
    assert all(word in done.stderr for word in (origin, "--mongodb-uri", "STREAMLINE_MONGODB_URI"))


def test_systemd_prints_a_unit_when_a_stronger_source_names_the_server(offline: Shell) -> None:
    (offline.folder / "streamline-pool.toml").write_text("embedded = true")
    done = offline("systemd", "--app", "shop:app", STREAMLINE_MONGODB_URI="mongodb://db/x")
    assert done.returncode == 0, done.stderr
    assert 'Environment="STREAMLINE_MONGODB_URI=mongodb://db/x"' in done.stdout


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
    "bad-uri-in-code": (
        "bad:app",
        "from streamline_pool import Streamline\napp = Streamline('http://x')",
        "bad:app: mongodb_uri: expected a URI",
    ),
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
