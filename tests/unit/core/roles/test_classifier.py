"""The analyst with a fake scorer: its arithmetic, its cache, and one pass for equal texts."""

import asyncio
import gc
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import pytest

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Scores
from server.core.engine.work import Work
from server.core.roles.classification import Classification
from server.core.roles.classifier import Classifier
from server.core.roles.heads import LinearHead
from server.core.roles.judges import HeadJudge, Judge, LabelJudge
from server.core.roles.prompts import MAX_LABEL_TOKENS, REFERENCE_TEXTS, normalise
from server.core.roles.tasks import Label, Task, inline_task
from server.core.text.tokenizer import ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

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
    """Returns the log-probabilities it was made with; `gate` holds its answers back.

    by_text: log-probabilities after other texts.
    states: hidden states by layer, which are returned if requested.
    """

    def __init__(self, *logprobs: float) -> None:
        self.logprobs = list(logprobs)
        self.by_text: dict[str, list[float]] = {}
        self.states: dict[int, list[float]] = {}
        self.calls: list[tuple[str, list[str]]] = []
        self.layers: list[tuple[int, ...]] = []
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
        layers: tuple[int, ...] = (),
        num_shared: int = 0,
        is_pinned: bool = False,
        work: Work | None = None,
        adapter: Adapter = BASE,
    ) -> Scores:
        prompt = "".join(map(chr, prompt_ids))
        self.calls.append((prompt, ["".join(map(chr, ids)) for ids in continuations]))
        self.layers.append(layers)
        self.pinned.append(is_pinned)
        self.shared.append(prompt[:num_shared])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        logprobs = self.by_text.get(prompt.partition("|")[2], self.logprobs)
        states = [self.states[layer] for layer in layers]
        return Scores(
            logprobs[: len(continuations)],
            num_cached=0,
            hidden_states=np.array(states, dtype=np.float32) if states else None,
        )

    @property
    def texts(self) -> list[str]:
        """The texts of the prompts, without the instruction."""
        return [prompt.partition("|")[2] for prompt, _ in self.calls]


class EveryTaskJudged(dict[str, Judge]):
    """Has a judge for every task: the scores of its labels as they are."""

    def __contains__(self, version: object) -> bool:
        return True

    def get(self, version: str, default: object = None) -> Judge:
        return LabelJudge()


