"""`streamline-pool chaos`: faults on two pools of its own, and a judgement. Owns its options and its end; chaos/ does the work."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from streamline_pool.chaos import nemesis, report
from streamline_pool.chaos.faults.catalogue import CATALOGUE, chosen, left_out
from streamline_pool.chaos.needs import missing
from streamline_pool.chaos.servers import ChaosServer, NotOurs, can_mount, given_server, private_server, replica_set
from streamline_pool.chaos.stage import Fault
from streamline_pool.chaos.stories import write_stories
from streamline_pool.supervisor.cli.console import CommandError, ExitCode
from streamline_pool.supervisor.logs import setup_logging

__all__ = ["chaos"]


class _Ended(BaseException):
    """A signal asked for the end; `args[0]` is its number."""


@click.command(short_help="Break two pools on purpose, and judge what came of it.")
@click.option("--embedded", is_flag=True, help="Start a MongoDB of its own in a temporary folder.")
@click.option("--mongodb-uri", "uri", metavar="URI", help="Use this server instead; faults that need control of it are left out.")
@click.option("--database", metavar="NAME", help="With --mongodb-uri: a database that does not exist yet. It is dropped at the end.")
@click.option("--members", type=click.Choice(["1", "3"]), default="3", show_default=True, help="With --embedded: members of the set.")
@click.option("--faults", metavar="A,B", help="Only these faults, separated by commas; see --list-faults.")
@click.option("--seconds", type=click.FloatRange(min=1), default=300.0, show_default=True, help="How long the faults go on.")
@click.option("--seed", type=int, help="Decides the order of faults and calls.  [default: a new one, which is printed]")
@click.option("--rate", type=click.FloatRange(min=0.1), default=12.0, show_default=True, help="Runs started per second.")
@click.option("--lease", type=click.FloatRange(min=1), default=5.0, show_default=True, help="Lease of the two pools in seconds.")
@click.option("--json", "json_path", metavar="FILE", help="Write the report as JSON; - for standard output.")
@click.option(
    "--evidence",
    metavar="FOLDER",
    help="Where to write the stories of runs with findings, and the logs of the pools.  [default: a temporary folder, if there are any]",
)
@click.option("--list-faults", is_flag=True, help="Show every fault and what it needs, then stop.")
def chaos(list_faults: bool, **options: Any) -> int:
    """Run two pools under load while processes die and freeze, and say whether a run was lost, wedged or done twice.

    It needs no application: it runs workflows of its own, on --embedded or in a database that it drops afterwards (settings of
    the environment do not count). After the last fault it only waits.

    Exit codes: 0 clean; 1 a rule was broken, or the judgement is incomplete; 2 wrong usage; 3 database unreachable;
    130, 143, 129 ended by a signal.
    """
    if list_faults:
        return _list_faults()
    if options["embedded"] == bool(options["uri"]) or bool(options["uri"]) != bool(options["database"]):
        raise CommandError("say where: --embedded, or --mongodb-uri URI with --database NAME.", ExitCode.USAGE)
    setup_logging("text", "warning")
    logging.getLogger("pymongo").setLevel(logging.CRITICAL)
    try:
        with _ending_by_signals():
            return _perform(options)
    except _Ended as ended:
        click.echo("ended by a signal; everything that was started has ended", err=True)
        return 128 + int(ended.args[0])


@contextlib.contextmanager
def _ending_by_signals() -> Iterator[None]:
    """The first INT, TERM or HUP ends the block; those after it are ignored, because the block is then ending what it started."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end(signum: int, _frame: object) -> NoReturn:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise _Ended(signum)

    before = {each: signal.signal(each, end) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _list_faults() -> int:
    lacks = missing(None, 3)
    width = max(len(fault.name) for fault in CATALOGUE)
    for fault in CATALOGUE:
        reason = left_out(fault, lacks)
        click.echo(f"{fault.name.ljust(width)}  {fault.what}{f' (left out here: {reason})' if reason else ''}")
    return ExitCode.OK


def _perform(options: dict[str, Any]) -> int:
    wanted = _wanted(options["faults"])
    _check_outputs(options["json_path"], options["evidence"])
    seed = options["seed"] if options["seed"] is not None else random.SystemRandom().randrange(2**31)
    with nemesis.temporary_folder() as name:
        folder = Path(name)
        with _server(options, folder, wanted) as server:
            lacks = missing(None if options["embedded"] else server, int(options["members"]))
            omitted = {fault.name: reason for fault in wanted if (reason := left_out(fault, lacks))}
            faults = [fault for fault in wanted if fault.name not in omitted]
            if not faults:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in omitted.items())
                raise CommandError(f"none of these faults can happen here: {reasons}. --list-faults shows them all.", ExitCode.USAGE)
            plan = nemesis.Plan(faults=faults, seconds=options["seconds"], seed=seed, rate=options["rate"], lease_s=options["lease"])
            _say(f"seed {seed}; {len(faults)} faults for {plan.seconds:g} s; left out: {', '.join(omitted) or 'none'}")
            outcome = nemesis.perform(server, options["database"] or "streamline_chaos", plan, folder, _say)
        found = report.document(outcome, omitted)
        if options["evidence"] or not report.is_clean(found):
            evidence = Path(options["evidence"] or tempfile.mkdtemp(prefix="streamline-evidence-"))
            write_stories(evidence, outcome.verdict.all(), outcome.audit, outcome.load, outcome.notes, outcome.logs)
            _say(f"evidence: {evidence}")
    _print(found, options["json_path"])
    return ExitCode.OK if report.is_clean(found) else ExitCode.CRASH


def _wanted(names: str | None) -> list[Fault]:
    try:
        return chosen(None if names is None else [name.strip() for name in names.split(",")])
    except KeyError as exc:
        raise CommandError(f"there is no fault {exc.args[0]!r}; --list-faults shows them all.", ExitCode.USAGE) from None


def _check_outputs(json_path: str | None, evidence: str | None) -> None:
    """What the command would write after minutes can be written."""
    try:
        if json_path not in (None, "-"):
            Path(str(json_path)).open("a").close()
        if evidence is not None:
            Path(evidence).mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CommandError(f"cannot write {exc.filename}: {exc.strerror}; name another place.", ExitCode.USAGE) from None


def _print(found: dict[str, Any], json_path: str | None) -> None:
    text = json.dumps(found, indent=2)
    if json_path == "-":
        click.echo(text)
        return
    for line in report.table(found):
        click.echo(line)
    if json_path is not None:
        Path(json_path).write_text(text + "\n")


@contextlib.contextmanager
def _server(options: dict[str, Any], folder: Path, faults: list[Fault]) -> Iterator[ChaosServer]:
    if not options["embedded"]:
        try:
            with given_server(options["uri"], options["database"]) as server:
                yield server
        except NotOurs as exc:
            raise CommandError(str(exc), ExitCode.USAGE) from None
        return
    start = replica_set if options["members"] == "3" else private_server
    with start(folder, small_disk=can_mount() and any("disk" in fault.needs for fault in faults)) as server:
        yield server


def _say(text: str) -> None:
    click.echo(text, err=True)
