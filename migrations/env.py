"""Runs the migrations: `alembic upgrade head` here, `sqlqueue migrate` from an installed wheel.

The schema comes from `-x schema=…`, the connection from whoever embeds this, or from the url
in `-x url=…`, SQLQUEUE_URL or alembic.ini. Nothing is imported from sqlqueue: a migration means
the same for ever.
"""

import os

from alembic import context
from sqlalchemy import Connection, create_engine

config = context.config
given = context.get_x_argument(as_dictionary=True)
schema = config.attributes.get("schema") or given.get("schema", "sqlqueue")
lock_timeout = config.attributes.get("lock_timeout", "2s")


def migrate(connection: Connection | None) -> None:
    context.configure(
        connection=connection,
        dialect_name=None if connection else "postgresql",
        version_table_schema=schema,
        literal_binds=connection is None,
        # The paramstyle of the driver would double the percent signs of a script.
        dialect_opts={} if connection else {"paramstyle": "named"},
    )
    with context.begin_transaction():
        context.execute(f"set local lock_timeout = '{lock_timeout}'")
        context.execute(f"create schema if not exists {schema}")
        context.run_migrations()


def url() -> str:
    return given.get("url") or os.environ.get("SQLQUEUE_URL") or config.get_main_option("url", "")


if context.is_offline_mode():
    migrate(None)
elif "connection" in config.attributes:
    migrate(config.attributes["connection"])
else:
    engine = create_engine(url())
    with engine.connect() as connection:
        migrate(connection)
