"""The run cache: bounded, counted, and without the least recently used run when it is full."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from streamline_pool.engine.run_cache import RunCache, RunNote

NOTE = RunNote("1.0.0", 1, 0.0, True)


def test_the_least_recently_used_run_is_evicted() -> None:
    cache = RunCache(2)
    cache.put("a", NOTE)
    cache.put("b", NOTE)
    assert cache.get("a") is NOTE  # now b is the oldest
    cache.put("c", NOTE)
    assert (cache.get("b"), cache.get("a"), cache.get("c")) == (None, NOTE, NOTE)
    assert cache.counters() == {"size": 2, "capacity": 2, "hits": 3, "misses": 1, "evictions": 1}


def test_an_entry_put_again_replaces_the_old_one_and_evicts_no_other() -> None:
    cache = RunCache(2)
    cache.put("a", NOTE)
    cache.put("b", NOTE)
    newer = NOTE._replace(token=2)
    cache.put("a", newer)
    assert (cache.get("a"), cache.get("b"), len(cache), cache.evictions) == (newer, NOTE, 2, 0)


def test_removing_a_missing_entry_does_nothing() -> None:
    cache = RunCache(2)
    cache.put("a", NOTE)
    cache.forget("a")
    cache.forget("a")
    assert len(cache) == 0


@given(st.lists(st.tuples(st.sampled_from("pgf"), st.integers(0, 9))), st.integers(1, 5))
def test_it_never_exceeds_its_bound_and_counts_every_lookup(calls: list[tuple[str, int]], capacity: int) -> None:
    """A cache without a bound is a leak that shows only after weeks."""
    cache = RunCache(capacity)
    for call, key in calls:
        {"p": lambda k: cache.put(k, NOTE), "g": cache.get, "f": cache.forget}[call](str(key))
        assert len(cache) <= capacity
    counted = cache.counters()
    assert counted["hits"] + counted["misses"] == sum(call == "g" for call, _ in calls)


def test_threads_may_share_it() -> None:
    cache = RunCache(50)

    def work(number: int) -> None:
        for turn in range(500):
            cache.put(str((number * 7 + turn) % 100), NOTE)
            cache.get(str(turn % 100))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted = cache.counters()
    assert (counted["size"], counted["hits"] + counted["misses"]) == (50, 2000)
