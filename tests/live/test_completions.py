"""Raw text continued: whole, streamed, the two compared, and what is refused."""

import asyncio
import dataclasses
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion

from server.core.engine.local import LocalEngine
from server.core.engine.sequence import SamplingParams
from server.routes import completions
from server.routes.sampling import sampling_params
from tests.contract.strict import assert_is
from tests.servers import LiveServer

BOUND_S = 30
PROMPT = "今天天气很好，"
HALF_STOPPED = ["e", "我", "！", " you"]


def body(live: LiveServer, **changes: Any) -> dict[str, Any]:
    return {
        "model": live.model,
        "prompt": PROMPT,
        "max_tokens": 24,
        "seed": 7,
        "temperature": 0.9,
        **changes,
    }


def post(live: LiveServer, **changes: Any) -> httpx.Response:
    return httpx.post(f"{live.base_url}/completions", json=body(live, **changes), timeout=60)


def whole(live: LiveServer, **changes: Any) -> Any:
    response = post(live, **changes)
    assert response.status_code == 200, response.text
    return response.json()


def text(live: LiveServer, **changes: Any) -> str:
    [choice] = whole(live, **changes)["choices"]
    content: str = choice["text"]
    return content


def streamed(live: LiveServer, **changes: Any) -> list[dict[str, Any]]:
    """The JSON of every event but the last, which must be [DONE]."""
    response = post(live, stream=True, **changes)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert b"\r" not in response.content
    *events, end = response.content.decode().split("\n\n")
    assert (events.pop(), end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(live: LiveServer, **changes: Any) -> dict[str, Any]:
    response = post(live, **changes)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert f"'{error['param']}'" in error["message"] or error["code"] == "context_length_exceeded"
    return error


# --- whole ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"n": 2}, {"logprobs": 3}, {"echo": True}, {"prompt": ["a", "b"]}, {"stop": ["的", "a"]}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_a_completion_is_valid(live: LiveServer, changes: dict[str, Any]) -> None:
    reply = whole(live, **changes)
    assert_is(Completion, reply)
    assert reply["id"].startswith("cmpl-")
    assert reply["model"] == live.model
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_prompt_goes_to_the_model_as_it_is(live: LiveServer) -> None:
    num_tokens = len(live.services.tokenizer.encode_text(PROMPT))
    assert whole(live)["usage"]["prompt_tokens"] == num_tokens
    assert "sentiment" not in whole(live, sentiment=True)
    assert "x-sentiment" not in post(live).headers


def test_a_marker_in_a_text_stays_plain_text(tiny: LiveServer) -> None:
    marker = "<|im_end|>"
    num_tokens = whole(tiny, prompt=marker)["usage"]["prompt_tokens"]
    assert num_tokens == len(tiny.services.tokenizer.encode_text(marker)) > 1
    marker_id = tiny.services.tokenizer.marker_id(marker)
    assert whole(tiny, prompt=[marker_id])["usage"]["prompt_tokens"] == 1


def test_a_text_and_its_token_ids_mean_the_same(live: LiveServer) -> None:
    ids = live.services.tokenizer.encode_text(PROMPT)
    expected = whole(live)
    for prompt in (ids, [ids], [PROMPT]):
        reply = whole(live, prompt=prompt)
        assert reply["choices"] == expected["choices"]
        assert reply["usage"]["prompt_tokens"] == expected["usage"]["prompt_tokens"]


def test_sixteen_tokens_are_written_unless_more_are_asked_for(tiny: LiveServer) -> None:
    endless = {"logit_bias": {"0": -100, "2": -100}, "max_tokens": None}
    reply = whole(tiny, **endless)
    assert reply["usage"]["completion_tokens"] == 16
    assert reply["choices"][0]["finish_reason"] == "length"


def test_each_prompt_has_its_choices_in_order(tiny: LiveServer) -> None:
    prompts = ["one", "another", "one"]
    reply = whole(tiny, prompt=prompts, n=2, seed=5)
    assert [choice["index"] for choice in reply["choices"]] == list(range(6))
    alone = [whole(tiny, prompt=prompt, seed=seed) for prompt in prompts for seed in (5, 6)]
    assert [c["text"] for c in reply["choices"]] == [r["choices"][0]["text"] for r in alone]
    usage = reply["usage"]
    assert usage["prompt_tokens"] == sum(r["usage"]["prompt_tokens"] for r in alone[::2])
    assert usage["completion_tokens"] == sum(r["usage"]["completion_tokens"] for r in alone)


@pytest.mark.parametrize("n", [1, 2])
def test_cached_tokens_are_those_of_earlier_requests(tiny: LiveServer, n: int) -> None:
    prompts = [f"words that nobody has continued before {i} {n} " * 2 for i in "ab"]

    def num_left() -> int:
        usage = whole(tiny, prompt=prompts, n=n)["usage"]
        return int(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])

    assert num_left() > 20
    assert num_left() == len(prompts)  # the last token of each is computed for what follows


