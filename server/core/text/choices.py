"""Choices in progress: from the engine's tokens to pieces of text.

Knows nothing of the prompts' contents.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace

import regex

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Engine
from server.core.engine.sequence import SamplingParams, TokenEvent
from server.core.engine.stream import TokenStream
from server.core.engine.work import Work
from server.core.text.detokenizer import Detokenizer


@dataclass(frozen=True)
class Piece:
    """Text that is final and, if log-probabilities are requested, its tokens.

    The text is empty at the end of a choice whose last tokens have no text.
    """

    text: str
    tokens: tuple[TokenEvent, ...]


@dataclass
class Choice:
    """One answer in progress. `pieces` may be iterated once, and updates the fields."""

    tokens: TokenStream
    detokenizer: Detokenizer
    num_completion_tokens: int = 0
    finish_reason: str | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer's pieces. However the iteration ends, the sequence ends with it."""
        pending_tokens: list[TokenEvent] = []
        try:
            async for token in self.tokens:
                self.num_completion_tokens += 1
                if token.logprob is not None:
                    pending_tokens.append(token)
                text = self.detokenizer.push(token.token_id)
                if self.detokenizer.is_stopped:
                    break
                if text:
                    yield Piece(text, tuple(pending_tokens))
                    pending_tokens = []
            else:
                assert self.tokens.finish_reason is not None
                self.finish_reason = self.tokens.finish_reason.value
                text = self.detokenizer.flush()
            if self.detokenizer.is_stopped:
                self.finish_reason = "stop"
                pending_tokens = self._tokens_within(text, pending_tokens)
            if text or pending_tokens:
                yield Piece(text, tuple(pending_tokens))
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends the sequence if it still runs. Idempotent."""
        self.tokens.abort()

    def _tokens_within(self, text: str, tokens: Sequence[TokenEvent]) -> list[TokenEvent]:
        """The tokens that begin before the end of `text`, which excludes those of a stop string."""
        num_bytes, within = len(text.encode()), []
        for token in tokens:
            if num_bytes <= 0:
                break
            within.append(token)
            num_bytes -= len(self.detokenizer.token_bytes[token.token_id])
        return within


@dataclass(frozen=True, kw_only=True)
class Choices:
    """All choices of a request, which has one prompt or several."""

    num_prompt_tokens: int
    choices: tuple[Choice, ...]
    # Cached prompt tokens, if the prompts were computed before the choices began; None: each
    # choice, which then is the only one of its prompt, counts them.
    num_prefilled_cached: int | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that needed no computing; final once every choice has a token."""
        if self.num_prefilled_cached is not None:
            return self.num_prefilled_cached
        return sum(choice.tokens.num_cached or 0 for choice in self.choices)

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens that were computed; all of them are kept for later prompts.

        0 where the engine does not report how many needed no computing.
        """
        if any(choice.tokens.num_cached is None for choice in self.choices):
            return 0
        return self.num_prompt_tokens - self.num_cached_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Completion tokens of all choices so far."""
        return sum(choice.num_completion_tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Pieces of all choices as they come, with the choice's index; None ends a choice."""
        try:
            if len(self.choices) == 1:
                # Faster, without a task for each piece.
                async for piece in self.choices[0].pieces():
                    yield 0, piece
                yield 0, None
                return
            async for indexed in self._interleaved():
                yield indexed
        finally:
            self.abort()

    async def _interleaved(self) -> AsyncIterator[tuple[int, Piece | None]]:
        iterators = [choice.pieces() for choice in self.choices]
        waiting = {_next_of(it): (i, it) for i, it in enumerate(iterators)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index, iterator = waiting.pop(task)
                    piece = task.result()
                    if piece is not None:
                        waiting[_next_of(iterator)] = index, iterator
                    yield index, piece
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def read(self) -> list[list[Piece]]:
        """All pieces of each choice, once all choices have ended."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        async for index, piece in self.pieces():
            if piece is not None:
                pieces[index].append(piece)
        return pieces

    def abort(self) -> None:
        """Ends all choices that still run. Idempotent."""
        for choice in self.choices:
            choice.abort()


def begin_choices(
    engine: Engine,
    prompt_ids: list[int],
    params: SamplingParams,
    num_choices: int,
    token_bytes: Sequence[bytes],
    stop: Sequence[str],
    *,
    max_context: int,
    work: Work | None = None,
    stop_until: regex.Pattern[str] | None = None,
    adapter: Adapter = BASE,
) -> tuple[Choice, ...]:
    """Starts several choices of the prompt. The seed of each further one is one higher.

    max_context: limit on the tokens of the prompt and a choice together.
    work: the request's; None: a new one for each choice.
    stop_until: pattern; stop strings are ignored from its match on.
    adapter: that the choices are computed with.

    Raises:
        EngineClosedError: the engine is closing.
    """
    room = max_context - adapter.num_virtual_tokens - len(prompt_ids)
    params = replace(params, max_tokens=min(params.max_tokens, room))
    return tuple(
        Choice(
            engine.submit(prompt_ids, _with_seed(params, i), work=work, adapter=adapter),
            Detokenizer(token_bytes, stop, stop_until=stop_until),
        )
        for i in range(num_choices)
    )


def _next_of(pieces: AsyncIterator[Piece]) -> asyncio.Task[Piece | None]:
    async def read() -> Piece | None:
        return await anext(pieces, None)

    return asyncio.create_task(read())


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=params.seed + index)
