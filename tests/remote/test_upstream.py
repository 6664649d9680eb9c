"""The upstream fails, is slow, restarts or refuses: the effects for clients of this server."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from server.config import Settings
from server.core.engine.checkpoint import CheckpointError
from server.core.engine.sequence import SamplingParams
from server.core.engine.stream import EngineClosedError, SequenceAbortedError
from server.core.engine.work import Work
from server.errors import EngineUnreachableError
from server.loading import load_services
from server.remote import engine as engine_module
from server.remote import upstream
from server.remote.engine import RemoteEngine
from server.remote.upstream import Address
from tests.faults.conftest import contents_of, events_of, text_of
from tests.live.test_clients_at_once import until
from tests.processes import closed_port
from tests.remote.scenario import SCENARIO, chat
from tests.remote.standin import Respond, StandIn, until_gone
from tests.servers import LiveServer, run_app, run_live

BOUND_S = 30
PATH, PLAIN = SCENARIO["plain"]


@pytest.fixture
def stand_in(vllm: tuple[StandIn, LiveServer]) -> Iterator[StandIn]:
    """The module's stand-in, reset after each test."""
    stand_in, _ = vllm
    stand_in.bodies.clear()
    yield stand_in
    stand_in.respond, stand_in.is_healthy = None, True


@pytest.fixture
def front(vllm: tuple[StandIn, LiveServer]) -> LiveServer:
    return vllm[1]


def post(server: LiveServer, body: Mapping[str, Any] = PLAIN) -> httpx.Response:
    return httpx.post(server.url + PATH, json=body, timeout=BOUND_S)


def answering(status: int, content: Any, **headers: str) -> Respond:
    async def respond(request: Request, body: Mapping[str, Any]) -> Response:
        return JSONResponse(content, status, headers=headers)

    return respond


def streaming(*lines: str, hold: bool = False) -> Respond:
    """A stream of these lines. hold: it then stays open without sending anything."""

    async def respond(request: Request, body: Mapping[str, Any]) -> Response:
        async def content() -> AsyncIterator[str]:
            for line in lines:
                yield f"{line}\n\n"
            if hold:
                await asyncio.sleep(BOUND_S)

        return StreamingResponse(content(), media_type="text/event-stream")

    return respond


def chunk(*token_ids: int, finish_reason: str | None = None) -> str:
    choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": finish_reason,
              "token_ids": list(token_ids)}  # fmt: skip
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}"


# --- as recorded ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["plain", "logprobs", "biased", "json", "tool", "extract", "completion"]
)
def test_vllm_gives_the_same_answers_as_the_local_engine(
    front: LiveServer, stand_in: StandIn, mini: LiveServer, name: str
) -> None:
    path, body = SCENARIO[name]
    upstream_reply, local_reply = (
        httpx.post(server.url + path, json=body, timeout=BOUND_S).json() for server in (front, mini)
    )
    assert content_of(upstream_reply) == content_of(local_reply)


@pytest.mark.parametrize("name", ["sampled", "choices"])
def test_sampled_choices_have_a_finish_reason(
    front: LiveServer, stand_in: StandIn, name: str
) -> None:
    reply = httpx.post(front.url + PATH, json=SCENARIO[name][1], timeout=BOUND_S).json()
    assert {choice["finish_reason"] for choice in reply["choices"]} <= {"stop", "length"}
    assert len(reply["choices"]) == SCENARIO[name][1].get("n", 1)
    assert reply["usage"]["completion_tokens"] > 0


def test_moods_are_judged_by_vllms_label_scores(front: LiveServer, stand_in: StandIn) -> None:
    path, body = SCENARIO["classify"]
    answer = httpx.post(front.url + path, json=body, timeout=BOUND_S).json()
    assert [each["label"] for each in answer["data"]] == ["negative", "positive", "neutral"]
    for name, label in (("sad", "negative"), ("happy", "positive")):
        reply = httpx.post(front.url + PATH, json=SCENARIO[name][1], timeout=BOUND_S).json()
        assert (reply["sentiment"]["label"], bool(content_of(reply))) == (label, True)
    path, body = SCENARIO["labels"]
    [item] = httpx.post(front.url + path, json=body, timeout=BOUND_S).json()["data"]
    assert item["label"] == "物流"


def test_a_stream_of_vllm_equals_the_whole_reply(front: LiveServer, stand_in: StandIn) -> None:
    whole, streamed = (
        httpx.post(front.url + PATH, json=SCENARIO[name][1], timeout=BOUND_S)
        for name in ("sad", "streamed")
    )
    *chunks, usage = contents_of(streamed)
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)
    assert text == text_of(whole) != ""
    assert usage["usage"] == whole.json()["usage"]


