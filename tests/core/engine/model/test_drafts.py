"""Drafts change the number of steps, not the tokens."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from server.core.engine.adapters import BASE
from server.core.engine.model.config import read_model_config
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.runner import MAX_DRAFT_ROWS, ModelRunner
from server.core.engine.scheduler import Scheduler
from server.core.engine.sequence import GrammarState, SamplingParams, Sequence
from tests.core.engine.model.test_backend import SHAPE, needs_kernels
from tests.core.engine.model.test_runner import Memory, random_ids

pytestmark = needs_kernels
GREEDY = SamplingParams(max_tokens=60, temperature=0.0)


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QwenModel:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"hidden_size": 256})).save_pretrained(folder)
    return load_qwen(folder, read_model_config(folder), request.param)


def generate(
    model: QwenModel, sequences: list[Sequence], max_draft_tokens: int, max_kv_tokens: int = 4096
) -> int:
    """Completes the sequences; returns the number of steps."""
    runner = ModelRunner(
        model, vocab_size=model.config.vocab_size, max_kv_tokens=max_kv_tokens, max_context=256,
        max_draft_tokens=max_draft_tokens,
    )  # fmt: skip
    scheduler = Scheduler(16, 256, Memory(runner))
    for sequence in sequences:
        scheduler.admission.add(sequence)
    num_steps = 0
    while not scheduler.admission.is_idle:
        chunks = scheduler.schedule()
        results = runner.step(chunks)
        num_steps += 1
        for chunk in chunks:
            chunk.advance()
        for sequence, result in results.items():
            assert isinstance(result, list)
            sequence.num_computed += len(result) - 1
            ids = [token.token_id for token in result]
            sequence.completion_ids += ids
            params = sequence.params
            assert params is not None
            assert not params.stop_token_ids & set(ids[:-1])
            assert len(sequence.completion_ids) <= params.max_tokens
            if (
                ids[-1] in params.stop_token_ids
                or len(sequence.completion_ids) == params.max_tokens
            ):
                scheduler.admission.remove(sequence)
                runner.release(sequence, is_sound=True)
    return num_steps


def both(
    model: QwenModel, make: Callable[[], list[Sequence]], max_kv_tokens: int = 4096
) -> tuple[list[Sequence], int, int]:
    """Checks that drafts change no token; returns sequences, and steps with and without drafts."""
    drafted, plain = make(), make()
    with_drafts = generate(model, drafted, 3, max_kv_tokens)
    without = generate(model, plain, 0, max_kv_tokens)
    assert [s.completion_ids for s in drafted] == [s.completion_ids for s in plain]
    return drafted, with_drafts, without


def test_repeated_tokens_take_fewer_steps_and_stay_the_same(model: QwenModel) -> None:
    # Random weights soon repeat themselves at temperature 0.
    _, with_drafts, without = both(model, lambda: [Sequence(random_ids(20), GREEDY)])
    assert with_drafts < without


@pytest.mark.parametrize("seed", range(4))
def test_a_seed_samples_the_same_tokens_and_logprobs(model: QwenModel, seed: int) -> None:
    params = replace(GREEDY, temperature=0.1, top_p=0.9, seed=seed, num_logprobs=2,
                     repetition_penalty=1.02, frequency_penalty=0.01)  # fmt: skip
    both(model, lambda: [Sequence(random_ids(9, seed) * 3, params) for _ in range(2)])


def test_a_completion_ends_where_it_would_without_drafts(model: QwenModel) -> None:
    [sequence], _, _ = both(model, lambda: [Sequence(random_ids(20), GREEDY)])
    for num in (7, 18, 19, 30, 31, 32):
        shorter = replace(GREEDY, max_tokens=num)
        both(model, lambda params=shorter: [Sequence(random_ids(20), params)])  # type: ignore[misc]
    last = sequence.completion_ids[-1]
    stopping = replace(GREEDY, stop_token_ids=frozenset({last}))
    both(model, lambda: [Sequence(random_ids(20), stopping)])


class Cycle:
    """A grammar that allows one token at a time, in a cycle."""

    text = "10, 11, 12, 13, 14, 10, …"

    def __init__(self, at: int = 0) -> None:
        self._at = at

    def begin(self) -> GrammarState:
        return Cycle()

    def allowed(self) -> bytes:
        return (1 << (10 + self._at % 5)).to_bytes(38, "little")

    def accept(self, token_id: int) -> None:
        assert token_id == 10 + self._at % 5, "a token that is not allowed"
        self._at += 1


def test_a_grammar_accepts_each_token_once(model: QwenModel) -> None:
    params = replace(GREEDY, grammar=Cycle())
    [sequence], with_drafts, without = both(model, lambda: [Sequence(random_ids(20), params)])
    assert sequence.completion_ids == [10, 11, 12, 13, 14] * 12
    assert with_drafts < without / 2


def test_a_draft_takes_no_memory_from_other_sequences(model: QwenModel) -> None:
    # Two slots of 128 tokens: each sequence fills its own to the last token.
    params = replace(GREEDY, max_tokens=68)
    both(
        model,
        lambda: [Sequence(random_ids(60, i), params) for i in range(2)],
        max_kv_tokens=256,
    )


def test_steps_of_many_sequences_have_no_drafts(model: QwenModel) -> None:
    num = MAX_DRAFT_ROWS // 4 + 1
    _, with_drafts, without = both(
        model, lambda: [Sequence(random_ids(20), GREEDY) for _ in range(num)]
    )
    assert with_drafts == without


def test_the_next_turn_reuses_the_tokens_of_a_drafting_sequence(model: QwenModel) -> None:
    runner_args: dict[str, Any] = {
        "vocab_size": model.config.vocab_size, "max_kv_tokens": 4096, "max_context": 256,
        "max_prefix_bytes": 2**24,
    }  # fmt: skip
    texts = []
    for max_draft_tokens in (0, 3):
        runner = ModelRunner(model, **runner_args, max_draft_tokens=max_draft_tokens)
        first = Sequence(random_ids(20), GREEDY)
        run(runner, first)
        second = Sequence([*first.token_ids, 7, 8], GREEDY)
        assert run(runner, second) > 64
        texts.append(first.completion_ids + second.completion_ids)
    assert texts[0] == texts[1]


def run(runner: ModelRunner, sequence: Sequence) -> int:
    """Completes the sequence; returns how many of its tokens were cached."""
    num_cached = runner.admit(sequence)
    assert num_cached is not None
    sequence.num_computed = num_cached
    scheduler = Scheduler(16, 256, Memory(runner))
    scheduler.admission.running.append(sequence)
    while len(sequence.completion_ids) < GREEDY.max_tokens:
        [chunk] = scheduler.schedule()
        result = runner.step([chunk])
        chunk.advance()
        for token in result[sequence]:  # type: ignore[union-attr]
            sequence.completion_ids.append(token.token_id)
        sequence.num_computed += len(result[sequence]) - 1  # type: ignore[arg-type]
    runner.release(sequence, is_sound=True)
    return num_cached


def test_without_kernels_there_are_no_drafts(tmp_path: Path) -> None:
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(tmp_path)
    plain = load_qwen(tmp_path, read_model_config(tmp_path), "float32")
    _, with_drafts, without = both(plain, lambda: [Sequence(random_ids(20), GREEDY, adapter=BASE)])
    assert with_drafts == without
