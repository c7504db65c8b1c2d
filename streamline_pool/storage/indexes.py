"""Indexes for users' own queries, and the TTL: which there are, what already stands in their way, how they come to be.

Owns what `setup_indexes` makes of its arguments. The engine's own indexes are in documents.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.domain.model import TERMINAL
from streamline_pool.protocol.engine_indexes import IndexDefinition
from streamline_pool.protocol.operations import Command

from .procedures import Procedure, Sleep

__all__ = ["TENANT_FIELD", "check_field", "custom_indexes", "days_in_seconds", "making_indexes", "tenant_fields"]

TENANT_FIELD = "context.tenantId"
"""Where a run's tenant stands unless `setup_indexes(tenant_field=)` says otherwise."""

_TENANT_PREFIX = "streamline_tenant_"
_TTL = "streamline_ttl"
_DAY_S = 86400.0
_TTL_S_MAX = 2**31 - 1  # MongoDB's limit, some 68 years
_FIELD_CHARACTERS_MAX = 200  # a guess

_TRIES = 60  # of a setup that others overtake, or of the build of an index that takes longer than one command may
_PAUSE_S = 0.2
_CONFLICTS = frozenset({85, 86})  # another index has these keys, or this name
_BUSY = frozenset({12586, 12587})  # an index of this collection is being built
_UNAUTHORIZED = 13


def check_field(field: object, where: str) -> str:
    """A field's path such as `context.order.id`; a ValidationError for what can be none."""
    if not isinstance(field, str):
        raise ValidationError(f"{where}: a field is text such as 'context.tenantId', not {field!r}")
    parts = field.split(".")
    if not all(parts) or any(part.startswith("$") for part in parts) or "\0" in field or len(field) > _FIELD_CHARACTERS_MAX:
        raise ValidationError(
            f"{where}: {field!r} is no field: parts separated by dots, none of them empty or beginning with $, "
            f"at most {_FIELD_CHARACTERS_MAX} characters"
        )
    try:
        field.encode()
    except UnicodeError:
        raise ValidationError(f"{where}: {field!r} holds a lone surrogate, which cannot be stored") from None
    return field


def custom_indexes(
    *, tenant_field: str | None, user_field: str | None, auto_cleanup_days: float | timedelta | None, context_fields: Sequence[str]
) -> tuple[IndexDefinition, ...]:
    """The indexes that `setup_indexes` makes besides the engine's. Raises ValidationError."""
    if isinstance(context_fields, str) or not isinstance(context_fields, Iterable):
        raise ValidationError(f"setup_indexes: context_fields is a list of fields, such as ['orderId'], not {context_fields!r}")
    made = [
        IndexDefinition(name="streamline_workflow_status", key={"workflowId": 1, "status": 1}),
        IndexDefinition(name="streamline_status_updated", key={"status": 1, "updatedAt": 1}),
    ]
    if tenant_field is not None:
        field = check_field(tenant_field, "setup_indexes: tenant_field")
        made.append(IndexDefinition(name=f"{_TENANT_PREFIX}{field}", key=_keys(field, "status", "createdAt")))
    field = check_field("userId" if user_field is None else user_field, "setup_indexes: user_field")
    made.append(IndexDefinition(name=f"streamline_user_{field}", key=_keys(field, "createdAt")))
    for given in context_fields:
        field = check_field(given, "setup_indexes: context_fields")
        field = field if field.startswith("context.") else f"context.{field}"
        made.append(IndexDefinition(name=f"streamline_field_{field}", key={field: 1}))
    if auto_cleanup_days is not None:
        made.append(_ttl(auto_cleanup_days))
    return tuple({index.name: index for index in made}.values())


def _keys(*fields: str) -> dict[str, int]:
    if len(set(fields)) < len(fields):
        raise ValidationError(f"setup_indexes: an index on {', '.join(fields)} would hold a field twice; choose another field")
    return dict.fromkeys(fields, 1)


def _ttl(days: float | timedelta) -> IndexDefinition:
    """Removes runs so many days after their end. Only those that have ended: no sleep, however long, is an old run."""
    after_s = round(days_in_seconds(days, "setup_indexes: auto_cleanup_days"))
    if after_s > _TTL_S_MAX:
        raise ValidationError(f"setup_indexes: auto_cleanup_days {days!r}: MongoDB's longest is {_TTL_S_MAX // int(_DAY_S)} days")
    ended = {"status": {"$in": sorted(status.value for status in TERMINAL)}}
    return IndexDefinition(name=_TTL, key={"endedAt": 1}, partial=ended, expire_after_s=after_s)


def days_in_seconds(days: object, where: str) -> float:
    """A number of days, 0 and fractions included, or a timedelta. Raises ValidationError."""
    if isinstance(days, timedelta):
        days = days.total_seconds() / _DAY_S
    if isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 <= days < float("inf"):
        raise ValidationError(f"{where}: a finite number of days, at least 0, or a timedelta, not {days!r}")
    return days * _DAY_S


# --- operations ----------------------------------------------------------------------------------------------------


def _list_indexes() -> Command:
    """The indexes of the runs, as `listIndexes` describes them."""
    body = {"cursor": {"batchSize": 1_000}}  # a collection has at most 64
    return Command(
        name="list_indexes",
        collection="runs",
        verb="listIndexes",
        body=body,
        parse=lambda reply: list(reply["cursor"]["firstBatch"]),
        writes=False,
    )


