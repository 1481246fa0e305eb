"""Charts, drawn here: SVG without scripts or styles, which style sheets colour by class."""

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from math import ceil, log10

from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 150, 40, 18, 8
Series = Sequence[tuple[str, Sequence[float | None]]]


def chart(
    title: str, at: Sequence[float], series: Series, *, unit: str = "", log: bool = False
) -> Markup:
    """Draw lines over time, and a table of the same numbers under them.

    at      epoch seconds, ascending; a missing minute is a gap of the line
    series  names with a value for each instant; None: none
    log     powers of ten on the y-axis
    """
    values = [value for _, line in series for value in line if value is not None]
    if not at or not values:
        return Markup('<figure class="chart"><figcaption>%s</figcaption><p class="empty">'
                      "no numbers yet</p></figure>") % title  # fmt: skip
    low, high = _range(values, log)
    first, last = at[0], max(at[-1], at[0] + 60)

    def x(when: float) -> float:
        return LEFT + (WIDTH - LEFT - 6) * (when - first) / (last - first)

    def y(value: float) -> float:
        share = (_scaled(value, log) - low) / (high - low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(share, 0), 1))

    parts = [Markup('<line class="axis" x1="{0}" y1="{1}" x2="{2}" y2="{1}"/>'
                    '<text x="{3}" y="{4}" class="tick end">{5}</text>').format(
        LEFT, y(one), WIDTH - 6, LEFT - 4, y(one) + 4, brief(one, unit))
        for one in _ticks(low, high, log)]  # fmt: skip
    for when, anchor in ((first, "start"), (last, "end")):
        told = datetime.fromtimestamp(when, UTC).strftime("%H:%M")
        parts.append(Markup('<text x="{}" y="{}" class="tick {}">{}</text>').format(
            round(x(when)), HEIGHT - 4, anchor, told))  # fmt: skip
    step = 60 if len(at) < 2 else max(60, min(b - a for a, b in pairwise(at)))
    for place, (_, line) in enumerate(series):
        for run in _runs(at, line, step * 1.5):
            points = " ".join(f"{x(when):.1f},{y(value):.1f}" for when, value in run)
            if len(run) == 1:
                ((when, value),) = run
                points += f" {x(when) + 1:.1f},{y(value):.1f}"
            parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(place, points))
    legend = Markup(" ").join(
        Markup('<span class="key s{}">{}</span>').format(place, name)
        for place, (name, _) in enumerate(series)
    )
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup("").join(parts)
    )
    return Markup('<figure class="chart"><figcaption>{} {}</figcaption>{}{}</figure>').format(
        title, legend, picture, _table(at, series, unit)
    )


def _table(at: Sequence[float], series: Series, unit: str) -> Markup:
    head = Markup("").join(Markup("<th scope=col>{}</th>").format(name) for name, _ in series)
    rows = Markup("").join(
        Markup("<tr><th scope=row>{}</th>{}</tr>").format(
            datetime.fromtimestamp(when, UTC).strftime("%H:%M"),
            Markup("").join(
                Markup("<td>{}</td>").format("" if line[n] is None else brief(line[n] or 0, unit))
                for _, line in series
            ),
        )
        for n, when in list(enumerate(at))[-12:]
    )
    return Markup(
        "<details><summary>numbers</summary><table><thead><tr><th scope=col>UTC</th>{}</tr></thead>"
        "<tbody>{}</tbody></table></details>"
    ).format(head, rows)


def bar(part: float, whole: float, label: str) -> Markup:
    """Draw how much of something is used."""
    share = min(max(part / whole, 0), 1) if whole else 0
    return Markup('<svg class="bar" viewBox="0 0 100 8" role="img" aria-label="{}">'
                  '<rect class="back" width="100" height="8" rx="2"/>'
                  '<rect class="used" width="{}" height="8" rx="2"/></svg>').format(
        label, round(share * 100))  # fmt: skip


def timeline(runs: Sequence[tuple[float, float, str, str]], first: float, last: float) -> Markup:
    """Draw the runs of a job: (begin, end, outcome, label) in epoch seconds."""
    span = max(last - first, 0.001)
    parts = [
        Markup('<rect class="run {}" x="{:.1f}" y="4" width="{:.1f}" height="16" rx="2">'
               "<title>{}</title></rect>").format(
            outcome, 1000 * (begin - first) / span, max(1000 * (end - begin) / span, 3), label)
        for begin, end, outcome, label in runs
    ]  # fmt: skip
    return Markup(
        '<svg class="timeline" viewBox="0 0 1000 24" preserveAspectRatio="none" role="img"'
        ' aria-label="runs of the job over time">'
        '<rect class="back" y="11" width="1000" height="2"/>{}</svg>'
    ).format(Markup("").join(parts))


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


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    if log:
        powers = [_scaled(value, True) for value in values]
        low, high = float(int(min(powers)) - 1), float(ceil(max(powers)))
        return low, max(high, low + 1)
    top = max(*values, 1)
    size = 10 ** int(log10(top))
    return 0.0, float(ceil(top / size) * size)


def _scaled(value: float, log: bool) -> float:
    return log10(max(value, 0.0001)) if log else value


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        return [10.0**power for power in range(int(low), int(high) + 1)]
    return [low, high / 2, high]


def _runs(
    at: Sequence[float], line: Sequence[float | None], gap: float
) -> list[list[tuple[float, float]]]:
    """Split a line where values are missing."""
    runs: list[list[tuple[float, float]]] = [[]]
    before = None
    for when, value in zip(at, line, strict=True):
        if value is None or (before is not None and when - before > gap):
            runs.append([])
        if value is not None:
            runs[-1].append((when, value))
        before = when
    return [run for run in runs if run]
