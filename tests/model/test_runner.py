"""The runner: scores of continuations, and sampling that does not depend on the batch."""

import random
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from server.core.engine import StepResult
from server.core.model.config import read_model_config
from server.core.model.qwen import load_qwen
from server.core.model.runner import ModelRunner
from server.core.scheduler import Scheduler
from server.core.sequence import SamplingParams, Sequence, TokenEvent

CONTINUATIONS = [[7], [8, 9], [8, 10, 11], [7, 12]]


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    model = load_qwen(checkpoint, read_model_config(checkpoint), "float32")
    return ModelRunner(
        model, vocab_size=model.config.vocab_size, max_kv_tokens=4096, max_context=256
    )


class Memory:
    """The runner's memory as the scheduler sees it."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.reserve = runner.reserve
        self.num_suspended = 0

    def admit(self, sequence: Sequence) -> bool:
        num_known = self._runner.admit(sequence)
        sequence.num_computed = num_known or 0
        return num_known is not None

    def suspend(self, sequence: Sequence) -> None:
        self._runner.suspend(sequence)
        sequence.num_computed = 0
        self.num_suspended += 1


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def to_generate(prompt: list[int], **params: float) -> Sequence:
    return Sequence(prompt, SamplingParams(max_tokens=12, **params), [], lambda event: None)  # type: ignore[arg-type]


def to_score(prompt: list[int]) -> Sequence:
    return Sequence(prompt, None, CONTINUATIONS, lambda event: None)


def run_all(
    runner: ModelRunner, sequences: list[Sequence], max_prefill_tokens: int = 1000,
    memory: Memory | None = None,
) -> dict[Sequence, list[StepResult]]:  # fmt: skip
    """Steps until every sequence has its scores or twelve tokens."""
    scheduler = Scheduler(16, max_prefill_tokens, memory or Memory(runner))
    for sequence in sequences:
        scheduler.add(sequence)
    results: dict[Sequence, list[StepResult]] = {sequence: [] for sequence in sequences}
    while not scheduler.is_idle:
        chunks = scheduler.schedule()
        done = runner.step(chunks)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        for sequence, result in done.items():
            assert not isinstance(result, Exception), result
            results[sequence].append(result)
            if isinstance(result, TokenEvent):
                sequence.completion_ids.append(result.token_id)
            if not isinstance(result, TokenEvent) or len(sequence.completion_ids) == 12:
                scheduler.remove(sequence)
                runner.release(sequence, is_sound=True)
    return results


def expected_score(oracle: PreTrainedModel, prompt: list[int], continuation: list[int]) -> float:
    with torch.inference_mode():
        logits = oracle(torch.tensor([prompt + continuation])).logits[0]
    logprobs = logits.log_softmax(-1)
    begin = len(prompt) - 1
    return sum(float(logprobs[begin + i, t]) for i, t in enumerate(continuation))


@pytest.mark.parametrize("logits_rows", [128, 3])
@pytest.mark.parametrize("max_prefill_tokens", [1000, 6])
def test_scores_are_the_summed_logprobs_of_each_continuation(
    runner: ModelRunner,
    oracle: PreTrainedModel,
    max_prefill_tokens: int,
    logits_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.core.model.runner.LOGITS_ROWS", logits_rows)
    prompts = [random_ids(20), random_ids(9, seed=1)]
    sequences = [to_score(prompt) for prompt in prompts]
    results = run_all(runner, sequences, max_prefill_tokens)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        theirs = [expected_score(oracle, prompt, c) for c in CONTINUATIONS]
        assert results[sequence][0].logprobs == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("num_last", [1, 2])
def test_continuations_of_one_token_are_scored_wherever_the_last_chunk_begins(
    runner: ModelRunner, oracle: PreTrainedModel, num_last: int
) -> None:
    prompt = random_ids(20)
    sequence = Sequence(prompt, None, [[7], [8]], lambda event: None)
    results = run_all(runner, [sequence], max_prefill_tokens=20 - num_last)
    theirs = [expected_score(oracle, prompt, c) for c in ([7], [8])]
    assert results[sequence][0].logprobs == pytest.approx(theirs, abs=1e-3)


def test_greedy_tokens_equal_those_of_transformers(
    runner: ModelRunner, oracle: PreTrainedModel
) -> None:
    ids = random_ids(15)
    sequence = to_generate(ids, temperature=0.0)
    run_all(runner, [sequence])
    theirs = oracle.generate(
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
    run_all(runner, [others[0], again, others[1], to_score(random_ids(8))], max_prefill_tokens=9)
    assert again.completion_ids == alone.completion_ids


def test_a_sequence_that_had_to_wait_halfway_gets_the_same_tokens(checkpoint: Path) -> None:
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
    scheduler.add(broken)
    scheduler.add(healthy)
    results = runner.step(scheduler.schedule())
    assert isinstance(results[broken], ValueError)
    assert isinstance(results[healthy], TokenEvent)
