"""Bringing the schema to a version: the migrations, as found beside or inside the package."""

from datetime import timedelta
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from sqlqueue.errors import SchemaMismatch
from sqlqueue.store import statement

LOCK_TIMEOUT = timedelta(seconds=2)


def folder() -> Path:
    """Return the migrations: inside an installed package, beside it in the repository."""
    package = Path(__file__).parent.parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"


def config(schema: str, lock_timeout: timedelta = LOCK_TIMEOUT) -> Config:
    """Return what Alembic has to know. Raises ValueError for a schema that is no plain name."""
    statement("begin", schema)
    made = Config()
    made.set_main_option("script_location", str(folder()).replace("%", "%%"))
    made.attributes["schema"] = schema
    made.attributes["lock_timeout"] = f"{lock_timeout // timedelta(milliseconds=1)}ms"
    return made


def migrate(
    engine: Engine,
    schema: str = "sqlqueue",
    revision: str = "head",
    *,
    lock_timeout: timedelta = LOCK_TIMEOUT,
) -> None:
    """Bring the schema up to `revision`, or down with "base"; all or nothing.

    Gives up when it has waited `lock_timeout` for a lock, and can be run again.
    """
    made = config(schema, lock_timeout)
    with engine.connect() as conn:
        made.attributes["connection"] = conn
        is_down = goes_down(current(engine, schema), revision)
        (command.downgrade if is_down else command.upgrade)(made, revision)


def goes_down(found: str | None, revision: str) -> bool:
    """Say whether a revision is below the one found."""
    return revision == "base" or (found or "") > revision


def head() -> str | None:
    """Return the revision that this release was made for."""
    return ScriptDirectory.from_config(config("sqlqueue")).get_current_head()


def current(engine: Engine, schema: str = "sqlqueue") -> str | None:
    """Return the revision that the database is at; None if it was never migrated."""
    with engine.connect() as conn:
        options = {"version_table_schema": schema}
        return MigrationContext.configure(conn, opts=options).get_current_revision()


def check(engine: Engine, schema: str = "sqlqueue") -> None:
    """Raise SchemaMismatch unless the database is at the revision this release was made for.

    One that this release does not know is of a later release, whose schema serves this one too.
    """
    found, wanted = current(engine, schema), head()
    known = ScriptDirectory.from_config(config(schema)).walk_revisions()
    if found != wanted and found in {None, *(one.revision for one in known)}:
        raise SchemaMismatch(
            f"schema {schema} is at revision {found or 'none'}, this release needs {wanted}: "
            f"run sqlqueue migrate"
        )
