"""What `sqlqueue migrate` does: apart from other commands, since Alembic takes long to import.

Every worker process imports the command line as it starts.
"""

import re
from io import StringIO
from typing import Any

import click
from alembic import command
from alembic.util import CommandError

from sqlqueue.cli.ending import confirm, failure
from sqlqueue.integrations.alembic import check, config, current, goes_down, head, migrate
from sqlqueue.integrations.roles import make_roles, roles_script
from sqlqueue.reports.control import Control, misuse

REVISION = re.compile(r"(head|base|\d{4})(:(head|base|\d{4}))?")


def bring(control: Control, action: str, revision: str | None, **given: Any) -> None:
    """Bring the schema up or down to a revision, and write where it is then.

    With `roles`, make them and their grants, too. With `sql`, write the statements instead.
    """
    if revision and not REVISION.fullmatch(revision):
        raise click.UsageError(f"{revision} is no revision such as 0001, base or head")
    if given["roles"] and action != "up":
        raise click.UsageError("--roles goes with up")
    try:
        if given["sql"]:
            with misuse():
                write(control, action == "down", revision, **given)
        else:
            move(control, action, revision, **given)
    except CommandError as error:
        raise failure(str(error)) from error


def move(control: Control, action: str, revision: str | None, **given: Any) -> None:
    """Bring the schema to a revision that lies this way, having asked before going down."""
    engine, schema = control.queue.engine, control.schema.value
    if action != "status":
        found, to = current(engine, schema), revision or ("base" if action == "down" else "head")
        if goes_down(found, to) != (action == "down"):
            raise failure(f"nothing was changed: {to} is not {action} from {found or 'base'}")
        if action == "down":
            confirm(f"Go down to {to}, and drop the jobs in schema {schema}?", given["yes"])
        migrate(engine, schema, to, lock_timeout=given["lock_timeout"])
    if given["roles"]:
        make_roles(engine, schema, lock_timeout=given["lock_timeout"])
    row = {"schema": schema, "revision": current(engine, schema), "head": head()}
    control.write(row, [row])
    if action == "status":
        check(engine, schema)


def write(control: Control, is_down: bool, revision: str | None, **given: Any) -> None:
    """Write the SQL that leads from one revision to another, `FROM:TO`; connect to nothing."""
    schema = control.schema.value
    made = config(schema, given["lock_timeout"])
    made.output_buffer = StringIO()
    run = command.downgrade if is_down else command.upgrade
    run(made, revision or ("head:base" if is_down else "base:head"), sql=True)
    click.echo(made.output_buffer.getvalue())
    if given["roles"]:
        click.echo(f"begin;\n\n{roles_script(schema)}\ncommit;")
