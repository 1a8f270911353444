"""Draws the bar charts of the performance page as SVG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log10

_WIDTH, _LABELS, _VALUES = 820, 250, 90
_TOP, _ROW, _BAR = 62, 30, 18
_COLOURS = ("#2f6f9f", "#e0a030", "#6a9f58", "#b05a7a", "#8a8a8a")
_FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Row:
    """One bar: its label, its parts by name, and its promised maximum."""

    label: str
    parts: Mapping[str, float]
    promise: float | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def chart(title: str, unit: str, rows: Sequence[Row], *, logarithmic: bool = False) -> str:
    """Draw horizontal bars, stacked for rows with several parts. A red line is a promise.

    A logarithmic scale starts at 1, and is for rows with one part.
    """
    most = max(max(row.total, row.promise or 0) for row in rows)
    if logarithmic:

        def share(value: float) -> float:
            return log10(max(value, 1)) / log10(max(most, 10))
    else:

        def share(value: float) -> float:
            return value / most

    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    height = _TOP + len(rows) * _ROW + 14
    note = f"{unit}{', logarithmic' if logarithmic else ''}"
    if any(row.promise for row in rows):
        note += "; the red line is the promise"
    lines = [
        (
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{_WIDTH}' height='{height}' "
            f"viewBox='0 0 {_WIDTH} {height}' role='img' aria-label='{escape(title, quote=True)}'>"
        ),
        f"<rect width='{_WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(16, 24, title, size=16, weight="bold"),
        _text(16, 44, note, size=12, fill="#555555"),
        *(_legend(names) if len(names) > 1 else ()),
    ]
    for number, row in enumerate(rows):
        lines += _row(_TOP + number * _ROW, row, names, share)
    return "\n".join([*lines, "</svg>", ""])


def _legend(names: Sequence[str]) -> Iterator[str]:
    x = _WIDTH - 16 - sum(24 + 7 * len(name) for name in names)
    for name, colour in zip(names, _COLOURS, strict=False):
        yield f"<rect x='{x}' y='35' width='10' height='10' fill='{colour}'/>"
        yield _text(x + 14, 44, name, size=12)
        x += 24 + 7 * len(name)


def _row(y: int, row: Row, names: Sequence[str], share: Callable[[float], float]) -> Iterator[str]:
    room = _WIDTH - _LABELS - _VALUES
    yield _text(_LABELS - 8, y + 14, row.label, size=13, anchor="end")
    x, figure = float(_LABELS), _figure(row.total)
    for name, value in row.parts.items():
        width = share(value) * room
        colour = _COLOURS[names.index(name) % len(_COLOURS)]
        yield (f"<rect x='{x:.1f}' y='{y}' width='{width:.1f}' height='{_BAR}' fill='{colour}'/>")
        x += width
    if row.promise is not None:
        line = _LABELS + share(row.promise) * room
        yield f"<path d='M{line:.1f} {y - 4}v{_BAR + 8}' stroke='#c02020' stroke-width='2'/>"
        if x < line < x + 12 + 8 * len(figure):
            x = line
    yield _text(x + 8, y + 14, figure, size=13)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int,
    anchor: str = "start",
    weight: str = "normal",
    fill: str = "#222222",
) -> str:
    return (
        f"<text x='{x:.0f}' y='{y:.0f}' {_FONT} font-size='{size}' font-weight='{weight}' "
        f"fill='{fill}' text-anchor='{anchor}'>{escape(text)}</text>"
    )
