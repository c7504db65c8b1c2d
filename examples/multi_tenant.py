"""Many customers in one database: each run stores its tenant, and queries for one tenant use an index.

    python examples/multi_tenant.py
    streamline-pool --app examples.multi_tenant:app --embedded   # a pool that executes such runs

Uses the server in STREAMLINE_MONGODB_URI, or else a private one that ends with the program.
"""

from __future__ import annotations

from streamline_pool import Context, Streamline, embedded

__all__ = ["app", "invoice", "main"]

app = Streamline()
# Without `context=` the whole input would be the first context. Here it is the tenant only.
invoice = app.workflow("invoice", context=lambda input: {"tenantId": input["tenant"]})


@invoice.step
def total(ctx: Context) -> int:
    return sum(ctx.input["items"])


@invoice.step
def file(ctx: Context) -> str:
    return f"{ctx.context['tenantId']}: {ctx.get_output('total')}"


def main() -> int:
    with embedded.serving(app):
        names = app.setup_indexes(tenant_field="context.tenantId", user_field="userId", auto_cleanup_days=90)
        print(f"indexes for queries by tenant and by user: {sum('tenant' in name or 'user' in name for name in names)}")
        for tenant, items in (("acme", [1, 2]), ("acme", [3]), ("zeta", [4, 5])):
            invoice.execute(invoice.start({"tenant": tenant, "items": items}, user_id=f"{tenant}-admin").id)
        for tenant in ("acme", "zeta"):
            # `app.runs` is a plain PyMongo collection. The index limits this query to the runs of the tenant.
            found = app.runs.find({"context.tenantId": tenant, "status": "done"}).sort("createdAt")
            print(f"{tenant}: {[run['output'] for run in found]}")
        removed = app.cleanup_old_runs(0, tenant_id="acme")
        left = app.runs.count_documents({})
        print(f"acme has left: {removed} of its runs removed, {left} of other tenants kept")
        return 0 if (removed, left) == (2, 1) else 1


if __name__ == "__main__":
    raise SystemExit(main())
