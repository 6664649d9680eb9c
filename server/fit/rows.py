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
# Of the names of columns, and of the characters of one, in a message.
MAX_SHOWN = 20
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Row:
    """A text and its label as the file has it. line: where the row begins, from 1."""

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
    """The rows of a file, and those that have no text or no label.

    A file whose name ends in .jsonl, .ndjson or .json is JSON Lines, any other is CSV with a
    header, its cells between commas, semicolons or tabs.

    Raises:
        FitError: the file cannot be read, is neither, or lacks a column.
    """
    content = _read_text(path, encoding)
    if not content.strip():
        raise FitError(f"{path} is empty")
    columns = (text_column, label_column)
    is_json = path.suffix.lower() in JSON_SUFFIXES
    found = _json_rows(content, columns) if is_json else _csv_rows(path, content, columns)
    rows, bad = [], []
    for each in found:
        if isinstance(each, Row):
            rows.append(each)
        else:
            bad.append(each)
    return rows, bad


def _read_text(path: Path, encoding: str) -> str:
    try:
        return path.read_bytes().decode(encoding)
    except OSError as error:
        raise FitError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FitError(
            f"{path} is not text in {encoding} (at byte {error.start}); save it as UTF-8, or say "
            "what it is, such as --encoding gb18030"
        ) from error
    except (LookupError, UnicodeError) as error:
        raise FitError(f"--encoding {encoding!r} cannot be read: {error}") from error


def _csv_rows(path: Path, content: str, columns: tuple[str, str]) -> Iterator[Row | BadRow]:
    reader = csv.reader(
        io.StringIO(content, newline=""), delimiter=_delimiter(content), strict=True
    )
    try:
        header = [cell.strip() for cell in next(reader)]
        places = [_place(path, header, column) for column in columns]
        end = reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num
            if any(cells):
                read: list[object] = [
                    _unguarded(cells[i]) if i < len(cells) else None for i in places
                ]
                yield _row(line, read, columns)
    except csv.Error as error:
        raise FitError(
            f"{path}, line {reader.line_num}: is not CSV ({error}); a text with a quotation mark "
            "in it stands between quotation marks, and that mark is written twice"
        ) from error


def _unguarded(cell: str) -> str:
    """Without the quotation mark that keeps spreadsheets from computing a cell, as the page's
    downloads have it.
    """
    return re.sub(r"^'(?=[=+\-@\t\r])", "", cell)


def _delimiter(content: str) -> str:
    """The one that the first line has most often."""
    first_line = content.split("\n", 1)[0]
    return max(DELIMITERS, key=first_line.count)


def _place(path: Path, header: list[str], column: str) -> int:
    if column not in header:
        shown = ", ".join(repr(name[:MAX_SHOWN]) for name in header[:MAX_SHOWN])
        raise FitError(
            f"{path} has no column {column!r}; its first line has {shown}; "
            "choose among them with --text-column and --label-column"
        )
    return header.index(column)


def _json_rows(content: str, columns: tuple[str, str]) -> Iterator[Row | BadRow]:
    # Not splitlines: JSON strings may hold other line separators as they are.
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
            yield BadRow(line, "is no JSON object")


def _row(line: int, cells: list[object], columns: tuple[str, str]) -> Row | BadRow:
    text, label = map(_as_text, cells)
    if not text:
        return BadRow(line, f"has no {columns[0]}")
    return Row(line, text, label) if label else BadRow(line, f"has no {columns[1]}")


def _as_text(cell: object) -> str:
    # JSON has numbers and true, too, which are labels as they are written.
    return json.dumps(cell) if isinstance(cell, int | float) else str(cell or "").strip()
