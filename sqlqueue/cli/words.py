"""How the words of a command are read. What cannot be is click.BadParameter, or a ValueError."""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import click

from sqlqueue.codec import encode_call
from sqlqueue.policy import Rate
from sqlqueue.reports import search
from sqlqueue.task import Task

SIZES = {"": 0, "K": 10, "M": 20, "G": 30}  # powers of two
KEYWORD = re.compile(r"([A-Za-z_]\w*)(:?=)(.*)", re.DOTALL)


def duration(text: str) -> timedelta:
    """Read a time span such as 30s."""
    try:
        return search.duration(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


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


def arguments(
    task: Task[..., Any] | None, words: Iterable[str], source: str | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Read the arguments of a call; those of a task that is known, by its annotations.

    Raises ValueError or TypeError for what cannot be read or does not fit.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    if source is not None:
        if source != "-" and not source.startswith("@"):
            raise ValueError(f"--args must be @FILE or -, got {source}")
        with click.open_file(source.removeprefix("@"), encoding="utf-8") as file:
            document = json.load(file)
        if not isinstance(document, list | dict):
            raise ValueError("--args must be a JSON list or object")
        args, kwargs = (document, {}) if isinstance(document, list) else ([], document)
    for word in words:
        if match := KEYWORD.fullmatch(word):
            kwargs[match[1]] = json.loads(match[3]) if match[2] == ":=" else match[3]
        else:
            args.append(json_or_text(word))
    return task.shape.decode(encode_call(tuple(args), kwargs)) if task else (args, kwargs)
