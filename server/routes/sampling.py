"""A request's sampling parameters over the checkpoint's own."""

from server.core.engine.sequence import Grammar, SamplingParams
from server.protocol.sampling import SamplingRequest
from server.services import Services


def sampling_params(
    body: SamplingRequest, services: Services, *,
    max_tokens: int | None = None, num_logprobs: int | None = None, grammar: Grammar | None = None,
) -> SamplingParams:  # fmt: skip
    """max_tokens: in place of the body's; None for as many as the context holds.

    Raises:
        InvalidRequestError: a token id is beyond the model's vocabulary.
    """
    biases = [(int(token_id), bias) for token_id, bias in body.logit_bias.items()]
    services.tokenizer.check_ids((token_id for token_id, _ in biases), lambda _: "logit_bias")
    own = services.defaults
    asked = body.model_dump(
        include={"temperature", "top_p", "top_k", "repetition_penalty"}, exclude_none=True
    )
    return SamplingParams(
        max_tokens=max_tokens or services.max_context,
        temperature=asked.get("temperature", own.temperature),
        top_p=asked.get("top_p", own.top_p),
        top_k=max(0, asked.get("top_k", own.top_k)),
        min_p=body.min_p,
        repetition_penalty=asked.get("repetition_penalty", own.repetition_penalty),
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple(biases),
        seed=body.seed,
        num_logprobs=num_logprobs,
        grammar=grammar,
        stop_token_ids=own.eos_token_ids,
    )