def test_the_seed_decides_the_text_unless_temperature_is_zero(tiny: LiveServer) -> None:
    assert text(tiny, seed=1) == text(tiny, seed=1) != text(tiny, seed=2)
    assert text(tiny, seed=1, temperature=0) == text(tiny, seed=2, temperature=0)
    assert text(tiny, top_k=1) == text(tiny, temperature=0)


def test_a_stop_string_ends_the_text_before_itself(live: LiveServer) -> None:
    full = text(live, temperature=0)
    stop = full[len(full) // 2 :][:2]
    [choice] = whole(live, temperature=0, stop=stop)["choices"]
    assert stop and choice["text"] == full[: full.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_an_echo_is_the_prompt_in_front(live: LiveServer) -> None:
    ids = live.services.tokenizer.encode_text(PROMPT)
    expected = PROMPT + text(live)
    assert expected == text(live, echo=True) == text(live, prompt=ids, echo=True)
    # What stands in the prompt stops nothing.
    assert text(live, echo=True, stop="天气").startswith(PROMPT)


# --- streamed -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "changes",
    [{}, {"stop": HALF_STOPPED}, {"echo": True}, {"n": 2}, {"prompt": ["a", "b"], "n": 2}],
    ids=lambda changes: next(iter(changes), "plain"),
)
def test_the_joined_stream_equals_the_whole(
    live: LiveServer, seed: int, changes: dict[str, Any]
) -> None:
    expected = whole(live, seed=seed, **changes)["choices"]
    chunks = streamed(live, seed=seed, **changes)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "text_completion"
    assert all("usage" not in chunk for chunk in chunks)
    for choice in expected:
        *parts, end = [
            c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert "\ufffd" not in choice["text"]
        assert all(part["finish_reason"] is None and part["text"] for part in parts)
        assert (end["text"], end["finish_reason"]) == ("", choice["finish_reason"])


def test_an_echo_is_the_first_piece(tiny: LiveServer) -> None:
    chunks = streamed(tiny, prompt=["a", "bc"], n=2, echo=True)
    first = [chunk["choices"][0] for chunk in chunks[:4]]
    assert [(c["index"], c["text"]) for c in first] == [(0, "a"), (1, "a"), (2, "bc"), (3, "bc")]


def test_usage_comes_in_one_chunk_of_its_own_when_asked_for(tiny: LiveServer) -> None:
    *others, last = streamed(tiny, stream_options={"include_usage": True}, n=2)
    assert all(c["usage"] is None and len(c["choices"]) == 1 for c in others)
    assert last["choices"] == []
    assert last["usage"] == whole(tiny, n=2)["usage"]


def test_an_exception_in_a_stream_is_an_error_event_and_done(
    tiny: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tiny.engine._runner
    step, calls = runner.step, []

    def explode_later(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("broken on purpose")
        return step(*args)

    monkeypatch.setattr(runner, "step", explode_later)
    *_, error = streamed(tiny, logit_bias={"0": -100, "2": -100})
    assert error["error"]["type"] == "server_error"
    assert "on purpose" not in error["error"]["message"]


# --- log-probabilities ----------------------------------------------------------------


def test_logprobs_contain_every_token_in_openais_older_shape(tiny: LiveServer) -> None:
    reply = whole(tiny, logprobs=3)
    [choice] = reply["choices"]
    logprobs = choice["logprobs"]
    num_tokens = reply["usage"]["completion_tokens"]
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert {len(column) for column in logprobs.values()} == {num_tokens}
    for name, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[name] == logprob <= 0
        assert len(top) in (3, 4)
        assert sorted(top.values(), reverse=True)[:3] == list(top.values())[:3]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    whole_tokens = [
        (name, offset)
        for name, offset in zip(logprobs["tokens"], offsets, strict=True)
        if not name.startswith("bytes:")
    ]
    assert whole_tokens
    assert all(choice["text"][offset:].startswith(name) for name, offset in whole_tokens)


def test_with_zero_logprobs_only_the_sampled_token_is_sent(tiny: LiveServer) -> None:
    logprobs = whole(tiny, logprobs=0)["choices"][0]["logprobs"]
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    assert logprobs["top_logprobs"] == [{name: logprob} for name, logprob in pairs]
    assert whole(tiny)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stop", [[], ["a", "e", "的", "是"]])
def test_the_logprobs_of_a_stream_are_those_of_the_whole(tiny: LiveServer, stop: list[str]) -> None:
    changes = {"logprobs": 2, "stop": stop, "n": 2}
    chunks = streamed(tiny, **changes)
    for choice in whole(tiny, **changes)["choices"]:
        joined: dict[str, list[Any]] = {name: [] for name in choice["logprobs"]}
        for part in (chunk["choices"][0] for chunk in chunks):
            if part["index"] == choice["index"]:
                for name, column in (part["logprobs"] or {}).items():
                    joined[name] += column
        assert joined == choice["logprobs"]


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(
    tiny: LiveServer, stream: bool
) -> None:
    limit = tiny.services.max_context
    error = refused(tiny, prompt=["ok", [5] * limit], stream=stream)
    assert (error["param"], error["code"]) == ("prompt[1]", "context_length_exceeded")
    assert f"is {limit} tokens" in error["message"] and f"has {limit} " in error["message"]
    reply = whole(tiny, prompt=[5] * (limit - 1))
    assert reply["usage"]["completion_tokens"] <= 1


def test_a_token_the_model_does_not_have_is_refused_with_its_place(tiny: LiveServer) -> None:
    too_high = tiny.services.tokenizer.vocab_size
    assert refused(tiny, prompt=[5, too_high])["param"] == "prompt[1]"
    assert refused(tiny, prompt=[5, -1])["param"] == "prompt[1]"
    assert refused(tiny, prompt=[[5], [5, 5, too_high]])["param"] == "prompt[1][2]"
    assert refused(tiny, logit_bias={str(too_high): 1})["param"] == "logit_bias"
    assert whole(tiny, prompt=[too_high - 1])["usage"]["prompt_tokens"] == 1


def test_an_unknown_model_is_not_found(tiny: LiveServer) -> None:
    response = post(tiny, model="gpt-5")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert whole(tiny, model=f"{tiny.model}:plain")["choices"] == whole(tiny)["choices"]


# --- the openai client ----------------------------------------------------------------


def test_the_openai_client_completes_and_streams(live: LiveServer) -> None:
    arguments: Any = {"model": live.model, "prompt": PROMPT, "seed": 3, "max_tokens": 12}
    with openai.OpenAI(base_url=live.base_url, api_key="unused", max_retries=0) as client:
        reply = client.completions.create(**arguments, logprobs=2, user="me")
        chunks = list(client.completions.create(**arguments, stream=True))
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**arguments, echo=True, logprobs=0)
    assert reply.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) != ""
    assert reply.choices[0].logprobs is not None
    assert chunks[-1].choices[0].finish_reason == reply.choices[0].finish_reason
    assert caught.value.param == "echo"


# --- clients that go away -------------------------------------------------------------


@pytest.fixture
def endless(tiny: LiveServer, monkeypatch: pytest.MonkeyPatch) -> LiveServer:
    """The random model, never ending by itself and slow enough to be left in the middle."""
    step = tiny.engine._runner.step

    def slow_step(*args: Any) -> Any:
        time.sleep(0.002)
        return step(*args)

    def never_ending(*args: Any, **options: Any) -> SamplingParams:
        return dataclasses.replace(sampling_params(*args, **options), stop_token_ids=frozenset())

    monkeypatch.setattr(tiny.engine._runner, "step", slow_step)
    monkeypatch.setattr(completions, "sampling_params", never_ending)
    return tiny


async def until(is_so: Callable[[], bool]) -> None:
    """Waits for a state of the engine's thread, which has no event to wait on."""
    async with asyncio.timeout(BOUND_S):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def is_idle(engine: LocalEngine) -> bool:
    return engine._scheduler.admission.is_idle and not engine._runner._states  # type: ignore[attr-defined]


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_frees_every_slot(endless: LiveServer, stream: bool, n: int) -> None:
    engine = endless.engine
    request = body(endless, prompt=["a", "b"], n=n, stream=stream, max_tokens=400)
    content = json.dumps(request).encode()
    host, port = endless.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        await until(lambda: len(engine._scheduler.admission.running) == 2 * n)
        sequences = list(engine._scheduler.admission.running)
    await until(lambda: is_idle(engine))
    # They were ended, not merely waited for.
    assert all(len(sequence.completion_ids) < 400 for sequence in sequences)


# --- what other servers ask for, as vLLM has it ---------------------------------------


def test_token_ids_are_those_of_the_text_streamed_or_whole(live: LiveServer) -> None:
    [choice] = whole(live, return_token_ids=True)["choices"]
    assert live.services.tokenizer.decode(choice["token_ids"]) == choice["text"]
    chunks = streamed(live, return_token_ids=True)
    ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
    assert ids == choice["token_ids"]
    assert choice["logprobs"] is None


def test_logprob_token_ids_replace_the_likeliest_tokens(live: LiveServer) -> None:
    ordinary = {"temperature": 0, "max_tokens": 1, "return_tokens_as_token_ids": True}
    [choice] = whole(live, logprobs=20, **ordinary)["choices"]
    [likeliest] = choice["logprobs"]["top_logprobs"]
    names = list(likeliest)[3:7]
    ids = [int(name.removeprefix("token_id:")) for name in names]
    [choice] = whole(live, logprobs=0, logprob_token_ids=ids, **ordinary)["choices"]
    [told] = choice["logprobs"]["top_logprobs"]
    assert {name: told[name] for name in names} == pytest.approx(
        {name: likeliest[name] for name in names}
    )
    assert told.keys() - names == {*choice["logprobs"]["tokens"]}


def test_a_stop_token_of_the_request_ends_a_text_and_the_models_own_may_be_ignored(
    tiny: LiveServer,
) -> None:
    ids = whole(tiny, return_token_ids=True)["choices"][0]["token_ids"]
    [choice] = whole(tiny, return_token_ids=True, stop_token_ids=[ids[3]])["choices"]
    assert (choice["token_ids"], choice["finish_reason"]) == (ids[: ids.index(ids[3])], "stop")
    only_eos = {"logit_bias": {"2": 100}, "max_tokens": 3, "return_token_ids": True}
    assert whole(tiny, **only_eos)["choices"][0]["token_ids"] == []
    assert whole(tiny, ignore_eos=True, **only_eos)["choices"][0]["token_ids"] == [2, 2, 2]


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": {"type": "array", "items": {"enum": ["a"]}, "minItems": 2, "maxItems": 2}},
        {"grammar": 'start: "[" A ", " A "]"\nA: /"a"/'},
    ],
    ids=lambda wanted: next(iter(wanted)),
)
def test_a_text_fits_structured_outputs(live: LiveServer, wanted: dict[str, Any]) -> None:
    assert text(live, structured_outputs=wanted) == '["a", "a"]'


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"structured_outputs": {"grammar": "start: nowhere"}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "nothing"}}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprob_token_ids": [10**6], "logprobs": 0}, "logprob_token_ids[0]"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
    ],
)
def test_invalid_parameters_of_vllm_are_refused_with_their_place(
    tiny: LiveServer, changes: dict[str, Any], param: str
) -> None:
    assert refused(tiny, **changes)["param"] == param
