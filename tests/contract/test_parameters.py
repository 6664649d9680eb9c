"""Every parameter of the routes that generate text: its effect, and the values it refuses.

The tables are complete: a field of a request that has no case here fails a test.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from server.protocol import chat, completions, responses
from server.protocol.sampling import SamplingRequest
from tests.contract.test_shapes import events
from tests.servers import LiveServer

PLAIN = "tiny-random:plain"
PROMPT = "今天天气很好，"
USER = [{"role": "user", "content": PROMPT}]
# Something of which is soon written by a model that writes anything.
STOP = ["的", "，", "a", "e"]
ENDLESS = {"logit_bias": {"0": -100, "2": -100}}
CLOCK = {
    "name": "clock",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
CHAT_CLOCK = {"type": "function", "function": CLOCK}
RESPONSES_CLOCK = {"type": "function", **CLOCK}

# The body of an answer; of a stream its last event.
Body = dict[str, Any]
Shows = Callable[[Body, Body], bool]


# --- how answers are read -------------------------------------------------------------


def ask(tiny: LiveServer, path: str, **request: Any) -> httpx.Response:
    body = {"model": tiny.model, "seed": 5, **request}
    return httpx.post(f"{tiny.base_url}/{path}", json=body, timeout=60)


def read(response: httpx.Response) -> Body:
    assert response.status_code == 200, response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        body: Body = response.json()
        return body
    if b"event: " in response.content:
        return {"is_stream": True}
    return {"is_stream": True, **events(response)[-1]}


def texts(body: Body) -> list[str]:
    if "output" in body:
        return ["".join(part["text"] for part in parts(body))]
    return [c["text"] if "text" in c else c["message"]["content"] for c in body["choices"]]


def parts(body: Body) -> list[dict[str, Any]]:
    return [part for item in body["output"] for part in item.get("content", [])]


def calls(body: Body) -> list[Any]:
    if "output" in body:
        return [item for item in body["output"] if item["type"] == "function_call"]
    return body["choices"][0]["message"].get("tool_calls", [])  # type: ignore[no-any-return]


def logprob_tokens(body: Body) -> list[tuple[str, dict[str, float]]]:
    """Tokens of the first choice, each with the likeliest in its place."""
    if "output" in body:
        logprobs = {"content": [entry for part in parts(body) for entry in part["logprobs"]]}
    else:
        logprobs = body["choices"][0]["logprobs"] or {"content": []}
    if "tokens" in logprobs:
        return list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    # By their bytes: the texts of half characters are all the same.
    return [
        (str(entry["bytes"]), {str(top["bytes"]): top["logprob"] for top in entry["top_logprobs"]})
        for entry in logprobs["content"]
    ]


def num_prompt_tokens(body: Body) -> int:
    usage = body["usage"]
    return int(usage["input_tokens"] if "input_tokens" in usage else usage["prompt_tokens"])


def num_written(body: Body) -> int:
    usage = body["usage"]
    return int(usage["output_tokens"] if "output_tokens" in usage else usage["completion_tokens"])


# --- how a parameter shows: by the answers without and with it -------------------------


def is_unchanged(without: Body, given: Body) -> bool:
    counts = [(num_prompt_tokens(body), num_written(body)) for body in (without, given)]
    return texts(without) == texts(given) and counts[0] == counts[1]


def is_greedy(without: Body, given: Body) -> bool:
    def takes_the_likeliest(body: Body) -> bool:
        return all(token == max(top, key=lambda t: top[t]) for token, top in logprob_tokens(body))

    return takes_the_likeliest(given) and not takes_the_likeliest(without)


def repeats_less(without: Body, given: Body) -> bool:
    before, after = ({token for token, _ in logprob_tokens(body)} for body in (without, given))
    return len(before) < len(after)


def has_one_token_only(without: Body, given: Body) -> bool:
    before, after = ({token for token, _ in logprob_tokens(body)} for body in (without, given))
    return len(before) > 1 and len(after) == 1


def is_stopped(without: Body, given: Body) -> bool:
    [before], [after] = texts(without), texts(given)
    is_shorter = before.startswith(after) and len(after) < len(before)
    return is_shorter and not any(stop in after for stop in STOP)


def is_three_tokens(without: Body, given: Body) -> bool:
    return num_written(given) == 3 < num_written(without)


def is_json(without: Body, given: Body) -> bool:
    return texts(given)[0].startswith("{") and not texts(without)[0].startswith("{")


def has_three_likeliest(without: Body, given: Body) -> bool:
    counts = [{len(top) for _, top in logprob_tokens(body)} for body in (without, given)]
    return counts[0].isdisjoint(counts[1]) and max(counts[1]) - 3 in (0, 1)


def has_logprobs(without: Body, given: Body) -> bool:
    return logprob_tokens(without) == [] != logprob_tokens(given)


def has_more_alternatives(without: Body, given: Body) -> bool:
    return len(logprob_tokens(given)[0][1]) > len(logprob_tokens(without)[0][1])


def has_calls(without: Body, given: Body) -> bool:
    return calls(without) == [] != calls(given)


def has_one_call(without: Body, given: Body) -> bool:
    return len(calls(given)) == 1 < len(calls(without))


def is_another_prompt(without: Body, given: Body) -> bool:
    return num_prompt_tokens(without) != num_prompt_tokens(given)


def is_without_sentiment(without: Body, given: Body) -> bool:
    return without["sentiment"] is not None and given["sentiment"] is None


# --- the tables -----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A value and its visible effect, a refused value, and the other fields of both requests."""

    value: Any
    shows: Shows
    wrong: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