def _create_indexes(indexes: Sequence[IndexDefinition]) -> Command:
    """Create indexes; does nothing when they exist. Several processes may do so at once: they wait for one build."""
    body = {"indexes": [index.spec() for index in indexes]}
    return Command(name="create_custom_indexes", collection="runs", verb="createIndexes", body=body)


def _change_ttl(name: str, expire_after_s: int) -> Command:
    """Give a TTL index another time, in place: nothing is built anew."""
    body = {"index": {"name": name, "expireAfterSeconds": expire_after_s}}
    return Command(name="change_ttl", collection="runs", verb="collMod", body=body)


# --- procedures ----------------------------------------------------------------------------------------------------


def making_indexes(indexes: Sequence[IndexDefinition]) -> Procedure[list[str]]:
    """Create what is missing of `indexes` and change the TTL where it differs. Returns the names under which they exist.

    Safe when many processes do it at once, also with different TTLs: the last one counts. Raises ValidationError, and
    creates nothing, when there is an index with the same keys or name and other options.
    """
    for tried in range(1, _TRIES + 1):
        existing = yield _list_indexes()
        names = [_name_of(index, existing) for index in indexes]
        missing = [index for index, name in zip(indexes, names, strict=True) if name is None]
        try:
            if missing:
                yield _create_indexes(missing)
            for index, name in zip(indexes, names, strict=True):
                if name is not None and index.expire_after_s != _named(existing, name).get("expireAfterSeconds"):
                    assert index.expire_after_s is not None, "_name_of lets an index differ in its TTL only where it is to have one"
                    yield from _changing_ttl(name, index.expire_after_s)
            return [name or index.name for index, name in zip(indexes, names, strict=True)]
        except StoreUnavailableError as exc:
            # Overtaken by another process, which the next look tells; or a build that takes longer than one command may,
            # and goes on meanwhile.
            code = getattr(exc.__cause__, "code", None)
            if tried == _TRIES or not (code in _CONFLICTS | _BUSY or exc.context.get("transient")):
                raise
            yield Sleep(_PAUSE_S)
    raise AssertionError("the last try either returns or raises")


def _changing_ttl(name: str, expire_after_s: int) -> Procedure[None]:
    try:
        yield _change_ttl(name, expire_after_s)
    except StoreUnavailableError as exc:
        if getattr(exc.__cause__, "code", None) != _UNAUTHORIZED:
            raise
        raise StoreUnavailableError(
            f"setup_indexes: the user may create an index, but not change the time of the TTL index {name!r} (readWrite does not hold "
            "collMod): call setup_indexes once as a user with the role dbAdmin, or drop the index, or leave auto_cleanup_days as it was",
            transient=False,
        ) from exc


def _named(existing: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(found for found in existing if found["name"] == name)


def _name_of(index: IndexDefinition, existing: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the existing index that is this one, but perhaps for the time of its TTL; None if it must be created."""
    rivals = [found for found in existing if found["name"] == index.name or _same_key(index, found)]
    differences = {found["name"]: _differences(index, found) for found in rivals}
    for name, found in differences.items():
        if not found:
            return str(name)
    for name, found in differences.items():
        raise ValidationError(
            f"setup_indexes: the collection has an index {name!r} which differs from the one wanted, {index.name!r} on "
            f"{dict(index.key)}: {'; '.join(found)}. Drop it (app.runs.drop_index({name!r})) and call setup_indexes again, or "
            "leave the argument out that asks for this index",
            index=name,
        )
    return None


def _same_key(index: IndexDefinition, found: Mapping[str, Any]) -> bool:
    return list(found["key"].items()) == list(index.key.items())


def _differences(index: IndexDefinition, found: Mapping[str, Any]) -> list[str]:
    wanted = index.spec()
    told = [] if _same_key(index, found) else [f"its keys are {dict(found['key'])}"]
    for option in sorted({*found, *wanted} - _NO_OPTIONS):
        if option not in wanted:
            told.append(f"it has {option} {found[option]!r}")
        elif option not in found:
            told.append(f"it lacks {option} {wanted[option]!r}")
        elif option != "expireAfterSeconds" and _plain(found[option]) != _plain(wanted[option]):
            told.append(f"its {option} is {found[option]!r}")
    return told


_NO_OPTIONS = frozenset({"v", "key", "name", "ns", "background"})
"""What `listIndexes` says of an index that makes no difference, or is compared by itself."""


def _plain(option: Any) -> Any:
    """An option for comparing: the values of `$in` in any order."""
    if isinstance(option, Mapping):
        return {key: sorted(map(str, value)) if key == "$in" else _plain(value) for key, value in option.items()}
    return option


def tenant_fields() -> Procedure[list[str]]:
    """The fields by which `setup_indexes` of any process has indexed tenants in this database."""
    try:
        existing = yield _list_indexes()
    except StoreUnavailableError as exc:
        if getattr(exc.__cause__, "code", None) != _NO_COLLECTION:
            raise
        return []
    return [found["name"].removeprefix(_TENANT_PREFIX) for found in existing if found["name"].startswith(_TENANT_PREFIX)]


_NO_COLLECTION = 26
