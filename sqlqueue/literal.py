"""Text that Postgres reads as a value, written without the driver where speed counts."""

import os
import time
from collections.abc import Iterable

MAX_TEXT_BYTES = 64 * 1024


def array(items: Iterable[object]) -> str:
    """Write a Postgres array literal: several times as fast as the driver's own arrays.

    Strings are quoted, None is NULL. A column of nothing but None is written as `{}`, which
    `unnest` fills up with NULL beside longer columns.
    """
    items = list(items)
    if items.count(None) == len(items):
        return "{}"
    text = "\0".join(map(str, items))  # which no item holds, or Postgres would refuse it
    if None not in items and text.count("\0") == len(items) - 1:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return '{"' + escaped.replace("\0", '","') + '"}'
    texts = [
        "NULL" if item is None else '"' + str(item).replace("\\", "\\\\").replace('"', '\\"') + '"'
        for item in items
    ]
    return "{" + ",".join(texts) + "}"


def storable(text: str) -> str:
    """Cut a text and replace what Postgres cannot hold: NUL and lone surrogates."""
    cut = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")
    return cut[-MAX_TEXT_BYTES:].decode("utf-8", "ignore")


def new_id() -> str:
    """Return a new uuid v7 as text: milliseconds, then a fraction of one, then random bits.

    Source: RFC 9562, section 6.2, method 3.
    """
    milliseconds, nanoseconds = divmod(time.time_ns(), 1_000_000)
    fraction = nanoseconds * 4096 // 1_000_000
    noise = int.from_bytes(os.urandom(8), "big") >> 2
    text = f"{milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0x2 << 62 | noise:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
