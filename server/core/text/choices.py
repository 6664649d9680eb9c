"""Continuations of prompts under way: from the engine's tokens to pieces of text.

Knows nothing of what the prompts say.
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
    """Text that became certain; if log-probabilities are asked for, the tokens it came from.

    The text may be empty at the end of a choice, where tokens without text came last.
    """

    text: str
    tokens: tuple[TokenEvent, ...]


@dataclass
class Choice:
    """One answer under way. `pieces` may be read once; the count grows as it is read."""

    tokens: TokenStream
    detokenizer: Detokenizer
    num_completion_tokens: int = 0
    finish_reason: str | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer as it becomes certain. However this ends, the sequence ends with it."""
        unsaid: list[TokenEvent] = []
        try:
            async for token in self.tokens:
                self.num_completion_tokens += 1
                if token.logprob is not None:
                    unsaid.append(token)
                text = self.detokenizer.push(token.token_id)
                if self.detokenizer.is_stopped:
                    break
                if text:
                    yield Piece(text, tuple(unsaid))
                    unsaid = []
            else:
                assert self.tokens.finish_reason is not None
                self.finish_reason = self.tokens.finish_reason.value
                text = self.detokenizer.flush()
            if self.detokenizer.is_stopped:
                self.finish_reason = "stop"
                unsaid = self._tokens_within(text, unsaid)
            if text or unsaid:
                yield Piece(text, tuple(unsaid))
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends the sequence if it still runs. Any number of times."""
        self.tokens.abort()

    def _tokens_within(self, text: str, tokens: Sequence[TokenEvent]) -> list[TokenEvent]:
        """Those that begin before the end of `text`: a stop string's own are not told."""
        num_bytes, within = len(text.encode()), []
        for token in tokens:
            if num_bytes <= 0:
                break
            within.append(token)
            num_bytes -= len(self.detokenizer.token_bytes[token.token_id])
        return within


@dataclass(frozen=True, kw_only=True)
class Choices:
    """All that one request asked for: choices of one prompt, or of several."""

    num_prompt_tokens: int
    choices: tuple[Choice, ...]
    # Prompt tokens that an earlier request had computed, where this one computed its prompts
    # before its choices began; else each choice, alone with its prompt, knows.
    num_prefilled_cached: int | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that needed no computing; known once every choice has a token."""
        if self.num_prefilled_cached is not None:
            return self.num_prefilled_cached
        return sum(choice.tokens.num_cached or 0 for choice in self.choices)

    @property
    def num_kept_tokens(self) -> int:
        """Prompt tokens that were computed, and all are kept for later prompts.

        0 where the engine does not report how many needed no computing.
        """
        if any(choice.tokens.num_cached is None for choice in self.choices):
            return 0
        return self.num_prompt_tokens - self.num_cached_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Of all choices together, so far."""
        return sum(choice.num_completion_tokens for choice in self.choices)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece | None], None]:
        """Pieces of all choices as they come, each with its index; None: that one is done."""
        try:
            if len(self.choices) == 1:
                # Without a task for each piece.
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
        """All pieces of each choice, once all have ended."""
        pieces: list[list[Piece]] = [[] for _ in self.choices]
        async for index, piece in self.pieces():
            if piece is not None:
                pieces[index].append(piece)
        return pieces

    def abort(self) -> None:
        """Ends all choices that still run. Any number of times."""
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
    """Starts to continue the prompt in several ways; the seed of each further one is one higher.

    max_context: tokens of the prompt and a choice together, which end it.
    work: of the request; None: each choice is one of its own.
    stop_until: what no stop string cuts, and what none counts behind.
    adapter: what the choices are computed with.

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
