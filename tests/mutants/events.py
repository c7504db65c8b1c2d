"""Mutants of durable events, to one run and to all, of the search for them, and of what is published."""

from __future__ import annotations

from .mutant import Edit, Mutant, mutants_of

__all__ = ["MUTANTS"]

_EVENTS = "streamline_pool/protocol/durable_events.py"
_DELIVERY = "streamline_pool/client/event_delivery.py"
_DRIVER = "streamline_pool/engine/run_driver.py"
_WRITER = "streamline_pool/engine/run_writer.py"
_RETENTION = "streamline_pool/storage/retention.py"
_SEARCH = """found = waits.arrived(document, {"name": name}) or await self._find_event(active, name)"""
_bug = mutants_of(
    "events",
    "conformance/test_event_search.py",
    "conformance/test_events_durable.py",
    "conformance/test_hostile_races.py",
    "simulation/test_faults_control_operations.py",
    kinds="event,events,mixed",
)

MUTANTS: tuple[Mutant, ...] = (
    _bug(
        name="delivery-to-one-ignores-what-was-seen",
        file=_EVENTS,
        old='''"seen": {"$ne": event_id}, "$expr"''',
        new='''"$expr"''',
        harm="A repeated delivery ends a second wait, or is in the inbox twice.",
    ),
    _bug(
        name="delivery-to-all-ignores-what-was-seen",
        file=_EVENTS,
        old="""        "seen": {"$ne": event["_id"]},
""",
        new="",
        harm="A steward that repeats a delivery ends the next wait of a run with the same event.",
    ),
    _bug(
        name="delivery-is-not-noted-as-seen",
        file="streamline_pool/protocol/inbox.py",
        old="    if is_event:",
        new="    if False:",
        harm="A repeated delivery, or the search of the next wait, brings the same event again.",
    ),
    _bug(
        name="found-event-is-not-noted-as-seen",
        file="streamline_pool/domain/waits.py",
        old="""return _answered(change._replace(seen=item["_id"]), place, item["_id"])""",
        new="""return _answered(change, place, item["_id"])""",
        harm="One event to all ends every wait of a run for its name.",
    ),
    _bug(
        name="search-ignores-what-was-seen",
        file=_EVENTS,
        old="    if seen:",
        new="    if False:",
        harm="A run finds an event again that has ended an earlier wait.",
    ),
    _bug(
        name="search-finds-events-older-than-the-run",
        file=_EVENTS,
        old="""query: Query = {"name": name, "bornAt": {"$gt": born_at}}""",
        new="""query: Query = {"name": name}""",
        harm="A run gets an event that was sent before it was started.",
    ),
    _bug(
        name="delivery-reaches-younger-runs",
        file=_EVENTS,
        old="""        "bornAt": {"$lt": event.get("bornAt")},
""",
        new="",
        harm="A steward delivers an event late, to a run that was started after it was sent.",
        explorer=("--kinds", "event,events"),
    ),
    _bug(
        name="birth-is-told-by-the-hosts-clock",
        file="streamline_pool/protocol/run_lifecycle.py",
        old="""stored = [{**document, "bornAt": SERVER_TICK} for document in documents]""",
        new="""stored = [{**d, "bornAt": type(SERVER_TICK)(int(d["createdAt"].timestamp()), 1)} for d in documents]""",
        harm="Whether a run receives an event to all depends on the clock of the host that started it.",
    ),
    _bug(
        name="search-finds-the-latest-event-first",
        file=_EVENTS,
        old="""filter=query, sort=(("bornAt", 1),), limit=1)""",
        new="""filter=query, sort=(("bornAt", -1),), limit=1)""",
        harm="Events to all end the waits of a run in another order than they were sent in.",
    ),
    _bug(
        name="event-revives-a-cancelled-run",
        file=_EVENTS,
        old='''query = {**live_run(None, run_id), "seen"''',
        new='''query = {"_id": run_id, "seen"''',
        harm="An event that comes after a cancel makes the run go on.",
        explorer=("--kinds", "event"),
    ),
    _bug(
        name="waits-are-ended-without-their-generation",
        file=_EVENTS,
        old="""query | {"_id": found["_id"], "waitGen": found.get("waitGen")}""",
        new="""query | {"_id": found["_id"]}""",
        harm="A delivery ends a later wait than the one that was found.",
        equivalent=(
            "A run that has gone on to a later wait for the same name searches the stored events before it lets go of its lease. It finds "
            "this one, because a pending event is kept, the run is older than it, and `seen` does not have it. So the later wait ends by "
            "this event with or without the delivery; `seen` and the status in the filter refuse it in every other case."
        ),
    ),
    _bug(
        name="event-to-all-counts-as-delivered-first",
        file=_DELIVERY,
        old="""    total = 0
    last = None
""",
        new="""    yield durable_events.mark_delivered(event["_id"])
    total = 0
    last = None
""",
        harm="When its sender dies, an event to all never reaches the runs that were waiting for it.",
        likely=("conformance/test_dead_senders.py", "simulation/test_faults_waits.py", "conformance/test_events_durable.py"),
        explorer=("--kinds", "event"),
    ),
    _bug(
        name="refused-event-counts-as-delivered",
        file=_DELIVERY,
        old="    if refused:",
        new="    if False:",
        harm="A run whose document was full never receives the event, also after it has room.",
        beyond_explorer="In the explorer the server refuses commits of lease holders as too large, and no deliveries.",
        likely=("conformance/test_events_refused.py",),
    ),
    _bug(
        name="search-is-skipped",
        file=_DRIVER,
        old=_SEARCH,
        new="""found = waits.arrived(document, {"name": name})""",
        harm="A run that begins to wait after an event to all was sent waits for ever.",
    ),
    _bug(
        name="search-is-skipped-after-a-claim",
        file=_DRIVER,
        old="""        just_claimed = True
        while True:
""",
        new="""        place = transitions.current_place(active.document)
        step: Any = {} if place is None else active.document["steps"][place]
        if place is not None and step["status"] == "waiting" and step["waitingFor"]["type"] == "event":
            expires_at = step["waitingFor"].get("expiresAt")
            if (expires_at is None or expires_at > self._store.now()) and not active.document.get("inbox"):
                await self._writer.store(active, waits.park(active.document, place))
                return
        just_claimed = True
        while True:
""",
        harm="After a crash between the wait and its search, an event to all is lost to the run.",
        explorer=("--kinds", "event"),
    ),
    _bug(
        name="deadline-comes-before-the-search",
        file=_DRIVER,
        old="""        if waiting_for["type"] == "event":
""",
        new="""        deadline = waiting_for.get("expiresAt")
        if deadline is not None and deadline <= self._store.now():
            return waits.time_out(document, place, self._store.now())
        if waiting_for["type"] == "event":
""",
        harm="A run whose deadline passed while its worker was dead times out, although the event was there in time.",
    ),
    _bug(
        name="search-before-the-wait-is-stored",
        file=_DRIVER,
        old="""            if decided is None or not await self._writer.store_decided(active, decided):
""",
        new="""            if decided is not None and decided.change.kind is ChangeKind.AWAIT_EVENT:
                waiting_for = decided.change.steps[active.place]["waitingFor"]
                if await self._find_event(active, waiting_for["eventName"]) is None:
                    change = decided.change._replace(releases=True, wake_at=waiting_for.get("expiresAt"))
                    decided = decided._replace(change=change)
            if decided is None or not await self._writer.store_decided(active, decided):
""",
        harm="An event to all that is stored between the search and the wait is lost to the run.",
        explorer=("--kinds", "event"),
    ),
    _bug(
        name="event-is-published-before-its-write",
        file=_WRITER,
        old="""            self._env.probe("commit.before")
            result:""",
        new="""            self._events.publish(active.document, write.change.events)
            self._env.probe("commit.before")
            result:""",
        also=(
            Edit(
                _WRITER,
                "        self._events.publish_committed(active, change)\n",
                "        self._events.publish_committed(active, change._replace(events=()))\n",
            ),
        ),
        harm="Subscribers are told of a result that a fenced worker has not stored, and are told twice of one that is repeated.",
        likely=("conformance/test_engine_executing.py", "conformance/test_engine_leases.py", "conformance/test_control_matrix.py"),
    ),
    _bug(
        name="inbox-has-no-bound",
        file=_EVENTS,
        old=""""$expr": {"$or": [hit, has_room(size)]}}""",
        new=""""$expr": {"$or": [hit, {"$literal": True}]}}""",
        harm="Events that a run never waits for fill its document, until it cannot be claimed.",
        beyond_explorer="It takes hundreds of events to one run.",
    ),
    _bug(
        name="clean-up-forgets-all-events",
        file=_RETENTION,
        old="""return (yield from _forgetting_outdated((yield from _finding_oldest())))""",
        new="""return (yield from _forgetting_outdated(None))""",
        harm="A run that waits later, or is rewound, never receives an event that was sent to all while it existed.",
        likely=("conformance/test_retention_events.py",),
    ),
    _bug(
        name="clean-up-forgets-events-of-ended-runs",
        file=_RETENTION,
        old="""receivers = [run for run in oldest if run.get("status") not in NOT_REWINDABLE_TEXTS]""",
        new="""receivers = [run for run in oldest if run.get("status") not in ("done", "failed", "cancelled")]""",
        harm="A run that is rewound after its end never receives an event that was sent to all before.",
        likely=("conformance/test_retention_events.py",),
        explorer=("--kinds", "event"),
    ),
    _bug(
        name="clean-up-forgets-pending-events",
        file=_EVENTS,
        old='''return {"bornAt": older, "pending": False, "$expr"''',
        new='''return {"bornAt": older, "$expr"''',
        harm="An event whose sender has died is removed before a steward has delivered it.",
        beyond_explorer="A stored run that can receive the event is older than it, and keeps it. What goes too early can reach no run.",
        likely=("conformance/test_retention_events.py",),
    ),
)
