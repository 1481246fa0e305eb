"""What a measure yields: a figure beside its ceiling."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Pair = tuple[float, float | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One figure, measured once or more, each time together with its ceiling.

    pairs  (ours, ceiling), in the order measured; the ceiling is None where there is none
    note   for people
    """

    name: str
    unit: str
    pairs: Sequence[Pair]
    note: str = ""

    @property
    def middle(self) -> Pair:
        """The pair with the median ratio: the pairs are odd in number, so it is one of them."""
        ranked = sorted(self.pairs, key=lambda pair: pair[0] / (pair[1] or 1))
        return ranked[len(ranked) // 2]

    @property
    def ratio(self) -> float | None:
        """Ours as a part of the ceiling, median of the pairs."""
        ours, ceiling = self.middle
        return ours / ceiling if ceiling else None

    def as_json(self) -> dict[str, Any]:
        """Return what --json says of it."""
        value, ceiling = self.middle
        parts = {"value": value, "unit": self.unit, "ceiling": ceiling, "ratio": self.ratio}
        return parts | {"pairs": self.pairs}

    def as_line(self) -> str:
        """Return what people read of it."""
        value, ceiling = self.middle
        line = f"{self.name:<16}{value:>12,.2f} {self.unit:<7}"
        if ceiling is not None:
            line += f" of {ceiling:>12,.2f}   x {self.ratio:<5.2f}"
        if len(self.pairs) > 1 and ceiling is not None:
            line += " of " + " ".join(f"{a / b:.2f}" for a, b in self.pairs if b)
        return f"{line}  {self.note}".rstrip()


def in_turn(times: int, ours: Callable[[], float], bare: Callable[[], float]) -> list[Pair]:
    """Measure both `times` times, in turn; which goes first changes each time."""
    pairs: list[Pair] = []
    for number in range(times):
        if number % 2:
            ceiling = bare()
            pairs.append((ours(), ceiling))
        else:
            pairs.append((ours(), bare()))
    return pairs


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest of the values that `percent` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
