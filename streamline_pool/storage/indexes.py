"""Indexes for users' own queries, and the TTL: which there are, how they are created, which existing index is in the way.

Owns what `setup_indexes` makes of its arguments. The engine's own indexes are in protocol/engine_indexes.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from streamline_pool.domain.document import RUN_FIELDS
from streamline_pool.domain.errors import StoreUnavailableError, ValidationError
from streamline_pool.protocol import server_codes
from streamline_pool.protocol.engine_indexes import IndexDefinition, list_indexes
from streamline_pool.protocol.expressions import TERMINAL_TEXTS
from streamline_pool.protocol.operations import Command

from .driver_errors import has_code
from .procedures import Procedure, Sleep

__all__ = ["TENANT_FIELD", "check_field", "custom_indexes", "days_in_seconds", "field_of_run", "making_indexes", "tenant_fields"]

TENANT_FIELD = "context.tenantId"
"""The field of a run's tenant, unless `setup_indexes(tenant_field=)` names another one."""

_TENANT_PREFIX = "streamline_tenant_"
_TTL = "streamline_ttl"
_DAY_S = 86400.0
_TTL_S_MAX = 2**31 - 1  # MongoDB's limit, some 68 years
_FIELD_CHARACTERS_MAX = 200  # a guess

_TRIES = 60  # other processes may change the indexes meanwhile, and the build of an index may take longer than one command
_PAUSE_S = 0.2


def check_field(field: object, where: str) -> str:
    """`field` if it is a path such as `context.order.id`. Raises ValidationError otherwise; `where` names the argument."""
    if not isinstance(field, str):
        raise ValidationError(f"{where}: a field is text such as 'context.tenantId', not {field!r}")
    parts = field.split(".")
    if not all(parts) or any(part.startswith("$") for part in parts) or "\0" in field or len(field) > _FIELD_CHARACTERS_MAX:
        raise ValidationError(
            f"{where}: {field!r} is not a field: parts separated by dots, none of them empty or beginning with $, "
            f"at most {_FIELD_CHARACTERS_MAX} characters"
        )
    try:
        field.encode()
    except UnicodeError:
        raise ValidationError(f"{where}: {field!r} holds a lone surrogate, which cannot be stored") from None
    return field


def field_of_run(name: object, where: str) -> str:
    """The field of a run that a name stands for: `tenantId` for `context.tenantId`, but `userId` and `meta.tenant` for themselves.

    The fields that the engine schedules by are not among those for users: `token` is `context.token`. Raises
    ValidationError as `check_field` does.
    """
    return _in_run(check_field(name, where))


def _in_run(field: str) -> str:
    return field if field.partition(".")[0] in RUN_FIELDS else f"context.{field}"


def custom_indexes(
    *, tenant_field: str | None, user_field: str | None, auto_cleanup_days: float | timedelta | None, context_fields: Sequence[str]
) -> tuple[IndexDefinition, ...]:
    """The indexes that `setup_indexes` creates besides the engine's. Raises ValidationError for a bad argument."""
    if isinstance(context_fields, str) or not isinstance(context_fields, Iterable):
        raise ValidationError(f"setup_indexes: context_fields is a list of fields, such as ['orderId'], not {context_fields!r}")
    made = [
        IndexDefinition(name="streamline_workflow_status", key={"workflowId": 1, "status": 1}),
        IndexDefinition(name="streamline_status_updated", key={"status": 1, "updatedAt": 1}),
    ]
    if tenant_field is not None:
        field = field_of_run(tenant_field, "setup_indexes: tenant_field")
        made.append(IndexDefinition(name=f"{_TENANT_PREFIX}{field}", key=_keys(field, "status", "createdAt")))
    field = field_of_run("userId" if user_field is None else user_field, "setup_indexes: user_field")
    made.append(IndexDefinition(name=f"streamline_user_{field}", key=_keys(field, "createdAt")))
    for given in context_fields:
        field = field_of_run(given, "setup_indexes: context_fields")
        made.append(IndexDefinition(name=f"streamline_field_{field}", key={field: 1}))
    if auto_cleanup_days is not None:
        made.append(_ttl(auto_cleanup_days))
    return tuple({index.name: index for index in made}.values())


def _keys(*fields: str) -> dict[str, int]:
    if len(set(fields)) < len(fields):
        raise ValidationError(f"setup_indexes: an index on {', '.join(fields)} would hold a field twice; choose another field")
    return dict.fromkeys(fields, 1)


def _ttl(days: float | timedelta) -> IndexDefinition:
    """An index that removes runs so many days after their end. A run that sleeps has not ended, however old it is."""
    after_s = round(days_in_seconds(days, "setup_indexes: auto_cleanup_days"))
    if after_s > _TTL_S_MAX:
        raise ValidationError(f"setup_indexes: auto_cleanup_days {days!r}: MongoDB's longest is {_TTL_S_MAX // int(_DAY_S)} days")
    return IndexDefinition(name=_TTL, key={"endedAt": 1}, partial={"status": {"$in": TERMINAL_TEXTS}}, expire_after_s=after_s)