def make(
    scorer: FakeScorer,
    *,
    cache_size: int = 10,
    max_context: int = 1000,
    judges: Mapping[str, Judge] | None = None,
) -> Classifier:
    return Classifier(
        scorer,
        cast(ChatTokenizer, FakeTokenizer()),
        max_context=max_context,
        cache_size=cache_size,
        judges=EveryTaskJudged() if judges is None else judges,
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
    """Lets other coroutines and threads run until the condition is true."""
    async with asyncio.timeout(BOUND_S):
        # Any condition, which may come true on a thread.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


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
    """Errors that only the event loop's exception handler gets."""
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
        # A tie goes to the label that is first in the task.
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
async def test_the_fallback_is_given_if_the_model_is_unsure(
    changes: dict[str, Any], label: str, confidence: float
) -> None:
    result = await make(up()).classify(task(**changes), "x")
    assert result.label.value == label
    assert result.confidence == pytest.approx(confidence)
    assert [p for _, p in result.probabilities] == pytest.approx((0.625, 0.25, 0.125))


async def test_a_confidence_equal_to_the_minimum_is_enough() -> None:
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


async def test_a_result_has_no_score_where_the_task_has_no_poles() -> None:
    assert (await make(up()).classify(task(), "x")).score is None


@pytest.mark.parametrize(
    ("poles", "score"),
    # Of the probabilities 0.625, 0.25, 0.125.
    [(("up", "down"), 0.375), (("down", "up"), -0.375), (("flat", "up"), -0.5)],
)
async def test_the_score_is_the_difference_of_the_poles_probabilities(
    poles: tuple[str, str], score: float
) -> None:
    result = await make(up()).classify(task(poles=poles), "x")
    assert result.score == pytest.approx(score)


async def test_the_fallback_leaves_the_score_as_it_is() -> None:
    asked = task(poles=("up", "down"), fallback="flat", min_confidence=0.9)
    result = await make(up()).classify(asked, "x")
    assert result.label.value == "flat"
    assert result.score == pytest.approx(0.375)


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


async def test_texts_that_differ_in_case_are_judged_separately() -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.classify(task(), "ok")
    assert not (await classifier.classify(task(), "OK")).is_cached
    assert len(scorer.calls) == 2


# --- cache ----------------------------------------------------------------------------


async def test_a_repeated_text_gets_its_result_from_the_cache() -> None:
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


async def test_the_least_recently_used_result_is_evicted() -> None:
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


async def test_equal_texts_of_different_tasks_in_flight_are_computed_separately() -> None:
    scorer = up()
    scorer.gate.clear()
    classifier = make(scorer)
    shining = task(labels=(Label(value="up", text="good", emoji="🌞"), *task().labels[1:]))
    waiting = [start(classifier, "x", of) for of in (task(), task("other"), shining)]
    await until(lambda: len(scorer.calls) == 3)
    scorer.gate.set()
    await bounded(asyncio.gather(*waiting))


@pytest.mark.parametrize("leaver", [0, 1, 2])
async def test_one_waiter_that_leaves_does_not_stop_the_pass(leaver: int) -> None:
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


async def test_when_all_waiters_have_left_the_pass_stops_and_a_newcomer_starts_another() -> None:
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


async def test_a_newcomer_joins_a_pass_that_another_waiter_has_left() -> None:
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

    async def score(self, *args: Any, **kwargs: Any) -> Scores:
        try:
            return await super().score(*args, **kwargs)
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


async def test_a_pass_that_fails_without_waiters_reports_nothing(
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


async def test_a_failing_pass_fails_every_waiter_and_is_not_cached() -> None:
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
async def test_a_text_that_leaves_no_room_for_the_labels_is_refused_before_scoring(
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


# --- the judges of the server's tasks -------------------------------------------------

# Of the two numbers of a state the head makes the scores of up and down; flat has its bias.
HEAD = LinearHead(
    np.zeros(2, dtype=np.float32),
    np.array([[1, 0, 0], [0, 1, 0]], dtype=np.float32),
    np.array([0, 0, 1], dtype=np.float32),
)


def headed(scorer: FakeScorer, of: Task, **options: Any) -> Classifier:
    """A classifier that judges the task by a head after the third layer."""
    return make(scorer, judges={of.version: HeadJudge(3, HEAD)}, **options)


def reads(*state: float) -> FakeScorer:
    """A scorer with this state after the third layer, and without label scores."""
    scorer = FakeScorer()
    scorer.states = {3: list(state)}
    return scorer


async def test_a_head_requests_its_layer_and_no_label_scores() -> None:
    scorer, judged = reads(2.0, 1.0), task()
    result = await headed(scorer, judged).classify(judged, "Hello")
    assert scorer.calls == [("Judge.|Hello", [])]
    assert scorer.layers == [(3,)]
    assert scorer.shared == ["Judge.|"] and scorer.pinned == [True]
    assert result.num_prompt_tokens == len("Judge.|Hello")
    assert result.num_kept_tokens == len("Judge.|")


@pytest.mark.parametrize(
    ("state", "label"), [((2.0, 1.0), "up"), ((-3.0, 4.0), "down"), ((0.0, 0.5), "flat")]
)
async def test_probabilities_of_a_head_are_the_softmax_of_its_scores(
    state: tuple[float, float], label: str
) -> None:
    judged = task(poles=("up", "down"))
    result = await headed(reads(*state), judged).classify(judged, "x")
    weights = [math.exp(state[0]), math.exp(state[1]), math.exp(1)]
    expected = [weight / sum(weights) for weight in weights]
    assert [x.value for x, _ in result.probabilities] == ["up", "down", "flat"]
    assert [p for _, p in result.probabilities] == pytest.approx(expected)
    assert sum(p for _, p in result.probabilities) == pytest.approx(1.0)
    assert result.label.value == label
    assert result.confidence == pytest.approx(max(expected))
    assert result.score == pytest.approx(expected[0] - expected[1])


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"fallback": "flat"}, "up"),
        ({"fallback": "flat", "min_confidence": 0.9}, "flat"),
        # A head says nothing of how much of the model's probability the labels have.
        ({"fallback": "flat", "min_label_mass": 1.0}, "up"),
    ],
)
async def test_the_fallback_of_a_head_depends_on_the_confidence_only(
    changes: dict[str, Any], label: str
) -> None:
    judged = task(**changes)
    result = await headed(reads(2.0, 0.0), judged).classify(judged, "x")
    assert result.label.value == label


