"""What is never shown: values under names like password, and those that tasks say to redact."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from sqlqueue.queue import Queue

HIDDEN = "(hidden)"
SECRET = re.compile(
    r"passw|passphrase|secret|token|api[_-]?key|private[_-]?key|credential|authorization|cookie"
    r"|(^|[_-])(pwd|pin|cvc|cvv|auth)([_-]|$)",
    re.IGNORECASE,
)


def hidden(value: Any, patterns: Sequence[str] = (), path: str = "") -> Any:
    """Return a JSON value without what is secret: by its name, or by a pattern of its path.

    A path is like card.number; a pattern like card.* hides whatever is below card.
    """
    if isinstance(value, Mapping):
        return {name: _hidden(name, one, patterns, path) for name, one in value.items()}
    if isinstance(value, list):
        return [_hidden(str(place), one, patterns, path) for place, one in enumerate(value)]
    return value


def _hidden(name: str, value: Any, patterns: Sequence[str], path: str) -> Any:
    inner = f"{path}.{name}" if path else name
    is_secret = SECRET.search(name) or any(fnmatchcase(inner, pattern) for pattern in patterns)
    return HIDDEN if is_secret and value is not None else hidden(value, patterns, inner)


def patterns_of(queue: Queue, task: str | None) -> Sequence[str]:
    """Return the paths that a task, if the application is known here, says to redact."""
    known = queue.tasks.get(task or "")
    return known.options.redact if known else ()


def shown(row: Mapping[str, Any], patterns: Sequence[str]) -> dict[str, Any]:
    """Return a row of a job or run without what is secret in its documents."""
    documents = [name for name in ("args", "headers", "result") if name in row]
    return {**row, **{name: hidden(row[name], patterns) for name in documents}}


def restored(edited: Any, original: Any) -> Any:
    """Put back what was hidden in a document that somebody edited."""
    if edited == HIDDEN:
        return original
    if isinstance(edited, dict) and isinstance(original, dict):
        return {name: restored(one, original.get(name)) for name, one in edited.items()}
    if isinstance(edited, list) and isinstance(original, list):
        known = [*original, *[None] * len(edited)]
        return [restored(one, known[place]) for place, one in enumerate(edited)]
    return edited
