"""Sentiment first, then the answer: which prompt each role reads, and how a reply ends."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.checkpoint import BUNDLED_FOLDER
from server.core.engine.engine import Engine, Scores
from server.core.engine.sequence import (
    AbortedEvent,
    Event,
    FailedEvent,
    FinishedEvent,
    FinishReason,
    SamplingParams,
    TokenEvent,
)
from server.core.engine.stream import EngineClosedError, SequenceAbortedError, TokenStream
from server.core.engine.work import Work
from server.core.roles.classification import Classification
from server.core.roles.classifier import Classifier, PreparedTexts
from server.core.roles.judges import LabelJudge
from server.core.roles.reply import Extract, Replier, Reply, with_cue
from server.core.roles.task_files import TASK_FILE_NAME, read_task_file
from server.core.roles.tasks import Label, ReplyStyle, Task, text_in
from server.core.text.tokenizer import ChatTemplateError, ChatTokenizer
from server.core.text.tools import Tool
from server.errors import ContextLengthError, InvalidRequestError

T = TypeVar("T")

BOUND_S = 20
BUILTIN = read_task_file().tasks
SENTIMENT, EMOTION, INTENT = (BUILTIN[name] for name in ("sentiment", "emotion", "intent"))
POSITIVE, NEGATIVE, NEUTRAL = SENTIMENT.labels
# The bundled model's, in which every label has a cue.
MINI = read_task_file(BUNDLED_FOLDER / TASK_FILE_NAME).tasks["sentiment"]
PERSONA = "You are a warm friend."
CHINESE_PERSONA = "你是一位温暖的朋友。"
STYLE = ReplyStyle(persona={"zh": CHINESE_PERSONA, "en": PERSONA})
IN_SYSTEM = STYLE.model_copy(update={"cue_position": "system"})
BEHIND = STYLE.model_copy(update={"cue_position": "behind"})
PARAMS = SamplingParams(max_tokens=50, temperature=0.5, seed=3)

Message = dict[str, Any]

# As some checkpoints have it: nothing may stand before the one system message.
STRICT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


class FakeGenerator:
    """Records its calls, and answers with the events it was given."""

    def __init__(self, *events: Event) -> None:
        self.events = events or (FinishedEvent(FinishReason.STOP),)
        self.submitted: list[tuple[list[int], SamplingParams]] = []
        self.num_aborts = 0
        self.prefilled: list[list[int]] = []
        self.num_known: int | None = 3

    async def prefill(
        self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
    ) -> int | None:
        self.prefilled.append(prompt_ids)
        return self.num_known

    def submit(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        *,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> TokenStream:
        self.submitted.append((prompt_ids, params))
        stream = TokenStream(self._abort)
        for event in self.events:
            stream.events.put_nowait(event)
        return stream

    def _abort(self) -> None:
        self.num_aborts += 1

    @property
    def prompt_ids(self) -> list[int]:
        """The one prompt submitted."""
        ((prompt_ids, _),) = self.submitted
        return prompt_ids


class FakeClassifier:
    """Gives every text the same label, or fails."""

    def __init__(self, label: Label = POSITIVE, error: Exception | None = None) -> None:
        self._label, self._error = label, error
        self.asked: list[tuple[str, str]] = []

    def prepare(self, task: Task, texts: list[str]) -> PreparedTexts:
        keys = [(task.name, task.version, text) for text in texts]
        return PreparedTexts(task, keys, {key: [7] for key in keys}, [], 0)

    async def judge(self, prepared: PreparedTexts, work: Work) -> list[Classification]:
        for name, _, text in prepared.keys:
            self.asked.append((name, text))
        if self._error is not None:
            raise self._error
        label = self._label
        return [Classification(label, 0.9, ((label, 0.9),), 7, 0) for _ in prepared.keys]


class FakeScorer:
    """The analyst's side of the engine."""

    def __init__(self, *logprobs: float) -> None:
        self._logprobs = list(logprobs)
        self.prompts: list[list[int]] = []

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Scores:
        self.prompts.append(prompt_ids)
        return Scores(self._logprobs, num_cached=0)


class RefusingTokenizer:
    """Its chat template accepts nothing."""

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        raise ChatTemplateError("roles must alternate")


@pytest.fixture
def make(tokenizer: ChatTokenizer) -> Callable[..., Replier]:
    """A replier around fakes, with the real tokenizer."""

    def make_replier(
        generator: FakeGenerator,
        classifier: FakeClassifier | Classifier | None = None,
        *,
        task: Task = SENTIMENT,
        others: Sequence[Task] = (),
        extractors: Mapping[str, Extract] | None = None,
        style: ReplyStyle = STYLE,
        max_context: int = 2048,
        with_tokenizer: ChatTokenizer = tokenizer,
    ) -> Replier:
        return Replier(
            cast(Engine, generator),
            cast(Classifier, classifier or FakeClassifier()),
            with_tokenizer,
            tasks={each.name: each for each in (task, *others)},
            extractors=extractors,
            style=style,
            max_context=max_context,
        )

    return make_replier


@pytest.fixture(scope="module")
def strict() -> ChatTokenizer:
    """A tokenizer whose template refuses a system message that is not the first."""
    tokenizer = Qwen2Tokenizer.from_pretrained(BUNDLED_FOLDER)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.chat_template = STRICT_TEMPLATE
    return ChatTokenizer(tokenizer)


