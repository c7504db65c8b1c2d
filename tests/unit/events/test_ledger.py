"""The ledger of a stream counts missing events exactly, even if batches are lost, repeated or out of order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.events.ledger import Ledger

batches_of_one = st.lists(st.integers(1, 5), min_size=1, max_size=12)


def numbered(sizes: list[int]) -> list[tuple[int, int]]:
    """(first, count) of batches of these sizes."""
    return [(sum(sizes[:place]), size) for place, size in enumerate(sizes)]


@given(batches_of_one, st.data())
def test_published_is_received_plus_missed(sizes: list[int], data: st.DataObject) -> None:
    """Signals get lost, come twice when a tail is opened again, and come out of order when sent without waiting."""
    batches = numbered(sizes)
    *before, last = batches
    arrivals = data.draw(st.lists(st.sampled_from(before), max_size=20)) if before else []
    arrivals.insert(data.draw(st.integers(0, len(arrivals))), last)  # the newest batch is never dropped
    ledger = Ledger()
    ledger.expect("p", 0)
    received: list[int] = []
    for first, count in arrivals:
        received += [first + place for place in ledger.receive("p", first, count)]
    assert len(received) == len(set(received)), "each once"
    assert set(received) == {number for first, count in arrivals for number in range(first, first + count)}
    assert len(received) + ledger.missed == sum(sizes)


def test_events_published_before_the_greeting_are_not_expected() -> None:
    """A worker may have a backlog for other subscribers when a new one comes."""
    ledger = Ledger()
    ledger.expect("p", 7)
    assert ledger.receive("p", 5, 4) == [2, 3]
    assert ledger.missed == 0


def test_without_a_greeting_events_are_expected_from_the_first_batch_on() -> None:
    ledger = Ledger()
    assert ledger.receive("p", 40, 2) == [0, 1]
    ledger.expect("p", 0)  # no effect: the publisher is known
    assert ledger.receive("p", 45, 1) == [0]
    assert ledger.missed == 3


def test_publishers_are_counted_separately() -> None:
    ledger = Ledger()
    for publisher in ("p", "q"):
        assert ledger.receive(publisher, 0, 2) == [0, 1]
    assert ledger.receive("p", 3, 1) == [0]
    assert ledger.receive("q", 2, 1) == [0]
    assert ledger.missed == 1


def test_events_missed_before_the_beginning_do_not_count() -> None:
    ledger = Ledger()
    ledger.receive("p", 0, 1)
    ledger.receive("p", 5, 1)
    ledger.begin()
    assert ledger.missed == 0
    assert ledger.receive("p", 3, 1) == []


def test_a_ledger_does_not_grow_with_the_number_of_processes() -> None:
    ledger = Ledger()
    for number in range(10_050):
        ledger.receive(f"p{number}", 0, 1)
    assert len(ledger._next) == 10_000
    assert ledger.missed == 0
