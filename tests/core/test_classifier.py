"""The analyst with a fake scorer: its arithmetic, its cache, and one pass for equal texts."""

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import pytest

from server.core.classifier import Classification, Classifier, normalise
from server.core.engine import Scores
from server.core.tasks import Label, Task, inline_task
from server.core.tokenizer import ChatTokenizer
from server.errors import ContextLengthError

T = TypeVar("T")

BOUND_S = 20


class FakeTokenizer:
    """One id per character, so that a prompt can be read back."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode_text("|".join(message["content"] for message in messages))

    def encode_chats(
        self, messages: list[dict[str, str]], endings: list[dict[str, str]]
    ) -> tuple[list[int], list[list[int]]]:
        shared = self.encode_text("".join(f"{message['content']}|" for message in messages))
        return shared, [self.encode_text(message["content"]) for message in endings]


class FakeScorer:
    """Gives the log-probabilities it was made with; `gate` holds its answers back."""

    def __init__(self, *logprobs: float) -> None:
        self.logprobs = list(logprobs)
        self.calls: list[tuple[str, list[str]]] = []
        self.shared: list[str] = []
        self.pinned: list[bool] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_cancelled = 0
        self.error: Exception | None = None

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        num_shared: int,
        is_pinned: bool,
    ) -> Scores:
        self.calls.append(
            ("".join(map(chr, prompt_ids)), ["".join(map(chr, ids)) for ids in continuations])
        )
        self.pinned.append(is_pinned)
        self.shared.append("".join(map(chr, prompt_ids[:num_shared])))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return Scores(self.logprobs, num_cached=0)


def make(
    scorer: FakeScorer, *, cache_size: int = 10, max_context: int = 1000, pinned: Task | None = None
) -> Classifier:
    return Classifier(
        scorer,
        cast(ChatTokenizer, FakeTokenizer()),
        max_context=max_context,
        cache_size=cache_size,
        pinned_tasks=[pinned] if pinned else [],
    )


def task(name: str = "mood", **changes: Any) -> Task:
    labels = (
        Label(value="up", text="good"),
        Label(value="down", text="bad"),
        Label(value="flat", text="meh"),
    )
    fields = {"name": name, "instructions": "Judge.", "labels": labels}
    return Task(**cast(dict[str, Any], fields | changes))


def up() -> FakeScorer:
    """A scorer that says `up`."""
    return FakeScorer(math.log(0.5), math.log(0.2), math.log(0.1))


async def bounded(awaitable: Awaitable[T]) -> T:
    """The result, or a failed test in place of one that hangs."""
    return await asyncio.wait_for(awaitable, BOUND_S)


async def until(condition: Callable[[], bool]) -> None:
    """Lets the other coroutines run until the condition holds."""
    for _ in range(100):
        if condition():
            return
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
    raise AssertionError("it never came to that")


def start(
    classifier: Classifier, text: str, of: Task | None = None
) -> asyncio.Task[Classification]:
    return asyncio.create_task(classifier.classify(of or task(), text))


async def settle() -> None:
    """Lets every coroutine that can run do so."""
    for _ in range(10):
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()


@pytest.fixture
async def complaints() -> list[str]:
    """What the event loop has to complain about: errors that reach nobody else."""
    heard: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _, context: heard.append(f"{context['message']}: {context.get('exception')!r}")
    )
    return heard


# --- arithmetic -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "probabilities", "label"),
    [
        ((0.5, 0.2, 0.1), (0.625, 0.25, 0.125), "up"),
        ((0.1, 0.2, 0.5), (0.125, 0.25, 0.625), "flat"),
        ((0.01, 0.02, 0.01), (0.25, 0.5, 0.25), "down"),
        ((0.3, 0.3, 0.4), (0.3, 0.3, 0.4), "flat"),
        # A tie goes to the label that stands first in the task.
        ((0.2, 0.2, 0.1), (0.4, 0.4, 0.2), "up"),
    ],
)
async def test_probabilities_are_the_shares_of_the_labels_among_themselves(
    shares: tuple[float, ...], probabilities: tuple[float, ...], label: str
) -> None:
    result = await make(FakeScorer(*map(math.log, shares))).classify(task(), "x")
    assert [x.value for x, _ in result.probabilities] == ["up", "down", "flat"]
    assert [p for _, p in result.probabilities] == pytest.approx(probabilities)
    assert result.label.value == label
    assert result.confidence == pytest.approx(max(probabilities))


async def test_probabilities_of_very_unlikely_labels_do_not_underflow() -> None:
    result = await make(FakeScorer(-5000.0, -5001.0, -6000.0)).classify(task(), "x")
    # e / (e + 1) and 1 / (e + 1)
    expected = (0.7310585786300049, 0.2689414213699951, 0.0)
    assert [p for _, p in result.probabilities] == pytest.approx(expected)
    assert result.label.value == "up"


async def test_probabilities_add_up_to_one() -> None:
    result = await make(FakeScorer(-0.1, -3.7, -11.3)).classify(task(), "x")
    assert sum(p for _, p in result.probabilities) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("changes", "label", "confidence"),
    [
        # Shares 0.5, 0.2, 0.1: mass 0.8, probabilities 0.625, 0.25, 0.125.
        ({}, "up", 0.625),
        ({"fallback": "flat"}, "up", 0.625),
        ({"fallback": "flat", "min_confidence": 0.62}, "up", 0.625),
        ({"fallback": "flat", "min_confidence": 0.63}, "flat", 0.125),
        ({"fallback": "flat", "min_label_mass": 0.79}, "up", 0.625),
        ({"fallback": "flat", "min_label_mass": 0.81}, "flat", 0.125),
        ({"fallback": "down", "min_confidence": 0.5, "min_label_mass": 0.9}, "down", 0.25),
        ({"fallback": "down", "min_confidence": 0.9, "min_label_mass": 0.5}, "down", 0.25),
        ({"fallback": "up", "min_confidence": 1.0}, "up", 0.625),
        # Unsure, but there is nothing to fall back to.
        ({"min_confidence": 1.0, "min_label_mass": 1.0}, "up", 0.625),
    ],
)
async def test_the_fallback_answers_where_the_model_is_unsure(
    changes: dict[str, Any], label: str, confidence: float
) -> None:
    result = await make(up()).classify(task(**changes), "x")
    assert result.label.value == label
    assert result.confidence == pytest.approx(confidence)
    assert [p for _, p in result.probabilities] == pytest.approx((0.625, 0.25, 0.125))


async def test_exactly_the_least_confidence_is_enough() -> None:
    asked = inline_task("Judge.", ["a", "b"]).model_copy(
        update={"min_confidence": 0.5, "fallback": "b"}
    )
    result = await make(FakeScorer(-1.0, -1.0)).classify(asked, "x")
    assert result.label.value == "a"


async def test_the_labels_texts_are_scored_after_the_analysts_prompt() -> None:
    scorer = up()
    result = await make(scorer).classify(task(), "Hello")
    assert scorer.calls == [("Judge.|Hello", ["good", "bad", "meh"])]
    assert result.num_prompt_tokens == len("Judge.|Hello")


# --- normalising ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Hello", "Hello"),
        ("  Hello \t\r\n\n there\u3000\u00a0! ", "Hello there !"),
        ("cafe\u0301", "café"),
        ("\u1100\u1161", "가"),
        ("", ""),
        (" \n ", ""),
        # What may change the mood stays.
        ("HELLO!!! 😄", "HELLO!!! 😄"),
        ("①ﬁ", "①ﬁ"),
    ],
)
def test_texts_are_compared_in_nfc_with_single_spaces(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normal) == normal


async def test_texts_that_differ_in_white_space_or_composition_share_a_result() -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.classify(task(), "café is  good")
    again = await classifier.classify(task(), "\ncafe\u0301 is good ")
    assert again.is_cached
    assert scorer.calls == [("Judge.|café is good", ["good", "bad", "meh"])]


async def test_texts_that_differ_in_case_are_judged_apart() -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.classify(task(), "ok")
    assert not (await classifier.classify(task(), "OK")).is_cached
    assert len(scorer.calls) == 2


# --- cache ----------------------------------------------------------------------------


async def test_a_second_time_the_same_result_comes_from_the_cache() -> None:
    scorer = up()
    classifier = make(scorer)
    first = await classifier.classify(task(), "x")
    second = await classifier.classify(task(), "x")
    assert (first.is_cached, second.is_cached) == (False, True)
    assert second.label == first.label
    assert second.probabilities == first.probabilities
    assert second.num_prompt_tokens == first.num_prompt_tokens
    assert len(scorer.calls) == 1


async def test_hits_and_misses_are_counted() -> None:
    classifier = make(up())
    assert (classifier.num_hits, classifier.num_misses) == (0, 0)
    for text in ("a", "b", "a", "a", "c", "b"):
        await classifier.classify(task(), text)
    assert (classifier.num_hits, classifier.num_misses) == (3, 3)


async def test_cache_size_zero_keeps_nothing(complaints: list[str]) -> None:
    scorer = up()
    classifier = make(scorer, cache_size=0)
    results = [await classifier.classify(task(), "x") for _ in range(3)]
    assert not any(result.is_cached for result in results)
    assert len(scorer.calls) == 3
    assert (classifier.num_hits, classifier.num_misses) == (0, 3)
    assert complaints == []


async def test_the_result_not_asked_for_longest_makes_room() -> None:
    classifier = make(up(), cache_size=2)
    for text in ("a", "b", "a", "c"):
        await classifier.classify(task(), text)
    assert (await classifier.classify(task(), "a")).is_cached
    assert (await classifier.classify(task(), "c")).is_cached
    assert not (await classifier.classify(task(), "b")).is_cached


@pytest.mark.parametrize(
    "other",
    [
        task("other"),
        task(instructions="Judge well."),
        task(labels=(*task().labels[:2], Label(value="flat", text="so so"))),
        task(fallback="flat"),
        task(fallback="flat", min_label_mass=0.5),
    ],
    ids=["name", "instructions", "labels", "fallback", "min_label_mass"],
)
async def test_tasks_and_versions_of_a_task_do_not_share_results(other: Task) -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.classify(task(), "x")
    assert not (await classifier.classify(other, "x")).is_cached
    assert (await classifier.classify(task(), "x")).is_cached
    assert (await classifier.classify(other, "x")).is_cached
    assert len(scorer.calls) == 2


async def test_inline_tasks_of_different_clients_do_not_share_results() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    classifier = make(scorer)
    first = await classifier.classify(inline_task("Judge.", ["a", "b"]), "x")
    second = await classifier.classify(inline_task("Judge.", ["c", "d"]), "x")
    assert (first.label.value, second.label.value) == ("a", "c")


# --- one pass for equal texts ---------------------------------------------------------


async def test_equal_texts_in_flight_are_computed_once() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    waiting = [start(classifier, text) for text in ("x", " x ", "x")]
    other = start(classifier, "y")
    await until(lambda: len(scorer.calls) == 2)
    scorer.gate.set()
    results = await bounded(asyncio.gather(*waiting, other))
    assert [result.label.value for result in results] == ["up"] * 4
    assert [prompt for prompt, _ in scorer.calls] == ["Judge.|x", "Judge.|y"]
    assert (classifier.num_hits, classifier.num_misses) == (2, 2)


async def test_equal_texts_in_flight_are_computed_once_even_without_a_cache() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer, cache_size=0)
    waiting = [start(classifier, "x") for _ in range(3)]
    await until(lambda: len(scorer.calls) == 1)
    scorer.gate.set()
    await bounded(asyncio.gather(*waiting))
    assert len(scorer.calls) == 1


async def test_equal_texts_of_different_tasks_in_flight_are_computed_apart() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    waiting = [start(classifier, "x", of) for of in (task(), task("other"), task(cue="{text}"))]
    await until(lambda: len(scorer.calls) == 3)
    scorer.gate.set()
    await bounded(asyncio.gather(*waiting))


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_one_waiter_that_leaves_takes_nothing_from_the_others(leaver: int) -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    waiting = [start(classifier, "x") for _ in range(3)]
    await until(lambda: len(scorer.calls) == 1)
    waiting[leaver].cancel()
    await settle()
    assert waiting[leaver].cancelled()
    assert scorer.num_cancelled == 0
    scorer.gate.set()
    stayed = [waiter for i, waiter in enumerate(waiting) if i != leaver]
    results = await bounded(asyncio.gather(*stayed))
    assert [result.label.value for result in results] == ["up", "up"]
    assert len(scorer.calls) == 1
    assert (await classifier.classify(task(), "x")).is_cached


async def test_when_all_waiters_have_left_the_pass_stops_and_a_newcomer_starts_afresh() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    waiting = [start(classifier, "x") for _ in range(3)]
    await until(lambda: len(scorer.calls) == 1)
    for waiter in waiting:
        waiter.cancel()
    await until(lambda: scorer.num_cancelled == 1)
    assert all(waiter.cancelled() for waiter in waiting)
    scorer.gate.set()
    result = await bounded(start(classifier, "x"))
    assert result.label.value == "up" and not result.is_cached
    assert len(scorer.calls) == 2


async def test_a_newcomer_joins_a_pass_that_somebody_else_has_left() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    first, second = start(classifier, "x"), start(classifier, "x")
    await until(lambda: len(scorer.calls) == 1)
    first.cancel()
    await settle()
    third = start(classifier, "x")
    await settle()
    second.cancel()
    await settle()
    assert scorer.num_cancelled == 0
    scorer.gate.set()
    assert (await bounded(third)).label.value == "up"
    assert len(scorer.calls) == 1


class SlowToStop(FakeScorer):
    """Its first call takes its time to notice that it is cancelled."""

    def __init__(self, *logprobs: float) -> None:
        super().__init__(*logprobs)
        self.gate.clear()
        self.may_stop = asyncio.Event()
        self.last_words: Exception | None = None

    async def score(
        self,
        prompt_ids: list[int],
        continuations: list[list[int]],
        *,
        num_shared: int,
        is_pinned: bool,
    ) -> Scores:
        try:
            return await super().score(
                prompt_ids, continuations, num_shared=num_shared, is_pinned=is_pinned
            )
        except asyncio.CancelledError:
            await self.may_stop.wait()
            if self.last_words is not None:
                raise self.last_words from None
            raise


async def test_a_newcomer_does_not_join_a_pass_that_is_being_cancelled() -> None:
    scorer = SlowToStop(-1.0, -2.0, -3.0)
    classifier = make(scorer)
    first = start(classifier, "x")
    await until(lambda: len(scorer.calls) == 1)
    first.cancel()
    await until(lambda: scorer.num_cancelled == 1)
    newcomer = start(classifier, "x")
    await until(lambda: len(scorer.calls) == 2)
    # The old pass ends only now; it must not take the new one with it.
    scorer.may_stop.set()
    await settle()
    another = start(classifier, "x")
    await settle()
    scorer.gate.set()
    results = await bounded(asyncio.gather(newcomer, another))
    assert [result.label.value for result in results] == ["up", "up"]
    assert len(scorer.calls) == 2


async def test_a_pass_that_fails_when_nobody_waits_any_more_makes_no_noise(
    complaints: list[str],
) -> None:
    scorer = SlowToStop()
    scorer.last_words = ValueError("too late")
    first = start(make(scorer), "x")
    await until(lambda: len(scorer.calls) == 1)
    first.cancel()
    await until(lambda: scorer.num_cancelled == 1)
    scorer.may_stop.set()
    await settle()
    del first
    gc.collect()
    await settle()
    assert complaints == []


# --- failures -------------------------------------------------------------------------


async def test_a_failing_pass_reaches_everybody_who_waits_and_is_not_cached() -> None:
    scorer = up()
    scorer.gate.clear()
    scorer.error = RuntimeError("engine trouble")
    classifier = make(scorer)
    waiting = [start(classifier, "x") for _ in range(3)]
    await until(lambda: len(scorer.calls) == 1)
    scorer.gate.set()
    results = await bounded(asyncio.gather(*waiting, return_exceptions=True))
    assert results == [scorer.error] * 3
    scorer.error = None
    result = await bounded(start(classifier, "x"))
    assert result.label.value == "up" and not result.is_cached
    assert len(scorer.calls) == 2


@pytest.mark.parametrize(
    ("max_context", "fits"),
    # "Judge.|xyz" has 10 tokens, "good" 4 and "bad" 3, of which the last are only looked at.
    [(1000, True), (18, True), (17, False), (10, False), (1, False)],
)
async def test_a_text_that_leaves_no_room_for_the_labels_is_refused_unscored(
    max_context: int, fits: bool
) -> None:
    scorer = up()
    classifier = make(scorer, max_context=max_context)
    if fits:
        assert (await classifier.classify(task(), "xyz")).label.value == "up"
        return
    with pytest.raises(ContextLengthError) as caught:
        await classifier.classify(task(), "xyz")
    assert scorer.calls == []
    assert caught.value.param == "input"
    assert caught.value.code == "context_length_exceeded"
    assert str(max_context) in caught.value.message


async def test_a_text_too_long_is_refused_every_time() -> None:
    classifier = make(up(), max_context=17)
    for _ in range(2):
        with pytest.raises(ContextLengthError):
            await classifier.classify(task(), "xyz")
    assert (await classifier.classify(task(), "x")).label.value == "up"


# --- questions about a conversation ---------------------------------------------------

CONVERSATION = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Hi  there"}]


def questions(*texts: str) -> list[Task]:
    return [task(instructions=text) for text in texts]


async def test_questions_stand_behind_the_conversation_which_is_left_as_it_is() -> None:
    scorer = up()
    results = await make(scorer).answer(questions("Good?", "Bad?"), CONVERSATION)
    labels = ["good", "bad", "meh"]
    assert scorer.calls == [("Judge.|Hi  there|Good?", labels), ("Judge.|Hi  there|Bad?", labels)]
    assert scorer.shared == ["Judge.|Hi  there|"] * 2
    assert [result.num_prompt_tokens for result in results] == [22, 21]


async def test_one_question_is_computed_before_the_others_which_come_together() -> None:
    scorer = up()
    scorer.gate.clear()
    answers = asyncio.create_task(make(scorer).answer(questions("a", "b", "c"), CONVERSATION))
    await settle()
    assert len(scorer.calls) == 1
    first_gate, scorer.gate = scorer.gate, asyncio.Event()
    first_gate.set()
    await until(lambda: len(scorer.calls) == 3)
    scorer.gate.set()
    assert len(await bounded(answers)) == 3


async def test_known_answers_do_not_count_as_the_first() -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.answer(questions("a"), CONVERSATION)
    scorer.gate.clear()
    answers = asyncio.create_task(classifier.answer(questions("a", "b", "c"), CONVERSATION))
    await settle()
    assert [prompt[-1] for prompt, _ in scorer.calls] == ["a", "b"]
    scorer.gate.set()
    assert [result.is_cached for result in await bounded(answers)] == [True, False, False]


async def test_equal_questions_are_computed_once_and_in_their_place() -> None:
    scorer = up()
    results = await make(scorer, cache_size=0).answer(questions("a", "b", "b", "c"), CONVERSATION)
    assert sorted(prompt[-1] for prompt, _ in scorer.calls) == ["a", "b", "c"]
    assert [result.num_prompt_tokens for result in results] == [18] * 4


async def test_answers_about_other_conversations_are_not_taken() -> None:
    scorer = up()
    classifier = make(scorer)
    for text in ("Hi there", "Hi  there"):
        [answer] = await classifier.answer(questions("a"), [{"role": "user", "content": text}])
        assert not answer.is_cached


async def test_what_was_computed_of_the_shared_tokens_is_told() -> None:
    [answer] = await make(up()).answer(questions("a"), CONVERSATION)
    assert answer.num_kept_tokens == len("Judge.|Hi  there|")


async def test_a_question_that_does_not_fit_ends_the_others() -> None:
    scorer = up()
    classifier = make(scorer, max_context=40)
    with pytest.raises(ContextLengthError) as caught:
        await classifier.answer(questions("a", "b", "c" * 40), CONVERSATION)
    assert caught.value.param == "input"


async def test_a_task_of_a_client_is_never_taken_for_the_servers_of_that_name() -> None:
    scorer, own = up(), task("inline")
    classifier = make(scorer, pinned=own)
    await bounded(classifier.classify(own, "text"))
    await bounded(classifier.classify(inline_task("Judge otherwise.", ["a", "b", "c"]), "text"))
    assert scorer.pinned == [True, False]
    assert classifier.label_counts == {("inline", "up"): 1}
