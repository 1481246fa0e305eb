"""Bringing the schema to a version: the migrations, as found beside or inside the package."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine

from sqlqueue.errors import SchemaMismatch
from sqlqueue.store import statement


def folder() -> Path:
    """Return the migrations: inside an installed package, beside it in the repository."""
    inside = Path(__file__).parent / "migrations"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "migrations"


def config(schema: str) -> Config:
    statement("begin", schema)  # raises ValueError for a bad name
    made = Config()
    made.set_main_option("script_location", str(folder()).replace("%", "%%"))
    made.attributes["schema"] = schema
    return made


def migrate(engine: Engine, schema: str = "sqlqueue", revision: str = "head") -> None:
    """Bring the schema up to `revision`, or down with "base"; all or nothing.

    Gives up when it has waited two seconds for a lock, and can be run again.
    """
    made = config(schema)
    with engine.connect() as conn:
        made.attributes["connection"] = conn
        if revision == "base" or (current(engine, schema) or "") > revision:
            command.downgrade(made, revision)
        else:
            command.upgrade(made, revision)


def current(engine: Engine, schema: str = "sqlqueue") -> str | None:
    """Return the revision that the database is at; None if it was never migrated."""
    with engine.connect() as conn:
        options = {"version_table_schema": schema}
        return MigrationContext.configure(conn, opts=options).get_current_revision()


def check(engine: Engine, schema: str = "sqlqueue") -> None:
    """Raise SchemaMismatch unless the database is at the revision this release was made for."""
    found = current(engine, schema)
    wanted = ScriptDirectory.from_config(config(schema)).get_current_head()
    if found != wanted:
        raise SchemaMismatch(
            f"schema {schema} is at revision {found or 'none'}, this release needs {wanted}: "
            f"run sqlqueue migrate"
        )
