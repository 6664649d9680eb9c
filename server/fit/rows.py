"""Reads labelled texts: CSV or JSON Lines. Knows neither tasks nor models."""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from server.fit.errors import FitError

DELIMITERS = ",;\t"
# In an error message: column names, and characters of each.
MAX_SHOWN = 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Row:
    """A text and its label as in the file. line: the row's first line, counted from 1."""

    line: int
    text: str
    label: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int
    reason: str


def read_rows(
    path: Path, *, text_column: str, label_column: str, encoding: str
) -> tuple[list[Row], list[BadRow]]:
    """The rows of a file, and its bad rows, such as those without a text or a label.

    A file named *.jsonl, *.ndjson or *.json is read as JSON Lines, any other as CSV with a header
    and commas, semicolons or tabs between cells.

    Raises:
        FitError: the file cannot be read, is neither, or lacks a column.
    """
    content = _read_text(path, encoding)
    if not content.strip():
        raise FitError(f"{path} is empty")
    columns = (text_column, label_column)
    is_json = path.suffix.lower() in JSON_SUFFIXES
    all_rows = _json_rows(content, columns) if is_json else _csv_rows(path, content, columns)
    rows, bad_rows = [], []
    for each in all_rows:
        if isinstance(each, Row):
            rows.append(each)
        else:
            bad_rows.append(each)
    return rows, bad_rows


def _read_text(path: Path, encoding: str) -> str:
    try:
        return path.read_bytes().decode(encoding)
    except OSError as error:
        raise FitError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FitError(
            f"{path} is not text in {encoding} (at byte {error.start}); save it as UTF-8, or give "
            "its encoding, such as --encoding gb18030"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise FitError(
            f"--encoding {encoding!r} cannot be used: {error}; give one such as utf-8 or gb18030"
        ) from error


def _csv_rows(path: Path, content: str, columns: tuple[str, str]) -> Iterator[Row | BadRow]:
    reader = csv.reader(
        io.StringIO(content, newline=""), delimiter=_delimiter(content), strict=True
    )
    try:
        header = [cell.strip() for cell in next(reader)]
        indices = [_index(path, header, column) for column in columns]
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            if any(cells):
                values: list[object] = [
                    _unguarded(cells[i]) if i < len(cells) else None for i in indices
                ]
                yield _row(line, values, columns)
    except csv.Error as error:
        raise FitError(
            f"{path}, line {reader.line_num}: is not CSV ({error}); put a text that contains "
            "quotation marks between quotation marks, and double those inside"
        ) from error


def _unguarded(cell: str) -> str:
    """Removes the quotation mark that the page's downloads put before a cell like a formula."""
    return re.sub(r"^'(?=[=+\-@\t\r])", "", cell)


def _delimiter(content: str) -> str:
    """The delimiter that is most frequent in the first line."""
    first_line = content.split("\n", 1)[0]
    return max(DELIMITERS, key=first_line.count)


def _index(path: Path, header: list[str], column: str) -> int:
    if column not in header:
        shown = ", ".join(repr(name[:MAX_SHOWN]) for name in header[:MAX_SHOWN])
        raise FitError(
            f"{path} has no column {column!r}; its first line has {shown}; "
            "choose columns with --text-column and --label-column"
        )
    return header.index(column)


def _json_rows(content: str, columns: tuple[str, str]) -> Iterator[Row | BadRow]:
    # Not splitlines: JSON strings may contain other line separators unescaped.
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            yield BadRow(line, "is not JSON")
            continue
        if isinstance(fields, dict):
            yield _row(line, [fields.get(column) for column in columns], columns)
        else:
            yield BadRow(line, "is not a JSON object")


def _row(line: int, values: list[object], columns: tuple[str, str]) -> Row | BadRow:
    text, label = map(_as_text, values)
    if not text:
        return BadRow(line, f"has no {columns[0]}")
    return Row(line, text, label) if label else BadRow(line, f"has no {columns[1]}")


def _as_text(value: object) -> str:
    # A number or boolean of JSON is a label as JSON writes it.
    return json.dumps(value) if isinstance(value, int | float) else str(value or "").strip()
