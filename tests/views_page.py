"""The page of the views, made from their comments: `python -m tests.views_page` writes it."""

from pathlib import Path

from sqlalchemy import Engine, create_engine, text

from sqlqueue.embedded import Server
from sqlqueue.integrations.alembic import migrate

PAGE = Path(__file__).parent.parent / "docs/reference/views.md"
HEAD = """# Views

What the schema `sqlqueue` offers to whoever knows SQL: stable, and documented by the comments in
the catalog, from which this page is made (`python -m tests.views_page`). Tables are private. Any
release may add columns at the end of a view; to remove one takes a major version. Counts stop at
10,001 where they would otherwise read all jobs. The role `sqlqueue_view` may read all of them.
"""
VIEWS = """
select relname, obj_description(oid, 'pg_class') as says
from pg_class
where relnamespace = 'sqlqueue'::regnamespace and relkind = 'v'
order by relname
"""
COLUMNS = """
select attname, format_type(atttypid, atttypmod) as kind, col_description(attrelid, attnum) as says
from pg_attribute
where attrelid = to_regclass('sqlqueue.' || :view) and attnum > 0
order by attnum
"""
FUNCTIONS = """
select proname || '(' || pg_get_function_identity_arguments(oid) || ')' as name,
    obj_description(oid, 'pg_proc') as says
from pg_proc
where pronamespace = 'sqlqueue'::regnamespace and proname = any (:names)
order by proname
"""
PUBLIC = [
    "why", "queue_lag", "queue_wait", "hist_sum", "hist_quantile", "enqueue", "cancel", "retry",
    "pause", "set_policy", "run_schedule", "change", "tell_worker", "mute_failures",
    "remove_schedule", "set_retention",
]  # fmt: skip


def page(engine: Engine) -> str:
    """Write the page of a migrated database."""
    parts = [HEAD]
    with engine.connect() as conn:
        for view, says in conn.execute(text(VIEWS)).all():
            parts.append(f"\n## {view}\n\n{says}.\n\n| column | type | |\n| --- | --- | --- |\n")
            for name, kind, what in conn.execute(text(COLUMNS), {"view": view}).all():
                parts.append(f"| {name} | {kind} | {what} |\n")
        parts.append("\n## Functions\n\n| function | |\n| --- | --- |\n")
        for name, says in conn.execute(text(FUNCTIONS), {"names": PUBLIC}).all():
            parts.append(f"| `{name}` | {says} |\n")
    return "".join(parts)


if __name__ == "__main__":
    with Server(durable=False) as server:
        migrate(create_engine(server.url))
        PAGE.write_text(page(create_engine(server.url)))
