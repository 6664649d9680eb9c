"""Reads texts from pasted lines or a file; writes results as CSV."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT_COLUMNS = ("text", "content", "review", "comment", "sentence", "文本", "内容", "评论")


def read_lines(text: str) -> list[str]:
    """The lines that are not empty."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_file(path: Path) -> list[str]:
    """The lines of a text file, or a column of a CSV file: one of TEXT_COLUMNS, or the first."""
    content = _decode(path.read_bytes())
    if path.suffix.lower() != ".csv":
        return read_lines(content)
    rows = [row for row in csv.reader(io.StringIO(content)) if any(row)]
    if not rows:
        return []
    header = [cell.strip().lower() for cell in rows[0]]
    column = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
    body = rows if column is None else rows[1:]
    cells = (row[column or 0].strip() for row in body if len(row) > (column or 0))
    return [cell for cell in cells if cell]


def batches(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """The texts in order, at most `size` at once."""
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


def to_csv(texts: Sequence[str], results: Sequence[Mapping[str, Any]]) -> bytes:
    """One row per text. Begins with a byte order mark, so that spreadsheets read it as UTF-8."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["text", "label", "confidence"])
    for text, result in zip(texts, results, strict=True):
        writer.writerow([_inert(text), _inert(result["label"]), result["confidence"]])
    return file.getvalue().encode("utf-8-sig")


def to_labelled_csv(labels: Mapping[str, str]) -> bytes:
    """Rows for `fit`. labels: text -> correct label."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["text", "label"])
    writer.writerows([_inert(text), label] for text, label in labels.items())
    return file.getvalue().encode("utf-8-sig")


def _inert(cell: str) -> str:
    # Otherwise a spreadsheet takes the cell for a formula.
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def _decode(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("gb18030", errors="replace")
