"""The mutants are armed: each changes the present source in one place, and the result compiles. The runner judges as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from mutants.__main__ import choose, parse
from mutants.catalogue import MUTANTS, tenth
from mutants.copies import ROOT, sources_of
from mutants.detectors import Finding, Search, Verdict, commands, verdict_of
from mutants.mutant import DisarmedError, Edit, Mutant, mutated
from mutants.report import Row, has_failed, line, summary

SEARCH = Search(likely_only=True, limit_s=60, schedules=10, seed=7, nemesis_s=40)


@pytest.mark.parametrize("part", sorted({mutant.part for mutant in MUTANTS}))
def test_each_mutant_changes_the_present_source_and_compiles(part: str) -> None:
    """A refactoring would otherwise disarm a mutant silently, and its promise would count as proved."""
    for mutant in of_part(part):
        before = sources_of(mutant)
        for file, text in mutated(before, mutant.edits()).items():
            assert file.startswith(("streamline_pool/", "supervisor/")), f"{mutant.name}: a mutant is a bug of the product"
            assert text != before[file], f"{mutant.name} changes nothing in {file}"
            compile(text, f"{mutant.name}: {file}", "exec", dont_inherit=True)


@pytest.mark.parametrize("part", sorted({mutant.part for mutant in MUTANTS}))
def test_each_mutant_says_what_goes_wrong_and_names_test_files_that_exist(part: str) -> None:
    """A file that does not exist ends the detector with a usage error."""
    for mutant in of_part(part):
        missing = [name for name in mutant.likely if not Path(ROOT, "tests", name).is_file()]
        assert mutant.likely and not missing, f"{mutant.name} names {missing}"
        assert mutant.harm.endswith("."), mutant.name
        assert mutant.equivalent is None or len(mutant.equivalent.split()) >= 15, f"{mutant.name}: an equivalence is argued, not claimed"


def of_part(part: str) -> list[Mutant]:
    return [mutant for mutant in MUTANTS if mutant.part == part]


def test_names_are_unique_and_there_are_at_least_ninety() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 90
    assert all(name == name.lower() and " " not in name for name in names)


@pytest.mark.parametrize("text", ["", "is here: old, and again: old"], ids=["not there", "there twice"])
def test_a_text_that_is_not_there_exactly_once_is_refused(text: str) -> None:
    """With two places, the mutant might change the one that does no harm."""
    with pytest.raises(DisarmedError):
        mutated({"a.py": text}, [Edit("a.py", "old", "new")])


def test_ten_days_have_every_mutant_once() -> None:
    """CI runs a tenth each day."""
    days = [tenth(MUTANTS, number) for number in range(355, 365)]
    assert sorted(mutant.name for day in days for mutant in day) == sorted(mutant.name for mutant in MUTANTS)
    assert max(map(len, days)) - min(map(len, days)) <= 1


def test_mutants_are_chosen_by_name_part_and_tenth() -> None:
    assert [mutant.name for mutant in choose("commit-without-rev,commit-without-fence", None, None)] == [
        "commit-without-rev",
        "commit-without-fence",
    ]
    assert {mutant.part for mutant in choose(None, "fence", "0")} == {"fence"}
    for wrong in (("no-such-mutant", None, None), (None, "no such part", None), (None, None, "yesterday")):
        with pytest.raises(KeyError):
            choose(*wrong)


@pytest.mark.parametrize("arguments", [["--names", "no-such-mutant"], ["--detectors", "hope"]], ids=["name", "detector"])
def test_a_wrong_argument_is_a_usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("detector", "code", "verdict"),
    [
        ("quick", 0, Verdict.MISSED),
        ("quick", 1, Verdict.FOUND),
        ("quick", 2, Verdict.BROKEN),
        ("quick", 4, Verdict.BROKEN),
        ("slow", 5, Verdict.MISSED),
        ("explorer", 0, Verdict.MISSED),
        ("explorer", 1, Verdict.FOUND),
        ("explorer", 2, Verdict.BROKEN),
        ("explorer", 5, Verdict.BROKEN),
        ("chaos", None, Verdict.LATE),
        ("chaos", -9, Verdict.BROKEN),
        ("nemesis", 1, Verdict.FOUND),
        ("nemesis", 3, Verdict.BROKEN),
    ],
)
def test_only_a_failed_test_or_a_violation_counts_as_found(detector: str, code: int | None, verdict: Verdict) -> None:
    """A detector that cannot even start would otherwise find every mutant."""
    assert verdict_of(detector, code) is verdict


def test_the_likely_tests_run_first_and_the_suite_only_if_asked() -> None:
    mutant = MUTANTS[0]
    (first,) = commands("quick", [mutant], SEARCH)
    assert first[-len(mutant.likely) :] == [f"tests/{name}" for name in mutant.likely]
    both = commands("quick", [mutant], Search(likely_only=False, limit_s=60, schedules=10, seed=7, nemesis_s=40))
    assert both[0] == first
    assert both[1] == first[: -len(mutant.likely)]


def test_a_mutant_may_tell_the_explorer_where_to_look() -> None:
    told = Mutant(name="x", part="x", file="x", old="x", new="y", harm="x.", likely=(), explorer=("--fault", "crash"))
    ((*_, fault, kind),) = commands("explorer", [told], SEARCH)
    assert (fault, kind) == ("--fault", "crash")
    assert "--fault" not in commands("explorer", [told, MUTANTS[0]], SEARCH)[0], "the run without a mutant is for all of them"


def row(*verdicts: Verdict, equivalent: str | None = None, control: bool = False) -> Row:
    mutant = Mutant(name="a-bug", part="x", file="x", old="x", new="y", harm="x.", likely=(), equivalent=equivalent)
    findings = {str(number): Finding(verdict, 1.5, "test_x") for number, verdict in enumerate(verdicts)}
    return Row(None if control else mutant, findings)


@pytest.mark.parametrize(
    ("rows", "failed"),
    [
        pytest.param([row(Verdict.MISSED, control=True), row(Verdict.MISSED, Verdict.FOUND)], False, id="found by one detector"),
        pytest.param([row(Verdict.MISSED, Verdict.MISSED)], True, id="missed by all"),
        pytest.param([row(Verdict.MISSED, equivalent="two guards")], False, id="equivalent and missed"),
        pytest.param([row(Verdict.LATE)], True, id="stopped at its limit"),
        pytest.param([row(Verdict.FOUND, Verdict.BROKEN)], True, id="a detector could not run"),
        pytest.param([row(Verdict.FOUND, control=True)], True, id="the tree without a mutant is not green"),
        pytest.param([row(Verdict.LATE, control=True)], True, id="the tree without a mutant takes too long"),
    ],
)
def test_the_command_fails_unless_each_bug_was_found(rows: list[Row], failed: bool) -> None:
    assert has_failed(rows) is failed


def test_the_table_names_what_was_missed_and_what_found_the_others() -> None:
    assert line(row(Verdict.FOUND)).split() == ["a-bug", "0", "found", "1.5", "s", "test_x"]
    assert summary([row(Verdict.MISSED, control=True), row(Verdict.FOUND), row(Verdict.MISSED)]) == (
        "2 mutants: 1 found, 1 missed, 0 equivalent; missed: a-bug"
    )
