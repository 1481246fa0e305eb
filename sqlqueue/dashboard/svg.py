"""Where the lines of a chart go: templates/svg.html draws them, without scripts or styles."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil, log10
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 40, 414, 8, 132
Line = Sequence[float | None]


def plot(at: Sequence[float], lines: Sequence[Line], log: bool = False) -> dict[str, Any] | None:
    """Return the ticks of the y-axis, as pairs of place and value, the paths, and times.

    at     epoch seconds, ascending; a missing minute is a gap of the line
    lines  a value for each instant; None: none
    log    powers of ten on the y-axis
    """
    values = [value for line in lines for value in line if value is not None]
    if not values:
        return None
    ticks = _ticks(values, log)
    low, high = _scaled(ticks[0], log), _scaled(ticks[-1], log)
    seconds = max(at[-1] - at[0], 60)
    gap = 1.5 * max(60, min((b - a for a, b in pairwise(at)), default=60))

    def y(value: float) -> float:
        share = (_scaled(value, log) - low) / (high - low)
        return round(BOTTOM - (BOTTOM - TOP) * min(max(share, 0), 1), 1)

    def path(line: Line) -> str:
        parts, before = [], float("-inf")
        for when, value in zip(at, line, strict=True):
            if value is not None:
                x = LEFT + (RIGHT - LEFT) * (when - at[0]) / seconds
                starts = when - before > gap  # with a stroke, for there may be no other value
                parts.append(f"M{x:.1f},{y(value)}h1" if starts else f"L{x:.1f},{y(value)}")
            before = when if value is not None else float("-inf")
        return "".join(parts)

    return {
        "ticks": [(y(one), one) for one in ticks],
        "paths": [path(line) for line in lines],
        "times": [f"{datetime.fromtimestamp(one, UTC):%H:%M}" for one in at],
    }


def brief(value: float, unit: str = "") -> str:
    """Write a number shortly; with the unit s as a duration."""
    if unit == "s":
        if value < 1:
            return f"{value * 1000:.3g} ms"
        if value < 120:
            return f"{value:.3g} s"
        return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if mark == 'k' else size):.3g}{mark}"
    return f"{value:,.10g}"


def _ticks(values: Sequence[float], log: bool) -> list[float]:
    if log:
        powers = [_scaled(value, True) for value in values]
        low = int(min(powers)) - 1
        return [10.0**power for power in range(low, max(ceil(max(powers)), low + 1) + 1)]
    top = max(*values, 1)
    size = 10 ** int(log10(top))
    high = ceil(top / size) * size
    return [0, high / 2, high]


def _scaled(value: float, log: bool) -> float:
    return log10(max(value, 0.0001)) if log else value
