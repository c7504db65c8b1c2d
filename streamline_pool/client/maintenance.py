"""Indexes, clean-up and archive of one application's runs. Client procedures, without I/O.

Owns the order of the parts of each call, and which field holds a run's tenant. The parts are in storage/indexes.py and
storage/retention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from streamline_pool.domain.errors import ValidationError
from streamline_pool.protocol import retention
from streamline_pool.protocol.engine_indexes import EVENT_INDEXES, HOST_INDEXES, OUTPUT_INDEXES, RUN_INDEXES
from streamline_pool.storage.indexes import TENANT_FIELD, custom_indexes, days_in_seconds, field_of_run, making_indexes, tenant_fields
from streamline_pool.storage.procedures import Procedure
from streamline_pool.storage.retention import archiving, check_archive, deleting, dropping_orphans, forgetting_events

from .services import Services

__all__ = ["Maintenance"]


class Maintenance:
    """The procedures behind `Streamline.setup_indexes`, `cleanup_old_runs` and their like."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._tenant_field: str | None = None  # as given to `setting_up_indexes` of this object

    def initializing_database(self) -> Procedure[list[str]]:
        """Create the engine's collections and indexes; see `Streamline.init_db`."""
        yield from self._services.ensure()
        return [index.name for index in (*RUN_INDEXES, *HOST_INDEXES, *EVENT_INDEXES, *OUTPUT_INDEXES)]

    def setting_up_indexes(
        self,
        tenant_field: str | None,
        user_field: str | None,
        auto_cleanup_days: float | timedelta | None,
        context_fields: Sequence[str],
    ) -> Procedure[list[str]]:
        """Create all indexes; see `Streamline.setup_indexes`."""
        indexes = custom_indexes(
            tenant_field=tenant_field, user_field=user_field, auto_cleanup_days=auto_cleanup_days, context_fields=context_fields
        )
        names = yield from self.initializing_database()
        names += yield from making_indexes(indexes)
        if tenant_field is not None:
            self._tenant_field = field_of_run(tenant_field, "setup_indexes: tenant_field")
        return names

    def cleaning_up_old_runs(self, days: float | timedelta, tenant_id: Any, dry_run: bool) -> Procedure[int]:
        """Delete old runs, and what nothing refers to any more; see `Streamline.cleanup_old_runs`."""
        age_s = days_in_seconds(days, "cleanup_old_runs: days")
        tenant = None if tenant_id is None else ((yield from self._finding_tenant_field()), tenant_id)
        count = yield from deleting(retention.ended_before(age_s, tenant), dry_run=dry_run)
        if not dry_run:
            yield from dropping_orphans()
            yield from forgetting_events()
        return count

    def archiving_old_runs(self, days: float | timedelta, to: str | None, collection_prefix: str, dry_run: bool) -> Procedure[int]:
        """Move old runs to the archive; see `Streamline.archive_old_runs`."""
        age_s = days_in_seconds(days, "archive_old_runs: days")
        collection, stored_name = check_archive(to, collection_prefix)
        count = yield from archiving(retention.ended_before(age_s), collection, stored_name, dry_run=dry_run)
        if not dry_run:
            yield from forgetting_events()
        return count

    def cleaning_up_expired_runs(self, dry_run: bool) -> Procedure[int]:
        """Delete expired runs; see `Streamline.cleanup_expired`."""
        count = yield from deleting(retention.expired(), dry_run=dry_run)
        if not dry_run:
            yield from forgetting_events()
        return count

    def _finding_tenant_field(self) -> Procedure[str]:
        """The field that holds a run's tenant: as given to this object, else as another process has indexed it."""
        if self._tenant_field is not None:
            return self._tenant_field
        known = yield from tenant_fields()
        if len(known) > 1:
            raise ValidationError(
                f"tenant_id: tenants are indexed by {' and by '.join(known)}; call setup_indexes(tenant_field=…) first, to say which counts"
            )
        return known[0] if known else TENANT_FIELD
