"""What `sqlqueue migrate` does: apart from other commands, since Alembic takes long to import.

Every worker process imports the command line as it starts.
"""

import re
from datetime import timedelta
from io import StringIO
from typing import Any

import click
from alembic import command
from alembic.util import CommandError

from sqlqueue.cli.words import FAILED, confirm, failure
from sqlqueue.integrations.alembic import check, config, current, goes_down, head, migrate
from sqlqueue.integrations.roles import make_roles, roles_script
from sqlqueue.reports import Control, misuse

REVISION = re.compile(r"(head|base|\d{4})(:(head|base|\d{4}))?")


def bring(control: Control, action: str, revision: str | None, **given: Any) -> None:
    """Bring the schema up or down to a revision, and write where it is then.

    With `roles`, make them and their grants, too. With `sql`, write the statements instead.
    """
    is_down, roles, lock_timeout = action == "down", given["roles"], given["lock_timeout"]
    if revision and not REVISION.fullmatch(revision):
        raise click.UsageError(f"{revision} is no revision such as 0001, base or head")
    if roles and action != "up":
        raise click.UsageError("--roles goes with up")
    schema = control.schema.value
    try:
        if given["sql"]:
            revisions = revision or ("head:base" if is_down else "base:head")
            with misuse():
                click.echo(script(schema, revisions, is_down=is_down, lock_timeout=lock_timeout))
                if roles:
                    click.echo(f"begin;\n\n{roles_script(schema)}\ncommit;")
            return
        if action != "status":
            target = revision or ("base" if is_down else "head")
            move(control, target, is_down=is_down, lock_timeout=lock_timeout, yes=given["yes"])
        if roles:
            make_roles(control.queue.engine, schema, lock_timeout=lock_timeout)
    except CommandError as error:
        raise failure(str(error), FAILED) from error
    engine = control.queue.engine
    row = {"schema": schema, "revision": current(engine, schema), "head": head()}
    control.write(row, [row])
    if action == "status":
        check(engine, schema)


def move(
    control: Control, revision: str, *, is_down: bool, lock_timeout: timedelta, yes: bool
) -> None:
    """Bring the schema to a revision that lies this way, having asked before going down."""
    engine, schema = control.queue.engine, control.schema.value
    found = current(engine, schema)
    if goes_down(found, revision) != is_down:
        way = "down" if is_down else "up"
        raise failure(
            f"nothing was changed: {revision} is not {way} from {found or 'base'}", FAILED
        )
    if is_down and not yes:
        confirm(f"Go down to {revision}, and drop the jobs in schema {schema}?")
    migrate(engine, schema, revision, lock_timeout=lock_timeout)


def script(schema: str, revisions: str, *, is_down: bool, lock_timeout: timedelta) -> str:
    """Return the SQL that leads from one revision to another, `FROM:TO`; connects to nothing."""
    made = config(schema, lock_timeout)
    made.output_buffer = StringIO()
    move = command.downgrade if is_down else command.upgrade
    move(made, revisions, sql=True)
    return made.output_buffer.getvalue()
