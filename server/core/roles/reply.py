"""Sentiment first, then the answer: the product in one function."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import regex

from server.core.engine.adapters import BASE, Adapter
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


# What a task returns: the text's label, or pieces of the text.
Analysis = Classification | list[str]
Extract = Callable[[str, Work], Coroutine[Any, Any, list[str]]]

SENTIMENT = "sentiment"


@dataclass(frozen=True, kw_only=True)
class Reply(Choices):
    """The mood, and one answer or several to the same prompt.

    analyses: results of the requested tasks, by name; None: the task failed, or there was no text.
    """

    sentiment: Classification | None
    analyses: Mapping[str, Analysis | None]


class Replier:
    """Judges the mood of the last user message, then answers the conversation."""

    def __init__(
        self, engine: Engine, classifier: Classifier, tokenizer: ChatTokenizer, *,
        tasks: Mapping[str, Task], style: ReplyStyle, max_context: int,
        extractors: Mapping[str, Extract] | None = None,
    ) -> None:  # fmt: skip
        """tasks: those that label a text, by name; includes `sentiment` and the style's `cue_task`.

        extractors: those that find pieces of a text, by name.
        """
        self._engine, self._classifier, self._tokenizer = engine, classifier, tokenizer
        self._tasks, self._extractors = tasks, extractors or {}
        self.style, self._max_context = style, max_context

    @property
    def task_names(self) -> list[str]:
        """The names that `reply` accepts as `tasks`."""
        return [*self._tasks, *self._extractors]

    async def reply(
        self, messages: Sequence[Message], params: SamplingParams, stop: Sequence[str], *,
        with_sentiment: bool, tasks: Sequence[str] = (), tools: Sequence[Tool] = (),
        call_opening: regex.Pattern[str] | None = None, num_choices: int = 1,
        work: Work | None = None, adapter: Adapter = BASE,
    ) -> Reply:  # fmt: skip
        """Judges the last user message, then starts one answer or several.

        tasks: names of further tasks to run on the message.
        call_opening: pattern of the start of a tool call; stop strings are ignored from there on.
        work: the request's; None: a new one.
        adapter: for the answer. The mood is judged with the adapter that its task names.

        Without sentiment, the conversation reaches the model unchanged: no cue, no persona, and
        no pass but those of `tasks`. A pass that fails is logged, and its result is None.
        The seed of each further answer is one higher.

        Raises:
            ContextLengthError: the conversation leaves no room for an answer.
            InvalidRequestError: the chat template refuses the conversation.
        """
        work = work or Work()
        text = _last_user_text(messages)
        language = language_of(text) if with_sentiment else ""
        # With a persona, a small model answers from memory where it should call a tool.
        has_persona = with_sentiment and not tools
        conversation = self._with_persona(messages, language) if has_persona else messages
        # Before the passes: a conversation that cannot be answered needs none.
        prompt_ids = await asyncio.to_thread(self._encode, conversation, tools, adapter)
        moods = [SENTIMENT, self.style.cue_task] if with_sentiment else []
        # Each task once, in this order.
        results: dict[str, Analysis | None] = dict.fromkeys([*moods, *tasks])
        num_cached = None
        if results and text.strip():
            is_prefilled = not (with_sentiment and self.style.cue_position == "system")
            num_cached = await self._analyse(
                text, results, prompt_ids, work, adapter, is_prefilled=is_prefilled
            )
            work.sentiment_s = work.total_s
        sentiment, mood = (_label_in(results, name) for name in (SENTIMENT, self.style.cue_task))
        if with_sentiment and (cue := self._cue(mood, language)) is not None:
            cued_ids = await self._encode_cued(conversation, cue, tools, adapter)
            prompt_ids = cued_ids or prompt_ids
        if num_choices > 1:
            # Computes the prompt once for all answers, if the engine has room to keep it.
            num_known = await self._engine.prefill(prompt_ids, work=work, adapter=adapter) or 0
            num_cached = num_known if num_cached is None else num_cached
        choices = begin_choices(
            self._engine, prompt_ids, params, num_choices, self._tokenizer.token_bytes,
            stop, stop_until=call_opening, max_context=self._max_context, work=work,
            adapter=adapter,
        )  # fmt: skip
        return Reply(
            sentiment=sentiment if with_sentiment else None,
            analyses={name: results[name] for name in tasks},
            num_prompt_tokens=len(prompt_ids),
            choices=choices,
            num_prefilled_cached=num_cached,
        )

    def _with_persona(self, messages: Sequence[Message], language: str) -> list[Message]:
        """Puts the persona first, unless the conversation has a system message of its own."""
        if any(message["role"] == "system" for message in messages):
            return list(messages)
        return [{"role": "system", "content": text_in(self.style.persona, language)}, *messages]

    def _cue(self, mood: Classification | None, language: str) -> str | None:
        """The text that reports the mood to the model; None: nothing is reported."""
        if mood is None or mood.label.cue is None:
            return None
        if mood.confidence < self.style.cue_min_confidence:
            return None
        return text_in(mood.label.cue, language)

    async def _analyse(
        self, text: str, results: dict[str, Analysis | None], plain_ids: list[int], work: Work,
        adapter: Adapter, *, is_prefilled: bool,
    ) -> int | None:  # fmt: skip
        """Runs the tasks in `results` on the text and stores what they find; a failed one is None.

        If labels are computed, the same steps compute the conversation, so that only the cue and
        the answer's header remain to be computed. Returns how many tokens of the conversation
        were cached before; None: it was not computed, or the engine does not report them.

        plain_ids: the conversation without a cue.
        is_prefilled: False if the cue comes first, so that the conversation cannot be reused.
        """
        prepared = await asyncio.to_thread(self._prepare, results, text)
        running = [
            asyncio.create_task(self._judge(name, each, results, work))
            for name, each in prepared.items()
        ]
        # Lets the label tasks run up to the engine, so that it receives them and the conversation
        # before its next step, which they share.
        await asyncio.sleep(0)
        running += [
            asyncio.create_task(self._extract(name, text, results, work))
            for name in results
            if name in self._extractors
        ]
        prefill = None
        if is_prefilled and any(each.prompt_ids for each in prepared.values()):
            prefill = asyncio.create_task(
                self._engine.prefill(plain_ids, work=work, adapter=adapter)
            )
        try:
            await asyncio.gather(*running)
            if prefill is None:
                return None
            # If it fails, the engine has logged it, and the answer computes the whole prompt.
            await asyncio.wait([prefill])
            return None if prefill.exception() else prefill.result()
        finally:
            started = [*running, *filter(None, [prefill])]
            for task in started:
                task.cancel()
            await asyncio.gather(*started, return_exceptions=True)

    def _prepare(self, names: Mapping[str, object], text: str) -> dict[str, PreparedTexts]:
        prepared = {}
        for name in names:
            if name in self._tasks:
                with _failure_logged(name):
                    prepared[name] = self._classifier.prepare(self._tasks[name], [text])
        return prepared

    async def _judge(
        self, name: str, prepared: PreparedTexts, results: dict[str, Analysis | None], work: Work
    ) -> None:
        with _failure_logged(name):
            [results[name]] = await self._classifier.judge(prepared, work)

    async def _extract(
        self, name: str, text: str, results: dict[str, Analysis | None], work: Work
    ) -> None:
        with _failure_logged(name):
            results[name] = await self._extractors[name](text, work)

    async def _encode_cued(
        self, conversation: Sequence[Message], cue: str, tools: Sequence[Tool], adapter: Adapter
    ) -> list[int] | None:
        """Ids of the conversation with the cue.

        None if the conversation has no place for a cue, or if the chat template refuses it: some
        allow a system message only at the beginning.
        """
        cued = with_cue(conversation, cue, self.style.cue_position)
        if cued == conversation:
            return None
        try:
            return await asyncio.to_thread(self._encode, cued, tools, adapter)
        except InvalidRequestError as error:
            logger.warning("the answer comes without a cue: %s", error)
            return None

    def _encode(
        self, conversation: Sequence[Message], tools: Sequence[Tool], adapter: Adapter
    ) -> list[int]:
        try:
            prompt_ids = self._tokenizer.encode_chat(conversation, tools)
        except ChatTemplateError as error:
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from error
        max_context = self._max_context - adapter.num_virtual_tokens
        if len(prompt_ids) >= max_context:
            raise ContextLengthError(len(prompt_ids), max_context, "messages")
        return prompt_ids


def with_cue(conversation: Sequence[Message], cue: str, position: str) -> list[Message]:
    """Adds the cue to the conversation, if its last turn is the user's.

    position: as `ReplyStyle.cue_position`. An answer that the client has begun stays last, to be
    continued.
    """
    cued = list(conversation)
    end = len(cued) - (cued[-1]["role"] == "assistant")
    if not end or cued[end - 1]["role"] != "user":
        return cued  # a tool's result is last: the user's message is already being answered
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


@contextmanager
def _failure_logged(name: str) -> Iterator[None]:
    """Logs the failure of a task's pass, so that the chat goes on without its result."""
    try:
        yield
    except EngineClosedError:
        raise  # the answer would fail, too
    except InvalidRequestError as error:
        logger.warning("no %s pass for this message: %s", name, error)
    except Exception:
        logger.exception("the %s pass failed; answering without it", name)


def _label_in(results: Mapping[str, Analysis | None], name: str) -> Classification | None:
    result = results.get(name)
    return result if isinstance(result, Classification) else None
