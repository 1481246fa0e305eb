"""The options that several commands have; settings may stand before the command, too."""

from functools import partial
from typing import Any

import click
from click import option
from click.core import ParameterSource

from sqlqueue.cli import words
from sqlqueue.reports.control import Choice, Control


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
COUNT = click.IntRange(1)
setting = partial(option, expose_value=False, callback=keep)
_app = partial(option, "-A", "--app", metavar="MODULE:ATTR", expose_value=False)
app = _app(callback=keep, help="Application: where its Queue is.")
apps = _app(callback=keep_all, multiple=True, help="Application; may be repeated.")
json = setting("--json", is_flag=True, help="Write one JSON document.")
yes = option("--yes", is_flag=True, help="Do not ask.")
dry_run = option("--dry-run", is_flag=True, help="Say what would happen; change nothing.")
where = option("--where", metavar="SEARCH", help="Only those that a search finds.")
wait = option("--wait", is_flag=True, help="Wait for the job, and write its result.")
wait_for = option("--wait-for", type=words.duration,
                        help="Wait so long at most, else exit 124.")  # fmt: skip
call = click.argument("arg", metavar="[ARG...] [k=v] [k:=JSON]", nargs=-1)
