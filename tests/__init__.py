"""The tests.

With SQLQUEUE_TEST_POOLER, the server of SQLQUEUE_TEST_URL is behind a pooler that knows no prepared
statements, and no engine makes any, as docs/operating.md tells applications.
"""

import os
from typing import Any

from sqlalchemy import Engine, event

if os.environ.get("SQLQUEUE_TEST_POOLER"):

    @event.listens_for(Engine, "do_connect")
    def prepare_nothing(dialect: Any, record: Any, args: Any, how: dict[str, Any]) -> None:
        """Have psycopg prepare no statement on a new connection."""
        if dialect.name == "postgresql":
            how["prepare_threshold"] = None
