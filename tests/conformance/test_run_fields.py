"""How the name of a field becomes a path in stored runs: one rule for all arguments and for the command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cli_shell import Shell
from old_runs import ids, put_run

from streamline_pool import Streamline, ValidationError
from streamline_pool.domain.document import RUN_FIELDS
from streamline_pool.storage.indexes import field_of_run
from support import shown

PATHS = {
    "tenantId": "context.tenantId",  # a bare name
    "context.tenantId": "context.tenantId",
    "customer.id": "context.customer.id",  # a path that begins with no field of a run
    "userId": "userId",
    "tags": "tags",
    "queue": "queue",
    "meta.tenant": "meta.tenant",
    "input.customer.id": "input.customer.id",
    "lease": "context.lease",  # fields that the engine schedules by are no fields for users
    "token.value": "context.token.value",
}


@pytest.mark.parametrize(("given", "path"), PATHS.items(), ids=PATHS)
def test_a_name_means_the_same_in_every_argument(app: Streamline, given: str, path: str) -> None:
    """An index on a field that no run has answers no query, and a clean-up by it deletes nothing."""
    assert field_of_run(given, "x") == path
    names = app.setup_indexes(tenant_field=given, user_field=given, context_fields=[given])
    made = {index["name"]: list(index["key"]) for index in app.runs.list_indexes()}
    assert made[f"streamline_tenant_{path}"] == [path, "status", "createdAt"]
    assert made[f"streamline_user_{path}"] == [path, "createdAt"]
    assert made[f"streamline_field_{path}"] == [path]
    assert {f"streamline_{kind}_{path}" for kind in ("tenant", "user", "field")} <= set(names)


def test_the_fields_of_a_run_are_those_of_its_stored_document_but_for_the_engines_own() -> None:
    assert {"_id", "workflowId", "status", "context", "input", "userId", "tags", "meta", "idempotencyKey", "cancelReason"} <= RUN_FIELDS
    assert not {"lane", "slot", "lease", "token", "wakeAt", "startId", "bornAt", "inbox"} & RUN_FIELDS


@pytest.mark.parametrize("field", ["", ".", "a.", ".a", "a..b", "$a", "a.$b", "context.", "context.$x", "a\0b", 7], ids=shown)
def test_a_path_that_cannot_be_is_refused(field: Any) -> None:
    with pytest.raises(ValidationError, match="setup_indexes: tenant_field"):
        field_of_run(field, "setup_indexes: tenant_field")


def three_tenants(app: Streamline) -> None:
    for tenant in ("acme", "zeta"):
        put_run(app, f"of-{tenant}", context={"tenantId": tenant})
    put_run(app, "of-none", tenantId="acme")  # a top-level field, as another program might add it


def test_a_bare_tenant_field_and_the_clean_up_of_a_tenant_agree(app: Streamline, make_app: Callable[..., Streamline]) -> None:
    three_tenants(app)
    app.setup_indexes(tenant_field="tenantId")
    plan = app.runs.find({"context.tenantId": "acme", "status": "done"}).explain()["queryPlanner"]["winningPlan"]
    assert "streamline_tenant_context.tenantId" in str(plan)
    assert app.cleanup_old_runs(tenant_id="acme", dry_run=True) == 1
    assert make_app().cleanup_old_runs(tenant_id="acme") == 1, "in a process that does not call setup_indexes"
    assert ids(app.runs) == {"of-zeta", "of-none"}


def test_the_command_cleans_up_by_the_field_of_a_bare_name(shell: Shell, app: Streamline) -> None:
    three_tenants(app)
    app.setup_indexes(tenant_field="tenantId")
    assert shell.json("cleanup", "--days", "30", "--tenant", "acme")["deleted"] == 1
    assert ids(app.runs) == {"of-zeta", "of-none"}


def test_the_index_that_an_earlier_version_made_of_a_bare_name_names_the_same_field(app: Streamline) -> None:
    """It is on a field that no run has. Beside the right one it must not make the tenant's field doubtful."""
    three_tenants(app)
    app.runs.create_index([("tenantId", 1), ("status", 1), ("createdAt", 1)], name="streamline_tenant_tenantId")
    assert app.cleanup_old_runs(tenant_id="acme", dry_run=True) == 1
    app.setup_indexes(tenant_field="tenantId")
    assert app.cleanup_old_runs(tenant_id="acme", dry_run=True) == 1
