"""The openai client's own helpers: tool runners, raw responses, several calls at once.

What the random model does with a tool is chance, so its first answer is forced to be a call,
and `<` is ruled out, with which it could begin another.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.lib.decisions_tool_runner import AsyncDecisionsToolRunner, DecisionsToolRunner
from openai.lib.responses_tool_runner import (
    AsyncRegisteredFunction,
    AsyncResponsesToolRunner,
    RegisteredFunction,
    ResponsesToolLedger,
    ResponsesToolRunner,
)
from openai.resources.responses import AsyncResponses, Responses

from tests.servers import LiveServer

MESSAGES: Any = [{"role": "user", "content": "今天真开心！"}]


class City(pydantic.BaseModel):
    """The arguments of the tool."""

    city: str = pydantic.Field(max_length=6)


class Mood(pydantic.BaseModel):
    """The type that the client parses an answer into."""

    is_glad: bool


@pytest.fixture
def client(tiny: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=tiny.base_url, api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture
async def async_client(tiny: LiveServer) -> AsyncIterator[openai.AsyncOpenAI]:
    base_url = tiny.base_url
    async with openai.AsyncOpenAI(base_url=base_url, api_key="unused", max_retries=0) as client:
        yield client


# --- the runner of responses ----------------------------------------------------------

ASKED = "What is the weather in Paris?"
TOOL: Any = openai.pydantic_responses_function_tool(City, name="get_weather")
WORDS = ["sunny", "rainy"]


BUDGET = {"max_input_bytes": 100_000, "max_input_images": 0}


def params(live: LiveServer) -> Any:
    """A request whose answer, where it is no call, is one of the words in JSON."""
    answer = {"type": "json_schema", "name": "weather", "schema": {"enum": WORDS}}
    return {
        "model": live.model,
        "input": ASKED,
        "max_output_tokens": 100,
        "parallel_tool_calls": False,
        "text": {"format": answer},
    }


@pytest.fixture
def answered(tiny: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """The conversations that the server has answered, as they came to its core."""
    conversations: list[list[Any]] = []
    reply = tiny.services.replier.reply

    async def spy(messages: list[Any], *args: Any, **options: Any) -> Any:
        conversations.append(messages)
        return await reply(messages, *args, **options)

    monkeypatch.setattr(tiny.services.replier, "reply", spy)
    return conversations


@pytest.fixture
def _force_one_call(tiny: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forces a call in the first answer only, which the runners do not allow to request."""
    token_bytes = tiny.services.tokenizer.token_bytes
    begin_a_call = [i for i, data in enumerate(token_bytes) if data.startswith(b"<")]
    extra_body = {"logit_bias": dict.fromkeys(begin_a_call, -100)}
    choices = iter(["required"])
    for resource in (Responses, AsyncResponses):

        def create(
            self: Any, *, _create: Any = resource.create, tool_choice: Any = "auto", **request: Any
        ) -> Any:
            choice = next(choices, tool_choice)
            return _create(self, **request, tool_choice=choice, extra_body=extra_body)

        monkeypatch.setattr(resource, "create", create)


def assert_result_came_back(answered: list[list[Any]], result: str) -> None:
    first, second = answered
    assert first == [{"role": "user", "content": ASKED}]
    said, call, output = second
    assert [said] == first
    assert call["role"] == "assistant"
    assert call["tool_calls"][0]["function"]["name"] == "get_weather"
    assert list(call["tool_calls"][0]["function"]["arguments"]) == ["city"]
    assert output == {"role": "tool", "content": result}


@pytest.mark.usefixtures("_force_one_call")
@pytest.mark.parametrize(
    "options",
    [{}, {"stream": True}, {"stream": True, "eager": True}, {"context_budget": BUDGET}],
    ids=["whole", "stream", "eager", "budget"],
)
def test_the_runner_calls_the_tool_and_brings_its_result(
    tiny: LiveServer, client: openai.OpenAI, answered: list[list[Any]], options: Any
) -> None:
    calls: list[dict[str, object]] = []

    def get_weather(arguments: dict[str, object]) -> str:
        calls.append(arguments)
        return "晴 <tool_call>"

    runner = ResponsesToolRunner(functions=[RegisteredFunction(TOOL, get_weather)])
    final: Any = runner.run(client, params(tiny), **options)
    assert len(calls) == 1
    assert_result_came_back(answered, "晴 <tool_call>")
    assert json.loads(final.output_text) in WORDS
    assert final.model_extra["sentiment"]["label"]


