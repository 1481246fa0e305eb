"""What commands share: how words are read, how failures end, the options that several have."""

import json
import re
import sys
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import click
from click.core import ParameterSource

from sqlqueue.codec import encode_value
from sqlqueue.errors import JobNotFound, NotEnded, SchemaMismatch, SqlqueueError
from sqlqueue.job import Job
from sqlqueue.link import DatabaseError
from sqlqueue.policy import Rate
from sqlqueue.reports import Choice, Control, inert

# Exit codes; 0 is done, and 2, which is click's, misused.
FAILED, UNREACHABLE, SCHEMA, NOTHING, IN_PART, TOO_LONG, INTERRUPTED = 1, 3, 4, 5, 6, 124, 130
CODES: dict[type, int] = {JobNotFound: NOTHING, SchemaMismatch: SCHEMA}
LIVE = ("scheduled", "waiting", "ready", "running")
RETRYABLE = ("failed", "cancelled")  # as retry.sql has it
STATES = (*LIVE, "succeeded", *RETRYABLE, "expired")
MOST = 10_000  # jobs that one command changes
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
SIZES = {"": 0, "K": 10, "M": 20, "G": 30}  # powers of two
KEYWORD = re.compile(r"([A-Za-z_]\w*)(:?=)(.*)", re.DOTALL)

# Words


def duration(text: str) -> timedelta:
    """Read a time span such as 30s."""
    if not (match := re.fullmatch(r"(\d{1,8}(?:\.\d{1,6})?)(ms|[smhd])", text)):
        raise click.BadParameter(f"{text!r} is no duration such as 250ms, 30s, 5m, 2h or 1d")
    return timedelta(seconds=float(match[1]) * SECONDS[match[2]])


def rate(text: str) -> Rate:
    """Read a rate such as 100/1m."""
    jobs, _, per = text.partition("/")
    with suppress(ValueError):
        return Rate(float(jobs), duration(per))
    raise click.BadParameter(f"{text!r} is no rate such as 100/1m")


def seconds(span: timedelta) -> str:
    """Write a duration as it is given, for a default."""
    return f"{span.total_seconds():g}s"


def time(text: str) -> datetime:
    """Read an instant in ISO 8601, with its time zone."""
    with suppress(ValueError):
        if (instant := datetime.fromisoformat(text)).tzinfo:
            return instant
    raise click.BadParameter(f"{text!r} is no time with a zone such as 2026-11-20T09:00+01:00")


def size(text: str) -> int:
    """Read a number of bytes such as 512M."""
    if not (match := re.fullmatch(r"(\d{1,9})([KMG]?)", text)):
        raise click.BadParameter(f"{text!r} is no size such as 512M")
    return int(match[1]) << SIZES[match[2]]


def numbers(text: str) -> tuple[int, int]:
    """Read a number, or two such as 1..4, the lower one first."""
    low, dots, high = text.partition("..")
    with suppress(ValueError):
        if 1 <= int(low) <= int(high if dots else low):
            return int(low), int(high if dots else low)
    raise click.BadParameter(f"{text!r} is no number above 0, or two such as 1..4")


def json_or_text(word: str) -> Any:
    """Read a word as JSON if it is, as text if not."""
    with suppress(ValueError, RecursionError):
        return json.loads(word, parse_constant=int)  # NaN and Infinity are no JSON
    return word


# Failures


def failure(message: str, code: int) -> click.exceptions.Exit:
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
    return failure(f"{at}, refused: {cause}", FAILED)


def confirm(question: str) -> None:
    """Ask before a change. Ends the command unless the answer, at a terminal, is yes."""
    if not sys.stdin.isatty():
        raise failure("nothing was changed: without a terminal to ask at, give --yes", FAILED)
    if not click.confirm(question, err=True):
        raise failure("nothing was changed", FAILED)


# Options that may stand before the command or after it, and those that several commands have


def keep(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Take note of a setting and of how it was given."""
    control = ctx.ensure_object(Control)
    if value and param.name:
        is_variable = ctx.get_parameter_source(param.name) is ParameterSource.ENVIRONMENT
        variable = f"{ctx.auto_envvar_prefix}_{param.name.upper()}"
        control.given[param.name] = Choice(value, variable if is_variable else f"--{param.name}")


def keep_all(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Take note of a setting that may be repeated: of the first as `keep` does."""
    keep(ctx, param, value and value[0])
    ctx.ensure_object(Control).others = value[1:]


CONTEXT = {"auto_envvar_prefix": "SQLQUEUE", "show_default": True}
count = click.IntRange(1)
option = click.option
setting = partial(option, expose_value=False, callback=keep)
app = partial(option, "-A", "--app", metavar="MODULE:ATTR", expose_value=False)
app_option = app(callback=keep, help="Application: where its Queue is.")
apps_option = app(callback=keep_all, multiple=True, help="Application; may be repeated.")
json_option = setting("--json", is_flag=True, help="Write one JSON document.")
yes_option = option("--yes", is_flag=True, help="Do not ask.")
dry_run_option = option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
wait_option = option("--wait", is_flag=True, help="Wait for the job, and write its result.")
wait_for_option = option("--wait-for", type=duration, help="Wait so long at most, else exit 124.")
words_argument = click.argument("words", metavar="[ARG...] [k=v] [k:=JSON]", nargs=-1)


def write_result(control: Control, job_id: UUID, *, wait: bool, wait_for: timedelta | None) -> None:
    """Write the result of a job as JSON."""
    job = Job.get(control.plain, job_id)
    try:
        result = job.wait(wait_for) if wait else job.result
    except NotEnded as error:
        raise failure(str(error), TOO_LONG if wait else FAILED) from error
    click.echo(encode_value(result))