GREEDY = {"temperature": 0}
SAMPLING = {
    "model": Case(PLAIN, lambda a, b: a["model"] + ":plain" == b["model"] == PLAIN, 5),
    "stream": Case(True, lambda a, b: "is_stream" in b and "is_stream" not in a, "true"),
    "temperature": Case(0, is_greedy, 2.1),
    "top_p": Case(1e-6, is_greedy, 0),
    "top_k": Case(1, is_greedy, -2),
    "min_p": Case(1, is_greedy, 1.1),
    "frequency_penalty": Case(2, repeats_less, 2.1, GREEDY),
    "presence_penalty": Case(2, repeats_less, -2.1, GREEDY),
    "repetition_penalty": Case(2, repeats_less, 0, GREEDY),
    "logit_bias": Case({"100": 100}, has_one_token_only, {"100": 101}),
    "seed": Case(6, lambda a, b: texts(a) != texts(b), 0.5),
    "stop": Case(STOP, is_stopped, [*STOP, "x"]),
}
CHOICES = SAMPLING | {
    "n": Case(2, lambda a, b: texts(a) == texts(b)[:1] and len(texts(b)) == 2, 17),
    "stream_options": Case(
        {"include_usage": True},
        lambda a, b: a["choices"] != b["choices"] == [] and num_written(b) > 0,
        {"include_usage": 1},
        {"stream": True},
    ),
}
SENTIMENT = Case(False, is_without_sentiment, "no")
TASKS = Case(
    ["intent"], lambda a, b: "analyses" not in a and list(b["analyses"]) == ["intent"], [1]
)


