"""Translates the engine's requests to bodies of /v1/completions, and its answers back.

Knows JSON and token ids, not connections. The fields are vLLM's:
https://docs.vllm.ai/en/latest/serving/openai_compatible_server/#completions-api
"""

import json
from collections.abc import Mapping
from typing import Any

from server.core.engine.sequence import FinishReason, SamplingParams, TokenEvent
from server.errors import InvalidRequestError

# The limit of vLLM's newer model runner for a sequence, which crashes above it.
MAX_BIASES = 1024
_TOKEN = "token_id:"
# vLLM's log-probability for a probability of zero.
_IMPOSSIBLE = -9999.0


class UpstreamFormatError(ValueError):
    """The answer does not have vLLM's format."""


def check_params(params: SamplingParams) -> None:
    """Checks that vLLM supports the parameters.

    Raises:
        InvalidRequestError: it does not support one; the message names it.
    """
    if len(params.logit_bias) > MAX_BIASES:
        raise InvalidRequestError(
            f"'logit_bias': the engine behind this server takes {MAX_BIASES} tokens at most, not "
            f"{len(params.logit_bias)}; give fewer.",
            param="logit_bias",
        )


def continuation_body(prompt_ids: list[int], params: SamplingParams) -> dict[str, Any]:
    """The body of a request for a continuation, as a stream.

    Sends every parameter, even at its neutral value: for a missing one, vLLM reads the checkpoint's
    generation_config.json.
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
        # vLLM takes a signed 64-bit number. The seed of each further choice is one higher.
        body["seed"] = (params.seed + 2**63) % 2**64 - 2**63
    if params.num_logprobs is not None:
        body |= {"logprobs": params.num_logprobs, "return_tokens_as_token_ids": True}
    if params.logprob_token_ids:
        body["logprob_token_ids"] = list(params.logprob_token_ids)
    if params.grammar is not None:
        body["structured_outputs"] = {"grammar": _in_lark(params.grammar.text)}
    return body


def scoring_body(prompts: list[list[int]], token_ids: list[int]) -> dict[str, Any]:
    """The body of a request for the log-probabilities of the tokens after each of the prompts."""
    return {
        **_neutral(max_tokens=1),
        "prompt": prompts,
        "logprobs": 0,
        "logprob_token_ids": token_ids,
        "return_tokens_as_token_ids": True,
    }


def prefill_body(prompt_ids: list[int]) -> dict[str, Any]:
    """The body of a request that caches the prompt; one generated token is the minimum."""
    return {**_neutral(max_tokens=1), "prompt": prompt_ids}


def tokens_of(choice: Mapping[str, Any], params: SamplingParams) -> list[TokenEvent]:
    """The tokens of a choice, whole or of one event. params: those of the request.

    Raises:
        UpstreamFormatError: there are none, or they have another format.
    """
    try:
        logprobs = choice["logprobs"]
        if logprobs is None:
            return [TokenEvent(token_id) for token_id in choice["token_ids"]]
        return [
            TokenEvent(token_id, logprob, _top_logprobs(top, params))
            for token_id, logprob, top in zip(
                choice["token_ids"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                strict=True,
            )
        ]  # fmt: skip
    except (LookupError, TypeError, ValueError) as error:
        raise UpstreamFormatError("a choice has no token ids") from error


def reason_of(choice: Mapping[str, Any]) -> FinishReason | None:
    """The choice's finish reason; None if it has not ended.

    Raises:
        UpstreamFormatError: the reason is unknown.
    """
    reason = choice.get("finish_reason")
    try:
        return None if reason is None else FinishReason(reason)
    except ValueError as error:
        raise UpstreamFormatError(f"a choice has the unknown finish reason {reason!r}") from error


def logprobs_of(answer: Mapping[str, Any], body: Mapping[str, Any]) -> list[dict[int, float]]:
    """The log-probabilities (nats) of `body`, a `scoring_body`: for each prompt, by token id.

    Raises:
        UpstreamFormatError: they are missing.
    """
    try:
        choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        all_logprobs = [_by_id(choice["logprobs"]["top_logprobs"][0]) for choice in choices]
        # zip checks that there is one choice for each prompt.
        pairs = zip(body["prompt"], all_logprobs, strict=True)
        return [{i: by_id[i] for i in body["logprob_token_ids"]} for _, by_id in pairs]
    except (LookupError, TypeError, ValueError) as error:
        raise UpstreamFormatError("a choice lacks log-probabilities by token id") from error


def num_cached_in(answer: Mapping[str, Any]) -> int | None:
    """The number of cached prompt tokens; None if the answer lacks it.

    vLLM reports it only with --enable-prompt-tokens-details.
    """
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    num_cached = details.get("cached_tokens")
    return num_cached if isinstance(num_cached, int) else None


def _neutral(max_tokens: int) -> dict[str, Any]:
    """Greedy decoding that ignores EOS and the checkpoint's own sampling defaults."""
    return {"max_tokens": max_tokens, "temperature": 0.0, "repetition_penalty": 1.0,
            "ignore_eos": True}  # fmt: skip


def _by_id(top: Mapping[str, float]) -> dict[int, float]:
    return {int(name.removeprefix(_TOKEN)): logprob for name, logprob in top.items()}


def _top_logprobs(
    top: Mapping[str, float], params: SamplingParams
) -> tuple[tuple[int, float], ...]:
    """The requested entries of `top`, which also contains the sampled token."""
    by_id = _by_id(top)
    if params.logprob_token_ids:
        return tuple((token_id, by_id[token_id]) for token_id in params.logprob_token_ids)
    # In a step that also scores labels, vLLM 0.32 fills up `top` with impossible tokens.
    possible = ((i, logprob) for i, logprob in by_id.items() if logprob > _IMPOSSIBLE)
    return tuple(sorted(possible, key=lambda each: -each[1])[: params.num_logprobs])


def _in_lark(text: str) -> str:
    """The grammar for `structured_outputs`, in Lark that only llguidance accepts.

    By default vLLM tries xgrammar first, whose Lark has no `%llguidance`.
    """
    if not text.startswith("{"):
        return f"%llguidance {{}}\n{text}"
    [grammar] = json.loads(text)["grammars"]
    return f"%llguidance {{}}\nstart: %json {json.dumps(grammar['json_schema'])}"
