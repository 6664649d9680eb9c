"""Requests to the upstream, parameter by parameter, and its answers."""

from dataclasses import fields
from typing import Any

import pytest

from server.core.engine.sequence import FinishReason, SamplingParams, TokenEvent
from server.core.text.grammar import GrammarCompiler
from server.core.text.tokenizer import ChatTokenizer
from server.errors import InvalidRequestError
from server.remote.wire import (
    MAX_BIASES,
    UpstreamFormatError,
    check_params,
    continuation_body,
    logprobs_of,
    num_cached_in,
    prefill_body,
    reason_of,
    scoring_body,
    tokens_of,
)

PLAIN = SamplingParams(max_tokens=9)


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"min_p": 0.1}, {"min_p": 0.1}),
        ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"frequency_penalty": 1.0}, {"frequency_penalty": 1.0}),
        ({"presence_penalty": -1.0}, {"presence_penalty": -1.0}),
        ({"logit_bias": ((3, -100.0),)}, {"logit_bias": {"3": -100.0}}),
        ({"seed": 0}, {"seed": 0}),
        ({"seed": 2**63}, {"seed": -(2**63)}),
        ({"num_logprobs": 2}, {"logprobs": 2, "return_tokens_as_token_ids": True}),
        ({"logprob_token_ids": (4, 5)}, {"logprob_token_ids": [4, 5]}),
        ({"stop_token_ids": frozenset({2, 0})}, {"stop_token_ids": [0, 2]}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_sampling_parameter_is_sent_with_vllms_name(
    changes: dict[str, Any], sent: dict[str, Any]
) -> None:
    plain = continuation_body([1], PLAIN)
    changed = continuation_body([1], SamplingParams(**{"max_tokens": 9, **changes}))
    assert changed == {**plain, **sent} != plain


def test_every_sampling_parameter_is_considered() -> None:
    """Fails for a new parameter until its form in vLLM is decided."""
    assert {field.name for field in fields(SamplingParams)} == {
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
        "frequency_penalty", "presence_penalty", "logit_bias", "seed", "num_logprobs",
        "logprob_token_ids", "grammar", "stop_token_ids",
    }  # fmt: skip


def test_neutral_values_are_sent_because_the_checkpoint_has_defaults() -> None:
    for body in (continuation_body([1], PLAIN), scoring_body([[1]], [2]), prefill_body([1])):
        assert body["repetition_penalty"] == 1.0
        assert body["ignore_eos"] is True
        assert "temperature" in body


@pytest.mark.parametrize("kind", ["json", "lark"])
def test_a_grammar_is_sent_in_lark_that_only_llguidance_accepts(
    tokenizer: ChatTokenizer, kind: str
) -> None:
    grammars = GrammarCompiler(tokenizer, [2, 0])
    own = grammars.json_schema({"type": "array"}) if kind == "json" else grammars.lark('start: "a"')
    body = continuation_body([1], SamplingParams(max_tokens=9, grammar=own))
    text = body["structured_outputs"]["grammar"]
    assert text.startswith("%llguidance {}\n")
    other, state = grammars.lark(text).begin(), own.begin()
    assert other.allowed() == state.allowed()


def test_more_biases_than_vllm_holds_are_refused_by_name() -> None:
    biases = tuple((i, 1.0) for i in range(MAX_BIASES + 1))
    check_params(SamplingParams(max_tokens=9, logit_bias=biases[:-1]))
    with pytest.raises(InvalidRequestError, match="'logit_bias'") as refused:
        check_params(SamplingParams(max_tokens=9, logit_bias=biases))
    assert refused.value.param == "logit_bias"


# --- answers --------------------------------------------------------------------------


def test_tokens_have_no_logprobs_unless_requested() -> None:
    choice = {"token_ids": [5, 6], "logprobs": None}
    assert tokens_of(choice, PLAIN) == [TokenEvent(5), TokenEvent(6)]


CHOICE = {
    "token_ids": [5],
    "logprobs": {
        "token_logprobs": [-3.0],
        # The sampled token comes first. vLLM fills up with token 0.
        "top_logprobs": [
            {"token_id:5": -3.0, "token_id:7": -0.5, "token_id:8": -1.0, "token_id:0": -9999.0}
        ],
    },
}


@pytest.mark.parametrize(
    ("changes", "top"),
    [
        ({"num_logprobs": 0}, ()),
        ({"num_logprobs": 2}, ((7, -0.5), (8, -1.0))),
        ({"num_logprobs": 4}, ((7, -0.5), (8, -1.0), (5, -3.0))),
        ({"num_logprobs": 0, "logprob_token_ids": (8, 5)}, ((8, -1.0), (5, -3.0))),
    ],
)
def test_a_token_has_the_requested_logprobs(
    changes: dict[str, Any], top: tuple[tuple[int, float], ...]
) -> None:
    params = SamplingParams(max_tokens=1, **changes)
    assert tokens_of(CHOICE, params) == [TokenEvent(5, -3.0, top)]


@pytest.mark.parametrize(
    "choice",
    [
        {"text": "of a server that knows no token ids"},
        {"token_ids": None, "logprobs": None},
        {"token_ids": [1, 2], "logprobs": CHOICE["logprobs"]},
        {"token_ids": [1], "logprobs": {"token_logprobs": [0.0], "top_logprobs": [{"a": 0.0}]}},
    ],
)
def test_an_answer_without_token_ids_cannot_be_used(choice: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFormatError):
        tokens_of(choice, PLAIN)


def test_an_unknown_finish_reason_is_an_error() -> None:
    assert reason_of({"finish_reason": None}) is None
    assert reason_of({"finish_reason": "length"}) is FinishReason.LENGTH
    with pytest.raises(UpstreamFormatError, match="abort"):
        reason_of({"finish_reason": "abort"})


def scored(*tops: dict[str, float]) -> dict[str, Any]:
    choices = [{"index": i, "logprobs": {"top_logprobs": [top]}} for i, top in enumerate(tops)]
    return {"choices": choices[::-1]}


def test_scores_are_ordered_by_prompt() -> None:
    body = scoring_body([[1], [1, 2]], [7, 8])
    answer = scored(
        {"token_id:9": 0.0, "token_id:7": -1.0, "token_id:8": -2.0},
        {"token_id:7": -3.0, "token_id:8": -4.0},
    )
    assert logprobs_of(answer, body) == [{7: -1.0, 8: -2.0}, {7: -3.0, 8: -4.0}]


@pytest.mark.parametrize(
    "answer", [scored({"token_id:9": 0.0}), scored(), {"choices": [{"index": 0, "text": "a"}]}, {}]
)
def test_an_answer_without_the_scores_cannot_be_used(answer: dict[str, Any]) -> None:
    with pytest.raises(UpstreamFormatError):
        logprobs_of(answer, scoring_body([[1]], [7]))


@pytest.mark.parametrize(
    ("usage", "number"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 4}}, 4),
        ({"prompt_tokens_details": None}, None),
        (None, None),
    ],
)
def test_cached_tokens_are_read_if_the_upstream_reports_them(
    usage: Any, number: int | None
) -> None:
    assert num_cached_in({"usage": usage}) == number
