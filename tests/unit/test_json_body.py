"""A body's JSON is parsed quickly, or refused."""

import json
import threading
from typing import Any

import pytest
from starlette.requests import Request

from server.errors import InvalidRequestError
from server.protocol import json_body
from server.protocol.classify import ClassifyRequest
from server.protocol.json_body import MAX_UNITS, UNITS_PER_NESTED, path_to_not_finite, read_json
from server.routes.common import MAX_INLINE_BYTES, parse

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_NESTED = MAX_UNITS // UNITS_PER_NESTED


def many(item: str, number: int) -> bytes:
    return f"[{','.join([item] * number)}]".encode()


@pytest.mark.parametrize(
    "text",
    ["{}", "[]", "null", "-0.5e-3", '{"a": [true, {"b": "\\u6211\\n"}], "a": 2}', "9" * 4300, '""'],
)
def test_json_is_parsed_as_by_python(text: str) -> None:
    assert read_json(text.encode()) == json.loads(text)


def test_a_byte_order_mark_is_accepted() -> None:
    assert read_json(b"\xef\xbb\xbf{}") == {}


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        (many("1", MAX_UNITS - UNITS_PER_NESTED), True),
        (many("1", MAX_UNITS), False),
        (many("[]", MAX_UNITS // (UNITS_PER_NESTED + 1) - 1), True),
        (many("[]", MAX_NESTED), False),
        (b"[" + many("{}", MAX_NESTED) + b"]", False),
        (many('""', MAX_UNITS // 2), False),
        (b"{" + b",".join(b'"%d":1' % i for i in range(MAX_NESTED)) + b"}", False),
        (b"[" * MAX_BODY_BYTES, False),
        (b"\\" * MAX_BODY_BYTES + b"[" * MAX_BODY_BYTES, False),
    ],
    ids=range(9),
)
def test_a_body_of_too_many_values_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, body: bytes, fits: bool
) -> None:
    monkeypatch.setattr(json_body, "from_json", lambda *args, **options: "read")
    if fits:
        assert read_json(body) == "read"
    else:
        with pytest.raises(InvalidRequestError, match="too many values"):
            read_json(body)


@pytest.mark.parametrize(
    "text",
    [
        "[{:," * 1_000_000,
        '"[{:,' * 700_000,
        '\\"[{:,\\' * 500_000,
        "\\" * 2_000_000 + "[" * 900_000,
    ],
    ids=range(4),
)
def test_a_text_counts_as_one_value(text: str) -> None:
    assert read_json(json.dumps({text: [text]}).encode()) == {text: [text]}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[NaN]", [0]),
        ('{"a": 1, "b": [[], [1, -Infinity]]}', ["b", 1, 1]),
        ('{"a": {"b": 1e309, "c": NaN}}', ["a", "b"]),
        ('[1.5, {"a": "NaN", "b": null}, [Infinity]]', [2, 0]),
        ('{"a": [1e308, -1e308, 0.0, true, 99, "Infinity"]}', None),
        ("[]", None),
    ],
)
def test_a_number_that_is_not_finite_is_found(text: str, path: Any) -> None:
    assert path_to_not_finite(read_json(text.encode())) == path


@pytest.mark.parametrize("number", [0, MAX_INLINE_BYTES])
async def test_a_long_body_is_not_parsed_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    threads = []

    def spy(body: bytes) -> Any:
        threads.append(threading.get_ident())
        return read_json(body)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"input": "a" * (number + 1)}).encode()}

    monkeypatch.setattr("server.protocol.base.read_json", spy)
    parsed = await parse(Request({"type": "http"}, receive), ClassifyRequest)
    assert len(parsed.texts[0]) == number + 1
    assert (threads == [threading.get_ident()]) == (number == 0)
