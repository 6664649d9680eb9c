"""A request's sampling parameters over the checkpoint's own."""

from server.core.engine.sequence import Grammar, SamplingParams
from server.core.text.grammar import GrammarCompiler, GrammarError, OutputFormat
from server.errors import InvalidRequestError
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


def compile_grammar(
    grammars: GrammarCompiler, output: OutputFormat, *, schema_param: str
) -> Grammar | None:
    """What keeps the answer in its format. May take a second.

    schema_param: where the request has the schema of the answer.

    Raises:
        InvalidRequestError: a schema cannot be guaranteed; says why.
    """
    try:
        return grammars.compile(output)
    except GrammarError as error:
        param = schema_param if error.tool is None else "tools"
        raise InvalidRequestError(f"'{param}': {error}.", param=param) from error
