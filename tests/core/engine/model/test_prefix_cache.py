"""What is reused equals what would have been computed, and memory stays within its bound."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.core.engine.model.attention import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache, KVMemory, KVPrefix
from server.core.engine.model.prefix_cache import PrefixCache
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.engine.sequence import SamplingParams, Sequence
from tests.core.engine.model.test_runner import CONTINUATIONS, run_all

TOLERANCE = 1e-4


@pytest.fixture
def model(checkpoint: Path) -> QwenModel:
    return load_qwen(checkpoint, read_model_config(checkpoint), "float32")


@pytest.fixture
def memory(model: QwenModel) -> KVMemory:
    return model.new_memory(max_tokens=4096, max_context=256)


@pytest.fixture
def num_layers(model: QwenModel) -> int:
    return model.config.num_layers


def new_runner(model: QwenModel, max_prefix_bytes: int = 0) -> ModelRunner:
    return ModelRunner(
        model,
        vocab_size=model.config.vocab_size,
        max_kv_tokens=4096,
        max_context=256,
        max_prefix_bytes=max_prefix_bytes,
    )


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def compute(model: QwenModel, memory: KVMemory, ids: list[int], cache: KVCache) -> Tensor:
    """Logits (V,) of the last of the tokens behind those in the cache."""
    assert memory.reserve(cache, len(ids))
    positions = range(cache.length, cache.length + len(ids))
    with torch.inference_mode():
        [[hidden]] = model.forward([Segment(ids, positions, cache)])
        return model.logits(hidden)[-1]


def computed(model: QwenModel, memory: KVMemory, ids: list[int]) -> KVCache:
    cache = KVCache()
    compute(model, memory, ids, cache)
    return cache


def filled(memory: KVMemory, prefix: KVPrefix | None) -> KVCache:
    assert prefix is not None
    cache = KVCache()
    assert memory.reserve(cache, prefix.length)
    memory.fill(cache, prefix)
    return cache


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_common", [1, 10, 39])
def test_a_hit_equals_a_cold_start(
    model: QwenModel, memory: KVMemory, num_layers: int, num_common: int
) -> None:
    known = random_ids(40)
    ids = known[:num_common] + random_ids(15, seed=9)
    prefixes = PrefixCache(2**30)
    prefixes.store(known, computed(model, memory, known), num_layers)
    cache = filled(memory, prefixes.lookup(ids, num_layers))
    assert cache.length >= num_common
    warm = compute(model, memory, ids[cache.length :], cache)
    assert_close(warm, compute(model, memory, ids, KVCache()))


def test_a_hit_leaves_one_token_to_compute(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(12)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids, computed(model, memory, ids), num_layers)
    prefix = prefixes.lookup(ids, num_layers)
    assert prefix is not None
    assert prefix.length == 11


def test_what_goes_on_from_a_hit_leaves_it_as_it_was(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(20)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids, computed(model, memory, ids), num_layers)
    first = filled(memory, prefixes.lookup(ids, num_layers))
    compute(model, memory, random_ids(30, seed=3), first)
    second = filled(memory, prefixes.lookup(ids, num_layers))
    again = compute(model, memory, ids[-1:], second)
    assert_close(again, compute(model, memory, ids, KVCache()))


def test_a_longer_conversation_replaces_the_one_it_continues(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(30)
    cache = computed(model, memory, ids)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids[:10], cache, num_layers)
    prefixes.store(ids, cache, num_layers)
    only_longer = prefixes.num_bytes
    prefixes.store(ids[:20], cache, num_layers)
    assert prefixes.num_bytes == only_longer == cache.first(30, num_layers).num_bytes


def test_the_least_recently_used_go_first_and_pinned_ones_never(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    prompts = [[3 + i, *random_ids(19)] for i in range(5)]
    size = computed(model, memory, prompts[0]).first(20, num_layers).num_bytes
    prefixes = PrefixCache(3 * size)
    prefixes.store(prompts[0], computed(model, memory, prompts[0]), num_layers, is_pinned=True)
    for ids in prompts[1:3]:
        prefixes.store(ids, computed(model, memory, ids), num_layers)
    assert prefixes.lookup(prompts[1], num_layers) is not None  # now 2 is the least recently used
    prefixes.store(prompts[3], computed(model, memory, prompts[3]), num_layers)
    assert prefixes.num_bytes <= 3 * size
    found = [prefixes.lookup(ids, num_layers) is not None for ids in prompts]
    assert found == [True, True, False, True, False]


def test_what_is_larger_than_the_cache_takes_nobodys_place(
    model: QwenModel, memory: KVMemory, num_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = random_ids(10), random_ids(31, seed=2)
    size = computed(model, memory, small).first(10, num_layers).num_bytes
    prefixes = PrefixCache(3 * size)
    prefixes.store(small, computed(model, memory, small), num_layers)
    with monkeypatch.context() as patch:
        patch.setattr(KVPrefix, "clone", lambda self: pytest.fail("copied for nothing"))
        prefixes.store(large, computed(model, memory, large), num_layers)
    assert prefixes.lookup(large, num_layers) is None
    assert prefixes.lookup(small, num_layers) is not None
    prefixes.store(small[:2], computed(model, memory, small[:2]), num_layers, is_pinned=True)
    assert prefixes.has_room_for(2 * size) and not prefixes.has_room_for(3 * size)


def test_pinning_twice_takes_no_more_memory(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(10)
    cache = computed(model, memory, ids)
    prefixes = PrefixCache(0)
    for _ in range(3):
        prefixes.store(ids, cache, num_layers, is_pinned=True)
    assert prefixes.num_bytes == cache.first(10, num_layers).num_bytes


def test_a_prefix_serves_those_that_are_as_deep_or_less(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(10)
    cache = computed(model, memory, ids)
    prefixes = PrefixCache(2**30)
    prefixes.store(ids, cache, 2)
    for depth in range(1, num_layers + 1):
        prefix = prefixes.lookup(ids, depth)
        if depth > 2:
            assert prefix is None
        else:
            assert prefix is not None
            assert (prefix.length, prefix.num_layers) == (9, depth)
            assert torch.equal(prefix.keys, cache.first(9, depth).keys)
            assert torch.equal(prefix.values, cache.first(9, depth).values)


def test_a_prefix_takes_memory_for_its_layers_only(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(10)
    cache = computed(model, memory, ids)
    whole = cache.first(10, num_layers).num_bytes
    prefixes = PrefixCache(whole // num_layers)
    prefixes.store(ids, cache, 2)
    assert prefixes.num_bytes == 0
    prefixes.store(ids, cache, 1)
    assert prefixes.num_bytes == whole // num_layers


def test_a_longer_shallow_prefix_hides_no_shorter_deep_one(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(30)
    cache = computed(model, memory, ids)
    for order in ((1, -1), (-1, 1)):
        prefixes = PrefixCache(2**30)
        for which in order:
            if which == 1:
                prefixes.store(ids, cache, 1)
            else:
                prefixes.store(ids[:10], cache, num_layers)
        deep, shallow = prefixes.lookup(ids, num_layers), prefixes.lookup(ids, 1)
        assert deep is not None and shallow is not None
        assert (deep.length, shallow.length) == (10, 29)


def test_a_deep_prefix_replaces_a_shallow_one_of_the_same_tokens_and_not_the_reverse(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(10)
    cache = computed(model, memory, ids)
    prefixes = PrefixCache(2**30)
    for depth in (1, num_layers, 1, 2):
        prefixes.store(ids, cache, depth)
    assert prefixes.num_bytes == cache.first(10, num_layers).num_bytes
    # What is longer is a replacement as well, in as many layers.
    prefixes.store(ids[:9], cache, 1)
    assert prefixes.num_bytes == cache.first(10, num_layers).num_bytes


def test_a_pinned_shallow_prefix_stays_beside_a_deep_one(
    model: QwenModel, memory: KVMemory, num_layers: int
) -> None:
    ids = random_ids(10)
    cache = computed(model, memory, ids)
    prefixes = PrefixCache(0)
    for depth in (1, num_layers, 1, 2, num_layers):
        prefixes.store(ids, cache, depth, is_pinned=True)
    assert prefixes.num_bytes == sum(cache.first(10, n).num_bytes for n in (1, num_layers))
    assert prefixes.lookup(ids, num_layers) is not None


def to_score(prompt: list[int], num_shared: int) -> Sequence:
    return Sequence(
        prompt, None, CONTINUATIONS, lambda event: None, num_shared=num_shared, is_pinned=True
    )


def test_scores_are_the_same_with_a_shared_instruction(model: QwenModel) -> None:
    instruction = random_ids(25)
    prompts = [instruction + random_ids(n, seed=n) for n in (4, 9)]
    cold = [to_score(prompt, 0) for prompt in prompts]
    expected = run_all(new_runner(model), cold)
    runner = new_runner(model)
    for prompt, sequence in zip(prompts, cold, strict=True):
        warm = to_score(prompt, len(instruction))
        result = run_all(runner, [warm])[warm][0]
        assert result.logprobs == pytest.approx(expected[sequence][0].logprobs, abs=1e-3)
    assert runner.admit(to_score(prompts[0], 0)) == len(instruction)


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(model: QwenModel) -> None:
    runner = new_runner(model, max_prefix_bytes=2**30)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    first = Sequence(random_ids(20), params, [], lambda event: None)
    run_all(runner, [first])
    next_prompt = first.token_ids + random_ids(8, seed=4)
    # The last token was sampled, but never computed.
    second = Sequence(next_prompt, params, [], lambda event: None)
    assert runner.admit(second) == len(first.token_ids) - 1


def test_nothing_of_a_broken_sequence_is_reused(model: QwenModel) -> None:
    runner = new_runner(model, max_prefix_bytes=2**30)
    sequence = Sequence(random_ids(20), SamplingParams(max_tokens=1), [], lambda event: None)
    runner.admit(sequence)
    sequence.num_computed = 20
    runner.release(sequence, is_sound=False)
    assert runner.admit(sequence) == 0
