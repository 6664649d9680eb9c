"""Sentiment first, then the answer: the product in one function."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from server.core.classifier import Classification, Classifier
from server.core.detokenizer import Detokenizer
from server.core.engine import EngineClosedError, TokenStream
from server.core.sequence import SamplingParams
from server.core.tasks import Task
from server.core.tokenizer import ChatTemplateError, ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]


class Generator(Protocol):
    """What the reply needs of the engine."""

    def submit(self, prompt_ids: list[int], params: SamplingParams) -> TokenStream:
        """Starts to continue the prompt."""

    def prefill(self, prompt_ids: list[int]) -> Coroutine[Any, Any, None]:
        """Computes a prompt that another will begin with."""


@dataclass
class Reply:
    """An answer under way. `pieces` may be read once; the counts grow as it is read."""

    sentiment: Classification | None
    num_prompt_tokens: int
    tokens: TokenStream
    detokenizer: Detokenizer
    num_completion_tokens: int = 0
    finish_reason: str | None = None

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it becomes certain. However this ends, the sequence ends with it."""
        try:
            async for token_id in self.tokens:
                self.num_completion_tokens += 1
                if piece := self.detokenizer.push(token_id):
                    yield piece
                if self.detokenizer.is_stopped:
                    self.finish_reason = "stop"
                    return
            assert self.tokens.finish_reason is not None
            self.finish_reason = self.tokens.finish_reason.value
            if piece := self.detokenizer.flush():
                yield piece
        finally:
            self.abort()

    def abort(self) -> None:
        """Ends the sequence if it still runs. Any number of times."""
        self.tokens.abort()


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
        with_sentiment: bool,
    ) -> Reply:  # fmt: skip
        """Judges the last user message, then starts the answer.

        Without sentiment the conversation goes to the model as it is: no pass, no cue and
        no persona. A pass that fails is logged, and the answer comes without a cue.

        Raises:
            ContextLengthError: the conversation leaves no room for an answer.
            InvalidRequestError: the chat template refuses the conversation.
        """
        sentiment = None
        conversation = list(messages)
        if with_sentiment:
            if all(message["role"] != "system" for message in conversation):
                conversation.insert(0, {"role": "system", "content": self._persona})
            # Before the pass: a conversation that cannot be answered needs no sentiment.
            plain_ids = self._encode(conversation)
            sentiment = await self._judge(messages, plain_ids)
        cue = self._task.render_cue(sentiment.label) if sentiment else None
        if cue is not None:
            # Behind the conversation, whose own prefix then stays the same from turn to turn;
            # but an answer the client has begun stays last, to be continued.
            end = len(conversation) - (conversation[-1]["role"] == "assistant")
            conversation.insert(end, {"role": "system", "content": cue})
        prompt_ids = self._encode(conversation)
        room = self._max_context - len(prompt_ids)
        params = replace(params, max_tokens=min(params.max_tokens, room))
        return Reply(
            sentiment=sentiment,
            num_prompt_tokens=len(prompt_ids),
            tokens=self._generator.submit(prompt_ids, params),
            detokenizer=Detokenizer(self._tokenizer.token_bytes, stop),
        )

    async def _judge(
        self, messages: Sequence[Message], plain_ids: list[int]
    ) -> Classification | None:
        """The sentiment of the last user message.

        While it is computed, so is the conversation, in the same steps: what is left to do
        afterwards are the cue and the answer's header.
        plain_ids: the conversation without a cue.
        """
        texts = [m["content"] for m in messages if m["role"] == "user"]
        if not texts or not texts[-1].strip():
            return None
        text = texts[-1]
        try:
            if self._classifier.is_known(self._task, text):
                return await self._classifier.classify(self._task, text)
            return await self._judge_while_prefilling(text, plain_ids)
        except EngineClosedError:
            raise  # there will be no answer either
        except Exception:
            logger.exception("the sentiment pass failed; answering without it")
            return None

    async def _judge_while_prefilling(self, text: str, plain_ids: list[int]) -> Classification:
        prefill = asyncio.create_task(self._generator.prefill(plain_ids))
        try:
            sentiment = await self._classifier.classify(self._task, text)
            # If it fails, the engine has logged it, and the reply computes everything itself.
            await asyncio.wait([prefill])
            return sentiment
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
