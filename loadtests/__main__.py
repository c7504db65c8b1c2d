"""`python -m loadtests <question> [--json] [options]`, or `all`. The exit status is 1 when a budget is missed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from types import FrameType, ModuleType

from . import cancel, durable, idle, lanes, latency, memory, outputs, scale, storm, throughput, timers
from .common import Report, UsageError, report_progress, serving

QUESTIONS: dict[str, ModuleType] = {
    "throughput": throughput,
    "durable": durable,
    "latency": latency,
    "idle": idle,
    "scale": scale,
    "lanes": lanes,
    "outputs": outputs,
    "memory": memory,
    "timers": timers,
    "cancel": cancel,
    "storm": storm,
}
NOT_IN_ALL = {"storm"}  # it measures no speed, and takes ten minutes


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line. `all` takes the common options only, and uses the defaults of each question."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print one JSON document on standard output and nothing else")
    shared.add_argument("--mongodb-uri", metavar="URI", help="use this server, which must be on this machine, instead of a private one")
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    commands = parser.add_subparsers(dest="question", metavar="question", required=True)
    for name, module in QUESTIONS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        question = commands.add_parser(name, parents=[shared], help=summary, description=module.__doc__)
        module.add_options(question)
    commands.add_parser("all", parents=[shared], help="every question but the storm, one after the other")
    return parser.parse_args(arguments)


def ask(question: str, options: argparse.Namespace) -> Report:
    """Answer one question on a server of its own."""
    report_progress(f"--- {question}")
    load = os.getloadavg()[0]
    module = QUESTIONS[question]
    with getattr(module, "serving", serving)(options.mongodb_uri) as server:
        report: Report = module.measure(server, options)
    report.settings["load_average_before_and_after"] = [load, os.getloadavg()[0]]
    return report


def _all_options(options: argparse.Namespace, question: str) -> argparse.Namespace:
    """The question's defaults, with the common options as given."""
    defaults = parse([question])
    for name in ("json", "mongodb_uri"):
        setattr(defaults, name, getattr(options, name))
    return defaults


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, _interrupt)  # so that SIGTERM, too, ends every process that was started
    reports = []
    try:
        for question in [name for name in QUESTIONS if name not in NOT_IN_ALL] if options.question == "all" else [options.question]:
            report = ask(question, _all_options(options, question) if options.question == "all" else options)
            reports.append(report)
            if not options.json:
                print(report.text(), flush=True)
    except UsageError as exc:
        report_progress(str(exc))
        return 2
    except KeyboardInterrupt:
        report_progress("interrupted")
        return 130
    if options.json:
        single = options.question != "all"
        print(json.dumps(reports[0].document() if single else {report.question: report.document() for report in reports}))
    return 0 if all(report.met for report in reports) else 1


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