def content_of(reply: dict[str, Any]) -> Any:
    """The texts, tool calls and finish reasons of a reply, or its extracted items."""
    if "data" in reply:
        return [each["items"] for each in reply["data"]]
    choices = reply["choices"]
    messages = [choice.get("message", {}) for choice in choices]
    calls = [[call["function"] for call in m.get("tool_calls") or []] for m in messages]
    texts = [c.get("text", m.get("content")) for c, m in zip(choices, messages, strict=True)]
    return texts, calls, [choice["finish_reason"] for choice in choices]


# --- failures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "content", "expected"),
    [
        (400, {"error": {"message": "logprobs is wrong", "param": "logprobs", "code": 400}},
         (400, "invalid_request_error", "logprobs", None)),
        (422, {"detail": "no"}, (400, "invalid_request_error", None, None)),
        (429, {"error": "busy"}, (429, "rate_limit_error", None, "queue_full")),
        (401, {"error": "Unauthorized"}, (502, "server_error", None, "engine_failed")),
        (404, {"error": {"message": "none"}}, (502, "server_error", None, "engine_failed")),
        (500, {"error": {"message": "broken"}}, (502, "server_error", None, "engine_failed")),
        (503, {}, (503, "server_error", None, "engine_unreachable")),
        (200, "nothing that can be used", (502, "server_error", None, "engine_failed")),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)  # fmt: skip
def test_an_upstream_error_becomes_one_in_openais_shape(
    front: LiveServer, stand_in: StandIn, status: int, content: Any, expected: tuple[Any, ...]
) -> None:
    stand_in.respond = answering(status, content, **{"retry-after": "17"})
    response = post(front)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"], error["code"]) == expected
    assert len(stand_in.bodies) == 1, "a sent request must not be repeated"
    if status == 429:
        assert response.headers["retry-after"] == "17"
    if expected[0] == 502:
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([chunk(30)], "engine_unreachable"),
        ([chunk(30), "data: [DONE]"], "engine_failed"),
        ([chunk(30), chunk(31, finish_reason="abort"), "data: [DONE]"], "engine_failed"),
        ([chunk(30), 'data: {"error": {"message": "dead", "code": 500}}'], "engine_failed"),
        ([chunk(30), 'data: {"error": "dead"}'], "engine_failed"),
        ([chunk(30), "data: {"], "engine_failed"),
        ([chunk(30), 'data: {"choices": [{"index": 0, "text": "?"}]}'], "engine_failed"),
    ],
    ids=["cut off", "no reason", "aborted", "error", "word", "half", "no ids"],
)
def test_a_failure_in_the_middle_ends_the_stream_with_an_error_event(
    front: LiveServer, stand_in: StandIn, lines: list[str], code: str
) -> None:
    stand_in.respond = streaming(*lines)
    response = post(front, {**PLAIN, "stream": True})
    assert response.status_code == 200
    *_, error, end = events_of(response.text)
    assert end == "[DONE]"
    assert json.loads(error)["error"]["code"] == code


def test_a_line_separator_in_a_text_ends_no_event(front: LiveServer, stand_in: StandIn) -> None:
    text = chunk(30, finish_reason="stop").replace("?", "\u2028 \x85")
    assert "\u2028" in text
    stand_in.respond = streaming(": comment", text.replace("\n", "\r\n"), "data: [DONE]")
    assert post(front).status_code == 200


def test_a_mood_that_cannot_be_judged_fails_no_chat(front: LiveServer, stand_in: StandIn) -> None:
    async def respond(request: Request, body: Mapping[str, Any]) -> Response:
        if "logprob_token_ids" in body:
            return JSONResponse({}, 500)
        return await streaming(chunk(30, finish_reason="length"), "data: [DONE]")(request, body)

    stand_in.respond = respond
    reply = post(front, chat("never judged before")[1])
    assert reply.status_code == 200
    assert reply.json()["sentiment"] is None


async def test_the_deadline_ends_a_request_to_a_silent_upstream(
    stand_in: StandIn, url: str
) -> None:
    settings = Settings(model="mini", engine=url, ui=False, request_timeout=1)
    with run_live(settings) as front:
        stand_in.respond = streaming(chunk(30), hold=True)
        assert post(front).status_code == 504
        *_, error, _ = events_of(post(front, {**PLAIN, "stream": True}).text)
        assert json.loads(error)["error"]["code"] == "request_timeout"
        await until(lambda: front.services.engine.num_running == 0)


# --- the engine alone -----------------------------------------------------------------


@asynccontextmanager
async def engine_at(url: str, max_num_seqs: int = 2) -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(
        Address(url, read_timeout_s=BOUND_S), "qwen-mini", max_num_seqs=max_num_seqs
    )
    try:
        yield engine
    finally:
        engine.close()


