"""Merges a request's sampling parameters with the checkpoint's own."""

from server.core.engine.sequence import Grammar, SamplingParams
from server.protocol.sampling import SamplingRequest
from server.services import Services


def sampling_params(
    body: SamplingRequest, services: Services, *,
    max_tokens: int | None = None, num_logprobs: int | None = None, grammar: Grammar | None = None,
) -> SamplingParams:  # fmt: skip
    """The request's parameters; where missing, the checkpoint's.

    max_tokens: None for as many as fit the context.

    Raises:
        InvalidRequestError: a token id in `logit_bias` is not in the vocabulary.
    """
    biases = [(int(token_id), bias) for token_id, bias in body.logit_bias.items()]
    services.tokenizer.check_ids((token_id for token_id, _ in biases), lambda _: "logit_bias")
    defaults = services.defaults
    given = body.model_dump(
        include={"temperature", "top_p", "top_k", "repetition_penalty"}, exclude_none=True
    )
    return SamplingParams(
        max_tokens=max_tokens or services.max_context,
        temperature=given.get("temperature", defaults.temperature),
        top_p=given.get("top_p", defaults.top_p),
        top_k=max(0, given.get("top_k", defaults.top_k)),
        min_p=body.min_p,
        repetition_penalty=given.get("repetition_penalty", defaults.repetition_penalty),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple(biases),
        seed=body.seed,
        num_logprobs=num_logprobs,
        grammar=grammar,
        stop_token_ids=defaults.eos_token_ids,
    )
