"""How the subscribers to events get to the workers, and their answer to the steward."""

from __future__ import annotations

import signal

from pool_script import STEWARD, Script

from streamline_pool.supervisor.ipc.messages import (
    ServeSubscribers,
    Subscribers,
    SubscribersServed,
)


def test_the_steward_gets_the_answer_when_the_last_worker_publishes() -> None:
    """A subscriber that gets its answer too early misses what the last worker does."""
    script = Script(workers=2).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    orders = script.sent(ServeSubscribers)
    assert [(pid, message.subscribers) for pid, message in orders] == [(101, (("l", 90.0),)), (102, (("l", 90.0),))]
    seq = orders[0][1].seq
    script.beat(101, subscribers_served=seq)
    script.beat(102, subscribers_served=seq - 1)
    assert not script.sent(SubscribersServed)
    script.beat(102, subscribers_served=seq)
    assert script.sent(SubscribersServed) == [(STEWARD, SubscribersServed(subscribers=("l",)))]
    script.beat(101, subscribers_served=seq)
    assert not script.sent(SubscribersServed), "once"


def test_a_worker_that_dies_is_not_waited_for_and_its_successor_gets_the_subscribers() -> None:
    script = Script(workers=2).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    seq = script.sent(ServeSubscribers)[0][1].seq
    script.beat(101, subscribers_served=seq)
    script.dies(102)
    assert script.sent(SubscribersServed) == [(STEWARD, SubscribersServed(subscribers=("l",)))]
    script.wait(10.0)
    script.beat(103)
    script.signal(signal.SIGTTIN)
    ((pid, publish),) = script.sent(ServeSubscribers)
    assert (pid, publish.seq) == (104, seq)
    ((subscriber, left_s),) = publish.subscribers
    assert (subscriber, round(left_s)) == ("l", 80), "ten seconds of it have passed"


def test_workers_forked_after_the_last_subscription_get_an_empty_list() -> None:
    script = Script(workers=1).started()
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 1.0),)))
    script.wait(2.0)
    script.signal(signal.SIGTTIN)
    assert [message.subscribers for _, message in script.sent(ServeSubscribers)] == [()]
    script.on_message(STEWARD, Subscribers(subscribers=()))
    assert [message.subscribers for _, message in script.sent(ServeSubscribers)] == [(), ()]


def test_a_draining_worker_publishes_to_its_end() -> None:
    """Its last steps are events like any others."""
    script = Script(workers=1).started()
    script.signal(signal.SIGTERM)
    script.on_message(STEWARD, Subscribers(subscribers=(("l", 90.0),)))
    ((pid, publish),) = script.sent(ServeSubscribers)
    script.beat(pid, subscribers_served=publish.seq, state="draining")
    assert script.sent(SubscribersServed)
