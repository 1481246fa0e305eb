"""How reports are written: as JSON, as lines of cells, as a table for a terminal."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from rich.table import Table
from rich.text import Text

Row = dict[str, Any]


def as_json(document: Any, indent: int | None = 2) -> str:
    """Write a document: instants in UTC, durations in seconds."""

    def plain(value: Any) -> Any:
        if isinstance(value, timedelta):
            return value.total_seconds()
        if isinstance(value, Decimal):
            return float(value)
        return _utc(value) if isinstance(value, datetime) else str(value)

    return json.dumps(document, default=plain, ensure_ascii=False, indent=indent)


def as_lines(rows: Sequence[Row]) -> list[str]:
    """Write a line for each row, its cells separated by tabs; what is inside them is escaped."""
    return ["\t".join(_cell(value).translate(_CONTROLS) for value in row.values()) for row in rows]


def as_table(rows: Sequence[Row]) -> Table:
    """Write rows for a terminal, without empty columns; no text of a job can move the cursor."""
    table = Table(box=None, pad_edge=False)
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)] if rows else []
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name != "value")
    for row in rows:
        table.add_row(*(Text(inert(_cell(row[name]))) for name in names))
    return table


def fields(job: Row) -> list[Row]:
    """Return a job with its runs as rows of a field and its value, without empty ones."""
    pairs = [pair for pair in job.items() if pair[0] != "runs"]
    for run in job["runs"]:
        pairs += [(f"run {run['run']} {name}", value) for name, value in run.items()]
    return [{"field": name, "value": value} for name, value in pairs if value is not None]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, timedelta):
        return f"{value.total_seconds():.3f}s"
    if isinstance(value, datetime):
        return _utc(value)
    if isinstance(value, dict | list | bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _utc(value: datetime) -> str:
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}
_MOVES = {code: text for code, text in _CONTROLS.items() if chr(code) not in "\t\n"}


def inert(text: str) -> str:
    """Escape what would do something to a terminal, but for tabs and the ends of lines."""
    return text.translate(_MOVES)