def judging(scorer: FakeScorer, tokenizer: ChatTokenizer, *, cache_size: int) -> Classifier:
    """The real analyst, which scores the labels of the sentiment task."""
    return Classifier(
        scorer,
        tokenizer,
        max_context=2048,
        cache_size=cache_size,
        judges={task.version: LabelJudge() for task in BUILTIN.values()},
    )


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def cue(label: Label, language: str = "en") -> str:
    assert label.cue is not None
    return text_in(label.cue, language)


def called_and_answered(result: str) -> list[Message]:
    """A call of a tool, and its result."""
    function = {"name": "weather", "arguments": "{}"}
    calls = [{"id": "call_1", "type": "function", "function": function}]
    return [
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]


async def ask(
    replier: Replier,
    messages: list[Message],
    *,
    params: SamplingParams = PARAMS,
    stop: Sequence[str] = (),
    with_sentiment: bool = True,
    tasks: Sequence[str] = (),
) -> Reply:
    return await bounded(
        replier.reply(messages, params, stop, with_sentiment=with_sentiment, tasks=tasks)
    )


async def read(reply: Reply) -> list[str]:
    async def all_pieces() -> list[str]:
        return [piece.text async for piece in reply.choices[0].pieces()]

    return await bounded(all_pieces())


async def bounded(awaitable: Awaitable[T]) -> T:
    """The result, or a failed test in place of one that hangs."""
    return await asyncio.wait_for(awaitable, BOUND_S)


def text_of(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes[token_id] for token_id in ids).decode()


def says(tokenizer: ChatTokenizer, text: str, *end: Event) -> FakeGenerator:
    """A generator that writes the text and then ends by itself, or with this reason."""
    written = [TokenEvent(token_id) for token_id in tokenizer.encode_text(text)]
    return FakeGenerator(*written, *(end or (FinishedEvent(FinishReason.STOP),)))


# --- the prompt -----------------------------------------------------------------------


@pytest.mark.parametrize("label", MINI.labels, ids=lambda label: label.value)
@pytest.mark.parametrize(
    ("messages", "before", "after"),
    [
        pytest.param(
            [user("Hi")], [system(PERSONA), user("Hi")], [], id="persona, as there is none"
        ),
        pytest.param(
            [system("Be brief."), user("Hi")],
            [system("Be brief."), user("Hi")],
            [],
            id="the client's own system message",
        ),
        pytest.param(
            [user("Hi"), system("Be brief."), user("So?")],
            [user("Hi"), system("Be brief."), user("So?")],
            [],
            id="the client's own system message, but late",
        ),
        pytest.param(
            [user("你好")],
            [system(CHINESE_PERSONA), user("你好")],
            [],
            id="the persona in Chinese",
        ),
        pytest.param(
            [system(""), user("Hi")],
            [system(""), user("Hi")],
            [],
            id="an empty system message is one, too",
        ),
        pytest.param(
            [user("a"), assistant("b"), user("c")],
            [system(PERSONA), user("a"), assistant("b"), user("c")],
            [],
            id="several turns",
        ),
        pytest.param(
            [user("Tell me."), assistant("Well, ")],
            [system(PERSONA), user("Tell me.")],
            [assistant("Well, ")],
            id="before an answer to be continued",
        ),
        pytest.param(
            [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("")],
            [system("Be brief."), user("a"), assistant("b"), user("c")],
            [assistant("")],
            id="before an empty answer to be continued",
        ),
    ],
)
async def test_the_cue_comes_after_the_conversation_with_the_text_of_the_label(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    messages: list[Message],
    before: list[Message],
    after: list[Message],
    label: Label,
) -> None:
    generator = FakeGenerator()
    replier = make(generator, FakeClassifier(label), task=MINI, style=BEHIND)
    reply = await ask(replier, messages)
    expected = tokenizer.encode_chat([*before, system(cue(label)), *after])
    assert generator.prompt_ids == expected
    assert reply.num_prompt_tokens == len(expected)
    assert reply.sentiment is not None and reply.sentiment.label == label


@pytest.mark.parametrize("label", [POSITIVE, NEGATIVE], ids=lambda label: label.value)
@pytest.mark.parametrize(
    ("messages", "before", "last", "after"),
    [
        pytest.param([user("Hi")], [system(PERSONA)], "Hi", [], id="persona, as there is none"),
        pytest.param(
            [system("Be brief."), user("Hi")],
            [system("Be brief.")],
            "Hi",
            [],
            id="the client's own system message",
        ),
        pytest.param(
            [user("Hi"), system("Be brief."), user("So?")],
            [user("Hi"), system("Be brief.")],
            "So?",
            [],
            id="the client's own system message, but late",
        ),
        pytest.param(
            [system(""), user("Hi")],
            [system("")],
            "Hi",
            [],
            id="an empty system message is one, too",
        ),
        pytest.param(
            [user("a"), assistant("b"), user("c")],
            [system(PERSONA), user("a"), assistant("b")],
            "c",
            [],
            id="several turns",
        ),
        pytest.param(
            [user("Tell me."), assistant("Well, ")],
            [system(PERSONA)],
            "Tell me.",
            [assistant("Well, ")],
            id="before an answer to be continued",
        ),
        pytest.param(
            [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("")],
            [system("Be brief."), user("a"), assistant("b")],
            "c",
            [assistant("")],
            id="before an empty answer to be continued",
        ),
    ],
)
async def test_the_cue_ends_the_last_user_message(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    messages: list[Message],
    before: list[Message],
    last: str,
    after: list[Message],
    label: Label,
) -> None:
    generator = FakeGenerator()
    reply = await ask(make(generator, FakeClassifier(label)), messages)
    expected = tokenizer.encode_chat([*before, user(last + cue(label)), *after])
    assert generator.prompt_ids == expected
    assert reply.num_prompt_tokens == len(expected)
    assert reply.sentiment is not None and reply.sentiment.label == label