@pytest.mark.parametrize(("max_context", "fits"), [(11, True), (10, False), (1, False)])
async def test_a_head_needs_no_room_for_labels(max_context: int, fits: bool) -> None:
    scorer, judged = reads(2.0, 1.0), task()
    classifier = headed(scorer, judged, max_context=max_context)
    if fits:  # "Judge.|xyz" has 10 tokens
        assert (await classifier.classify(judged, "xyz")).label.value == "up"
        return
    with pytest.raises(ContextLengthError) as caught:
        await classifier.classify(judged, "xyz")
    assert scorer.calls == []
    assert caught.value.param == "input"
    assert str(max_context) in caught.value.message


async def test_a_head_accepts_labels_of_any_length() -> None:
    long = task(labels=(Label(value="up", text="x" * 2000), *task().labels[1:]))
    result = await headed(reads(2.0, 1.0), long).classify(long, "x")
    assert result.label.value == "up"


async def test_results_of_a_head_are_cached_and_counted_as_any_other() -> None:
    scorer, judged = reads(2.0, 1.0), task()
    classifier = headed(scorer, judged)
    results = [await classifier.classify(judged, text) for text in ("x", "x", "y")]
    assert [result.is_cached for result in results] == [False, True, False]
    assert len(scorer.calls) == 2
    assert classifier.label_counts == {("mood", "up"): 3}
    scorer.states = {3: [0.0, 5.0]}
    await classifier.classify(judged, "z")
    assert classifier.label_counts == {("mood", "up"): 3, ("mood", "down"): 1}


async def test_a_label_judges_prior_is_subtracted_before_its_temperature() -> None:
    judged = task()
    prior = (math.log(0.5), math.log(0.1), math.log(0.1))
    classifier = make(up(), judges={judged.version: LabelJudge(prior, temperature=2.0)})
    result = await classifier.classify(judged, "x")
    # Shares 0.5, 0.2, 0.1 of the model, over those of any text: 1, 2, 1.
    weights = [1.0, math.sqrt(2), 1.0]
    expected = [weight / sum(weights) for weight in weights]
    assert [p for _, p in result.probabilities] == pytest.approx(expected)
    assert result.label.value == "down"


@pytest.mark.parametrize(("least", "label"), [(0.79, "up"), (0.81, "flat")])
async def test_the_label_mass_is_the_models_own_whatever_the_prior(
    least: float, label: str
) -> None:
    judged = task(fallback="flat", min_label_mass=least)
    classifier = make(up(), judges={judged.version: LabelJudge((-9.0, -9.0, -9.0))})
    assert (await classifier.classify(judged, "x")).label.value == label


async def test_the_servers_tasks_are_warmed_up_without_measuring_or_counting() -> None:
    scorer, first, second = reads(2.0, 1.0), task("first"), task("second", instructions="How?")
    scorer.logprobs = [-1.0, -2.0, -3.0]
    judges: dict[str, Judge] = {
        first.version: HeadJudge(3, HEAD),
        second.version: LabelJudge((-1.0, -1.0, -1.0)),
    }
    classifier = make(scorer, judges=judges)
    await classifier.warm_up([first, second])
    assert scorer.calls == [("Judge.|", []), ("How?|", ["good", "bad", "meh"])]
    assert scorer.pinned == [True, True]
    assert classifier.label_counts == {}


