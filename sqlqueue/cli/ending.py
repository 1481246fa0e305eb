"""How commands end: their exit codes, what is said of a failure, and asking before a change."""

import sys
from typing import Any

import click

from sqlqueue.errors import JobNotFound, SchemaMismatch, SqlqueueError
from sqlqueue.link import DatabaseError
from sqlqueue.reports.control import Control
from sqlqueue.reports.written import inert

# Exit codes; 0 is done, and 2, which is click's, misused.
FAILED, UNREACHABLE, SCHEMA, NOTHING, IN_PART, TOO_LONG, INTERRUPTED = 1, 3, 4, 5, 6, 124, 130
CODES: dict[type, int] = {JobNotFound: NOTHING, SchemaMismatch: SCHEMA}


def failure(message: str, code: int = FAILED) -> click.exceptions.Exit:
    """Say what failed, and return what ends the command with an exit code."""
    click.echo(f"Error: {inert(message)}", err=True)
    return click.exceptions.Exit(code)


class Commands(click.Group):
    """The commands, whose expected failures end in a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            raise failure("interrupted", INTERRUPTED) from error
        except SqlqueueError as error:
            raise failure(str(error), CODES.get(type(error), FAILED)) from error
        except DatabaseError as error:
            raise database_failure(error, ctx.obj) from error


def database_failure(error: Exception, control: Control) -> click.exceptions.Exit:
    """Say what a database error means, by its code in Postgres; without one, nothing answered."""
    cause = getattr(error, "orig", error)
    code = getattr(cause, "sqlstate", None)
    at = "the database of {value}, chosen by {why}".format(**control.settings[1])
    if code is None or code.startswith(("08", "57P")):
        return failure(f"{at}, cannot be reached: {cause}", UNREACHABLE)
    if code in ("3F000", "42P01", "42703", "42883"):  # no such schema, table, column, function
        where = f"schema {control.schema.value} in {at}"
        return failure(f"{where}, is missing or of another version: run sqlqueue migrate", SCHEMA)
    return failure(f"{at}, refused: {cause}")


def confirm(question: str, yes: bool) -> None:
    """Ask before a change, unless `yes`. Ends the command if the answer, at a terminal, is no."""
    if not yes and not sys.stdin.isatty():
        raise failure("nothing was changed: without a terminal to ask at, give --yes")
    if not yes and not click.confirm(question, err=True):
        raise failure("nothing was changed")
