"""The runner: scores, hidden states, and sampling that does not depend on the batch."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from server.core.engine.model.arena import Arena
from server.core.engine.model.config import read_model_config
from server.core.engine.model.qwen import load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.engine.runner import StepResult
from server.core.engine.scheduler import ScheduledChunk, Scheduler
from server.core.engine.sequence import (
    PrefilledEvent,
    SamplingParams,
    ScoredEvent,
    Sequence,
    TokenEvent,
)

CONTINUATIONS = [[7], [8, 9], [8, 10, 11], [7, 12]]
TOLERANCE = 1e-4


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    model = load_qwen(checkpoint, read_model_config(checkpoint), "float32")
    return ModelRunner(
        model, vocab_size=model.config.vocab_size, max_kv_tokens=4096, max_context=256
    )


class Memory:
    """Adapts the runner's memory for the scheduler."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.reserve, self.fits = runner.reserve, runner.fits
        self.num_suspended = 0

    def admit(self, sequence: Sequence) -> bool:
        num_cached = self._runner.admit(sequence)
        sequence.num_computed = num_cached or 0
        return num_cached is not None

    def suspend(self, sequence: Sequence) -> None:
        self._runner.suspend(sequence)
        sequence.num_computed = sequence.num_scored = 0
        self.num_suspended += 1


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def to_generate(prompt: list[int], **params: float) -> Sequence:
    return Sequence(prompt, SamplingParams(max_tokens=12, **params), [], lambda event: None)  # type: ignore[arg-type]


def to_score(prompt: list[int]) -> Sequence:
    return Sequence(prompt, None, CONTINUATIONS, lambda event: None)


def to_measure(
    prompt: list[int],
    *layers: int,
    continuations: list[list[int]] | None = None,
    num_shared: int = 0,
) -> Sequence:
    """A sequence for hidden states, and for scores of continuations if there are any."""
    return Sequence(
        prompt, None, continuations or [], lambda event: None, layers, num_shared=num_shared
    )


def run_all(
    runner: ModelRunner, sequences: list[Sequence], max_rows: int = 1000,
    memory: Memory | None = None,
) -> dict[Sequence, list[StepResult]]:  # fmt: skip
    """Steps until every sequence has its scores or twelve tokens."""
    scheduler = Scheduler(16, max_rows, memory or Memory(runner))
    for sequence in sequences:
        scheduler.admission.add(sequence)
    results: dict[Sequence, list[StepResult]] = {sequence: [] for sequence in sequences}
    while not scheduler.admission.is_idle:
        chunks = scheduler.schedule()
        done = runner.step(chunks)
        for chunk in chunks:
            chunk.advance()
        for sequence, result in done.items():
            assert not isinstance(result, Exception), result
            results[sequence].append(result)
            if isinstance(result, list):
                sequence.num_computed += len(result) - 1
                sequence.completion_ids += [token.token_id for token in result]
            if not isinstance(result, list) or len(sequence.completion_ids) == 12:
                scheduler.admission.remove(sequence)
                runner.release(sequence, is_sound=True)
    return results


def scores_of(results: Iterable[StepResult | Exception]) -> list[float]:
    [result] = results
    assert isinstance(result, ScoredEvent)
    return result.logprobs


def token_of(result: StepResult | Exception) -> TokenEvent:
    """The one token of a step."""
    assert isinstance(result, list)
    [token] = result
    return token


def expected_score(oracle: PreTrainedModel, prompt: list[int], continuation: list[int]) -> float:
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + continuation])).logits[0]
    logprobs = logits.log_softmax(-1)
    begin = len(prompt) - 1
    return sum(float(logprobs[begin + i, t]) for i, t in enumerate(continuation))