class Held:
    """Starts streams that stay open until the client disconnects."""

    def __init__(self) -> None:
        self.num_begun = self.num_left = 0

    async def __call__(self, request: Request, body: Mapping[str, Any]) -> Response:
        async def content() -> AsyncIterator[str]:
            self.num_begun += 1
            try:
                yield f"{chunk(30)}\n\n"
                await asyncio.sleep(BOUND_S)
            finally:
                self.num_left += 1

        return StreamingResponse(content(), media_type="text/event-stream")


@pytest.fixture
def held(stand_in: StandIn) -> Held:
    held = Held()
    stand_in.respond = held
    return held


@pytest.fixture
def url(vllm: tuple[StandIn, LiveServer]) -> str:
    engine: Any = vllm[1].services.engine
    address: Address = engine._address
    return address.url


PARAMS = SamplingParams(max_tokens=9)


async def test_an_aborted_sequence_closes_its_connection(held: Held, url: str) -> None:
    async with engine_at(url) as engine:
        stream = engine.submit([1], PARAMS)
        assert (await anext(aiter(stream))).token_id == 30
        assert (engine.num_running, held.num_left) == (1, 0)
        stream.abort()
        stream.abort()
        await until(lambda: held.num_left == 1)
        assert engine.num_running == 0


async def test_a_cancelled_call_closes_its_connection(stand_in: StandIn, url: str) -> None:
    gone = threading.Event()

    async def respond(request: Request, body: Mapping[str, Any]) -> Response:
        await until_gone(request)
        gone.set()
        return Response()

    stand_in.respond = respond
    async with engine_at(url) as engine:
        scoring = asyncio.create_task(engine.score([1], [[2]]))
        await until(lambda: len(stand_in.bodies) == 1)
        scoring.cancel()
        await until(gone.is_set)


async def test_close_ends_every_sequence_and_refuses_new_ones(held: Held, url: str) -> None:
    async with engine_at(url) as engine:
        work = Work()
        streams = [engine.submit([1], PARAMS, work=work) for _ in range(4)]
        await until(lambda: held.num_begun == 2)
        assert (engine.num_running, engine.num_waiting) == (2, 2)
        engine.close()
        engine.close()
        assert not engine.is_alive
        for stream in streams:
            with pytest.raises(SequenceAbortedError):
                async for _ in stream:
                    pass
            stream.abort()  # without effect
        with pytest.raises(EngineClosedError):
            engine.submit([1], PARAMS)
        await until(lambda: held.num_left == 2)


async def test_a_large_request_leaves_room_for_another(held: Held, url: str) -> None:
    async with engine_at(url) as engine:
        large = Work()
        for _ in range(4):
            engine.submit([1], PARAMS, work=large)
        await until(lambda: held.num_begun == 2)
        other = engine.submit([1], PARAMS)
        assert (await anext(aiter(other))).token_id == 30
        assert engine.num_waiting == 2


async def test_a_label_is_scored_by_all_its_tokens(stand_in: StandIn, url: str) -> None:
    async def respond(request: Request, body: Mapping[str, Any]) -> Response:
        logprobs = {f"token_id:{i}": -float(i) for i in body["logprob_token_ids"]}
        choices = [
            {"index": i, "logprobs": {"top_logprobs": [logprobs]}}
            for i in range(len(body["prompt"]))
        ]
        usage = {"prompt_tokens_details": {"cached_tokens": 16}}
        return JSONResponse({"choices": choices, "usage": usage})

    stand_in.respond = respond
    async with engine_at(url) as engine:
        scores = await engine.score([1, 2], [[3], [4, 5], [4, 6, 7]])
    assert scores.logprobs == [-3.0, -9.0, -17.0]
    assert scores.num_cached == 16
    assert [body["prompt"] for body in stand_in.bodies] == [[[1, 2]], [[1, 2, 4], [1, 2, 4, 6]]]


@pytest.mark.parametrize(
    ("details", "num_cached", "num_kept"), [({}, 0, 0), ({"cached_tokens": 1}, 1, 1)]
)
def test_tokens_count_as_kept_only_if_the_upstream_reports_cached_ones(
    front: LiveServer, stand_in: StandIn, details: dict[str, int], num_cached: int, num_kept: int
) -> None:
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens_details": details}})
    stand_in.respond = streaming(
        chunk(30), chunk(31, finish_reason="stop"), f"data: {usage}", "data: [DONE]"
    )
    body = {"model": "qwen-mini", "input": "?", "sentiment": False}
    reply = httpx.post(front.url + "/v1/responses", json=body, timeout=BOUND_S).json()
    total, known = reply["usage"]["input_tokens"], reply["usage"]["input_tokens_details"]
    assert known["cached_tokens"] == num_cached
    assert known["cache_write_tokens"] == num_kept * (total - num_cached)


