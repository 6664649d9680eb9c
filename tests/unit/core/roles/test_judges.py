"""The choice of a judge and its probabilities, with a fake model that reads the prompt's text."""

import asyncio
import math
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from server.core.engine.adapters import BASE, Adapter
from server.core.engine.engine import Scores
from server.core.engine.work import Work
from server.core.roles import fitting
from server.core.roles.fitting import (
    LABEL_SCORES_STRIDE,
    MAX_LOSS_RATIO,
    candidate_layers,
    fit_judge,
    measure_prior,
)
from server.core.roles.heads import Floats, Indices, LinearHead, calibrate, fit_heads, log_loss
from server.core.roles.judges import CrossValidation, HeadJudge, Judge, LabelJudge
from server.core.roles.prompts import MAX_LABEL_TOKENS, REFERENCE_TEXTS, TaskPrompts
from server.core.roles.tasks import MIN_EXAMPLES, Example, Label, Task
from server.core.text.tokenizer import ChatTokenizer
from server.errors import ContextLengthError, InvalidRequestError

T = TypeVar("T")
Row = NDArray[np.float64]

BOUND_S = 20
VALUES = ("up", "down", "flat")
NUM_LAYERS = 24
LAYERS = candidate_layers(NUM_LAYERS)


class FakeTokenizer:
    """One id per character, so that a prompt can be read back."""

    def encode_text(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode_text("|".join(message["content"] for message in messages))


def truth(text: str) -> int:
    """Texts begin with their label."""
    return VALUES.index(text.split()[0])


def one_hot(size: int, place: int) -> Row:
    row = np.zeros(size)
    row[place] = 1
    return row


def noise(text: str, size: int, stream: int = 0) -> Row:
    return np.random.default_rng([zlib.crc32(text.encode()), stream]).normal(size=size)


def telling(text: str, layer: int) -> Row:
    """Numbers that show the label of every text, with little noise."""
    return 2 * one_hot(6, truth(text)) + 0.3 * noise(text, 6, layer)


def hinting(text: str, layer: int = 0) -> Row:
    """Numbers that show the label of most texts."""
    return 2 * one_hot(6, truth(text)) + noise(text, 6, layer)


def silent(text: str, layer: int = 0) -> Row:
    """Numbers that do not depend on the label."""
    return noise(text, 6, layer)


class FakeModel:
    """Answers by the text of the prompt; `gate` holds its answers back."""

    def __init__(
        self,
        label_scores: Callable[[str], Row] = lambda text: silent(text)[:3],
        states: Callable[[str, int], Row] = silent,
    ) -> None:
        self._label_scores, self._states = label_scores, states
        self.calls: list[dict[str, Any]] = []
        self.num_cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

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
        text = prompt.partition("|")[2]
        self.calls.append(
            {
                "text": text,
                "labels": ["".join(map(chr, ids)) for ids in continuations],
                "layers": layers,
                "shared": prompt[:num_shared],
                "is_pinned": is_pinned,
                "adapter": adapter,
            }
        )
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return Scores(
            self._label_scores(text).tolist() if continuations else [],
            num_cached=0,
            hidden_states=np.stack([self._states(text, layer) for layer in layers]).astype(
                np.float32
            )
            if layers
            else None,
        )

    @property
    def texts(self) -> list[str]:
        return [call["text"] for call in self.calls]


def examples(num_each: int = 30, num_kinds: int = 5) -> list[Example]:
    return [
        Example(text=f"{value} {i}", label=value, kind=f"kind {i % num_kinds}")
        for i in range(num_each)
        for value in VALUES
    ]


def task(of: list[Example] | None = None) -> Task:
    labels = tuple(Label(value=value, text=f"<{value}>") for value in VALUES)
    return Task(
        name="mood",
        instructions="Judge.",
        labels=labels,
        examples=tuple(examples() if of is None else of),
    )


def prompts_of(of: Task | None = None, max_context: int = 1000) -> TaskPrompts:
    return TaskPrompts(of or task(), cast(ChatTokenizer, FakeTokenizer()), max_context)


async def bounded(awaitable: Awaitable[T]) -> T:
    """The result, or a failed test in place of one that hangs."""
    return await asyncio.wait_for(awaitable, BOUND_S)


async def fit(model: FakeModel, prompts: TaskPrompts | None = None) -> Judge:
    return await bounded(fit_judge(model, prompts or prompts_of(), NUM_LAYERS, lambda: None))


async def probabilities_of(judge: Judge, model: FakeModel, text: str) -> list[float]:
    """Probabilities of the labels of a text by the judge."""
    prompts = prompts_of()
    labels = prompts.labels(0) if isinstance(judge, LabelJudge) else []
    return judge.probabilities(await model.score(prompts.encode(text), labels, layers=judge.layers))


async def share_right(judge: Judge, model: FakeModel) -> float:
    """The accuracy on texts that the judge was not fitted to."""
    texts = [f"{value} {i}" for value in VALUES for i in range(1000, 1100)]
    found = [np.argmax(await probabilities_of(judge, model, text)) == truth(text) for text in texts]
    return found.count(True) / len(found)


# --- which judge is chosen ------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
async def test_a_head_is_chosen_after_the_layer_that_predicts_the_labels(layer: int) -> None:
    model = FakeModel(states=lambda text, i: telling(text, i) if i == layer else silent(text, i))
    judge = await fit(model)
    assert isinstance(judge, HeadJudge)
    assert judge.layer == layer and judge.layers == (layer,)
    assert judge.validation is not None
    assert judge.validation.num_examples == 90
    assert judge.validation.accuracy > 0.95
    assert await share_right(judge, model) > 0.95


async def test_label_scores_are_chosen_if_hidden_states_are_uninformative() -> None:
    model = FakeModel(label_scores=lambda text: telling(text, 0)[:3])
    judge = await fit(model)
    assert isinstance(judge, LabelJudge)
    assert judge.layers == ()
    assert judge.validation is not None
    assert judge.validation.num_examples == 3 * 30 / LABEL_SCORES_STRIDE
    assert await share_right(judge, model) > 0.95


async def test_label_scores_are_chosen_if_a_head_is_no_better() -> None:
    # Both predict the same two of three examples.
    def hints(text: str) -> Row:
        return one_hot(3, (truth(text) + (zlib.crc32(text.encode()) % 3 == 0)) % 3)

    model = FakeModel(
        label_scores=lambda text: hints(text),
        states=lambda text, layer: np.concatenate([hints(text), 0.1 * noise(text, 3, layer)]),
    )
    assert isinstance(await fit(model), LabelJudge)


@pytest.mark.parametrize(("max_ratio", "kind"), [(0.0, LabelJudge), (100.0, HeadJudge)])
async def test_a_head_is_chosen_up_to_the_maximum_loss_ratio(
    monkeypatch: pytest.MonkeyPatch, max_ratio: float, kind: type[Judge]
) -> None:
    monkeypatch.setattr(fitting, "MAX_LOSS_RATIO", max_ratio)
    both = FakeModel(label_scores=lambda text: hinting(text)[:3], states=hinting)
    assert isinstance(await fit(both), kind)


async def test_a_head_and_the_label_scores_are_compared_on_the_same_examples() -> None:
    # Of every sixth example of a label both are known, and of these the head knows nothing.
    scored = {f"{value} {i}" for value in VALUES for i in range(0, 30, LABEL_SCORES_STRIDE)}

    def states(text: str, layer: int) -> Row:
        return silent(text, layer) if text in scored else telling(text, layer)

    model = FakeModel(label_scores=lambda text: hinting(text)[:3], states=states)
    assert isinstance(await fit(model), LabelJudge)
    assert {call["text"] for call in model.calls if call["labels"]} == scored


BIAS = np.array([6.0, 0.0, -3.0])


async def test_the_prior_is_subtracted_if_this_helps() -> None:
    model = FakeModel(label_scores=lambda text: telling(text, 0)[:3] + BIAS)
    judge = await fit(model)
    assert isinstance(judge, LabelJudge)
    assert np.subtract(judge.prior, judge.prior[1]) == pytest.approx(BIAS, abs=0.5)
    assert judge.validation is not None and judge.validation.accuracy > 0.9
    assert await share_right(judge, model) > 0.95


async def test_the_prior_is_not_subtracted_if_there_is_none() -> None:
    model = FakeModel(label_scores=lambda text: hinting(text)[:3])
    judge = await fit(model, prompts_of(task(examples(num_each=300))))
    assert isinstance(judge, LabelJudge) and judge.prior == ()


@pytest.mark.parametrize("factor", [0.3, 1.0, 10.0])
async def test_probabilities_are_calibrated_however_sure_the_model_is(
    factor: float,
) -> None:
    def claimed(text: str) -> Row:
        # The label is drawn with the probabilities that the softmax of these gives.
        candidates = (2 * noise(text, 3, stream) for stream in range(1000))
        return next(
            each
            for stream, each in enumerate(candidates)
            if (each + np.random.default_rng([stream, 7]).gumbel(size=3)).argmax() == truth(text)
        )

    model = FakeModel(label_scores=lambda text: factor * claimed(text))
    prompts = prompts_of(task(examples(num_each=600)))
    judge = await fit(model, prompts)
    assert isinstance(judge, LabelJudge) and judge.validation is not None
    assert judge.temperature == pytest.approx(factor, rel=0.35)
    texts = [f"{value} {i}" for value in VALUES for i in range(1000, 1100)]
    found = np.array([await probabilities_of(judge, model, text) for text in texts])
    loss = log_loss(np.log(found), np.array(list(map(truth, texts))))
    assert loss == pytest.approx(judge.validation.log_loss, abs=0.15)


async def test_a_head_is_validated_on_held_out_examples() -> None:
    # Each kind shows its labels differently, so heads cannot judge kinds they have not seen.
    def states(text: str, layer: int) -> Row:
        kind = int(text.split()[1]) % 5
        return 3 * one_hot(15, 3 * kind + truth(text)) + 0.1 * noise(text, 15, layer)

    model = FakeModel(states=states)
    judge = await fit(model)
    assert judge.validation is not None
    assert judge.validation.accuracy < 0.6
    assert judge.validation.log_loss > 0.9


# --- what is measured -----------------------------------------------------------------


async def test_every_example_is_measured_and_reported_once() -> None:
    model, reports = FakeModel(states=telling), list[None]()
    await bounded(fit_judge(model, prompts_of(), NUM_LAYERS, lambda: reports.append(None)))
    assert len(reports) == len(model.calls) == 90
    assert Counter(model.texts) == Counter(example.text for example in examples())
    assert {call["layers"] for call in model.calls} == {LAYERS}
    assert {call["shared"] for call in model.calls} == {"Judge.|"}


async def test_every_sixth_example_of_a_label_has_its_label_texts_scored() -> None:
    model = FakeModel(states=telling)
    await fit(model)
    scored = [call for call in model.calls if call["labels"]]
    assert all(call["labels"] == ["<up>", "<down>", "<flat>"] for call in scored)
    assert Counter(call["text"].split()[0] for call in scored) == dict.fromkeys(VALUES, 5)
    assert "up 0" in model.texts and "up 6" in model.texts


async def test_the_first_example_computes_the_instruction_for_all_others() -> None:
    model = FakeModel(states=telling)
    model.gate.clear()
    fitting = asyncio.create_task(fit(model))
    for _ in range(100):
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
    [first] = model.calls
    # In all layers, and for good.
    assert first["labels"] and first["is_pinned"]
    model.gate.set()
    await bounded(fitting)
    assert not any(call["is_pinned"] for call in model.calls[1:])


async def test_examples_are_measured_in_the_form_in_which_texts_are_judged() -> None:
    of = examples()
    of[4] = Example(text="  down\n\n e\u0301  ", label="down")
    model = FakeModel(states=telling)
    await fit(model, prompts_of(task(of)))
    assert "down é" in model.texts


async def test_examples_beyond_the_context_are_left_out() -> None:
    # Of 113 tokens, "Judge.|" takes 7, the labels' texts without their last tokens 13, and one
    # stays free.
    longest, too_long = "up " + "x" * 89, "up " + "x" * 90
    of = [Example(text=text, label="up") for text in (too_long, longest, too_long + "x")]
    model, reports = FakeModel(states=telling), list[None]()
    prompts = prompts_of(task([*of, *examples()]), 113)
    judge = await bounded(fit_judge(model, prompts, NUM_LAYERS, lambda: reports.append(None)))
    assert Counter(model.texts) == Counter([longest, *(example.text for example in examples())])
    assert len(reports) == 91
    assert judge.validation is not None and judge.validation.num_examples == 91


@pytest.mark.parametrize(
    ("num_fitting", "values"),
    [
        (MIN_EXAMPLES, ("flat",)),
        (MIN_EXAMPLES - 1, ("flat",)),
        (0, ("flat",)),
        (0, ("up",)),
        (0, VALUES),
    ],
)
async def test_if_too_few_examples_fit_the_context_the_prior_is_subtracted(
    num_fitting: int, values: tuple[str, ...]
) -> None:
    of = [
        Example(text=each.text + " long" * 100, label=each.label)
        if each.label in values and int(each.text.split()[1]) >= num_fitting
        else each
        for each in examples()
    ]
    model = FakeModel(
        label_scores=lambda text: BIAS if text in REFERENCE_TEXTS else hinting(text)[:3] + BIAS
    )
    judge = await fit(model, prompts_of(task(of), 200))
    if num_fitting == MIN_EXAMPLES:
        assert judge.validation is not None
        assert Counter(model.texts) == Counter(each.text for each in of if len(each.text) < 100)
    else:
        assert judge == LabelJudge(tuple(BIAS))
        assert set(model.texts) == set(REFERENCE_TEXTS)
    probabilities = await probabilities_of(judge, model, "up 1000")
    assert len(probabilities) == 3
    assert sum(probabilities) == pytest.approx(1)


async def test_the_prior_of_a_task_without_examples_is_subtracted() -> None:
    model = FakeModel(label_scores=lambda text: BIAS)
    assert await fit(model, prompts_of(task([]))) == LabelJudge(tuple(BIAS))
    assert set(model.texts) == set(REFERENCE_TEXTS)


async def test_label_scores_are_chosen_even_if_their_examples_are_of_one_kind() -> None:
    # Alternating kinds: every sixth example of a label has the same kind.
    of = examples(num_kinds=LABEL_SCORES_STRIDE)
    model = FakeModel(label_scores=lambda text: telling(text, 0)[:3])
    judge = await fit(model, prompts_of(task(of)))
    assert isinstance(judge, LabelJudge)
    assert judge.validation is not None and math.isfinite(judge.validation.log_loss)


async def test_labels_that_are_too_long_are_an_error() -> None:
    labels = tuple(Label(value=value, text=value * MAX_LABEL_TOKENS) for value in VALUES)
    long = task().model_copy(update={"labels": labels})
    with pytest.raises(InvalidRequestError, match=f"at most {MAX_LABEL_TOKENS} are"):
        await fit(FakeModel(), prompts_of(long, 10**6))


async def test_an_example_that_fails_ends_the_fit_with_its_error() -> None:
    def states(text: str, layer: int) -> Row:
        if text == "flat 7":
            raise ValueError("not finite")
        return telling(text, layer)

    with pytest.raises(ValueError, match="not finite"):
        await fit(FakeModel(states=states))


async def test_a_cancelled_fit_cancels_what_it_waits_for() -> None:
    model = FakeModel(states=telling)
    model.gate.clear()
    fitting = asyncio.create_task(fit(model))
    while not model.calls:
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
    fitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fitting
    assert model.num_cancelled == len(model.calls) == 1


# --- the prior of a task without examples ---------------------------------------------


def said_of_references(text: str) -> Row:
    return BIAS + noise(text, 3)


async def test_the_prior_is_the_mean_after_the_reference_texts() -> None:
    model = FakeModel(label_scores=said_of_references)
    judge = await bounded(measure_prior(model, prompts_of()))
    expected = np.mean([said_of_references(text) for text in REFERENCE_TEXTS], axis=0)
    assert judge.prior == pytest.approx(tuple(expected))
    assert (judge.temperature, judge.validation, judge.layers) == (1.0, None, ())
    assert Counter(model.texts) == Counter(REFERENCE_TEXTS)
    assert {call["shared"] for call in model.calls} == {"Judge.|"}
    assert {call["layers"] for call in model.calls} == {()}


async def test_the_first_reference_text_computes_the_instruction_for_the_others() -> None:
    model = FakeModel(label_scores=said_of_references)
    model.gate.clear()
    measuring = asyncio.create_task(measure_prior(model, prompts_of()))
    while not model.calls:
        await asyncio.wait([measuring], timeout=0)
    for _ in range(20):
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
    assert len(model.calls) == 1
    model.gate.set()
    await bounded(measuring)


async def test_reference_texts_that_do_not_fit_the_context_are_left_out() -> None:
    # Room for "Judge.|", the labels' texts without their last tokens, and 10 characters.
    short = [text for text in REFERENCE_TEXTS if len(text) <= 10]
    assert 0 < len(short) < len(REFERENCE_TEXTS)
    model = FakeModel(label_scores=said_of_references)
    judge = await bounded(measure_prior(model, prompts_of(max_context=7 + 13 + 10 + 1)))
    assert Counter(model.texts) == Counter(short)
    expected = np.mean([said_of_references(text) for text in short], axis=0)
    assert judge.prior == pytest.approx(tuple(expected))


async def test_if_no_reference_text_fits_the_context_nothing_is_subtracted() -> None:
    model = FakeModel(label_scores=said_of_references)
    judge = await bounded(measure_prior(model, prompts_of(max_context=7 + 13 + 1)))
    assert judge == LabelJudge()
    assert not model.calls


# --- probabilities of judges ----------------------------------------------------------


def test_a_label_judge_subtracts_the_prior_and_divides_by_the_temperature() -> None:
    scores = Scores([math.log(0.5), math.log(0.2), math.log(0.1)], num_cached=0)
    assert LabelJudge().probabilities(scores) == pytest.approx([5 / 8, 2 / 8, 1 / 8])
    prior = (math.log(0.5), math.log(0.1), math.log(0.1))
    assert LabelJudge(prior).probabilities(scores) == pytest.approx([1 / 4, 2 / 4, 1 / 4])
    cooled = LabelJudge(prior, temperature=0.5)
    assert cooled.probabilities(scores) == pytest.approx([1 / 6, 4 / 6, 1 / 6])


def test_a_head_judge_applies_its_head_to_the_state_after_its_layer() -> None:
    head = LinearHead(
        np.array([3, 5], np.float32),
        np.array([[1, 0], [0, 2]], np.float32),
        np.array([0, 1], np.float32),
    )
    states = np.array([[3 + math.log(8), 5 + 0.5 * math.log(2 / math.e)]], np.float32)
    judge = HeadJudge(5, head)
    # exp of the scores: 8 and 2.
    found = judge.probabilities(Scores([], num_cached=0, hidden_states=states))
    assert found == pytest.approx([0.8, 0.2])
    assert judge.layers == (5,)


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_probabilities_add_up_to_1_however_far_apart_the_scores_are(size: float) -> None:
    found = LabelJudge().probabilities(Scores([-size, 0.0, -2 * size], num_cached=0))
    assert found == [0.0, 1.0, 0.0]


def test_probabilities_do_not_change_the_scores_or_the_judge() -> None:
    scores, judge = Scores([-1.0, -2.0], num_cached=0), LabelJudge((-0.5, -0.25), 2.0)
    assert judge.probabilities(scores) == judge.probabilities(scores)
    assert scores.logprobs == [-1.0, -2.0]


# --- layers, prompts and labels -------------------------------------------------------


@pytest.mark.parametrize("num_layers", range(1, 81))
def test_candidate_layers_rise_and_leave_a_part_of_the_model_out(num_layers: int) -> None:
    layers = candidate_layers(num_layers)
    assert 1 <= len(layers) <= 2
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 1 and layers[-1] <= num_layers
    assert layers[-1] < num_layers or num_layers < 3


def test_all_prompts_share_what_comes_before_the_text() -> None:
    prompts = prompts_of()
    assert prompts.num_shared == len("Judge.|")
    assert prompts.encode("x")[: prompts.num_shared] == prompts.encode("我")[: prompts.num_shared]


def test_labels_need_room_after_the_prompt_for_all_but_their_last_tokens() -> None:
    tokenizer = cast(ChatTokenizer, FakeTokenizer())
    # <up>, <down> and <flat> have 16 tokens; the last of each is only looked at.
    found = TaskPrompts(task(), tokenizer, 50 + 13 + 1).labels(50)
    assert ["".join(map(chr, ids)) for ids in found] == ["<up>", "<down>", "<flat>"]
    with pytest.raises(ContextLengthError):
        TaskPrompts(task(), tokenizer, 50 + 13).labels(50)


def test_an_overconfident_head_gets_a_higher_temperature() -> None:
    """Dimensions that say the same are counted each by itself, for the covariance is shrunk."""
    rng = np.random.default_rng(0)
    means = 0.7 * rng.normal(size=(3, 4))

    def draw(num_examples: int) -> tuple[Floats, Indices]:
        labels = np.arange(num_examples) % 3
        states = means[labels] + rng.normal(size=(num_examples, 4))
        return np.repeat(states, 25, axis=1).astype(np.float32), labels

    states, labels = draw(300)
    judge = fitting._best(
        (7,),
        states[:, None],
        rng.normal(size=(300, 3)).astype(np.float32),
        labels,
        [f"kind {i // 3 % 5}" for i in range(300)],
        np.ones(300, dtype=np.bool_),
    )
    assert isinstance(judge, HeadJudge) and isinstance(judge.validation, CrossValidation)
    assert judge.validation.num_examples == 300
    others, their_labels = draw(3000)
    for head in fit_heads(states, labels):
        assert calibrate(head.scores(others), their_labels).temperature > 5
    found = calibrate(judge.head.scores(others), their_labels)
    assert found.temperature == pytest.approx(1, rel=0.25)
    assert found.accuracy == pytest.approx(judge.validation.accuracy, abs=0.1)
    assert found.log_loss == pytest.approx(judge.validation.log_loss, abs=0.1)


def test_a_judge_with_more_parameters_must_be_better() -> None:
    assert 0 < MAX_LOSS_RATIO < 1
