"""What is reused equals what would have been computed, and memory stays within its bound."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.core.model.config import read_model_config
from server.core.model.kv_cache import KVCache
from server.core.model.prefix_cache import PrefixCache
from server.core.model.qwen import QwenModel, Segment, load_qwen
from server.core.model.runner import ModelRunner
from server.core.sequence import SamplingParams, Sequence
from tests.model.test_runner import CONTINUATIONS, run_all

TOLERANCE = 1e-4


@pytest.fixture
def model(checkpoint: Path) -> QwenModel:
    return load_qwen(checkpoint, read_model_config(checkpoint), torch.float32)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def compute(model: QwenModel, ids: list[int], cache: KVCache) -> Tensor:
    positions = range(cache.length, cache.length + len(ids))
    with torch.inference_mode():
        return model.logits(model.forward([Segment(ids, positions, cache)]))[-1]


def computed(model: QwenModel, ids: list[int]) -> KVCache:
    cache = model.new_cache()
    compute(model, ids, cache)
    return cache


@pytest.mark.parametrize("num_common", [1, 10, 39])
def test_a_hit_equals_a_cold_start(model: QwenModel, num_common: int) -> None:
    known = random_ids(40)
    ids = known[:num_common] + random_ids(15, seed=9)
    prefixes = PrefixCache(2**30)
    prefixes.store(known, computed(model, known))
    cache = prefixes.lookup(ids)
    assert cache is not None
    assert cache.length >= num_common
    warm = compute(model, ids[cache.length :], cache)
    torch.testing.assert_close(warm, compute(model, ids, model.new_cache()), rtol=0, atol=TOLERANCE)


def test_a_hit_leaves_one_token_to_compute(model: QwenModel) -> None:
    ids = random_ids(12)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids, computed(model, ids))
    cache = prefixes.lookup(ids)
    assert cache is not None
    assert cache.length == 11


def test_what_is_taken_out_can_be_changed_without_harm(model: QwenModel) -> None:
    ids = random_ids(20)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids, computed(model, ids))
    first = prefixes.lookup(ids)
    assert first is not None
    compute(model, random_ids(30, seed=3), first)
    second = prefixes.lookup(ids)
    assert second is not None
    again = compute(model, ids[-1:], second)
    torch.testing.assert_close(
        again, compute(model, ids, model.new_cache()), rtol=0, atol=TOLERANCE
    )


def test_a_longer_conversation_replaces_the_one_it_continues(model: QwenModel) -> None:
    ids = random_ids(30)
    cache = computed(model, ids)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids[:10], cache)
    prefixes.store(ids, cache)
    only_longer = prefixes.num_bytes
    prefixes.store(ids[:20], cache)
    assert prefixes.num_bytes == only_longer == cache.copy(30).num_bytes


def test_the_least_recently_used_go_first_and_pinned_ones_never(model: QwenModel) -> None:
    prompts = [[3 + i, *random_ids(19)] for i in range(5)]
    size = computed(model, prompts[0]).copy(20).num_bytes
    prefixes = PrefixCache(3 * size)
    prefixes.store(prompts[0], computed(model, prompts[0]), is_pinned=True)
    for ids in prompts[1:3]:
        prefixes.store(ids, computed(model, ids))
    assert prefixes.lookup(prompts[1]) is not None  # now 2 is the least recently used
    prefixes.store(prompts[3], computed(model, prompts[3]))
    assert prefixes.num_bytes <= 3 * size
    found = [prefixes.lookup(ids) is not None for ids in prompts]
    assert found == [True, True, False, True, False]


def test_pinning_twice_takes_no_more_memory(model: QwenModel) -> None:
    ids = random_ids(10)
    cache = computed(model, ids)
    prefixes = PrefixCache(0)
    for _ in range(3):
        prefixes.store(ids, cache, is_pinned=True)
    assert prefixes.num_bytes == cache.copy(10).num_bytes


def to_score(prompt: list[int], num_shared: int) -> Sequence:
    return Sequence(
        prompt, None, CONTINUATIONS, lambda event: None, num_shared=num_shared, is_pinned=True
    )


def test_scores_are_the_same_with_a_shared_instruction(model: QwenModel) -> None:
    instruction = random_ids(25)
    prompts = [instruction + random_ids(n, seed=n) for n in (4, 9)]
    cold = [to_score(prompt, 0) for prompt in prompts]
    expected = run_all(ModelRunner(model), cold)
    runner = ModelRunner(model)
    for prompt, sequence in zip(prompts, cold, strict=True):
        warm = to_score(prompt, len(instruction))
        result = run_all(runner, [warm])[warm][0]
        assert result.logprobs == pytest.approx(expected[sequence][0].logprobs, abs=1e-3)
    assert runner.admit(to_score(prompts[0], 0)) == len(instruction)


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(model: QwenModel) -> None:
    runner = ModelRunner(model, max_prefix_bytes=2**30)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    first = Sequence(random_ids(20), params, [], lambda event: None)
    run_all(runner, [first])
    next_prompt = first.token_ids + random_ids(8, seed=4)
    # The last token was sampled, but never computed.
    second = Sequence(next_prompt, params, [], lambda event: None)
    assert runner.admit(second) == len(first.token_ids) - 1


def test_nothing_of_a_broken_sequence_is_reused(model: QwenModel) -> None:
    runner = ModelRunner(model, max_prefix_bytes=2**30)
    sequence = Sequence(random_ids(20), SamplingParams(max_tokens=1), [], lambda event: None)
    runner.admit(sequence)
    sequence.num_computed = 20
    runner.release(sequence, is_sound=False)
    assert runner.admit(sequence) == 0