@pytest.mark.usefixtures("_force_one_call")
async def test_the_async_runner_calls_the_tool_and_brings_its_result(
    tiny: LiveServer, async_client: openai.AsyncOpenAI, answered: list[list[Any]]
) -> None:
    cities: list[City] = []

    async def get_weather(city: City) -> Any:
        cities.append(city)
        return [{"type": "input_text", "text": "rain, "}, {"type": "input_text", "text": "wind"}]

    function = AsyncRegisteredFunction.from_tool(TOOL, execute=get_weather)
    runner = AsyncResponsesToolRunner(functions=[function])
    final = await runner.run(async_client, params(tiny), stream=True)
    assert len(cities) == 1
    assert_result_came_back(answered, "rain, \nwind")
    assert json.loads(final.output_text) in WORDS


@pytest.mark.usefixtures("_force_one_call")
def test_a_saved_run_resumes_where_it_was(
    tiny: LiveServer, client: openai.OpenAI, answered: list[list[Any]]
) -> None:
    saved: list[Any] = []
    runner = ResponsesToolRunner(functions=[RegisteredFunction(TOOL, lambda _: "fog")])
    runner.run(client, params(tiny), ledger=ResponsesToolLedger("run", saved.append))
    [after_the_call] = [
        checkpoint
        for checkpoint in saved
        if checkpoint["phase"] == "boundary"
        and checkpoint["returned_call_ids"]
        and checkpoint["consumed_requests"] == 1
    ]
    ledger = ResponsesToolLedger("run", saved.append, resume_from=after_the_call)
    request: Any = {**params(tiny), "input": "And now?"}
    final = runner.run(client, request, ledger=ledger)
    assert answered[2] == [*answered[1], {"role": "user", "content": "And now?"}]
    assert json.loads(final.output_text) in WORDS


# --- the runner of decisions ----------------------------------------------------------


class Crossing:
    """Two ways, one of which is to stay; after going, only staying is possible."""

    WAYS = ("left", "right")

    def __init__(self, stay: str) -> None:
        self._stay = stay
        self.gone: list[str] = []

    def observe(self) -> Any:
        return [{"type": "input_text", "text": "You are at a crossing."}]

    def candidates(self, going: Callable[[str], Callable[[], Any]]) -> list[Any]:
        ways = [self._stay] if self.gone else self.WAYS
        return [
            {"id": way, "description": f"The {way} way."}
            | ({"done": True} if way == self._stay else {"execute": going(way)})
            for way in ways
        ]


def decision(live: LiveServer) -> Any:
    return {"model": live.model, "input": "Choose a way.", "safety_identifier": "me"}


def assert_the_chosen_way_was_gone(crossings: list[Crossing], results: list[Any]) -> None:
    """The question is the same whichever of the ways means to stay, and so is the choice."""
    answers = [result["decisions"][0].answers[0] for result in results]
    [chosen] = {answer.choice for answer in answers}
    assert {(answer.type, answer.name) for answer in answers} == {("choice", "next_action")}
    assert [crossing.gone for crossing in crossings if crossing.gone] == [[chosen]]
    completed = [result["completed_candidate_ids"] for result in results]
    assert completed == [crossing.gone for crossing in crossings]


def test_the_runner_of_decisions_goes_where_the_server_chose(
    tiny: LiveServer, client: openai.OpenAI
) -> None:
    crossings = [Crossing(stay) for stay in Crossing.WAYS]

    def run(crossing: Crossing) -> Any:
        def going(way: str) -> Callable[[], object]:
            return lambda: crossing.gone.append(way)

        runner = DecisionsToolRunner(
            observe=crossing.observe,
            candidates=lambda _: crossing.candidates(going),
            verify=lambda _: True,
        )
        return runner.run(client, decision(tiny))

    results = [run(crossing) for crossing in crossings]
    assert {result["status"] for result in results} == {"verified"}
    assert_the_chosen_way_was_gone(crossings, results)


