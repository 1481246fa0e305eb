"""What must hold at every commit, whatever has happened: migrations/invariants.sql."""

from sqlalchemy import Connection, Engine

from sqlqueue.integrations.alembic import folder

INVARIANTS = (folder() / "invariants.sql").read_text("utf-8")


def violations(conn: Connection, schema: str = "sqlqueue") -> list[tuple[str, str, str]]:
    """Return (rule, job or key, detail) for each rule that is broken."""
    found = conn.exec_driver_sql(INVARIANTS.replace("sqlqueue.", f"{schema}."))
    return [tuple(row) for row in found]


def assert_invariants(engine: Engine) -> None:
    """Fail if a rule is broken, and say which."""
    with engine.connect() as conn:
        assert violations(conn) == []