@pytest.mark.parametrize("label", [POSITIVE, NEGATIVE], ids=lambda label: label.value)
@pytest.mark.parametrize(
    ("messages", "before", "instructions", "after"),
    [
        pytest.param([user("Hi")], [], PERSONA, [user("Hi")], id="persona, as there is none"),
        pytest.param(
            [system("Be brief."), user("Hi")],
            [],
            "Be brief.",
            [user("Hi")],
            id="the client's own system message",
        ),
        pytest.param(
            [user("Hi"), system("Be brief."), user("So?")],
            [user("Hi")],
            "Be brief.",
            [user("So?")],
            id="the client's own system message, but late",
        ),
        pytest.param(
            [system("a"), user("Hi"), system("b"), user("So?")],
            [],
            "a",
            [user("Hi"), system("b"), user("So?")],
            id="the first of two",
        ),
        pytest.param(
            [user("a"), assistant("b"), user("c"), assistant("Well, ")],
            [],
            PERSONA,
            [user("a"), assistant("b"), user("c"), assistant("Well, ")],
            id="an answer to be continued",
        ),
    ],
)
async def test_the_cue_ends_the_first_system_message(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    messages: list[Message],
    before: list[Message],
    instructions: str,
    after: list[Message],
    label: Label,
) -> None:
    generator = FakeGenerator()
    reply = await ask(make(generator, FakeClassifier(label), style=IN_SYSTEM), messages)
    expected = tokenizer.encode_chat([*before, system(instructions + cue(label)), *after])
    assert generator.prompt_ids == expected
    assert reply.num_prompt_tokens == len(expected)
    assert reply.sentiment is not None and reply.sentiment.label == label


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM, BEHIND], ids=lambda style: style.cue_position)
@pytest.mark.parametrize(
    ("messages", "before"),
    [
        ([user("Hi")], [system(PERSONA)]),
        ([user("你好")], [system(CHINESE_PERSONA)]),
        ([system("Be brief."), user("Hi"), assistant("So")], []),
    ],
    ids=["persona", "persona in Chinese", "the client's own system message"],
)
async def test_a_label_without_cue_leaves_the_conversation_as_it_is(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    messages: list[Message],
    before: list[Message],
    style: ReplyStyle,
) -> None:
    generator = FakeGenerator()
    reply = await ask(make(generator, FakeClassifier(NEUTRAL), style=style), messages)
    assert generator.prompt_ids == tokenizer.encode_chat([*before, *messages])
    assert reply.sentiment is not None and reply.sentiment.label == NEUTRAL


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM, BEHIND], ids=lambda style: style.cue_position)
@pytest.mark.parametrize("result", ["rain", "I love it!"])
async def test_after_the_result_of_a_tool_there_is_no_cue(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, style: ReplyStyle, result: str
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier(NEGATIVE)
    messages = [user("I lost my keys."), *called_and_answered(result)]
    reply = await ask(make(generator, classifier, style=style), messages)
    assert generator.prompt_ids == tokenizer.encode_chat([system(PERSONA), *messages])
    # The mood is still that of what the user said.
    assert classifier.asked == [("sentiment", "I lost my keys.")]
    assert reply.sentiment is not None and reply.sentiment.label == NEGATIVE


@pytest.mark.parametrize("position", ["user", "system", "behind"])
@pytest.mark.parametrize(
    "conversation",
    [
        [system("a"), assistant("b")],
        [system("a")],
        [system("a"), user("b"), assistant("c"), assistant("d")],
        [system("a"), user("b"), system("c")],
        [system("a"), user("b"), *called_and_answered("c")],
        [system("a"), user("b"), *called_and_answered("c"), assistant("d")],
    ],
    ids=lambda conversation: "-".join(message["role"] for message in conversation),
)
def test_only_a_turn_of_the_user_gets_a_cue(conversation: list[Message], position: str) -> None:
    assert with_cue(conversation, "sad", position) == conversation


@pytest.mark.parametrize("position", ["user", "system", "behind"])
def test_a_cue_changes_no_message_of_the_conversation_itself(position: str) -> None:
    conversation = [system("a"), user("b"), assistant("c")]
    with_cue(conversation, "sad", position)
    assert conversation == [system("a"), user("b"), assistant("c")]


async def test_the_reply_reads_the_mood_after_the_users_message(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    await ask(make(generator, FakeClassifier(NEGATIVE)), [user("I lost my keys.")])
    assert text_of(tokenizer, generator.prompt_ids) == (
        f"system\n{PERSONA}\nuser\nI lost my keys. (I feel upset right now.)\nassistant\n"
    )


async def test_the_cue_that_the_bundled_model_reads_is_chinese_text_and_emoji(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    replier = make(generator, FakeClassifier(MINI.labels[1]), task=MINI, style=BEHIND)
    await ask(replier, [user("I lost my keys.")])
    assert text_of(tokenizer, generator.prompt_ids) == (
        f"system\n{PERSONA}\nuser\nI lost my keys.\nsystem\n用户此刻的情绪：负面😢\nassistant\n"
    )


# --- the user's language --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("我的钥匙丢了。", "zh"),
        ("iPhone屏幕碎了", "zh"),
        ("I lost my keys.", "en"),
        ("What does 人山人海 mean?", "en"),
        ("J'ai perdu mes clés.", "en"),
        ("😢", "en"),
    ],
)
async def test_persona_and_cue_are_in_the_language_of_the_user(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, text: str, language: str
) -> None:
    generator = FakeGenerator()
    await ask(make(generator, FakeClassifier(NEGATIVE)), [user(text)])
    persona = {"zh": CHINESE_PERSONA, "en": PERSONA}[language]
    expected = [system(persona), user(text + cue(NEGATIVE, language))]
    assert generator.prompt_ids == tokenizer.encode_chat(expected)


async def test_the_language_is_that_of_the_last_user_message_only(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    before = [user("今天很好"), assistant("太好了！")]
    messages = [*before, user("I lost my keys."), assistant("真遗憾，")]
    await ask(make(generator, FakeClassifier(NEGATIVE)), messages)
    cued = [*before, user("I lost my keys." + cue(NEGATIVE, "en")), assistant("真遗憾，")]
    assert generator.prompt_ids == tokenizer.encode_chat([system(PERSONA), *cued])


async def test_the_cue_is_in_the_users_language_whatever_the_clients_system_message_is_in(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    await ask(make(generator, FakeClassifier(NEGATIVE)), [system("Be brief."), user("钥匙丢了")])
    expected = [system("Be brief."), user("钥匙丢了" + cue(NEGATIVE, "zh"))]
    assert generator.prompt_ids == tokenizer.encode_chat(expected)


@pytest.mark.parametrize("text", ["I lost my keys.", "我的钥匙丢了。"])
async def test_a_persona_in_one_language_serves_users_of_every_other(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, text: str
) -> None:
    generator = FakeGenerator()
    style = ReplyStyle(persona={"zh": CHINESE_PERSONA})
    await ask(make(generator, FakeClassifier(NEUTRAL), style=style), [user(text)])
    assert generator.prompt_ids == tokenizer.encode_chat([system(CHINESE_PERSONA), user(text)])


async def test_there_is_no_persona_with_tools(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator, tools = FakeGenerator(), [Tool("find", {"type": "object"})]
    replier = make(generator, FakeClassifier(NEGATIVE))
    await replier.reply([user("My keys!")], PARAMS, (), with_sentiment=True, tools=tools)
    cued = [user("My keys!" + cue(NEGATIVE))]
    assert generator.prompt_ids == tokenizer.encode_chat(cued, tools)


# --- a conversation that is not changed -----------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [user("Hi")],
        [system("Be brief."), user("Hi")],
        [user("a"), assistant("b"), user("c")],
        [user("Tell me."), assistant("Well, ")],
    ],
    ids=len,
)
async def test_without_sentiment_the_conversation_goes_to_the_model_as_it_is(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, messages: list[Message]
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier()
    reply = await ask(make(generator, classifier), messages, with_sentiment=False)
    assert generator.prompt_ids == tokenizer.encode_chat(messages)
    assert reply.sentiment is None
    assert classifier.asked == []


async def test_the_conversation_is_computed_while_it_is_judged(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = says(tokenizer, "Hello!")
    reply = await ask(make(generator), [user("Hi")])
    (prefilled,) = generator.prefilled
    assert prefilled == tokenizer.encode_chat([system(PERSONA), user("Hi")])
    assert generator.prompt_ids[: len(prefilled) - 8] == prefilled[:-8]
    # What was known before, not what the reply itself computed beside the pass.
    assert reply.num_cached_tokens == 3


@pytest.mark.parametrize("style", [STYLE, BEHIND], ids=lambda style: style.cue_position)
async def test_a_cue_at_the_end_reuses_what_was_computed_during_the_pass(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, style: ReplyStyle
) -> None:
    generator = FakeGenerator()
    await ask(make(generator, style=style), [user("Hi there, how are you today?")])
    (prefilled,) = generator.prefilled
    # All but the answer's header, which the cue replaces.
    begin = prefilled[: prefilled.index(tokenizer.marker_id("<|im_end|>"), -6) - 1]
    assert generator.prompt_ids[: len(begin)] == begin


async def test_with_a_cue_at_the_beginning_nothing_is_computed_during_the_pass(
    make: Callable[..., Replier],
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier()
    reply = await ask(make(generator, classifier, style=IN_SYSTEM), [user("Hi")])
    assert generator.prefilled == []
    assert classifier.asked == [("sentiment", "Hi")]
    assert reply.num_cached_tokens == 0


@pytest.mark.parametrize("names", [[], ["emotion", "intent"]], ids=len)
async def test_both_roles_reach_the_engine_in_one_turn_of_the_event_loop(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, names: list[str]
) -> None:
    loop, turn = asyncio.get_running_loop(), 0
    ticking: asyncio.Handle

    def tick() -> None:
        nonlocal turn, ticking
        turn += 1
        ticking = loop.call_soon(tick)

    class Prefilling(FakeGenerator):
        async def prefill(
            self, prompt_ids: list[int], *, work: Work | None = None, adapter: Adapter = BASE
        ) -> int | None:
            begun.append(("prefill", turn))
            return await super().prefill(prompt_ids, work=work)

    class Scoring(FakeScorer):
        async def score(self, *args: Any, **kwargs: Any) -> Scores:
            begun.append(("score", turn))
            return await super().score(*args, **kwargs)

    begun: list[tuple[str, int]] = []
    classifier = judging(Scoring(-0.1, -3.0, -4.0), tokenizer, cache_size=8)
    ticking = loop.call_soon(tick)
    try:
        replier = make(Prefilling(), classifier, others=[EMOTION, INTENT])
        await replier.reply([user("hi")], PARAMS, (), with_sentiment=True, tasks=names)
    finally:
        ticking.cancel()
    # The passes first, whose text is yet to be encoded: then nothing lies between them, and
    # the engine's thread finds all before its next step.
    assert [kind for kind, _ in begun] == ["score"] * (1 + len(names)) + ["prefill"]
    assert len({turn for _, turn in begun}) == 1


# --- more than the mood ---------------------------------------------------------------


class ByTask(FakeClassifier):
    """Gives every task its first label, but fails those in `failing`."""

    def __init__(self, failing: Sequence[str] = ()) -> None:
        super().__init__()
        self._failing = failing

    async def judge(self, prepared: PreparedTexts, work: Work) -> list[Classification]:
        await super().judge(prepared, work)
        if prepared.task.name in self._failing:
            raise RuntimeError("no memory")
        label = prepared.task.labels[0]
        return [Classification(label, 0.9, ((label, 0.9),), 7, 0)]


async def shout(text: str, work: Work) -> list[str]:
    return [text.upper()]


def found(reply: Reply) -> dict[str, Any]:
    return {
        name: result.label.value if isinstance(result, Classification) else result
        for name, result in reply.analyses.items()
    }


async def test_a_reply_without_tasks_has_no_analyses(make: Callable[..., Replier]) -> None:
    assert (await ask(make(FakeGenerator()), [user("Hi")])).analyses == {}


async def test_tasks_are_judged_once_and_reported_in_the_requested_order(
    make: Callable[..., Replier],
) -> None:
    classifier = ByTask()
    replier = make(
        FakeGenerator(), classifier, others=[EMOTION, INTENT], extractors={"loud": shout}
    )
    assert replier.task_names == ["sentiment", "emotion", "intent", "loud"]
    names = ["intent", "loud", "sentiment", "intent"]
    reply = await ask(replier, [user("a"), assistant("b"), user("Hi")], tasks=names)
    assert found(reply) == {"intent": "question", "loud": ["HI"], "sentiment": "positive"}
    assert list(reply.analyses) == ["intent", "loud", "sentiment"]
    assert sorted(classifier.asked) == [("intent", "Hi"), ("sentiment", "Hi")]


async def test_without_sentiment_tasks_are_judged_but_the_answer_has_no_cue(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator, classifier = FakeGenerator(), ByTask()
    replier = make(generator, classifier, others=[EMOTION])
    names = ["emotion", "sentiment"]
    reply = await ask(replier, [user("Hi")], with_sentiment=False, tasks=names)
    assert reply.sentiment is None
    assert found(reply) == {"emotion": "joy", "sentiment": "positive"}
    assert generator.prompt_ids == tokenizer.encode_chat([user("Hi")])


async def test_a_task_that_fails_fails_neither_the_others_nor_the_answer(
    make: Callable[..., Replier], caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(text: str, work: Work) -> list[str]:
        raise InvalidRequestError("too long")

    replier = make(
        FakeGenerator(), ByTask(["emotion"]), others=[EMOTION, INTENT],
        extractors={"broken": broken},
    )  # fmt: skip
    reply = await ask(replier, [user("Hi")], tasks=["emotion", "intent", "broken"])
    assert found(reply) == {"emotion": None, "intent": "question", "broken": None}
    assert reply.sentiment is not None
    assert "the emotion pass failed" in caplog.text and "no broken pass" in caplog.text


async def test_without_text_tasks_find_nothing(make: Callable[..., Replier]) -> None:
    classifier = ByTask()
    replier = make(FakeGenerator(), classifier, others=[EMOTION], extractors={"loud": shout})
    reply = await ask(replier, [user(" ")], tasks=["emotion", "loud"])
    assert found(reply) == {"emotion": None, "loud": None} and not classifier.asked


async def test_the_cue_may_be_that_of_another_task(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    style = STYLE.model_copy(update={"cue_task": "emotion"})
    reply = await ask(make(generator, ByTask(), others=[EMOTION], style=style), [user("Hi")])
    assert reply.sentiment is not None and reply.sentiment.label == POSITIVE
    said = user("Hi" + cue(EMOTION.labels[0]))
    assert generator.prompt_ids == tokenizer.encode_chat([system(PERSONA), said])
    assert reply.analyses == {}


async def test_several_choices_compute_the_prompt_once_and_differ_in_their_seed(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = says(tokenizer, "Hello!")
    reply = await bounded(
        make(generator).reply([user("Hi")], PARAMS, [], with_sentiment=False, num_choices=3)
    )
    prompt_ids = tokenizer.encode_chat([user("Hi")])
    assert generator.prefilled == [prompt_ids]
    assert [ids for ids, _ in generator.submitted] == [prompt_ids] * 3
    assert [params.seed for _, params in generator.submitted] == [3, 4, 5]
    texts = ["", "", ""]
    ended = []
    async for index, piece in reply.pieces():
        if piece is None:
            ended.append(index)
        else:
            texts[index] += piece.text
    assert texts == ["Hello!"] * 3
    assert sorted(ended) == [0, 1, 2]
    assert reply.num_completion_tokens == 3 * len(tokenizer.encode_text("Hello!"))


@pytest.mark.parametrize(("num_known", "num_cached"), [(7, 7), (None, 0)])
async def test_what_several_choices_share_counts_once(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, num_known: int, num_cached: int
) -> None:
    generator = says(tokenizer, "Hello!")
    generator.num_known = num_known
    reply = await bounded(
        make(generator).reply([user("Hi")], PARAMS, [], with_sentiment=False, num_choices=3)
    )
    assert reply.num_cached_tokens == num_cached


async def test_leaving_one_choice_aborts_them_all(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator(TokenEvent(tokenizer.encode_text("Hi")[0]))
    reply = await bounded(
        make(generator).reply([user("Hi")], PARAMS, [], with_sentiment=False, num_choices=2)
    )
    async with aclosing(reply.pieces()) as pieces:
        await bounded(anext(pieces))
    assert generator.num_aborts >= 2


async def test_a_task_without_cues_judges_but_adds_none(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    silent = POSITIVE.model_copy(update={"cue": None})
    task = SENTIMENT.model_copy(update={"labels": (silent, *SENTIMENT.labels[1:])})
    reply = await ask(make(generator, FakeClassifier(silent), task=task), [user("Hi")])
    assert generator.prompt_ids == tokenizer.encode_chat([system(PERSONA), user("Hi")])
    assert reply.sentiment is not None and reply.sentiment.label == silent


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM, BEHIND], ids=lambda style: style.cue_position)
async def test_the_clients_messages_are_not_changed(
    make: Callable[..., Replier], style: ReplyStyle
) -> None:
    messages = [system("Be brief."), user("Tell me."), assistant("Well, ")]
    await ask(make(FakeGenerator(), style=style), messages)
    assert messages == [system("Be brief."), user("Tell me."), assistant("Well, ")]


@pytest.mark.parametrize("style", [STYLE, BEHIND], ids=lambda style: style.cue_position)
async def test_the_prefix_of_a_conversation_is_the_same_from_turn_to_turn(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, style: ReplyStyle
) -> None:
    generator = FakeGenerator()
    replier = make(generator, FakeClassifier(POSITIVE), style=style)
    await ask(replier, [user("a")])
    await ask(replier, [user("a"), assistant("b"), user("c")])
    (first, _), (second, _) = generator.submitted
    # All but the cue and the opened answer, which come last.
    num_shared = len(first) - len(tokenizer.encode_chat([system(cue(POSITIVE))]))
    assert num_shared > 10
    assert second[:num_shared] == first[:num_shared]


# --- the two roles keep apart ---------------------------------------------------------


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM, BEHIND], ids=lambda style: style.cue_position)
@pytest.mark.parametrize(
    "messages",
    [
        [user("I love it!")],
        [system("Be brief."), user("Hi"), assistant("Hello!"), user("I love it!")],
        [user("I love it!"), assistant("Me ")],
    ],
    ids=len,
)
async def test_neither_role_ever_reads_the_instruction_of_the_other(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    messages: list[Message],
    style: ReplyStyle,
) -> None:
    generator, scorer = FakeGenerator(), FakeScorer(-0.1, -3.0, -4.0)
    classifier = judging(scorer, tokenizer, cache_size=4)
    await ask(make(generator, classifier, style=style), messages)

    reads = text_of(tokenizer, generator.prompt_ids)
    assert "(I feel happy right now.)" in reads and "I love it!" in reads
    assert SENTIMENT.instructions not in reads
    assert "分析师" not in reads

    (analyst_ids,) = scorer.prompts
    reads = text_of(tokenizer, analyst_ids)
    assert reads == f"system\n{SENTIMENT.instructions}\nuser\nI love it!\nassistant\n"
    assert PERSONA not in reads and "I feel" not in reads


async def test_the_analyst_reads_the_last_user_message_only(make: Callable[..., Replier]) -> None:
    classifier = FakeClassifier()
    messages = [user("a"), assistant("b"), user("c"), system("d"), assistant("e")]
    await ask(make(FakeGenerator(), classifier), messages)
    assert classifier.asked == [("sentiment", "c")]


@pytest.mark.parametrize(
    "messages",
    [
        [system("Be brief.")],
        [assistant("Well, ")],
        [user("")],
        [user("I love it!"), assistant("b"), user(" \n\u3000")],
    ],
    ids=["no user", "only an answer", "an empty message", "white space last"],
)
async def test_without_a_users_text_there_is_nothing_to_judge(
    make: Callable[..., Replier], messages: list[Message]
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier()
    reply = await ask(make(generator, classifier), messages)
    assert reply.sentiment is None
    assert classifier.asked == []
    assert len(generator.submitted) == 1


# --- a failing pass -------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("the engine had a bad day"),
        SequenceAbortedError(),
        ContextLengthError(3000, 2048, "input"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_failing_pass_is_logged_and_the_answer_comes_without_a_cue(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    generator = says(tokenizer, "Hello!")
    with caplog.at_level(logging.WARNING, logger="server"):
        reply = await ask(make(generator, FakeClassifier(error=error)), [user("Hi")])
    assert reply.sentiment is None
    assert generator.prompt_ids == tokenizer.encode_chat([system(PERSONA), user("Hi")])
    assert "".join(await read(reply)) == "Hello!"
    (record,) = caplog.records
    if isinstance(error, ContextLengthError):  # foreseen: a line is enough
        assert record.exc_info is None and str(error) in record.getMessage()
    else:
        assert record.exc_info is not None and record.exc_info[1] is error


async def test_a_client_that_leaves_during_the_pass_gets_no_answer(
    make: Callable[..., Replier],
) -> None:
    asked = asyncio.Event()

    class Endless(FakeClassifier):
        async def judge(self, prepared: PreparedTexts, work: Work) -> list[Classification]:
            asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    generator = FakeGenerator()
    running = asyncio.create_task(ask(make(generator, Endless()), [user("Hi")]))
    await bounded(asked.wait())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bounded(running)
    assert generator.submitted == []


async def test_a_closed_engine_is_an_error_of_the_reply(make: Callable[..., Replier]) -> None:
    class Closed(FakeGenerator):
        def submit(
            self, prompt_ids: list[int], params: SamplingParams, *, work: Work | None = None,
            adapter: Adapter = BASE,
        ) -> TokenStream:  # fmt: skip
            raise EngineClosedError

    with pytest.raises(EngineClosedError):
        await ask(make(Closed(), FakeClassifier(error=EngineClosedError())), [user("Hi")])


# --- a cue that cannot be added -------------------------------------------------------


def the_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The one line that was logged."""
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.exc_info is None
    return record.getMessage()


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM, BEHIND], ids=lambda style: style.cue_position)
@pytest.mark.parametrize("room", [1, 3])
async def test_a_cue_that_does_not_fit_is_dropped_with_a_warning_and_the_answer_comes(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    caplog: pytest.LogCaptureFixture,
    style: ReplyStyle,
    room: int,
) -> None:
    generator = says(tokenizer, "Hello!")
    plain = tokenizer.encode_chat([system(PERSONA), user("Hi")])
    replier = make(generator, style=style, max_context=len(plain) + room)
    with caplog.at_level(logging.WARNING, logger="server"):
        reply = await ask(replier, [user("Hi")])
    assert "without a cue" in the_warning(caplog)
    ((prompt_ids, submitted),) = generator.submitted
    assert prompt_ids == plain and reply.num_prompt_tokens == len(plain)
    assert submitted.max_tokens == room
    assert reply.sentiment is not None and reply.sentiment.label == POSITIVE
    assert "".join(await read(reply)) == "Hello!"


async def test_a_cue_that_just_fits_is_added(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    generator = FakeGenerator()
    cued = tokenizer.encode_chat([system(PERSONA), user("Hi" + cue(POSITIVE))])
    with caplog.at_level(logging.WARNING, logger="server"):
        await ask(make(generator, max_context=len(cued) + 1), [user("Hi")])
    assert generator.prompt_ids == cued
    assert caplog.records == []


async def test_a_cue_that_the_template_refuses_is_dropped_with_a_warning_and_the_answer_comes(
    make: Callable[..., Replier], strict: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    generator = says(strict, "Hello!")
    replier = make(generator, style=BEHIND, with_tokenizer=strict)
    with caplog.at_level(logging.WARNING, logger="server"):
        reply = await ask(replier, [user("Hi")])
    assert "System message must be at the beginning" in the_warning(caplog)
    assert generator.prompt_ids == strict.encode_chat([system(PERSONA), user("Hi")])
    assert reply.sentiment is not None and reply.sentiment.label == POSITIVE
    assert "".join(await read(reply)) == "Hello!"


@pytest.mark.parametrize("style", [STYLE, IN_SYSTEM], ids=lambda style: style.cue_position)
async def test_a_template_with_one_system_message_takes_a_cue_within_a_message(
    make: Callable[..., Replier],
    strict: ChatTokenizer,
    caplog: pytest.LogCaptureFixture,
    style: ReplyStyle,
) -> None:
    generator = FakeGenerator()
    with caplog.at_level(logging.WARNING, logger="server"):
        await ask(make(generator, style=style, with_tokenizer=strict), [user("Hi")])
    assert cue(POSITIVE) in text_of(strict, generator.prompt_ids)
    assert caplog.records == []


# --- limits ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "room", "given"), [(50, 100, 50), (50, 50, 50), (50, 49, 49), (50, 1, 1), (1, 9, 1)]
)
async def test_max_tokens_is_capped_by_the_room_in_the_context(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, asked: int, room: int, given: int
) -> None:
    generator = FakeGenerator()
    num_prompt = len(tokenizer.encode_chat([user("Hi")]))
    replier = make(generator, max_context=num_prompt + room)
    params = SamplingParams(max_tokens=asked, temperature=0.5, top_k=7, seed=3)
    await ask(replier, [user("Hi")], params=params, with_sentiment=False)
    ((_, submitted),) = generator.submitted
    assert submitted == SamplingParams(max_tokens=given, temperature=0.5, top_k=7, seed=3)


async def test_the_cue_counts_when_max_tokens_is_capped(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = FakeGenerator()
    num_prompt = len(tokenizer.encode_chat([system(PERSONA), user("Hi" + cue(POSITIVE))]))
    await ask(make(generator, max_context=num_prompt + 5), [user("Hi")])
    ((prompt_ids, submitted),) = generator.submitted
    assert len(prompt_ids) == num_prompt
    assert submitted.max_tokens == 5


@pytest.mark.parametrize("with_sentiment", [True, False])
@pytest.mark.parametrize("excess", [0, 1, 100])
async def test_a_conversation_too_long_is_refused_with_the_numbers_before_any_pass(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, with_sentiment: bool, excess: int
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier()
    messages = [system("Be brief."), user("Hello there! " * 30)]
    num_prompt = len(tokenizer.encode_chat(messages))
    replier = make(generator, classifier, max_context=num_prompt - excess)
    with pytest.raises(ContextLengthError) as caught:
        await ask(replier, messages, with_sentiment=with_sentiment)
    assert f"{num_prompt - excess} tokens" in caught.value.message
    assert f"has {num_prompt} " in caught.value.message
    assert caught.value.param == "messages"
    assert caught.value.code == "context_length_exceeded"
    assert classifier.asked == []
    assert generator.submitted == []


@pytest.mark.parametrize("with_sentiment", [True, False])
async def test_a_conversation_that_the_template_refuses_is_an_invalid_request(
    make: Callable[..., Replier], with_sentiment: bool
) -> None:
    generator, classifier = FakeGenerator(), FakeClassifier()
    refusing = cast(ChatTokenizer, RefusingTokenizer())
    replier = make(generator, classifier, with_tokenizer=refusing)
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        await ask(replier, [user("a"), user("b")], with_sentiment=with_sentiment)
    assert caught.value.param == "messages"
    assert classifier.asked == [] and generator.submitted == []


# --- reading the reply ----------------------------------------------------------------


async def test_the_pieces_joined_are_the_text_and_the_tokens_are_counted(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    text = "你好呀！😄 Nice to see you, 小明。"
    generator = says(tokenizer, text)
    reply = await ask(make(generator), [user("Hi")])
    assert (reply.num_completion_tokens, reply.choices[0].finish_reason) == (0, None)
    pieces = await read(reply)
    assert "".join(pieces) == text
    assert all(pieces), "an empty piece is no piece"
    assert reply.num_completion_tokens == len(tokenizer.encode_text(text))
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("reason", "word"), [(FinishReason.STOP, "stop"), (FinishReason.LENGTH, "length")]
)
async def test_the_finish_reason_is_the_engines_in_openais_words(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, reason: FinishReason, word: str
) -> None:
    reply = await ask(
        make(says(tokenizer, "Hello", FinishedEvent(reason))), [user("Hi")], stop=["!"]
    )
    assert "".join(await read(reply)) == "Hello"
    assert reply.choices[0].finish_reason == word


async def test_an_empty_reply_has_no_pieces_and_ends_with_stop(
    make: Callable[..., Replier],
) -> None:
    reply = await ask(make(FakeGenerator()), [user("Hi")])
    assert await read(reply) == []
    assert (reply.choices[0].finish_reason, reply.num_completion_tokens) == ("stop", 0)


@pytest.mark.parametrize(
    ("text", "stop", "given"),
    [
        ("Hello there. Bye.", ["there"], "Hello "),
        ("你好呀！再见。", ["！"], "你好呀"),
        ("gut 😄 so", ["😄", "so"], "gut "),
        ("gut 😄 so", ["so", "x"], "gut 😄 "),
    ],
)
async def test_a_stop_string_ends_the_reply_with_stop_and_aborts_the_rest(
    make: Callable[..., Replier],
    tokenizer: ChatTokenizer,
    text: str,
    stop: list[str],
    given: str,
) -> None:
    # Without the stop string the reply would end with `length`.
    generator = says(tokenizer, text + " and so on", FinishedEvent(FinishReason.LENGTH))
    reply = await ask(make(generator), [user("Hi")], stop=stop)
    assert "".join(await read(reply)) == given
    assert reply.choices[0].finish_reason == "stop"
    assert generator.num_aborts >= 1
    assert 0 < reply.num_completion_tokens < len(generator.events) - 1


async def test_text_that_only_resembles_a_stop_string_comes_at_the_end(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    reply = await ask(make(says(tokenizer, "Hello th")), [user("Hi")], stop=["there"])
    assert "".join(await read(reply)) == "Hello th"
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (FailedEvent(ValueError("bad logits")), ValueError),
        (AbortedEvent(), SequenceAbortedError),
    ],
)
async def test_a_sequence_that_fails_fails_the_reply_without_a_finish_reason(
    make: Callable[..., Replier], tokenizer: ChatTokenizer, end: Event, error: type[Exception]
) -> None:
    generator = says(tokenizer, "Hello", end)
    reply = await ask(make(generator), [user("Hi")])
    with pytest.raises(error):
        await read(reply)
    assert reply.choices[0].finish_reason is None
    assert generator.num_aborts >= 1


async def test_a_reader_that_stops_reading_aborts_the_sequence(
    make: Callable[..., Replier], tokenizer: ChatTokenizer
) -> None:
    generator = says(tokenizer, "Hello there, how are you?")
    reply = await ask(make(generator), [user("Hi")])
    async with aclosing(reply.choices[0].pieces()) as pieces:
        assert await bounded(anext(pieces))
        assert generator.num_aborts == 0
    assert generator.num_aborts == 1
    assert reply.choices[0].finish_reason is None


async def test_an_unread_reply_can_be_aborted_any_number_of_times(
    make: Callable[..., Replier],
) -> None:
    generator = FakeGenerator()
    reply = await ask(make(generator), [user("Hi")])
    reply.abort()
    reply.abort()
    assert generator.num_aborts == 2