async def test_the_async_runner_of_decisions_goes_there_too(
    tiny: LiveServer, async_client: openai.AsyncOpenAI
) -> None:
    crossings = [Crossing(stay) for stay in Crossing.WAYS]

    async def run(crossing: Crossing) -> Any:
        def going(way: str) -> Callable[[], Any]:
            async def go() -> None:
                crossing.gone.append(way)

            return go

        async def observe() -> Any:
            return crossing.observe()

        async def candidates(_: Any) -> list[Any]:
            return crossing.candidates(going)

        runner = AsyncDecisionsToolRunner(observe=observe, candidates=candidates)
        return await runner.run(async_client, decision(tiny))

    results = [await run(crossing) for crossing in crossings]
    assert {result["status"] for result in results} == {"unverified"}
    assert_the_chosen_way_was_gone(crossings, results)


# --- responses as they come over the wire ---------------------------------------------


def test_a_raw_response_has_the_sentiment_in_its_header(
    tiny: LiveServer, client: openai.OpenAI
) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=tiny.model, messages=MESSAGES, max_tokens=8
    )
    parsed: Any = raw.parse()
    assert raw.headers["x-sentiment"] == parsed.sentiment["label"]
    assert json.loads(raw.text)["id"] == parsed.id


def test_a_streaming_response_has_the_sentiment_before_its_body(
    tiny: LiveServer, client: openai.OpenAI
) -> None:
    with client.chat.completions.with_streaming_response.create(
        model=tiny.model, messages=MESSAGES, max_tokens=8, stream=True
    ) as response:
        label = response.headers["x-sentiment"]
        lines = [line for line in response.iter_lines() if line]
    assert json.loads(lines[0].removeprefix("data: "))["sentiment"]["label"] == label
    assert lines[-1] == "data: [DONE]"


def test_options_of_one_call_apply(tiny: LiveServer, client: openai.OpenAI) -> None:
    patient = client.with_options(max_retries=0, timeout=60)
    assert patient.chat.completions.create(model=tiny.model, messages=MESSAGES, max_tokens=4).id
    hasty = client.with_options(max_retries=0, timeout=0.001)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(model=tiny.model, messages=MESSAGES, max_tokens=300)


def test_a_completion_streams(tiny: LiveServer, client: openai.OpenAI) -> None:
    request: Any = {"model": tiny.model, "prompt": "Once", "max_tokens": 12, "seed": 2}
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(**request, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


# --- the async client -----------------------------------------------------------------


def mood(live: LiveServer, seed: int) -> Any:
    return {
        "model": live.model, "messages": MESSAGES, "max_tokens": 50, "seed": seed,
        "response_format": Mood,
    }  # fmt: skip


async def test_the_async_client_parses_and_streams_the_same(
    tiny: LiveServer, async_client: openai.AsyncOpenAI
) -> None:
    parsed = await async_client.chat.completions.parse(**mood(tiny, seed=1))
    async with async_client.chat.completions.stream(**mood(tiny, seed=1)) as stream:
        kinds = {event.type async for event in stream}
        final: Any = await stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Mood)
    assert final.choices[0].message == parsed.choices[0].message
    assert final.sentiment["label"]


async def test_concurrent_streams_and_replies_equal_those_alone(
    tiny: LiveServer, async_client: openai.AsyncOpenAI
) -> None:
    async def stream(seed: int) -> str:
        request: Any = {"model": tiny.model, "messages": MESSAGES, "max_tokens": 20, "seed": seed}
        async with async_client.chat.completions.stream(**request) as events:
            return "".join([e.delta async for e in events if e.type == "content.delta"])

    async def parse(seed: int) -> str | None:
        completion = await async_client.chat.completions.parse(**mood(tiny, seed))
        return completion.choices[0].message.content

    together = await asyncio.gather(*(ask(seed) for seed in range(6) for ask in (stream, parse)))
    alone = [await ask(seed) for seed in range(6) for ask in (stream, parse)]
    assert together == alone
    assert len(set(alone)) > 2
