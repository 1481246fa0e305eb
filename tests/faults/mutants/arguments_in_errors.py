"""An error of the database tells the parameters of the statement, as SQLAlchemy does by default."""

from pathlib import Path

from tests.faults.mutants import replace

BAR = "r38 and our_own_connection"
TESTS = "tests/test_r38_input.py"
IS_QUICK = True
SAID = "[frame.f_locals for frame, _ in __import__('traceback').walk_tb(error.__traceback__)]"


def apply(root: Path) -> None:
    replace(
        root,
        "sqlqueue/transaction.py",
        "DBAPIError.instance(None, None, error, psycopg.Error, True)",
        f"DBAPIError.instance('enqueue', {{'said': str({SAID})}}, error, psycopg.Error, False)",
    )
