"""Minimum, median and maximum of figures, and their table."""

import statistics
from collections.abc import Mapping
from typing import Any


def summary(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    triple = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in triple.items()}


def print_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A row each; beside it what is to be reached, where there is such a goal."""
    print(f"{title:60} {'min':>9} {'median':>9} {'max':>9}")
    for name, row in rows.items():
        goal = f"   to reach: {row['goal']}" if row.get("goal") else ""
        print(f"{name:60} {row['min']:>9} {row['median']:>9} {row['max']:>9}{goal}")
    print(flush=True)
