"""What is promised, by which fault it could be broken, and which tests show that it is kept. Data only; page.py renders it.

The promises are those of docs/explanation/guarantees.md and the seven invariants of docs/architecture.md, section 5. test_page.py checks
that every test that is named here exists.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLOCKS", "NOT_TRIED", "PROMISES", "Promise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """One promise. `tests`: paths, with `::name` for one test of a file."""

    promise: str
    fault: str
    tests: tuple[str, ...]


PROMISES = (
    Promise(
        promise="What returned is durable and took effect once: a start, an answer, an event, a pause, a checkpoint (invariant 2)",
        fault="the reply is lost, and the caller sends the call again; the process dies before or after the write; the primary is replaced",
        tests=(
            "tests/simulation/test_faults_control_operations.py",
            "tests/simulation/test_faults_waits.py",
            "tests/conformance/test_starting_races.py",
            "tests/conformance/test_blocking_calls.py",
            "tests/chaos/test_storm.py",
        ),
    ),
    Promise(
        promise="Every step has exactly one accepted result, stored with the decision what comes next",
        fault="any operation fails before or after it was performed, once or for good",
        tests=("tests/simulation/test_faults.py", "tests/unit/domain/test_transitions.py", "tests/simulation/test_faults_checkpoints.py"),
    ),
    Promise(
        promise="A handler is entered again only if its result was not durable, with the same idempotency key (invariant 3)",
        fault="SIGKILL of a worker at random and at named instructions; SIGSTOP beyond the lease; an outage of the database",
        tests=("tests/chaos/test_kills.py", "tests/chaos/test_outage.py", "tests/conformance/test_engine_leases.py"),
    ),
    Promise(
        promise="One worker at a time: a worker that lost its lease changes nothing, however late it wakes (invariant 1)",
        fault="a worker is frozen beyond its lease and wakes while another holds the run; a cancel meets the completion",
        tests=(
            "tests/conformance/test_claim.py",
            "tests/conformance/test_claimed_again.py",
            "tests/conformance/test_long_steps.py::test_a_worker_that_is_suspended_for_longer_than_its_lease_loses_the_step_and_its_result",
        ),
    ),
    Promise(
        promise="Nothing gets stuck: every run that has not ended and is not paused is held, or claimable from an instant, or waits for an "
        "answer or event that can be named (invariant 4)",
        fault="a wake-up is lost; a worker dies between its wait and its search for events; the steward or the supervisor dies",
        tests=(
            "tests/conformance/test_invariants.py",
            "tests/conformance/test_invariants_waits.py",
            "tests/conformance/test_supervisor.py",
            "tests/conformance/test_sweep.py",
        ),
    ),
    Promise(
        promise="Every failed run says why, and every ended run when it ended (invariant 5)",
        fault="a handler kills its worker three times; a stored document is damaged; a handler raises what cannot be stored",
        tests=("tests/conformance/test_suspects.py", "tests/conformance/test_hostile_damage.py", "tests/conformance/test_cli_runs.py"),
    ),
    Promise(
        promise="An answer answers one wait; an old token never answers a newer one; an event reaches each run once",
        fault="two answers at once; an answer before the wait is stored; the sender of an event to all dies in the middle",
        tests=(
            "tests/conformance/test_waits.py::test_of_two_answers_from_two_processes_exactly_one_counts",
            "tests/conformance/test_hostile_races.py::test_an_answer_to_an_older_wait_answers_no_newer_one",
            "tests/simulation/test_faults_waits.py::test_a_broadcast_whose_sender_dies_anywhere_is_finished_by_a_steward",
        ),
    ),
    Promise(
        promise="A pause answers, ends and times out nothing; an accepted cancel stays in force; no late copy of a call takes effect "
        "(invariant 6)",
        fault="control operations meet the holder's commit, a deadline, a recovery, each other",
        tests=(
            "tests/conformance/test_control_meets_holders.py",
            "tests/conformance/test_control_matrix.py",
            "tests/conformance/test_control_races.py",
        ),
    ),
    Promise(
        promise="No correctness depends on a host's time of day, on an event in process, or on a cache (invariant 7)",
        fault="a host's clock is wrong or jumps; signals are dropped",
        tests=(
            "tests/conformance/test_engine_leases.py",
            "tests/conformance/test_hostile_races.py::test_whether_a_run_existed_when_an_event_was_sent_does_not_depend_on_clocks",
            "tests/conformance/test_hostile_drops.py",
        ),
    ),
    Promise(
        promise="Clean-ups delete ended runs only, each with its outputs, and never one that is rewound meanwhile",
        fault="the clean-up is interrupted, or meets a rewind; an output was stored and its run was not",
        tests=("tests/conformance/test_retention_races.py", "tests/conformance/test_retention_files.py"),
    ),
    Promise(
        promise="A process that serves for long holds no more than after its warm-up",
        fault="very many runs over every capability",
        tests=(
            "tests/reliability/test_soak.py",
            "tests/conformance/test_memory_of_runs.py",
            "tests/unit/engine/test_handler_threads.py",
        ),
    ),
)

CLOCKS = (
    ("every due time and every lease is compared with the server's clock in the condition of the write",
     "tests/conformance/test_engine_leases.py"),
    ("a sleep never ends early by the server's clock, whatever the host's clock says", "tests/conformance/test_timers_in_pools.py"),
    ("whether a run existed when an event to all was sent does not depend on a host's clock",
     "tests/conformance/test_hostile_races.py::test_whether_a_run_existed_when_an_event_was_sent_does_not_depend_on_clocks"),
)  # fmt: skip
"""What holds when clocks jump, and the test of it."""

NOT_TRIED = (
    "A cluster of more than one machine. Hosts are processes of one machine, and partitions are made between them.",
    "Sharded clusters, and servers that only resemble MongoDB.",
    "MongoDB versions other than the one of the embedded server.",
    "A disk that returns wrong data, memory that flips bits, and a kernel that crashes.",
    "A soak with outputs above 16 MiB, which are stored as files, and one with faults: the soak measures resources, the nemesis faults.",
    "A soak of more than some hours. The soak is accelerated: it counts runs and not days, so what grows by the clock alone is not seen.",
    "Other operating systems than Linux.",
)