# --- the prior of clients' own tasks --------------------------------------------------

OWN = inline_task("Own.", ["a", "b"])


async def test_the_prior_of_a_clients_task_is_subtracted() -> None:
    scorer = FakeScorer(math.log(0.6), math.log(0.2))  # of any text
    scorer.by_text = {"x": [math.log(0.6), math.log(0.4)]}
    classifier = make(scorer, judges={})
    result = await classifier.classify(OWN, "x")
    assert [p for _, p in result.probabilities] == pytest.approx((1 / 3, 2 / 3))
    assert result.label.value == "b"
    same = await classifier.classify(OWN, "y")
    assert [p for _, p in same.probabilities] == pytest.approx((0.5, 0.5))


async def test_the_prior_is_the_mean_of_the_log_probabilities() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    scorer.by_text = {text: [-0.1 * i, -4.0] for i, text in enumerate(REFERENCE_TEXTS)}
    result = await make(scorer, judges={}).classify(OWN, "x")
    mean = -0.1 * (len(REFERENCE_TEXTS) - 1) / 2
    odds = math.exp((-1.0 - mean) - (-2.0 + 4.0))
    assert result.probabilities[0][1] == pytest.approx(odds / (1 + odds))


async def test_the_prior_is_measured_before_the_text_on_the_reference_texts() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    result = await make(scorer, judges={}).classify(OWN, "x")
    labels = ["a", "b"]
    assert scorer.calls == [(f"Own.|{text}", labels) for text in (*REFERENCE_TEXTS, "x")]
    assert set(scorer.shared) == {"Own.|"}
    assert set(scorer.pinned) == {False} and set(scorer.layers) == {()}
    # It is none of the text's own tokens.
    assert result.num_prompt_tokens == len("Own.|x")


async def test_one_reference_text_is_computed_before_the_others() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    scorer.gate.clear()
    waiting = start(make(scorer, judges={}), "x", OWN)
    await settle()
    assert scorer.texts == list(REFERENCE_TEXTS[:1])
    first_gate, scorer.gate = scorer.gate, asyncio.Event()
    first_gate.set()
    await settle()
    assert scorer.texts == list(REFERENCE_TEXTS)
    scorer.gate.set()
    await bounded(waiting)
    assert scorer.texts == [*REFERENCE_TEXTS, "x"]


async def test_the_prior_is_measured_once_for_concurrent_and_later_texts() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    classifier = make(scorer, judges={})
    waiting = [start(classifier, text, OWN) for text in ("x", "y", "z", "x")]
    await bounded(asyncio.gather(*waiting))
    assert scorer.texts == [*REFERENCE_TEXTS, "x", "y", "z"]
    await bounded(classifier.classify(OWN, "later"))
    assert scorer.texts == [*REFERENCE_TEXTS, "x", "y", "z", "later"]
    assert (classifier.num_hits, classifier.num_misses) == (1, 4)
    # The same task, made anew by another request.
    await bounded(classifier.classify(inline_task("Own.", ["a", "b"]), "again"))
    assert scorer.texts[-2:] == ["later", "again"]


async def test_every_task_of_a_client_has_a_prior_of_its_own() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    classifier = make(scorer, judges={})
    for own in (OWN, inline_task("Own.", ["b", "a"]), inline_task("Other.", ["a", "b"])):
        await bounded(classifier.classify(own, "x"))
    assert scorer.texts == [*REFERENCE_TEXTS, "x"] * 3


async def test_without_a_cache_of_results_the_prior_is_still_measured_once() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    classifier = make(scorer, cache_size=0, judges={})
    for _ in range(2):
        await bounded(classifier.classify(OWN, "x"))
    assert scorer.texts == [*REFERENCE_TEXTS, "x", "x"]


