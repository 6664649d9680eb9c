"""What is asked of /v1/completions, and what its answers say, in terms of the engine.

Knows JSON and token ids, nothing of connections. The fields are vLLM's:
https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#completions-api
"""

import json
from collections.abc import Mapping
from typing import Any

from server.core.engine.sequence import FinishReason, SamplingParams, TokenEvent
from server.errors import InvalidRequestError

# What vLLM's newer model runner holds of a sequence; with more it breaks down.
MAX_BIASES = 1024
_TOKEN = "token_id:"
# Stands for a probability of zero.
_IMPOSSIBLE = -9999.0


class UpstreamFormatError(ValueError):
    """The answer is not what vLLM's would be."""


def check_params(params: SamplingParams) -> None:
    """Refuses what vLLM cannot do.

    Raises:
        InvalidRequestError: names the parameter.
    """
    if len(params.logit_bias) > MAX_BIASES:
        raise InvalidRequestError(
            f"'logit_bias': the engine behind this server takes {MAX_BIASES} tokens at most, not "
            f"{len(params.logit_bias)}; name fewer.",
            param="logit_bias",
        )


def continuation_body(prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
    """Asks for a continuation, as a stream.

    Every parameter is named, also where it is neutral: what is missing is taken from the
    checkpoint's generation_config.json there.
    """
    body = {
        **_neutral(params.max_tokens),
        "prompt": prompt_ids,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "repetition_penalty": params.repetition_penalty,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "stop_token_ids": sorted(params.stop_token_ids),
    }
    if params.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in params.logit_bias}
    if params.seed is not None:
        # Of 64 bits with a sign; a further choice has the next one.
        body["seed"] = (params.seed + 2**63) % 2**64 - 2**63
    if params.num_logprobs is not None:
        body |= {"logprobs": params.num_logprobs, "return_tokens_as_token_ids": True}
    if params.logprob_token_ids:
        body["logprob_token_ids"] = list(params.logprob_token_ids)
    if params.grammar is not None:
        body["structured_outputs"] = {"grammar": _in_lark(params.grammar.text)}
    return body


def scoring_body(prompts: list[list[int]], token_ids: list[int]) -> dict[str, Any]:
    """Asks for the log-probabilities of the tokens behind each of the prompts."""
    return {
        **_neutral(max_tokens=1),
        "prompt": prompts,
        "logprobs": 0,
        "logprob_token_ids": token_ids,
        "return_tokens_as_token_ids": True,
    }


def prefill_body(prompt_ids: list[int]) -> dict[str, Any]:
    """Asks for the prompt to be computed, and so kept; a token is the least that can be asked."""
    return {**_neutral(max_tokens=1), "prompt": prompt_ids}


def tokens_of(choice: Mapping[str, Any], params: SamplingParams) -> list[TokenEvent]:
    """The tokens of one choice, or of what a stream tells of it; params: what was asked for.

    Raises:
        UpstreamFormatError: it does not tell them.
    """
    try:
        logprobs = choice["logprobs"]
        if logprobs is None:
            return [TokenEvent(token_id) for token_id in choice["token_ids"]]
        return [
            TokenEvent(token_id, logprob, _wanted(top, params))
            for token_id, logprob, top in zip(
                choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                strict=True,
            )
        ]  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:
        raise UpstreamFormatError("it tells no ids of the tokens it writes") from error


def reason_of(choice: Mapping[str, Any]) -> FinishReason | None:
    """Why the choice ended; None while it goes on.

    Raises:
        UpstreamFormatError: for none of the reasons that there are.
    """
    reason = choice.get("finish_reason")
    try:
        return None if reason is None else FinishReason(reason)
    except ValueError as error:
        raise UpstreamFormatError(f"it ends a text for the reason {reason!r}") from error


def logprobs_of(answer: Mapping[str, Any], body: Mapping[str, Any]) -> list[dict[int, float]]:
    """The log-probabilities (nats) that a `scoring_body` asked for, by token, for each prompt.

    Raises:
        UpstreamFormatError: there are none.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        told = [_by_id(choice["logprobs"]["top_logprobs"][0]) for choice in choices]
        # One for each prompt.
        pairs = zip(body["prompt"], told, strict=True)
        return [{i: by_id[i] for i in body["logprob_token_ids"]} for _, by_id in pairs]
    except (LookupError, TypeError, ValueError) as error:
        raise UpstreamFormatError("it tells no log-probabilities of tokens by their ids") from error


def num_cached_in(answer: Mapping[str, Any]) -> int | None:
    """Prompt tokens that needed no computing; None where nothing is said of them.

    vLLM tells them with --enable-prompt-tokens-details only.
    """
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    num_cached = details.get("cached_tokens")
    return num_cached if isinstance(num_cached, int) else None


def _neutral(max_tokens: int) -> dict[str, Any]:
    """The likeliest tokens, whatever the checkpoint's own defaults are, as many as that."""
    return {"max_tokens": max_tokens, "temperature": 0.0, "repetition_penalty": 1.0,
            "ignore_eos": True}  # fmt: skip


def _by_id(top: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix(_TOKEN)): logprob for name, logprob in top.items()}


def _wanted(top: Mapping[str, float], params: SamplingParams) -> tuple[tuple[int, float], ...]:
    """What was asked for of the tokens told, among which is the one that was sampled."""
    by_id = _by_id(top)
    if params.logprob_token_ids:
        return tuple((token_id, by_id[token_id]) for token_id in params.logprob_token_ids)
    # In a step that also scores labels vLLM 0.32 fills up with impossible tokens.
    possible = ((i, logprob) for i, logprob in by_id.items() if logprob > _IMPOSSIBLE)
    return tuple(sorted(possible, key=lambda each: -each[1])[: params.num_logprobs])


def _in_lark(text: str) -> str:
    """A grammar for `structured_outputs`, in the language of llguidance alone.

    vLLM tries xgrammar first, unless it is told otherwise at its start, and xgrammar's Lark knows
    no `%llguidance`.
    """
    if not text.startswith("{"):
        return f"%llguidance {{}}\n{text}"
    [grammar] = json.loads(text)["grammars"]
    return f"%llguidance {{}}\nstart: %json {json.dumps(grammar['json_schema'])}"
