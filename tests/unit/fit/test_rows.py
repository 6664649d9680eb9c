"""Labelled texts from CSV and JSON Lines: rows, bad rows and errors."""

from pathlib import Path

import pytest

from server.fit.errors import FitError
from server.fit.rows import BadRow, Row, read_rows
from server.ui.lines import to_labelled_csv


def read(
    path: Path,
    content: bytes | str,
    *,
    text: str = "text",
    label: str = "label",
    encoding: str = "utf-8-sig",
) -> tuple[list[Row], list[BadRow]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_rows(path, text_column=text, label_column=label, encoding=encoding)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_csv_is_read_whatever_spreadsheet_wrote_it(
    tmp_path: Path, delimiter: str, mark: bytes
) -> None:
    lines = ["id,text,label", "1,好吃,positive", "2,太慢了,negative", ""]
    content = mark + "\r\n".join(lines).replace(",", delimiter).encode()
    rows, bad = read(tmp_path / "rows.csv", content)
    assert rows == [Row(2, "好吃", "positive"), Row(3, "太慢了", "negative")]
    assert bad == []


def test_a_download_of_the_page_is_read_as_the_original_texts(tmp_path: Path) -> None:
    texts = ["=1+1", "-10 for the soup", "'quoted'", "@you", "plain"]
    content = to_labelled_csv(dict.fromkeys(texts, "a"))
    rows, _ = read(tmp_path / "rows.csv", content)
    assert [row.text for row in rows] == texts


def test_a_text_may_contain_line_breaks_delimiters_and_quotes(tmp_path: Path) -> None:
    content = 'text,label\n"one, ""two""\nthree",a\nfour,b\n'
    rows, _ = read(tmp_path / "rows.csv", content)
    assert rows == [Row(2, 'one, "two"\nthree', "a"), Row(4, "four", "b")]


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    content = "stars,review\n5,fine\n"
    rows, _ = read(tmp_path / "rows.csv", content, text="review", label="stars")
    assert rows == [Row(2, "fine", "5")]


def test_rows_without_text_or_label_are_reported(tmp_path: Path) -> None:
    content = "text,label\n,a\n  ,a\nb,\nshort\n\nfine,a\n"
    rows, bad = read(tmp_path / "rows.csv", content)
    assert rows == [Row(7, "fine", "a")]
    assert bad == [
        BadRow(2, "has no text"),
        BadRow(3, "has no text"),
        BadRow(4, "has no label"),
        BadRow(5, "has no label"),
    ]


def test_json_lines_are_read_with_numbers_as_labels(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b", "label": 1, "more": []}\n\n{"text": "c", "label": true}\n'
    rows, bad = read(tmp_path / "rows.jsonl", content)
    assert rows == [Row(1, "a\u2028b", "1"), Row(3, "c", "true")]
    assert bad == []


def test_lines_that_are_no_json_objects_are_reported(tmp_path: Path) -> None:
    content = '{"text": "a"\n["a", "b"]\n{"text": null, "label": "x"}\n{"text": "a"}\n'
    rows, bad = read(tmp_path / "rows.jsonl", content + "[" * 100_000)
    assert rows == []
    assert [(each.line, each.reason) for each in bad] == [
        (1, "is not JSON"),
        (2, "is not a JSON object"),
        (3, "has no text"),
        (4, "has no label"),
        (5, "is not JSON"),
    ]


def test_the_given_encoding_is_used(tmp_path: Path) -> None:
    content = "text,label\n好吃,正面\n"
    for encoding in ("gb18030", "utf-16"):
        rows, _ = read(tmp_path / "rows.csv", content.encode(encoding), encoding=encoding)
        assert rows == [Row(2, "好吃", "正面")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \r\n\n", "is empty"),
        ("text,label\n好吃,正面\n".encode("gb18030"), "not text in utf-8-sig (at byte 11)"),
        (b"review,label\na,b\n", "has no column 'text'; its first line has 'review', 'label'"),
        (b"text\na\n", "has no column 'label'"),
        (b'text,label\n"a"b,c\n', "line 2: is not CSV"),
        (b'text,label\nd,e\n"a,c\n', "line 3: is not CSV"),
        (b"text,label\n" + b"a" * 200_000 + b",b\n", "line 2: is not CSV"),
    ],
)
def test_an_invalid_file_is_one_sentence(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(FitError) as raised:
        read(tmp_path / "rows.csv", content)
    message = str(raised.value)
    assert says in message and "rows.csv" in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "says"), [("missing.csv", "No such file"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, says: str) -> None:
    with pytest.raises(FitError, match=says):
        read_rows(tmp_path / name, text_column="text", label_column="label", encoding="utf-8")


@pytest.mark.parametrize("encoding", ["nonsense", "rot13"])
def test_an_unknown_encoding_is_one_sentence(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(FitError, match=f"--encoding '{encoding}'"):
        read(tmp_path / "rows.csv", "text,label\na,b\n", encoding=encoding)