async def test_a_classified_reference_text_is_not_a_cache_hit() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    classifier = make(scorer, judges={})
    result = await bounded(classifier.classify(OWN, REFERENCE_TEXTS[0]))
    assert not result.is_cached
    assert scorer.texts == [*REFERENCE_TEXTS, REFERENCE_TEXTS[0]]
    assert (classifier.num_hits, classifier.num_misses) == (0, 1)


async def test_a_failing_measurement_fails_every_waiter_and_is_not_cached(
    complaints: list[str],
) -> None:
    scorer = FakeScorer(-1.0, -2.0)
    scorer.error = RuntimeError("engine trouble")
    classifier = make(scorer, judges={})
    waiting = [start(classifier, text, OWN) for text in ("x", "y")]
    results = await bounded(asyncio.gather(*waiting, return_exceptions=True))
    assert results == [scorer.error] * 2
    assert scorer.texts == list(REFERENCE_TEXTS[:1])
    scorer.error = None
    await bounded(classifier.classify(OWN, "x"))
    assert scorer.texts == [REFERENCE_TEXTS[0], *REFERENCE_TEXTS, "x"]
    assert complaints == []


async def test_one_reference_text_that_fails_cancels_the_others(complaints: list[str]) -> None:
    class Failing(FakeScorer):
        async def score(self, *args: Any, **kwargs: Any) -> Scores:
            if len(self.calls) == 5:
                raise RuntimeError("engine trouble")
            return await super().score(*args, **kwargs)

    scorer = Failing(-1.0, -2.0)
    scorer.gate.clear()
    waiting = start(make(scorer, judges={}), "x", OWN)
    await settle()
    first_gate, scorer.gate = scorer.gate, asyncio.Event()
    first_gate.set()
    with pytest.raises(RuntimeError, match="engine trouble"):
        await bounded(waiting)
    assert len(scorer.calls) == 5 and scorer.num_cancelled == 4
    assert complaints == []


async def test_a_disconnect_of_the_only_waiter_stops_the_measurement(complaints: list[str]) -> None:
    scorer = FakeScorer(-1.0, -2.0)
    scorer.gate.clear()
    classifier = make(scorer, judges={})
    waiting = start(classifier, "x", OWN)
    await settle()
    first_gate, scorer.gate = scorer.gate, asyncio.Event()
    first_gate.set()
    await settle()
    assert len(scorer.calls) == len(REFERENCE_TEXTS)
    waiting.cancel()
    await settle()
    assert waiting.cancelled()
    assert scorer.num_cancelled == len(REFERENCE_TEXTS) - 1
    scorer.gate.set()
    # Half a measurement is none.
    await bounded(classifier.classify(OWN, "x"))
    assert scorer.texts == [*REFERENCE_TEXTS, *REFERENCE_TEXTS, "x"]
    assert complaints == []


async def test_a_measurement_goes_on_while_it_has_a_waiter() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    scorer.gate.clear()
    classifier = make(scorer, judges={})
    leaver, stayer = start(classifier, "x", OWN), start(classifier, "y", OWN)
    await settle()
    leaver.cancel()
    await settle()
    assert leaver.cancelled() and scorer.num_cancelled == 0
    scorer.gate.set()
    await bounded(stayer)
    assert scorer.texts == [*REFERENCE_TEXTS, "y"]


async def test_labels_of_a_client_that_are_too_long_are_refused_before_scoring() -> None:
    scorer = FakeScorer(-1.0, -2.0)
    own = inline_task("Own.", ["a" * MAX_LABEL_TOKENS, "b"])
    with pytest.raises(InvalidRequestError) as caught:
        await make(scorer, max_context=5000, judges={}).classify(own, "x")
    assert caught.value.param == "labels"
    assert scorer.calls == []


# --- questions about a conversation ---------------------------------------------------

CONVERSATION = [{"role": "system", "content": "Judge."}, {"role": "user", "content": "Hi  there"}]


def questions(*texts: str) -> list[Task]:
    return [task(instructions=text) for text in texts]


