"""Sentiment first, then the answer: the product in one function."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from server.core.classifier import Classification, Classifier
from server.core.detokenizer import Detokenizer
from server.core.engine import EngineClosedError, TokenStream
from server.core.sequence import SamplingParams, TokenEvent
from server.core.tasks import Task
from server.core.tokenizer import ChatTemplateError, ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


class Generator(Protocol):
    """What the reply needs of the engine."""

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Starts to continue the prompt."""

    def prefill(self, prompt_ids: list[int]) -> Coroutine[Any, Any, int]:
        """Computes a prompt that others will begin with; returns how much of it was known."""


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

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it becomes certain. However this ends, the sequence ends with it."""
        unsaid: list[TokenEvent] = []
        try:
            async for token in self.tokens:
                self.num_completion_tokens += 1
                if token.logprob is not None:
                    unsaid.append(token)
                text = self.detokenizer.push(token.token_id)
                if self.detokenizer.is_stopped:
                    self.finish_reason = "stop"
                    if text:
                        yield Piece(text, self._tokens_within(text, unsaid))
                    return
                if text:
                    yield Piece(text, tuple(unsaid))
                    unsaid = []
            assert self.tokens.finish_reason is not None
            self.finish_reason = self.tokens.finish_reason.value
            text = self.detokenizer.flush()
            if text or unsaid:
                yield Piece(text, tuple(unsaid))
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends the sequence if it still runs. Any number of times."""
        self.tokens.abort()

    def _tokens_within(self, text: str, tokens: Sequence[TokenEvent]) -> tuple[TokenEvent, ...]:
        """Those that begin before the end of `text`: a stop string's own are not told."""
        num_bytes, within = len(text.encode()), []
        for token in tokens:
            if num_bytes <= 0:
                break
            within.append(token)
            num_bytes -= len(self.detokenizer.token_bytes[token.token_id])
        return tuple(within)


@dataclass(frozen=True)
class Reply:
    """The mood, and one answer or several to the same prompt."""

    sentiment: Classification | None
    num_prompt_tokens: int
    choices: tuple[Choice, ...]
    # Prompt tokens that an earlier request had computed, where this one computed its prompt
    # before its answers began; else the only answer knows.
    num_prefilled_cached: int | None = None

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that needed no computing; known once a first token has come."""
        if self.num_prefilled_cached is not None:
            return self.num_prefilled_cached
        return self.choices[0].tokens.num_cached

    @property
    def num_completion_tokens(self) -> int:
        """Of all answers together, so far."""
        return sum(choice.num_completion_tokens for choice in self.choices)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece | None]]:
        """Pieces of all choices as they come, each with its index; None: that one is done."""
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
            self.abort()
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def abort(self) -> None:
        """Ends all answers that still run. Any number of times."""
        for choice in self.choices:
            choice.abort()


class Replier:
    """Answers conversations, knowing the mood of their last user message."""

    def __init__(
        self, generator: Generator, classifier: Classifier, tokenizer: ChatTokenizer, *,
        task: Task, persona: str, max_context: int,
    ) -> None:  # fmt: skip
        self._generator, self._classifier, self._tokenizer = generator, classifier, tokenizer
        self._task, self._persona, self._max_context = task, persona, max_context

    async def reply(
        self, messages: Sequence[Message], params: SamplingParams, stop: Sequence[str], *,
        with_sentiment: bool, num_choices: int = 1,
    ) -> Reply:  # fmt: skip
        """Judges the last user message, then starts the answer, or several.

        Without sentiment the conversation goes to the model as it is: no pass, no cue and
        no persona. A pass that fails is logged, and the answer comes without a cue. The seed
        of each further answer is one higher.

        Raises:
            ContextLengthError: the conversation leaves no room for an answer.
            InvalidRequestError: the chat template refuses the conversation.
        """
        sentiment, num_cached = None, None
        conversation = list(messages)
        if with_sentiment:
            if all(message["role"] != "system" for message in conversation):
                conversation.insert(0, {"role": "system", "content": self._persona})
            # Before the pass: a conversation that cannot be answered needs no sentiment.
            plain_ids = self._encode(conversation)
            sentiment, num_cached = await self._judge(messages, plain_ids)
        cue = self._task.render_cue(sentiment.label) if sentiment else None
        if cue is not None:
            # Behind the conversation, whose own prefix then stays the same from turn to turn;
            # but an answer the client has begun stays last, to be continued.
            end = len(conversation) - (conversation[-1]["role"] == "assistant")
            conversation.insert(end, {"role": "system", "content": cue})
        prompt_ids = self._encode(conversation)
        room = self._max_context - len(prompt_ids)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        if num_choices > 1:
            # The answers copy what is computed here once.
            known = await self._generator.prefill(prompt_ids)
            num_cached = known if num_cached is None else num_cached
        return Reply(
            sentiment=sentiment,
            num_prompt_tokens=len(prompt_ids),
            choices=tuple(
                Choice(
                    self._generator.submit(prompt_ids, _with_seed(params, i)),
                    Detokenizer(self._tokenizer.token_bytes, stop),
                )
                for i in range(num_choices)
            ),
            num_prefilled_cached=num_cached,
        )

    async def _judge(
        self, messages: Sequence[Message], plain_ids: list[int]
    ) -> tuple[Classification | None, int | None]:
        """The sentiment of the last user message.

        While it is computed, so is the conversation, in the same steps: what is left to do
        afterwards are the cue and the answer's header. The second result then is how many
        tokens of the conversation were known before.
        plain_ids: the conversation without a cue.
        """
        texts = [m["content"] for m in messages if m["role"] == "user"]
        if not texts or not texts[-1].strip():
            return None, None
        text = texts[-1]
        try:
            if self._classifier.is_known(self._task, text):
                return await self._classifier.classify(self._task, text), None
            return await self._judge_while_prefilling(text, plain_ids)
        except EngineClosedError:
            raise  # there will be no answer either
        except Exception:
            logger.exception("the sentiment pass failed; answering without it")
            return None, None

    async def _judge_while_prefilling(
        self, text: str, plain_ids: list[int]
    ) -> tuple[Classification, int | None]:
        prefill = asyncio.create_task(self._generator.prefill(plain_ids))
        try:
            sentiment = await self._classifier.classify(self._task, text)
            # If it fails, the engine has logged it, and the reply computes everything itself.
            await asyncio.wait([prefill])
            return sentiment, None if prefill.exception() else prefill.result()
        finally:
            prefill.cancel()
            await asyncio.gather(prefill, return_exceptions=True)

    def _encode(self, conversation: Sequence[Message]) -> list[int]:
        try:
            prompt_ids = self._tokenizer.encode_chat(conversation)
        except ChatTemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from error
        if len(prompt_ids) >= self._max_context:
            raise ContextLengthError(len(prompt_ids), self._max_context, "messages")
        return prompt_ids


def _next_of(pieces: AsyncIterator[Piece]) -> asyncio.Task[Piece | None]:
    async def read() -> Piece | None:
        return await anext(pieces, None)

    return asyncio.create_task(read())


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    if params.seed is None or index == 0:
        return params
    return replace(params, seed=params.seed + index)