async def test_the_key_is_sent(stand_in: StandIn, url: str) -> None:
    stand_in.respond = streaming(chunk(30, finish_reason="length"), "data: [DONE]")
    stand_in.key = "secret"
    try:
        engine = RemoteEngine(Address(url, "secret"), "qwen-mini", max_num_seqs=1)
        assert [token.token_id async for token in engine.submit([1], PARAMS)] == [30]
        engine.close()
    finally:
        stand_in.key = None


# --- connections ----------------------------------------------------------------------


@asynccontextmanager
async def raw_server(port: int, answer: bytes) -> AsyncIterator[list[bytes]]:
    """Gives every request the same answer and closes; yields the requests' first lines."""
    request_lines, writers = list[bytes](), list[asyncio.StreamWriter]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        request_lines.append(await reader.readline())
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    async with server:
        yield request_lines
    for writer in writers:  # or the event loop may end before their sockets are closed
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "PAUSES_S", (0.01, 0.01, 0.3))
    monkeypatch.setattr(engine_module, "WATCH_INTERVAL_S", 0.02)


HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


async def test_a_sent_request_is_not_repeated(quick: None) -> None:
    port = closed_port()
    async with (
        raw_server(port, b"") as request_lines,
        engine_at(f"http://127.0.0.1:{port}") as engine,
    ):
        with pytest.raises(EngineUnreachableError):
            await engine.score([1], [[2]])
        assert len([line for line in request_lines if b"/v1/completions" in line]) == 1


async def test_connecting_is_retried(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Enough for a busy machine, where the server starts late.
    monkeypatch.setattr(upstream, "PAUSES_S", (0.01,) * 1000)
    port = closed_port()
    async with engine_at(f"http://127.0.0.1:{port}") as engine:
        await until(lambda: engine.trouble is not None)
        prefill = asyncio.create_task(engine.prefill([1]))
        await asyncio.sleep(0.1)  # the first tries
        answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}"
        async with raw_server(port, answer):
            assert await prefill is None  # the answer does not count cached tokens


async def test_a_lost_upstream_is_reported_and_may_recover(quick: None) -> None:
    port = closed_port()
    async with engine_at(f"http://127.0.0.1:{port}") as engine:
        with pytest.raises(EngineUnreachableError):
            await engine.prefill([1])
        assert not engine.is_alive
        assert engine.breakdown is None
        assert engine.trouble and "does not answer" in engine.trouble
        async with raw_server(port, HEALTHY):
            await until(lambda: engine.is_alive)
        await until(lambda: not engine.is_alive)


async def test_an_unhealthy_upstream_makes_this_server_not_ready(
    stand_in: StandIn, front: LiveServer
) -> None:
    async with httpx.AsyncClient(base_url=front.url) as client:
        stand_in.is_healthy = False
        await until(lambda: not front.services.engine.is_alive)
        health, ready = await client.get("/health"), await client.get("/ready")
        assert (health.status_code, ready.status_code) == (503, 503)
        assert "its /health answers 503" in health.json()["reason"]
        assert ready.json()["status"] == "no engine"
        stand_in.is_healthy = True
        await until(lambda: front.services.engine.is_alive)
        assert (await client.get("/ready")).status_code == 200


# --- the start ------------------------------------------------------------------------


def start(url: str, **changes: Any) -> None:
    load_services(Settings(model="mini", engine=url, **changes)).engine.close()


def test_an_unreachable_upstream_is_one_sentence() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(OSError, match=f"the engine at {url} does not answer .*; start it first"):
        start(url)


def test_a_missing_key_is_one_sentence(stand_in: StandIn, url: str) -> None:
    stand_in.key = "secret"
    try:
        with pytest.raises(OSError, match="refuses the key; give its own with --engine-key"):
            start(url)
        start(url, engine_key="secret")
    finally:
        stand_in.key = None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (JSONResponse({"data": []}), "lists no model with its context"),
        (JSONResponse({"data": [{"id": "a", "parent": None}]}), "lists no model with its context"),
        (JSONResponse(["a"]), "answers 200 to /v1/models; it must be a vLLM"),
        (Response("<html>"), "answers 200 to /v1/models; it must be a vLLM"),
        (Response(status_code=404), "answers 404 to /v1/models; it must be a vLLM"),
    ],
)
def test_another_kind_of_server_is_one_sentence(answer: Response, reason: str) -> None:
    with run_app(answer) as url, pytest.raises(OSError, match=reason):
        start(url)


def test_a_server_too_old_to_score_labels_is_one_sentence(stand_in: StandIn, url: str) -> None:
    choice = {"index": 0, "text": "?", "logprobs": {"top_logprobs": [{"token_id:1": 0.0}]}}
    stand_in.respond = answering(200, {"choices": [choice]})
    with pytest.raises(CheckpointError, match=r"the labels of the task .* cannot be scored"):
        start(url)
