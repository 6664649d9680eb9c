"""What an operator sees: metrics at /metrics, lines in the log."""

import errno
import io
import json
import logging
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.logs import (
    OWN_LOGGERS,
    JsonFormatter,
    LogHandler,
    TextFormatter,
    configure_logs,
    request_id,
)
from tests.faults.conftest import held
from tests.live.test_clients_at_once import until
from tests.servers import LiveServer


def samples(live: LiveServer) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every number by name and labels."""
    response = httpx.get(f"{live.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def number(live: LiveServer, name: str, **labels: str) -> float:
    return samples(live).get((name, frozenset(labels.items())), 0.0)


def chat(live: LiveServer, **changes: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "Count me."}]
    body = {"model": live.model, "messages": messages, "max_tokens": 5, "seed": 1, **changes}
    return httpx.post(f"{live.base_url}/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(
    ("name", "labels", "grows_by"),
    [
        ("qwen_requests_total", {"route": "/v1/chat/completions", "status": "200"}, 1),
        ("qwen_request_seconds_count", {"route": "/v1/chat/completions"}, 1),
        ("qwen_first_token_seconds_count", {}, 1),
        ("qwen_next_token_seconds_count", {}, 4),
        ("qwen_tokens_total", {"kind": "generated"}, 5),
    ],
)
def test_a_chat_is_counted(
    tiny: LiveServer, name: str, labels: dict[str, str], grows_by: float
) -> None:
    before = number(tiny, name, **labels)
    # Without the tokens that would end it early.
    assert chat(tiny, logit_bias={"0": -100, "2": -100}).status_code == 200
    assert number(tiny, name, **labels) == before + grows_by


def test_prompt_tokens_and_cached_tokens_are_counted(tiny: LiveServer) -> None:
    def counts() -> tuple[float, float]:
        return (
            number(tiny, "qwen_tokens_total", kind="prompt"),
            number(tiny, "qwen_tokens_total", kind="cached"),
        )

    before = counts()
    usage = chat(tiny, sentiment=False).json()["usage"]
    after = counts()
    assert after[0] - before[0] == usage["prompt_tokens"]
    assert after[1] - before[1] == usage["prompt_tokens_details"]["cached_tokens"]


def test_labels_and_their_source_are_counted(tiny: LiveServer) -> None:
    label = chat(tiny).json()["sentiment"]["label"]
    before = number(tiny, "qwen_labels_total", task="sentiment", label=label)
    cached = number(tiny, "qwen_classifications_total", source="cache")
    chat(tiny)
    assert number(tiny, "qwen_labels_total", task="sentiment", label=label) == before + 1
    assert number(tiny, "qwen_classifications_total", source="cache") == cached + 1


def test_nothing_is_left_inside(tiny: LiveServer) -> None:
    chat(tiny)
    assert number(tiny, "qwen_sequences", state="running") == 0
    assert number(tiny, "qwen_sequences", state="waiting") == 0
    assert number(tiny, "qwen_requests_inside") == 0
    assert number(tiny, "qwen_kv_tokens") == 0


def test_clients_cannot_create_label_values(tiny: LiveServer) -> None:
    httpx.get(f"{tiny.url}/made-up-path")
    assert "made-up" not in httpx.get(f"{tiny.url}/metrics").text
    assert number(tiny, "qwen_requests_total", route="other", status="404") >= 1


# --- the times of one request ----------------------------------------------------------


def timings_of(response: httpx.Response) -> dict[str, float]:
    """Milliseconds by part."""
    parts = (part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    return {name: float(milliseconds) for name, milliseconds in parts}


@pytest.mark.parametrize("stream", [False, True])
def test_the_headers_of_a_chat_contain_its_timings(tiny: LiveServer, stream: bool) -> None:
    told = timings_of(chat(tiny, stream=stream))
    assert list(told)[-2:] == ["sentiment", "total"]
    assert 0 <= told["sentiment"] <= told["total"]
    said = [{"role": "user", "content": f"judged only here, stream {stream}"}]
    told = timings_of(chat(tiny, stream=stream, messages=said))
    assert list(told) == ["queue", "sentiment", "total"]
    assert 0 <= told["queue"] <= told["sentiment"] <= told["total"]


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("responses", {"input": "timed", "max_output_tokens": 16}, ["queue", "sentiment", "total"]),
        ("completions", {"prompt": "timed"}, ["queue", "total"]),
        ("classify", {"input": "timed as a label"}, ["queue", "total"]),
        (
            "decisions",
            {"input": "timed", "questions": [{"type": "predicate", "instructions": "Is it?"}]},
            ["queue", "total"],
        ),
        ("classify", {"input": 3}, ["total"]),
        ("nowhere", {}, ["total"]),
    ],
)
def test_every_response_contains_the_timings_it_has(
    tiny: LiveServer, path: str, body: dict[str, Any], names: list[str]
) -> None:
    response = httpx.post(f"{tiny.base_url}/{path}", json={"model": tiny.model, **body}, timeout=60)
    assert list(timings_of(response)) == names, response.text


async def test_a_stream_sends_the_timings_known_at_its_start(tiny: LiveServer) -> None:
    body = {"model": tiny.model, "prompt": "not taken up yet", "stream": True, "max_tokens": 2}
    url = f"{tiny.base_url}/completions"
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=60))
        stack.enter_context(held(tiny.services))
        await stack.enter_async_context(client.stream("POST", url, json=body))
        # Its step is held, so a new request is not admitted to the engine.
        await until(lambda: tiny.engine.num_running == 1)
        late = await stack.enter_async_context(client.stream("POST", url, json=body))
        assert list(timings_of(late)) == ["total"]


# --- the log --------------------------------------------------------------------------


def record(message: str, **more: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": message, "levelname": "INFO", "name": "a.b", **more})


def test_json_lines_have_the_requests_id_and_the_exception() -> None:
    token = request_id.set("req_1")
    try:
        raise ValueError("no")
    except ValueError as error:
        line = JsonFormatter().format(record("你好\n", exc_info=(ValueError, error, None)))
    finally:
        request_id.reset(token)
    assert "\n" not in line
    content = json.loads(line)
    assert content["message"] == "你好\n" and content["request_id"] == "req_1"
    assert content["level"] == "info" and "ValueError: no" in content["exception"]


def test_text_lines_have_the_id_if_there_is_one() -> None:
    assert TextFormatter().format(record("a")) == "INFO     a.b: a"
    token = request_id.set("req_1")
    try:
        assert TextFormatter().format(record("a")) == "INFO     a.b: a [req_1]"
    finally:
        request_id.reset(token)


def test_what_the_engine_logs_of_a_sequence_has_its_requests_id(
    tiny: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    lines = []

    def explode(chunks: Any) -> Any:
        raise RuntimeError("broken on purpose")

    def keep(record: logging.LogRecord) -> bool:
        lines.append(json.loads(JsonFormatter().format(record)))
        return True

    caplog.handler.addFilter(keep)
    headers = {"x-request-id": "mine-7"}
    body = {"model": tiny.model, "prompt": "hit"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.engine._runner, "step", explode)
        httpx.post(f"{tiny.base_url}/completions", json=body, headers=headers)
    caplog.handler.removeFilter(keep)
    told = {line["message"]: line["request_id"] for line in lines}
    assert told["a sequence failed"] == "mine-7"


def test_no_word_of_anybody_is_logged(tiny: LiveServer, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    with pytest.MonkeyPatch.context() as patch:
        # As the command configures it, at the most verbose level.
        patch.setattr(root, "handlers", [])
        for name in ("", *OWN_LOGGERS):
            patch.setattr(logging.getLogger(name), "level", logging.NOTSET)
        configure_logs("debug", "text")
        patch.setattr(root, "handlers", [caplog.handler])
        said = [{"role": "user", "content": "my secret word"}]
        text = chat(tiny, messages=said).json()["choices"][0]["message"]["content"]
        stream = chat(tiny, messages=said, stream=True)
        chat(tiny, messages=said, temperature="secret")
    logged = "\n".join(record.getMessage() for record in caplog.records)
    assert "/v1/chat/completions 200" in logged
    assert stream.status_code == 200 and "delta" not in logged
    assert "secret" not in logged and text not in logged


def test_a_log_that_cannot_be_written_is_reported_once_and_stops_no_request(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    handler = LogHandler(Full())
    for _ in range(3):
        handler.handle(record("a"))
    told = capsys.readouterr()
    assert told.out.count("\n") == 1 and "No space left on device" in told.out
    assert not told.err
