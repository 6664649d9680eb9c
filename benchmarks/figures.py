"""Figures of several rounds: medians, ratios within a round, and their goals."""

import itertools
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figure = tuple[str, str]  # engine or server, case
Figures = dict[Figure, list[float]]  # a value per round, or one for all
COLUMN = 10  # characters


@dataclass(frozen=True)
class Goal:
    """A goal for a figure or, with peers, for its ratio to the highest peer in each round.

    reach: "at least 1.2" or "at most 1.6"; None: the ratio is only reported.
    """

    figure: Figure
    peers: Sequence[Figure] = ()
    reach: str | None = None

    @property
    def name(self) -> str:
        """`ours: case`, `ours / peer or peer: case`, or `ours: case / other case`."""
        engine, case = self.figure
        names, cases = zip(*self.peers, strict=True) if self.peers else ((), ())
        peers = "" if set(names) <= {engine} else f" / {' or '.join(names)}"
        others = "" if set(cases) <= {case} else f" / {' or '.join(cases)}"
        return f"{engine}{peers}: {case}{others}"

    def is_known(self, figures: Figures) -> bool:
        """Whether all its figures were measured: the best of fewer peers is another goal."""
        return {self.figure, *self.peers} <= figures.keys()

    def values(self, figures: Figures) -> list[float]:
        """The figure's values, or its ratios to the highest peer."""
        if not self.peers:
            return figures[self.figure]
        rounds = zip(*(figures[peer] for peer in self.peers), strict=True)
        best = [max(values) for values in rounds]
        return [ours / peer for ours, peer in zip(figures[self.figure], best, strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    triple = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in triple.items()}


def report_goals(figures: Figures, goals: Sequence[Goal]) -> dict[str, Any]:
    """Prints the goals whose figures are known; returns them by name."""
    rows = {
        goal.name: {**summary(goal.values(figures)), "goal": goal.reach}
        for goal in goals
        if goal.is_known(figures)
    }
    if rows:
        print_table("ratios, round by round", rows)
    return rows


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a row for each, with its goal if it has one."""
    width = max(60, *map(len, rows))
    print(f"{title:{width}} {'min':>9} {'median':>9} {'max':>9}")
    for name, row in rows.items():
        goal = f"   goal: {row['goal']}" if row.get("goal") else ""
        print(f"{name:{width}} {row['min']:>9} {row['median']:>9} {row['max']:>9}{goal}")
    print(flush=True)


def print_medians(title: str, figures: Figures) -> None:
    """Prints a row for each engine or server, a column for each case."""
    names, cases = (list(dict.fromkeys(column)) for column in zip(*figures, strict=True))
    width = max(map(len, names))
    print(title)
    headings = (textwrap.wrap(case.replace("_", " "), COLUMN) for case in cases)
    for line in itertools.zip_longest(*headings, fillvalue=""):
        print(" " * width, *(f"{part:>{COLUMN}}" for part in line))
    for name in names:
        cells = (_cell(figures.get((name, case))) for case in cases)
        print(f"{name:{width}}", *(f"{cell:>{COLUMN}}" for cell in cells))
    print(flush=True)


def _cell(values: list[float] | None) -> str:
    if not values:
        return "–"
    median = statistics.median(values)
    return f"{median:.2f}" if median < 100 else f"{median:.0f}"
