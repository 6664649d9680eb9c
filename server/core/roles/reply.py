"""Sentiment first, then the answer: the product in one function."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import regex

from server.core.engine.engine import Engine
from server.core.engine.sequence import SamplingParams
from server.core.engine.stream import EngineClosedError
from server.core.engine.work import Work
from server.core.roles.classification import Classification
from server.core.roles.classifier import Classifier, PreparedTexts
from server.core.roles.language import language_of
from server.core.roles.tasks import ReplyStyle, Task, text_in
from server.core.text.choices import Choices, begin_choices
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer, Message
from server.core.text.tools import Tool
from server.errors import ContextLengthError, InvalidRequestError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Reply(Choices):
    """The mood, and one answer or several to the same prompt."""

    sentiment: Classification | None


class Replier:
    """Answers conversations, knowing the mood of their last user message."""

    def __init__(
        self, engine: Engine, classifier: Classifier, tokenizer: ChatTokenizer, *,
        task: Task, style: ReplyStyle, max_context: int,
    ) -> None:  # fmt: skip
        self._engine, self._classifier, self._tokenizer = engine, classifier, tokenizer
        self._task, self.style, self._max_context = task, style, max_context

    async def reply(
        self, messages: Sequence[Message], params: SamplingParams, stop: Sequence[str], *,
        with_sentiment: bool, tools: Sequence[Tool] = (),
        call_opening: regex.Pattern[str] | None = None, num_choices: int = 1,
        work: Work | None = None,
    ) -> Reply:  # fmt: skip
        """Judges the last user message, then starts the answer, or several.

        call_opening: what a call of a tool begins with; stop strings cut none.
        work: of the request; None: a new one.

        Without sentiment the conversation goes to the model as it is: no pass, no cue and
        no persona. A pass that fails is logged, and the answer comes without a cue. The seed
        of each further answer is one higher.

        Raises:
            ContextLengthError: the conversation leaves no room for an answer.
            InvalidRequestError: the chat template refuses the conversation.
        """
        work = work or Work()
        text = _last_user_text(messages)
        language = language_of(text) if with_sentiment else ""
        conversation = self._with_persona(messages, language) if with_sentiment else messages
        # Before the pass: a conversation that cannot be answered needs no sentiment.
        prompt_ids = await asyncio.to_thread(self._encode, conversation, tools)
        sentiment, num_cached = None, None
        if with_sentiment and text.strip():
            sentiment, num_cached = await self._judge(text, prompt_ids, work)
            work.sentiment_s = work.total_s
        if (cue := self._cue(sentiment, language)) is not None:
            prompt_ids = await self._encode_cued(conversation, cue, tools) or prompt_ids
        if num_choices > 1:
            # The answers copy what is computed here once, if it can be kept for them.
            known = await self._engine.prefill(prompt_ids, work=work) or 0
            num_cached = known if num_cached is None else num_cached
        choices = begin_choices(
            self._engine, prompt_ids, params, num_choices, self._tokenizer.token_bytes,
            stop, stop_until=call_opening, max_context=self._max_context, work=work,
        )  # fmt: skip
        return Reply(
            sentiment=sentiment,
            num_prompt_tokens=len(prompt_ids),
            choices=choices,
            num_prefilled_cached=num_cached,
        )

    def _with_persona(self, messages: Sequence[Message], language: str) -> list[Message]:
        """The conversation behind the persona, unless it brings a system message of its own."""
        if any(message["role"] == "system" for message in messages):
            return list(messages)
        return [{"role": "system", "content": text_in(self.style.persona, language)}, *messages]

    def _cue(self, sentiment: Classification | None, language: str) -> str | None:
        """What the answer is told of the mood; None: nothing."""
        if sentiment is None or sentiment.label.cue is None:
            return None
        if sentiment.confidence < self.style.cue_min_confidence:
            return None
        return text_in(sentiment.label.cue, language)

    async def _judge(
        self, text: str, plain_ids: list[int], work: Work
    ) -> tuple[Classification | None, int | None]:
        """The sentiment of the text.

        While it is computed, so is the conversation, in the same steps: what is left to do
        afterwards are the cue and the answer's header. The second result then is how many
        tokens of the conversation were known before.
        plain_ids: the conversation without a cue.
        """
        try:
            prepared = await asyncio.to_thread(self._classifier.prepare, self._task, [text])
            # A cue that changes the beginning leaves nothing to use of what is computed without.
            if not prepared.prompt_ids or self.style.cue_position == "system":
                [sentiment] = await self._classifier.judge(prepared, work)
                return sentiment, None
            return await self._judge_while_prefilling(prepared, plain_ids, work)
        except EngineClosedError:
            raise  # there will be no answer either
        except InvalidRequestError as error:
            logger.warning("no sentiment pass for this message: %s", error)
            return None, None
        except Exception:
            logger.exception("the sentiment pass failed; answering without it")
            return None, None

    async def _judge_while_prefilling(
        self, prepared: PreparedTexts, plain_ids: list[int], work: Work
    ) -> tuple[Classification, int | None]:
        judging = asyncio.create_task(self._classifier.judge(prepared, work))
        # Lets the pass be queued, so that both reach the engine in one turn of the event loop:
        # it then finds both before its next step, which they share.
        await asyncio.sleep(0)
        prefill = asyncio.create_task(self._engine.prefill(plain_ids, work=work))
        try:
            [sentiment] = await judging
            # If it fails, the engine has logged it, and the reply computes everything itself.
            await asyncio.wait([prefill])
            return sentiment, None if prefill.exception() else prefill.result()
        finally:
            judging.cancel()
            prefill.cancel()
            await asyncio.gather(judging, prefill, return_exceptions=True)

    async def _encode_cued(
        self, conversation: Sequence[Message], cue: str, tools: Sequence[Tool]
    ) -> list[int] | None:
        """Ids of the conversation with the cue; None if it has no place for one, or is refused.

        Some templates refuse a system message that is not the first.
        """
        cued = with_cue(conversation, cue, self.style.cue_position)
        if cued == conversation:
            return None
        try:
            return await asyncio.to_thread(self._encode, cued, tools)
        except InvalidRequestError as error:
            logger.warning("the answer comes without a cue: %s", error)
            return None

    def _encode(self, conversation: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        try:
            prompt_ids = self._tokenizer.encode_chat(conversation, tools)
        except ChatTemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from error
        if len(prompt_ids) >= self._max_context:
            raise ContextLengthError(len(prompt_ids), self._max_context, "messages")
        return prompt_ids


def with_cue(conversation: Sequence[Message], cue: str, position: str) -> list[Message]:
    """The conversation with the cue in its place; as it is if its last turn is not the user's.

    position: as `ReplyStyle.cue_position`. An answer that the client has begun stays last, to be
    continued.
    """
    cued = list(conversation)
    end = len(cued) - (cued[-1]["role"] == "assistant")
    if not end or cued[end - 1]["role"] != "user":
        return cued  # a tool's result is last: the user's message was answered before
    if position == "behind":
        cued.insert(end, {"role": "system", "content": cue})
        return cued
    roles = [message["role"] for message in cued]
    place = end - 1 if position == "user" else roles.index("system")
    cued[place] = {**cued[place], "content": cued[place]["content"] + cue}
    return cued


def _last_user_text(messages: Sequence[Message]) -> str:
    texts = [message["content"] for message in messages if message["role"] == "user"]
    return texts[-1] if texts else ""