def tool_cases(clock: dict[str, Any], limit: str) -> dict[str, Case]:
    called = {"tools": [clock], limit: 90, **ENDLESS}
    return {
        "tools": Case([clock], is_another_prompt, {}),
        "tool_choice": Case("required", has_calls, "always", called),
        "parallel_tool_calls": Case(
            False, has_one_call, 1, called | {"tool_choice": "required"}
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Route:
    """A route, its default request, and its parameters.

    neutral: unsupported parameters, with the values that mean "off".
    """

    path: str
    kind: type[SamplingRequest]
    least: Mapping[str, Any]
    cases: Mapping[str, Case]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()


ROUTES = [
    Route(
        "chat/completions",
        chat.ChatCompletionRequest,
        {"messages": USER, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 1},
        CHOICES | tool_cases(CHAT_CLOCK, "max_completion_tokens") | {
            "messages": Case([{"role": "user", "content": "Hi"}], is_another_prompt, []),
            "max_tokens": Case(3, is_three_tokens, 0, {"max_completion_tokens": None}),
            "max_completion_tokens": Case(3, is_three_tokens, 0),
            "logprobs": Case(True, has_logprobs, 1, {"logprobs": None, "top_logprobs": None}),
            "top_logprobs": Case(3, has_three_likeliest, 21),
            "response_format": Case({"type": "json_object"}, is_json, {"type": "xml"}),
            "sentiment": SENTIMENT,
            "tasks": TASKS,
        },
        chat.UNSUPPORTED,
        chat.WITHOUT_EFFECT,
    ),
    Route(
        "completions",
        completions.CompletionRequest,
        {"prompt": PROMPT, "max_tokens": 12, "logprobs": 1},
        CHOICES | {
            "prompt": Case("Hi", is_another_prompt, 5),
            "max_tokens": Case(3, is_three_tokens, 0),
            "echo": Case(
                True, lambda a, b: texts(b) == [PROMPT + texts(a)[0]], 1, {"logprobs": None}
            ),
            "logprobs": Case(3, has_logprobs, 21, {"logprobs": None}),
            "logprob_token_ids": Case(
                [5, 6, 7], has_more_alternatives, ["a"],
                {"logprobs": 0},
            ),
            "return_token_ids": Case(
                True, lambda a, b: "token_ids" in b["choices"][0].keys() - a["choices"][0], 1
            ),
            "return_tokens_as_token_ids": Case(
                True, lambda a, b: "token_id:" in str(b) and "token_id:" not in str(a), 1
            ),
            "stop_token_ids": Case(
                [5], lambda a, b: texts(b) == [""] != texts(a), ["a"], {"logit_bias": {"5": 100}}
            ),
            "ignore_eos": Case(
                True, lambda a, b: "'length'" in str(b) and "'stop'" in str(a), 1,
                {"logit_bias": {"2": 100}},
            ),
            "structured_outputs": Case(
                {"grammar": 'start: "[]"'}, lambda a, b: texts(b) == ["[]"], {"regex": "a"}
            ),
        },
        completions.UNSUPPORTED,
        completions.WITHOUT_EFFECT,
    ),
    Route(
        "responses",
        responses.ResponsesRequest,
        {
            "input": PROMPT, "max_output_tokens": 12,
            "include": [responses.LOGPROBS], "top_logprobs": 1,
        },
        SAMPLING | tool_cases(RESPONSES_CLOCK, "max_output_tokens") | {
            "input": Case("Hi", is_another_prompt, 5),
            "instructions": Case("Be brief.", is_another_prompt, 5),
            "max_output_tokens": Case(3, is_three_tokens, 0),
            "text": Case({"format": {"type": "json_object"}}, is_json, {"format": {"type": "xml"}}),
            "include": Case(
                [responses.LOGPROBS], has_logprobs, "all", {"include": None, "top_logprobs": None}
            ),
            "top_logprobs": Case(3, has_three_likeliest, 21),
            "metadata": Case({"a": "b"}, lambda a, b: b["metadata"] == {"a": "b"}, {"a": 1}),
            "previous_response_id": Case(None, is_unchanged, "resp_1"),
            "sentiment": SENTIMENT,
            "tasks": TASKS,
        },
        responses.UNSUPPORTED,
        responses.WITHOUT_EFFECT,
    ),
]  # fmt: skip
CASES = [
    pytest.param(route, name, id=f"{route.path} {name}") for route in ROUTES for name in route.cases
]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
def test_every_field_has_a_case(route: Route) -> None:
    fields = {info.alias or name for name, info in route.kind.model_fields.items()}
    assert set(route.cases) == fields
    # What is no field is known once.
    assert route.kind.known == {*route.neutral, *route.without_effect}
    assert len(route.neutral) + len(route.without_effect) == len(route.kind.known - fields)


@pytest.mark.parametrize(("route", "name"), CASES)
def test_every_parameter_has_an_effect(tiny: LiveServer, route: Route, name: str) -> None:
    case = route.cases[name]
    request = {**route.least, **case.beside}
    without = read(ask(tiny, route.path, **request))
    given = read(ask(tiny, route.path, **{**request, name: case.value}))
    assert case.shows(without, given), (without, given)


@pytest.mark.parametrize(("route", "name"), CASES)
def test_every_parameter_is_refused_with_an_invalid_value(
    tiny: LiveServer, route: Route, name: str
) -> None:
    case = route.cases[name]
    response = ask(tiny, route.path, **{**route.least, **case.beside, name: case.wrong})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert error["param"].split(".")[0].split("[")[0] == name


@pytest.mark.parametrize(
    ("route", "name"),
    [pytest.param(r, name, id=f"{r.path} {name}") for r in ROUTES for name in r.neutral],
)
def test_unsupported_parameters_are_refused_unless_their_value_is_neutral(
    tiny: LiveServer, route: Route, name: str
) -> None:
    plain = read(ask(tiny, route.path, **route.least))
    for value in (None, *route.neutral[name]):
        assert is_unchanged(plain, read(ask(tiny, route.path, **{**route.least, name: value})))
    response = ask(tiny, route.path, **{**route.least, name: {"made": "up"}})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("route", "name"),
    [pytest.param(r, name, id=f"{r.path} {name}") for r in ROUTES for name in r.without_effect],
)
def test_parameters_without_effect_change_nothing(
    tiny: LiveServer, route: Route, name: str
) -> None:
    plain = read(ask(tiny, route.path, **route.least))
    for value in ("x", True, {"a": ["b"]}):
        assert is_unchanged(plain, read(ask(tiny, route.path, **{**route.least, name: value})))


@pytest.mark.parametrize(("older", "newer"), [(9, 4), (4, 9)])
def test_the_newer_of_two_token_limits_counts(tiny: LiveServer, older: int, newer: int) -> None:
    limits = {"max_tokens": older, "max_completion_tokens": newer}
    body = read(ask(tiny, "chat/completions", messages=USER, **ENDLESS, **limits))
    assert num_written(body) == newer
    assert body["choices"][0]["finish_reason"] == "length"
