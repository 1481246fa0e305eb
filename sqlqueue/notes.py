"""What runs say while they run: how far they are, and their records of `logging`.

Lines wait in memory until the worker writes them, within a second and in a transaction of its
own: they are seen while the job runs, and outlive the rollback of its run.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, NamedTuple

import psycopg

from sqlqueue.literal import storable

MOST = 1000  # records of a run that are kept
MOST_BYTES = 256 * 1024  # of their texts
MOST_MORE = 200  # records from WARNING that are kept after that
MOST_WAITING = 20_000  # lines kept while they cannot be written
USUAL = {*vars(logging.makeLogRecord({})), "message", "asctime"}
FORMAT = logging.Formatter()


class Line(NamedTuple):
    """A row of the table `log`, but for `at`: when it was said, by the monotonic clock."""

    job_id: str
    run: int
    seq: int
    at: float
    level: str
    logger: str | None = None
    source: str | None = None
    message: str | None = None
    fields: dict[str, str] | None = None
    progress: float | None = None


class Said:
    """The lines that a worker has still to write; of progress, the last of each run."""

    def __init__(self) -> None:
        self._lines: deque[Line] = deque(maxlen=MOST_WAITING)
        self._progress: dict[tuple[str, int], Line] = {}

    def add(self, line: Line) -> None:
        """Take a line; any thread may call this."""
        if line.progress is None:
            self._lines.append(line)
        else:
            self._progress[line.job_id, line.run] = line

    @contextmanager
    def taken(self) -> Iterator[str | None]:
        """Lend the lines, as the statement `log` takes them; None if there are none.

        They come back if they cannot be written now; what is refused does not.
        """
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        latest = [self._progress.pop(key) for key in list(self._progress)]
        now = monotonic()
        rows = [{**line._asdict(), "age": now - line.at} for line in lines + latest]
        try:
            yield json.dumps(rows) if rows else None
        except psycopg.DataError:  # a line is refused, and would be for ever
            raise
        except BaseException:
            self._lines.extendleft(reversed(lines))
            for line in latest:
                self._progress.setdefault((line.job_id, line.run), line)
            raise


class Notes:
    """What one run says, up to a limit; `add` takes its lines."""

    def __init__(self, key: tuple[str, int], add: Callable[[Line], object]) -> None:
        self._key = key
        self._add = add
        self._seq = 0
        self._kept = self._bytes = self._more = self._dropped = 0

    def progress(self, percent: float, note: str | None) -> None:
        """Say how far the run is."""
        self._say("PROGRESS", message=note and storable(note), progress=percent)

    def record(self, record: logging.LogRecord) -> None:
        """Keep a record, unless there are too many."""
        if self._kept >= MOST or self._bytes >= MOST_BYTES:
            if record.levelno < logging.WARNING or self._more >= MOST_MORE:
                self._dropped += 1
                return
            self._more += 1
        text = storable(FORMAT.format(record))
        self._kept += 1
        self._bytes += len(text)
        source = f"{record.filename}:{record.lineno}"
        added = [one for one in vars(record).items() if one[0] not in USUAL]
        fields = {storable(name): storable(str(value)) for name, value in added} or None
        self._say(record.levelname, record.name, source, text, fields)

    def close(self) -> None:
        """Say how many records were not kept."""
        if self._dropped:
            self._say("WARNING", message=f"{self._dropped} more records were not kept")
            self._dropped = 0

    def _say(self, level: str, *what: Any, **more: Any) -> None:
        self._seq += 1
        self._add(Line(*self._key, self._seq, monotonic(), level, *what, **more))
