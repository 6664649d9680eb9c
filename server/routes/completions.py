"""POST /v1/completions, whole or streamed: continues raw text, without sentiment."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.core.engine.sequence import Grammar, SamplingParams, TokenEvent
from server.core.text.choices import Choices
from server.core.text.grammar import GrammarCompiler, GrammarError
from server.errors import InvalidRequestError
from server.protocol.base import new_id, now, usage
from server.protocol.completions import CompletionRequest, LogprobsWriter, StructuredOutputs
from server.routes.common import find_model, read, unless_disconnected, work_of
from server.routes.sampling import sampling_params
from server.routes.streaming import stream
from server.services import Services


async def text_completions(request: Request) -> Response:
    """Continues each prompt as it is."""
    services, body = await read(request, CompletionRequest)
    adapter = find_model(services, body.model).adapter
    params = await asyncio.to_thread(_params, body, services)

    async def begin() -> _Completion:
        choices = await services.completer.complete(
            body.prompts,
            params,
            body.stop,
            num_choices=body.n,
            work=work_of(request),
            adapter=adapter,
        )
        return _Completion(body, services, choices)

    async def complete() -> Response:
        return await (await begin()).whole()

    if not body.stream:
        return await unless_disconnected(request, complete())
    completion = await unless_disconnected(request, begin())
    return stream(request, completion.chunks(), completion.choices.abort, headers={})


class _Completion:
    """Turns choices into a response or a stream of chunks."""

    def __init__(self, body: CompletionRequest, services: Services, choices: Choices) -> None:
        self.choices = choices
        self._includes_usage, self._returns_ids = body.includes_usage, body.return_token_ids
        self._base: dict[str, Any] = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": now(),
            "model": body.model,
        }
        self._echoes = [
            _text_of(prompt, services) if body.echo else ""
            for prompt in body.prompts.values()
            for _ in range(body.n)
        ]
        self._logprobs = [
            LogprobsWriter(
                services.tokenizer.token_bytes,
                services.tokenizer.decode,
                is_by_id=body.return_tokens_as_token_ids,
            )
            for _ in (choices.choices if body.logprobs is not None else ())
        ]

    async def whole(self) -> Response:
        """The response, when all choices are complete."""
        choices = [
            self._choice(
                index,
                self._echoes[index] + "".join(piece.text for piece in pieces),
                [token for piece in pieces for token in piece.tokens],
                self.choices.choices[index].finish_reason,
            )
            for index, pieces in enumerate(await self.choices.read())
        ]
        return JSONResponse({**self._base, "choices": choices, "usage": self._usage()})

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Chunks of the prompts if `echo`, text, finish reasons, and usage on request."""
        base = self._base | ({"usage": None} if self._includes_usage else {})
        for index, echo in enumerate(self._echoes):
            if echo:
                yield {**base, "choices": [self._choice(index, echo)]}
        async for index, piece in self.choices.pieces():
            if piece is None:
                end = self._choice(
                    index, "", finish_reason=self.choices.choices[index].finish_reason
                )
                yield {**base, "choices": [end]}
            else:
                yield {**base, "choices": [self._choice(index, piece.text, piece.tokens)]}
        if self._includes_usage:
            yield {**base, "choices": [], "usage": self._usage()}

    def _choice(
        self, index: int, text: str, tokens: Sequence[TokenEvent] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        logprobs = None
        if self._logprobs and tokens is not None:
            logprobs = self._logprobs[index].write(tokens)
        ids = {"token_ids": [token.token_id for token in tokens or ()]}
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
            **(ids if self._returns_ids else {}),
        }

    def _usage(self) -> dict[str, Any]:
        choices = self.choices
        return usage(
            choices.num_prompt_tokens, choices.num_completion_tokens, choices.num_cached_tokens
        )


def _params(body: CompletionRequest, services: Services) -> SamplingParams:
    """The sampling parameters. May take a second, to compile a grammar.

    Raises:
        InvalidRequestError: a token id is not in the vocabulary, or the grammar is invalid.
    """
    check_ids = services.tokenizer.check_ids
    check_ids(body.logprob_token_ids, lambda i: f"logprob_token_ids[{i}]")
    check_ids(body.stop_token_ids, lambda i: f"stop_token_ids[{i}]")
    num_logprobs = body.logprobs
    if body.return_token_ids and num_logprobs is None:
        num_logprobs = 0  # pieces contain their tokens only if log-probabilities are requested
    params = sampling_params(
        body, services, max_tokens=body.max_tokens, num_logprobs=num_logprobs,
        grammar=_grammar(body.structured_outputs, services.grammars),
    )  # fmt: skip
    eos_token_ids = frozenset[int]() if body.ignore_eos else params.stop_token_ids
    return replace(
        params,
        stop_token_ids=eos_token_ids | {*body.stop_token_ids},
        logprob_token_ids=tuple(body.logprob_token_ids),
    )


def _grammar(outputs: StructuredOutputs | None, grammars: GrammarCompiler) -> Grammar | None:
    if outputs is None:
        return None
    try:
        if outputs.grammar is not None:
            return grammars.lark(outputs.grammar)
        assert outputs.json_schema is not None
        return grammars.json_schema(outputs.json_schema)
    except GrammarError as error:
        param = "structured_outputs"
        raise InvalidRequestError(f"'{param}': {error}.", param=param) from error


def _text_of(prompt: str | Sequence[int], services: Services) -> str:
    return prompt if isinstance(prompt, str) else services.tokenizer.decode(prompt)