async def test_questions_follow_the_unchanged_conversation() -> None:
    scorer = up()
    results = await make(scorer).answer(questions("Good?", "Bad?"), CONVERSATION)
    labels = ["good", "bad", "meh"]
    assert scorer.calls == [("Judge.|Hi  there|Good?", labels), ("Judge.|Hi  there|Bad?", labels)]
    assert scorer.shared == ["Judge.|Hi  there|"] * 2
    assert [result.num_prompt_tokens for result in results] == [22, 21]


async def test_no_prior_is_subtracted_from_answers_to_questions() -> None:
    scorer = up()
    [asked] = questions("a")
    # Not even if a task of the server happens to be the same.
    judges = {asked.version: LabelJudge((-9.0, -1.0, -1.0))}
    for classifier in (make(scorer, judges={}), make(scorer, judges=judges)):
        [answer] = await classifier.answer([asked], CONVERSATION)
        assert [p for _, p in answer.probabilities] == pytest.approx((0.625, 0.25, 0.125))
        assert classifier.label_counts == {}
    assert [prompt for prompt, _ in scorer.calls] == ["Judge.|Hi  there|a"] * 2
    assert scorer.pinned == [False, False]


async def test_one_question_is_computed_before_the_others() -> None:
    scorer = up()
    scorer.gate.clear()
    answers = asyncio.create_task(make(scorer).answer(questions("a", "b", "c"), CONVERSATION))
    await until(lambda: bool(scorer.calls))
    await settle()
    assert len(scorer.calls) == 1
    first_gate, scorer.gate = scorer.gate, asyncio.Event()
    first_gate.set()
    await until(lambda: len(scorer.calls) == 3)
    scorer.gate.set()
    assert len(await bounded(answers)) == 3


async def test_cached_answers_do_not_count_as_the_first() -> None:
    scorer = up()
    classifier = make(scorer)
    await classifier.answer(questions("a"), CONVERSATION)
    scorer.gate.clear()
    answers = asyncio.create_task(classifier.answer(questions("a", "b", "c"), CONVERSATION))
    await until(lambda: len(scorer.calls) > 1)
    await settle()
    assert [prompt[-1] for prompt, _ in scorer.calls] == ["a", "b"]
    scorer.gate.set()
    assert [result.is_cached for result in await bounded(answers)] == [True, False, False]


async def test_equal_questions_are_computed_once_and_in_their_place() -> None:
    scorer = up()
    results = await make(scorer, cache_size=0).answer(questions("a", "b", "b", "c"), CONVERSATION)
    assert sorted(prompt[-1] for prompt, _ in scorer.calls) == ["a", "b", "c"]
    assert [result.num_prompt_tokens for result in results] == [18] * 4


async def test_answers_about_other_conversations_are_not_reused() -> None:
    scorer = up()
    classifier = make(scorer)
    for text in ("Hi there", "Hi  there"):
        [answer] = await classifier.answer(questions("a"), [{"role": "user", "content": text}])
        assert not answer.is_cached


async def test_results_count_the_shared_tokens_that_were_computed() -> None:
    [answer] = await make(up()).answer(questions("a"), CONVERSATION)
    assert answer.num_kept_tokens == len("Judge.|Hi  there|")


async def test_a_question_that_does_not_fit_cancels_the_others() -> None:
    scorer = up()
    classifier = make(scorer, max_context=40)
    with pytest.raises(ContextLengthError) as caught:
        await classifier.answer(questions("a", "b", "c" * 40), CONVERSATION)
    assert caught.value.param == "input"


async def test_a_clients_task_is_never_confused_with_the_servers_of_that_name() -> None:
    scorer, own = up(), task("inline")
    classifier = make(scorer, judges={own.version: LabelJudge()})
    await bounded(classifier.classify(own, "text"))
    await bounded(classifier.classify(inline_task("Judge otherwise.", ["a", "b", "c"]), "text"))
    assert scorer.pinned == [True] + [False] * (len(REFERENCE_TEXTS) + 1)
    assert classifier.label_counts == {("inline", "up"): 1}