_DAYS_MAX = 1e9  # nothing is as old, and the seconds of more days can be beyond a float


def days_in_seconds(days: object, where: str) -> float:
    """Seconds of a number of days (0 and fractions are allowed) or of a timedelta. Raises ValidationError."""
    if isinstance(days, timedelta):
        days = days.total_seconds() / _DAY_S
    if isinstance(days, bool) or not isinstance(days, (int, float)) or not 0 <= days < float("inf"):
        raise ValidationError(f"{where}: a finite number of days, at least 0, or a timedelta, not {days!r}")
    return min(days, _DAYS_MAX) * _DAY_S


# --- operations ----------------------------------------------------------------------------------------------------


def _create_indexes(indexes: Sequence[IndexDefinition]) -> Command:
    """Create indexes. Does nothing when they exist. Several processes may do so at once: they wait for one build."""
    body = {"indexes": [index.spec() for index in indexes]}
    return Command(name="create_custom_indexes", collection="runs", verb="createIndexes", body=body)


def _change_ttl(name: str, expire_after_s: int) -> Command:
    """Give a TTL index another time, in place. The index is not built again."""
    body = {"index": {"name": name, "expireAfterSeconds": expire_after_s}}
    return Command(name="change_ttl", collection="runs", verb="collMod", body=body)


# --- procedures ----------------------------------------------------------------------------------------------------


def making_indexes(indexes: Sequence[IndexDefinition]) -> Procedure[list[str]]:
    """Create the missing ones of `indexes` and change the TTL where it differs. Returns the names under which they exist.

    Safe when many processes do it at once, also with different TTLs: the last one counts. Raises ValidationError, and
    creates nothing, when an index has the same keys or name but other options.
    """
    for tried in range(1, _TRIES + 1):
        existing = yield list_indexes()
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
            # Another process has changed the indexes, or a build takes longer than one command and goes on meanwhile.
            # The next try lists the indexes again.
            may_pass = has_code(exc, *server_codes.INDEX_CONFLICT, *server_codes.INDEX_BUILD_UNDER_WAY) or exc.context.get("transient")
            if tried == _TRIES or not may_pass:
                raise
            yield Sleep(_PAUSE_S)
    raise AssertionError("the last try either returns or raises")


def _changing_ttl(name: str, expire_after_s: int) -> Procedure[None]:
    try:
        yield _change_ttl(name, expire_after_s)
    except StoreUnavailableError as exc:
        if not has_code(exc, server_codes.UNAUTHORIZED):
            raise
        raise StoreUnavailableError(
            f"setup_indexes: the user may create an index, but not change the time of the TTL index {name!r} (readWrite does not hold "
            "collMod): call setup_indexes once as a user with the role dbAdmin, or drop the index, or leave auto_cleanup_days as it was",
            transient=False,
        ) from exc


def _named(existing: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next(found for found in existing if found["name"] == name)


def _name_of(index: IndexDefinition, existing: Sequence[Mapping[str, Any]]) -> str | None:
    """The name of the existing index that equals this one, except perhaps for the time of its TTL. None: it must be created."""
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
    """In words, how an existing index differs from the wanted one."""
    wanted = index.spec()
    differences = [] if _same_key(index, found) else [f"its keys are {dict(found['key'])}"]
    for option in sorted({*found, *wanted} - _NO_OPTIONS):
        if option not in wanted:
            differences.append(f"it has {option} {found[option]!r}")
        elif option not in found:
            differences.append(f"it lacks {option} {wanted[option]!r}")
        elif option != "expireAfterSeconds" and _plain(found[option]) != _plain(wanted[option]):
            differences.append(f"its {option} is {found[option]!r}")
    return differences


_NO_OPTIONS = frozenset({"v", "key", "name", "ns", "background"})
"""Fields of `listIndexes` that make no difference, or are compared separately."""


def _plain(option: Any) -> Any:
    """An option in a form that can be compared: the order of the values of `$in` does not matter."""
    if isinstance(option, Mapping):
        return {key: sorted(map(str, value)) if key == "$in" else _plain(value) for key, value in option.items()}
    return option


def tenant_fields() -> Procedure[list[str]]:
    """The tenant fields for which a process has called `setup_indexes` in this database."""
    try:
        existing = yield list_indexes()
    except StoreUnavailableError as exc:
        if not has_code(exc, server_codes.NAMESPACE_NOT_FOUND):
            raise
        return []
    named = [found["name"].removeprefix(_TENANT_PREFIX) for found in existing if found["name"].startswith(_TENANT_PREFIX)]
    return list(dict.fromkeys(map(_in_run, named)))  # an earlier version made an index for a bare name, on a field that no run has
