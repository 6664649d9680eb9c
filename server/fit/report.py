"""The report of a fit: lines for the console, JSON, and an HTML page with charts."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from server.core.roles.measures import Quality
from server.core.roles.tasks import Task
from server.fit.learning import MAX_CHANCE, Comparison, Curve, Fitted
from server.fit.rows import BadRow
from server.fit.selection import Selection

TEMPLATE = "report.html.jinja"
# Line numbers listed for each reason.
MAX_LISTED = 5


@dataclass(frozen=True)
class Report:
    """The fitted judge, its data and its figures. file: the file of the rows."""

    task: Task
    model_id: str
    dtype: str
    file: Path
    selection: Selection
    fitted: Fitted

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON."""
        selection, comparison = self.selection, self.fitted.comparison
        return {
            "task": self.task.name,
            "labels": self.task.values,
            "model": self.model_id,
            "dtype": self.dtype,
            "rows": {
                "file": self.file.name,
                "train": len(selection.train),
                "test": len(selection.test),
                "left_out": [asdict(each) for each in selection.left_out],
            },
            "recipe": self.fitted.recipe,
            "before": asdict(comparison.before),
            "after": asdict(comparison.after),
            "num_better": comparison.num_better,
            "num_worse": comparison.num_worse,
            "chance": comparison.chance,
            "is_gain": comparison.is_gain,
            "curve": asdict(self.fitted.curve) if self.fitted.curve else None,
        }

    def as_lines(self) -> Iterator[str]:
        """The lines for the console."""
        comparison = self.fitted.comparison
        yield from self.about_rows()
        yield f"fitted: {self.fitted.recipe}"
        yield ""
        yield from _table(self.task.values, comparison)
        yield ""
        for title, each in (("before", comparison.before), ("after", comparison.after)):
            yield from _confusion(title, self.task.values, each)
            yield ""
        if self.fitted.curve:
            yield from _curve(self.fitted.curve)
        yield verdict(comparison)

    def about_rows(self) -> Iterator[str]:
        """How many rows are used, and which rows are left out."""
        selection = self.selection
        yield (
            f"{self.file}: {len(selection.train)} training rows, {len(selection.test)} test rows, "
            f"{len(selection.left_out)} left out"
        )
        yield from left_out_lines(selection.left_out)

    def as_page(self) -> str:
        """The same as a self-contained HTML page."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template(TEMPLATE).render(
            report=self,
            comparison=self.fitted.comparison,
            curve=self.fitted.curve,
            left_out=list(left_out_lines(self.selection.left_out)),
            verdict=verdict(self.fitted.comparison),
        )


def left_out_lines(left_out: Sequence[BadRow]) -> Iterator[str]:
    """One line per reason, with the first line numbers of the file."""
    lines_of = defaultdict(list)
    for each in left_out:
        lines_of[each.reason].append(each.line)
    for reason, lines in lines_of.items():
        listed = ", ".join(map(str, sorted(lines)[:MAX_LISTED]))
        more = f" and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
        yield f"  left out, {len(lines)}: {reason}: line {listed}{more}"


def verdict(comparison: Comparison) -> str:
    """Whether the new judge is better, with the figures of the test, in one sentence."""
    better, worse = comparison.num_better, comparison.num_worse
    changed = f"{better} test rows became correct and {worse} wrong"
    chance = f"chance alone gives this or more in {comparison.chance:.1%} of cases"
    if comparison.is_gain:
        return f"The new judge is better: {changed}; {chance}."
    return f"The new judge is not better: {changed}; {chance} (the limit is {MAX_CHANCE:.0%})."


def _table(values: Sequence[str], comparison: Comparison) -> Iterator[str]:
    before, after = comparison.before, comparison.after
    width = max(12, *map(len, values)) + 2
    yield f"{'':{width}}{'before':>20}{'after':>20}"
    rows = [
        ("accuracy", *(_share(each.accuracy, each.accuracy_interval) for each in (before, after))),
        ("macro-F1", f"{before.macro_f1:.3f}", f"{after.macro_f1:.3f}"),
        ("ECE", f"{before.calibration_error:.3f}", f"{after.calibration_error:.3f}"),
    ]
    for value, a, b in zip(values, before.per_label, after.per_label, strict=True):
        if a is not None and b is not None:
            shares = (_share(each.recall, each.recall_interval) for each in (a, b))
            rows.append((value, *shares))
    for name, *cells in rows:
        yield f"{name:{width}}" + "".join(f"{cell:>20}" for cell in cells)


def _share(share: float, interval: tuple[float, float]) -> str:
    return f"{share:.3f} ({interval[0]:.2f}–{interval[1]:.2f})"


def _confusion(title: str, values: Sequence[str], each: Quality) -> Iterator[str]:
    widths = [max(6, len(value)) + 2 for value in values]
    first = max(len(title), *map(len, values)) + 2
    header = "".join(f"{value:>{w}}" for value, w in zip(values, widths, strict=True))
    yield f"{title:{first}}{header}   (rows: true labels; columns: given labels)"
    for value, counts in zip(values, each.confusion, strict=True):
        cells = "".join(f"{count:>{w}}" for count, w in zip(counts, widths, strict=True))
        yield f"{value:{first}}{cells}"


def _curve(curve: Curve) -> Iterator[str]:
    points = (f"{n}: {a:.3f}" for n, a in zip(curve.num_rows, curve.accuracies, strict=True))
    yield f"accuracy by number of training rows: {', '.join(points)}"
    yield (
        f"expected with twice the rows ({2 * curve.num_rows[-1]}): "
        f"about {curve.expected_of_twice:.2f}"
    )
