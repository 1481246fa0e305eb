"""A nemesis: strikes at random, by a seed, and writes down each strike."""

import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

Strike = Callable[[random.Random], str | None]


class Nemesis:
    """Strikes in a thread of its own from entry to exit, then heals.

    strikes  by name: a function that strikes, and says whom; None if there was nobody
    every    shortest and longest seconds between two strikes
    heal     ends all faults
    """

    def __init__(
        self,
        seed: int,
        strikes: Mapping[str, Strike],
        every: tuple[float, float] = (0.3, 1.0),
        heal: Callable[[], None] = lambda: None,
    ) -> None:
        self._dice = random.Random(seed)
        self._strikes = dict(strikes)
        self._every = every
        self._heal = heal
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nemesis")
        self._began = time.monotonic()
        self._error: Exception | None = None
        self.log: list[tuple[float, str, str]] = []  # seconds, which, whom

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._thread.join(30)
        self._heal()
        if self._error and error is None:
            raise self._error

    def count(self, which: str) -> int:
        """Return how often it has struck in this way."""
        return sum(name == which for _, name, _ in self.log)

    def __str__(self) -> str:
        return "\n".join(f"{at:7.2f} s  {name}: {whom}" for at, name, whom in self.log)

    def _run(self) -> None:
        while not self._ends.wait(self._dice.uniform(*self._every)):
            name = self._dice.choice(sorted(self._strikes))
            try:
                with suppress(ProcessLookupError):  # it ended by itself
                    if whom := self._strikes[name](self._dice):
                        self.log.append((time.monotonic() - self._began, name, whom))
            except Exception as error:
                self._error = error
                return