@pytest.mark.parametrize("logits_rows", [128, 3])
@pytest.mark.parametrize("max_rows", [1000, 6])
def test_scores_are_the_summed_logprobs_of_each_continuation(
    runner: ModelRunner,
    oracle: PreTrainedModel,
    max_rows: int,
    logits_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.core.engine.model.logits.LOGITS_ROWS", logits_rows)
    prompts = [random_ids(20), random_ids(9, seed=1)]
    sequences = [to_score(prompt) for prompt in prompts]
    results = run_all(runner, sequences, max_rows)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        theirs = [expected_score(oracle, prompt, c) for c in CONTINUATIONS]
        assert scores_of(results[sequence]) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("num_last", [1, 2])
def test_continuations_of_one_token_are_scored_wherever_the_last_chunk_begins(
    runner: ModelRunner, oracle: PreTrainedModel, num_last: int
) -> None:
    prompt = random_ids(20)
    sequence = Sequence(prompt, None, [[7], [8]], lambda event: None)
    results = run_all(runner, [sequence], max_rows=20 - num_last)
    theirs = [expected_score(oracle, prompt, c) for c in ([7], [8])]
    assert scores_of(results[sequence]) == pytest.approx(theirs, abs=1e-3)


def test_continuations_of_one_token_after_one_that_fills_the_step_need_no_rows(
    runner: ModelRunner, oracle: PreTrainedModel
) -> None:
    prompt, continuations = random_ids(20), [[7, 8, 9, 10, 11, 12, 13, 14], [7], [8]]
    results = run_all(
        runner, [to_measure(prompt, continuations=continuations) for _ in range(2)], max_rows=6
    )
    theirs = [expected_score(oracle, prompt, c) for c in continuations]
    for found in results.values():
        assert scores_of(found) == pytest.approx(theirs, abs=1e-3)


def test_scores_in_int8_are_the_same_to_the_last_bit_however_they_are_divided(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where activations are quantized, a difference in the last bit may change a label.
    model = load_qwen(checkpoint, read_model_config(checkpoint), "int8")
    lengths = [1, 2, 5, 6, 2, 17, 9, 40, 3]
    labels = [random_ids(n, seed=n + i) for i, n in enumerate(lengths)]

    def scored(max_rows: int, num_others: int) -> list[ScoredEvent]:
        runner = ModelRunner(
            model, vocab_size=model.config.vocab_size, max_kv_tokens=4096, max_context=256
        )
        prompts = [random_ids(n, seed=n) for n in (11, 127, 128, 150)]
        sequences = [to_measure(ids, 1, continuations=labels) for ids in prompts]
        others = [to_generate(random_ids(60 + i, seed=i)) for i in range(num_others)]
        results = run_all(runner, [*others, *sequences], max_rows)
        return [result for sequence in sequences for result in results[sequence]]  # type: ignore[misc]

    alone = scored(1000, 0)
    # As after a long prompt, few labels are computed at once.
    monkeypatch.setattr("server.core.engine.model.attention.branches._MAX_SCORES", 1500)
    for max_rows, num_others in [(1000, 0), (1000, 3), (64, 0), (64, 2), (13, 1)]:
        for one, same in zip(alone, scored(max_rows, num_others), strict=True):
            assert one.logprobs == same.logprobs
            assert one.hidden_states is not None and same.hidden_states is not None
            assert np.array_equal(one.hidden_states, same.hidden_states)


def test_greedy_tokens_equal_those_of_transformers(
    runner: ModelRunner, oracle: PreTrainedModel
) -> None:
    ids = random_ids(15)
    sequence = to_generate(ids, temperature=0.0)
    run_all(runner, [sequence])
    theirs = cast(Any, oracle).generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        min_new_tokens=12,
        eos_token_id=None,
        repetition_penalty=1.0,
        pad_token_id=0,
        temperature=None,
        top_p=None,
    )
    assert sequence.completion_ids == theirs[0, len(ids) :].tolist()


def test_the_same_seed_gives_the_same_tokens_alone_and_in_a_batch(runner: ModelRunner) -> None:
    alone = to_generate(random_ids(10), seed=5, temperature=0.9)
    run_all(runner, [alone])
    again = to_generate(random_ids(10), seed=5, temperature=0.9)
    others = [to_generate(random_ids(n, seed=n), seed=n) for n in (3, 30)]
    run_all(runner, [others[0], again, others[1], to_score(random_ids(8))], max_rows=9)
    assert again.completion_ids == alone.completion_ids


def test_a_suspended_sequence_gets_the_same_tokens(checkpoint: Path) -> None:
    model = load_qwen(checkpoint, read_model_config(checkpoint), "float32")
    roomy = ModelRunner(
        model, vocab_size=model.config.vocab_size, max_kv_tokens=4096, max_context=256
    )
    prompts = [random_ids(n, seed=n) for n in (120, 125, 122)]

    def sequences() -> list[Sequence]:
        return [to_generate(ids, seed=i, temperature=0.9) for i, ids in enumerate(prompts)]

    expected = sequences()
    run_all(roomy, expected)
    # Three slots of 128 tokens fit, but none of 256 beside them.
    tight = ModelRunner(
        model, vocab_size=model.config.vocab_size, max_kv_tokens=3 * 128, max_context=256
    )
    memory, waiting = Memory(tight), sequences()
    run_all(tight, waiting, memory=memory)
    assert memory.num_suspended > 0
    assert [s.completion_ids for s in waiting] == [s.completion_ids for s in expected]
    assert tight.num_sequences == 0


def test_released_sequences_hold_no_memory(runner: ModelRunner) -> None:
    run_all(runner, [to_generate(random_ids(5)), to_score(random_ids(6))])
    assert runner.num_sequences == 0
    assert runner._memory.num_tokens == 0


def test_logits_that_are_not_finite_fail_their_sequence_only(runner: ModelRunner) -> None:
    broken, healthy = to_generate(random_ids(5)), to_generate(random_ids(7))
    model = runner._model
    plain_logits = model.logits
    factors = torch.tensor([[float("nan")], [1.0]])
    model.logits = lambda hidden: plain_logits(hidden) * factors  # type: ignore[method-assign]
    scheduler = Scheduler(4, 100, Memory(runner))
    scheduler.admission.add(broken)
    scheduler.admission.add(healthy)
    results = runner.step(scheduler.schedule())
    assert isinstance(results[broken], ValueError)
    assert isinstance(results[healthy], list)


# --- hidden states --------------------------------------------------------------------


def new_runner(runner: ModelRunner, max_prefix_bytes: int = 0) -> ModelRunner:
    """Another runner of the same model."""
    return ModelRunner(
        runner._model,
        vocab_size=runner._model.config.vocab_size,
        max_kv_tokens=4096,
        max_context=256,
        max_prefix_bytes=max_prefix_bytes,
    )


def expected_states(oracle: PreTrainedModel, prompt: list[int], layers: tuple[int, ...]) -> Tensor:
    """(L, C) of the last token, without the final norm."""
    before_norm: list[Tensor] = []
    with (
        torch.inference_mode(),
        oracle.model.norm.register_forward_pre_hook(
            lambda _, inputs: before_norm.append(inputs[0])
        ),
    ):
        states = oracle(torch.tensor([prompt]), output_hidden_states=True).hidden_states
    after_layers = [*states[:-1], *before_norm]
    return torch.stack([after_layers[layer][0, -1] for layer in layers])


def states_of(results: Iterable[StepResult | Exception]) -> NDArray[np.float32]:
    [result] = results
    assert isinstance(result, ScoredEvent) and result.hidden_states is not None
    assert result.hidden_states.dtype == np.float32
    return result.hidden_states


def assert_close(ours: NDArray[np.float32], theirs: NDArray[np.float32] | Tensor) -> None:
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("max_rows", [1000, 6, 2])
def test_hidden_states_are_those_of_the_last_prompt_token_however_it_is_cut(
    runner: ModelRunner, oracle: PreTrainedModel, max_rows: int
) -> None:
    num_layers = runner._model.config.num_layers
    prompts = [random_ids(n, seed=n) for n in (20, 9, 1, 13)]
    wanted = [(1,), (1, 2), (num_layers,), tuple(range(1, num_layers + 1))]
    sequences = [
        to_measure(prompt, *layers) for prompt, layers in zip(prompts, wanted, strict=True)
    ]
    results = run_all(runner, sequences, max_rows)
    for prompt, layers, sequence in zip(prompts, wanted, sequences, strict=True):
        assert_close(states_of(results[sequence]), expected_states(oracle, prompt, layers))
        assert scores_of(results[sequence]) == []


@pytest.mark.parametrize("max_rows", [1000, 6])
def test_scores_and_hidden_states_come_together(
    runner: ModelRunner, oracle: PreTrainedModel, max_rows: int
) -> None:
    num_layers = runner._model.config.num_layers
    prompts = [random_ids(n, seed=n) for n in (20, 9, 13)]
    # The last one has no rows after its prompt.
    cases = [((1,), CONTINUATIONS), ((2, num_layers), CONTINUATIONS), ((2,), [[7], [8]])]
    sequences = [
        to_measure(prompt, *layers, continuations=continuations)
        for prompt, (layers, continuations) in zip(prompts, cases, strict=True)
    ]
    results = run_all(runner, sequences, max_rows)
    for prompt, (layers, continuations), sequence in zip(prompts, cases, sequences, strict=True):
        assert_close(states_of(results[sequence]), expected_states(oracle, prompt, layers))
        theirs = [expected_score(oracle, prompt, c) for c in continuations]
        assert scores_of(results[sequence]) == pytest.approx(theirs, abs=1e-3)


def random_sequence(rng: random.Random, instruction: list[int], num_layers: int) -> Sequence:
    """A sequence of any kind; some prompts begin with the instruction, and some share it."""
    prompt = rng.choice([[], instruction]) + rng.choices(range(3, 300), k=rng.randint(1, 30))
    num_shared = rng.choice([0, len(instruction)]) if len(prompt) > len(instruction) else 0
    layers = sorted(rng.sample(range(1, num_layers + 1), rng.randint(1, 2)))
    match rng.randrange(6):
        case 0 | 1:
            return to_generate(prompt, seed=rng.randrange(100), temperature=0.9)
        case 2:
            return to_measure(prompt, *layers, continuations=CONTINUATIONS, num_shared=num_shared)
        case 3:
            return to_measure(prompt, continuations=CONTINUATIONS, num_shared=num_shared)
        case _:
            return to_measure(prompt, *layers, num_shared=num_shared)


def copy_of(sequence: Sequence) -> Sequence:
    return Sequence(
        sequence.prompt_ids,
        sequence.params,
        sequence.continuations,
        sequence.deliver,
        sequence.layers,
    )


@pytest.mark.parametrize("max_rows", [1000, 7])
@pytest.mark.parametrize("seed", range(3))
def test_any_mix_of_sequences_equals_each_of_them_alone(
    runner: ModelRunner, seed: int, max_rows: int
) -> None:
    rng = random.Random(seed)
    instruction, num_layers = random_ids(17, seed=seed), runner._model.config.num_layers
    sequences = [random_sequence(rng, instruction, num_layers) for _ in range(20)]
    # More than run at once, so that the last ones reuse slots and prefixes of the first ones.
    together = new_runner(runner, max_prefix_bytes=2**20)
    results = run_all(together, sequences, max_rows)
    assert together.num_sequences == together.num_kv_tokens == 0
    for sequence in sequences:
        alone = copy_of(sequence)
        [expected, *_] = run_all(runner, [alone])[alone]
        if sequence.params is not None:
            assert sequence.completion_ids == alone.completion_ids
            continue
        [ours] = results[sequence]
        assert isinstance(ours, ScoredEvent) and isinstance(expected, ScoredEvent)
        assert ours.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert (ours.hidden_states is None) == (expected.hidden_states is None)
        if ours.hidden_states is not None and expected.hidden_states is not None:
            assert_close(ours.hidden_states, expected.hidden_states)


@pytest.mark.parametrize(
    ("first", "second", "is_hit"),
    [
        ((1,), (1,), True),
        ((2,), (1,), True),
        ((1, 2), (1,), True),
        ((1,), (2,), False),
        ((1,), (1, 2), False),
        ((1,), (), False),
        ((2,), (), False),
        ((), (1,), True),
        ((), (2,), True),
        ((), (), True),
    ],
)
def test_a_cached_instruction_is_reused_by_sequences_of_its_depth_or_less(
    runner: ModelRunner,
    oracle: PreTrainedModel,
    first: tuple[int, ...],
    second: tuple[int, ...],
    is_hit: bool,
) -> None:
    """first, second: layers of two sequences; () is one with continuations, for all layers."""
    runner = new_runner(runner, max_prefix_bytes=2**30)
    instruction = random_ids(25)
    prompts = [instruction + random_ids(n, seed=n) for n in (4, 9)]
    earlier, later = (
        to_measure(prompt, *layers, continuations=[] if layers else CONTINUATIONS, num_shared=25)
        for prompt, layers in zip(prompts, (first, second), strict=True)
    )
    run_all(runner, [earlier])
    assert runner.admit(later) == (25 if is_hit else 0)
    runner.release(later, is_sound=True)
    [result] = run_all(runner, [later])[later]
    assert isinstance(result, ScoredEvent)
    if second:
        assert_close(states_of([result]), expected_states(oracle, prompts[1], second))
    else:
        theirs = [expected_score(oracle, prompts[1], c) for c in CONTINUATIONS]
        assert result.logprobs == pytest.approx(theirs, abs=1e-3)


def test_a_conversation_does_not_reuse_the_tokens_of_an_early_leaver(
    runner: ModelRunner,
) -> None:
    runner = new_runner(runner, max_prefix_bytes=2**30)
    prompt = random_ids(20)
    run_all(runner, [to_measure(prompt, 2, num_shared=20)])
    cold = to_generate(prompt, temperature=0.0)
    assert runner.admit(cold) == 0
    runner.release(cold, is_sound=True)
    run_all(runner, [cold])
    # The tokens of the conversation are deep enough for both.
    assert runner.admit(to_measure(prompt, 2)) == 19
    assert runner.admit(to_generate(prompt)) == 19


@pytest.fixture
def poisoned_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory for keys with numbers that would win every softmax."""
    slots = Arena.slots

    def poisoned(self: Arena, capacity: int, first_token: int) -> tuple[Tensor, Tensor]:
        keys, values = slots(self, capacity, first_token)
        return keys.fill_(1e6), values

    monkeypatch.setattr(Arena, "slots", poisoned)


@pytest.mark.usefixtures("poisoned_keys")
@pytest.mark.parametrize("is_sound", [True, False])
def test_the_slot_of_an_early_leaver_does_not_affect_the_next_sequence(
    runner: ModelRunner, oracle: PreTrainedModel, is_sound: bool
) -> None:
    # The neighbour keeps the memory of the slots, and decodes beside later sequences.
    neighbour, leaver = to_generate(random_ids(30), temperature=0.0), to_measure(random_ids(90), 1)
    results = {}
    scheduler = Scheduler(16, 1000, Memory(runner))

    def step() -> None:
        chunks = scheduler.schedule()
        results.update(runner.step(chunks))
        for chunk in chunks:
            chunk.advance()
            result = results[chunk.sequence]
            if isinstance(result, list):
                chunk.sequence.completion_ids += [token.token_id for token in result]

    for sequence in (leaver, neighbour):
        scheduler.admission.add(sequence)
    step()
    assert_close(states_of([results[leaver]]), expected_states(oracle, leaver.prompt_ids, (1,)))
    scheduler.admission.remove(leaver)
    runner.release(leaver, is_sound=is_sound)
    later = [
        to_generate(random_ids(5, seed=1), temperature=0.0),
        to_measure(random_ids(12, seed=2), 2, continuations=CONTINUATIONS),
    ]
    for sequence in later:
        scheduler.admission.add(sequence)
    step()
    assert_close(states_of([results[later[1]]]), expected_states(oracle, later[1].prompt_ids, (2,)))
    theirs = [expected_score(oracle, later[1].prompt_ids, c) for c in CONTINUATIONS]
    assert scores_of([results[later[1]]]) == pytest.approx(theirs, abs=1e-3)
    scheduler.admission.remove(later[1])
    runner.release(later[1], is_sound=True)
    while len(later[0].completion_ids) < 12:
        step()
    for sequence in (neighbour, later[0]):
        alone = to_generate(sequence.prompt_ids, temperature=0.0)
        run_all(new_runner(runner), [alone])
        assert sequence.completion_ids[:12] == alone.completion_ids


def test_sequences_that_wait_for_memory_get_the_same_states(
    runner: ModelRunner, oracle: PreTrainedModel
) -> None:
    tight = ModelRunner(
        runner._model,
        vocab_size=runner._model.config.vocab_size,
        max_kv_tokens=3 * 128,
        max_context=256,
    )
    prompts = [random_ids(n, seed=n) for n in (120, 200, 122)]
    sequences = [to_measure(prompt, 2, num_shared=60) for prompt in prompts]
    generated = to_generate(random_ids(120), temperature=0.0)
    results = run_all(tight, [generated, *sequences], max_rows=50)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert_close(states_of(results[sequence]), expected_states(oracle, prompt, (2,)))
    assert tight.num_sequences == tight.num_kv_tokens == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_hidden_states_that_are_not_finite_fail_their_sequence_only(
    runner: ModelRunner, oracle: PreTrainedModel, bad: float
) -> None:
    model, token = runner._model, 5
    lookup = model._embeddings
    model._embeddings = lambda ids: lookup(ids).masked_fill((ids == token)[:, None], bad)
    prefilled, healthy = to_measure([9, 9]), to_measure([9, 8, 7], 2)
    scored = to_measure([9, 8], 1, continuations=[[7], [8, 9]])
    generated = to_generate(random_ids(30), temperature=0.0)
    # In the last slots, and longer than the sequences there later.
    broken = [
        to_measure([*random_ids(20), token, *random_ids(20)], 1),
        to_measure([*random_ids(40), token], 2),
        to_measure([token, *random_ids(40)], 1, continuations=CONTINUATIONS),
    ]
    scheduler = Scheduler(16, 4000, Memory(runner))
    for sequence in (prefilled, healthy, scored, generated, *broken):
        scheduler.admission.add(sequence)
    results = runner.step(scheduler.schedule())
    for sequence in broken:
        assert isinstance(results[sequence], ValueError)
        assert "not finite" in str(results[sequence])
    assert_close(states_of([results[healthy]]), expected_states(oracle, [9, 8, 7], (2,)))
    theirs = [expected_score(oracle, [9, 8], c) for c in ([7], [8, 9])]
    assert scores_of([results[scored]]) == pytest.approx(theirs, abs=1e-3)
    assert_close(states_of([results[scored]]), expected_states(oracle, [9, 8], (1,)))
    first = token_of(results[generated])
    assert isinstance(results[prefilled], PrefilledEvent)
    # A sequence in the slot of a broken one decodes beside a longer one, which keeps the memory.
    generated.num_computed, generated.completion_ids = 30, [first.token_id]
    for sequence in reversed(broken):
        runner.release(sequence, is_sound=False)
    later = to_generate([9, 8, 6], temperature=0.0)
    scheduler = Scheduler(16, 1000, Memory(runner))
    scheduler.admission.add(later)
    first = token_of(runner.step(scheduler.schedule())[later])
    later.completion_ids = [first.token_id]
    later.num_computed = 3
    chunks = [ScheduledChunk(generated, 1), ScheduledChunk(later, 1)]
    results = runner.step(chunks)
    for sequence in (generated, later):
        sampled = token_of(results[sequence])
        alone = to_generate(sequence.prompt_ids, temperature=0.0)
        run_all(new_runner(runner), [alone])
        assert [*sequence.completion_ids, sampled.token_id] == alone.completion_ids[:2]


def test_returned_hidden_states_do_not_change_and_may_be_changed(
    runner: ModelRunner, oracle: PreTrainedModel
) -> None:
    sequence = to_measure(random_ids(8), 1, 2)
    states = states_of(run_all(runner, [sequence])[sequence])
    run_all(runner, [to_measure(random_ids(8, seed=1), 1, 2)])
    assert_close(states, expected_states(oracle, sequence.prompt_ids, (1, 2)))
    states += 1
