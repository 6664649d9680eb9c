"""Cached keys and values equal computed ones, and memory stays within its bound."""

import random
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.core.engine.model import prefix_cache
from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache, KVPrefix
from server.core.engine.model.kv_memory import KVMemory
from server.core.engine.model.prefix_cache import PrefixCache
from server.core.engine.model.qwen import QwenModel, load_qwen
from server.core.engine.model.runner import ModelRunner
from server.core.engine.sequence import SamplingParams, Sequence
from tests.core.engine.model.test_runner import CONTINUATIONS, run_all, scores_of

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
    """Logits (V,) of the last of the tokens after those in the cache."""
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
    stored = random_ids(40)
    ids = stored[:num_common] + random_ids(15, seed=9)
    prefixes = PrefixCache(2**30)
    prefixes.store(stored, computed(model, memory, stored), num_layers)
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


def test_a_sequence_that_continues_a_hit_does_not_change_it(
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


def test_a_prefix_larger_than_the_cache_evicts_nothing(
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


def test_a_prefix_is_found_for_its_depth_or_less(
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
    # A longer entry of at least as many layers serves for shorter tokens, too.
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


def tiny_cache(num_layers: int, length: int) -> KVCache:
    """Computed tokens of 8 bytes a layer."""
    memory = KVMemory(num_layers, 1, 1, max_tokens=length, max_context=length)
    cache = KVCache()
    assert memory.reserve(cache, length)
    cache.length = length
    return cache


def num_common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def test_an_entry_that_is_stored_again_counts_as_used() -> None:
    cache = tiny_cache(1, 10)
    first, second, third = ([i] * 10 for i in range(3))
    prefixes = PrefixCache(2 * cache.first(10, 1).num_bytes)
    for ids in (first, second, first[:9], third):
        prefixes.store(ids, cache, 1)
    found = [prefixes.lookup(ids, 1) is not None for ids in (first, second, third)]
    assert found == [True, False, True]


def test_a_lookup_among_many_entries_compares_few(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class CountedKey(bytes):
        def __lt__(self, other: bytes) -> bool:
            calls.append("order")
            return super().__lt__(other)

        def startswith(self, *args: object) -> bool:
            calls.append("prefix")
            return super().startswith(*args)  # type: ignore[arg-type]

    def counted_num_common(a: bytes, b: bytes) -> int:
        calls.append("common")
        return original_num_common(a, b)

    original_key, original_num_common = prefix_cache._key, prefix_cache._num_common
    monkeypatch.setattr(prefix_cache, "_key", lambda ids: CountedKey(original_key(ids)))
    monkeypatch.setattr(prefix_cache, "_num_common", counted_num_common)

    cache, shared = tiny_cache(2, 60), random_ids(50)
    conversations = [shared + random_ids(10, seed=i) for i in range(10_000)]
    prefixes = PrefixCache(2**30)
    prefixes.store(shared, cache, 2, is_pinned=True)
    for i, ids in enumerate(conversations):
        prefixes.store(ids, cache, 1 + i % 2)
    assert prefixes.num_bytes == 50 * 2 * 8 + 60 * 3 * 8 * 5000
    # Three lists, of two neighbours each; 14 steps at most to find a place in one.
    for seed in range(10):
        ids = conversations[seed * 321][: 50 + seed] + random_ids(10, seed=-1 - seed)
        expected = max(num_common(ids[50:-1], stored[50:]) for stored in conversations)
        calls.clear()
        prefix = prefixes.lookup(ids, 1)
        assert prefix is not None and prefix.length == 50 + expected
        assert 0 < calls.count("common") <= 6
        assert calls.count("order") <= 3 * 14
        calls.clear()
        prefixes.store(ids[:60], cache, 1)
        assert calls.count("common") + calls.count("prefix") <= 12
        assert calls.count("order") <= 4 * 14


@dataclass(eq=False)
class Kept:
    ids: list[int]
    depth: int
    is_pinned: bool
    tag: int

    @property
    def num_bytes(self) -> int:
        return 8 * self.depth * len(self.ids)


class NaivePrefixCache:
    """The same rules, on a list that is searched from end to end."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.entries: list[Kept] = []  # the least recently used first

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.entries)

    @property
    def num_pinned_bytes(self) -> int:
        return sum(each.num_bytes for each in self.entries if each.is_pinned)

    def longest(self, ids: list[int], depth: int) -> tuple[int, dict[int, Kept]]:
        """The length of the longest prefix, and all entries that have it, by their tags."""
        lengths = {
            each: num_common(each.ids, ids[:-1]) for each in self.entries if each.depth >= depth
        }
        longest = max(lengths.values(), default=0)
        return longest, {each.tag: each for each, length in lengths.items() if length == longest}

    def use(self, entry: Kept) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)

    def store(self, new: Kept) -> None:
        if not new.is_pinned and self.num_pinned_bytes + new.num_bytes > self.max_bytes:
            return
        for each in self.entries:
            is_known = each.depth >= new.depth and each.ids[: len(new.ids)] == new.ids
            if is_known and (each.is_pinned or not new.is_pinned):
                return
        self.entries = [
            each
            for each in self.entries
            if each.is_pinned or each.depth > new.depth or new.ids[: len(each.ids)] != each.ids
        ]
        for each in [each for each in self.entries if not each.is_pinned]:
            if self.num_bytes + new.num_bytes > self.max_bytes:
                self.entries.remove(each)
        self.entries.append(new)


def lookup_in_both(
    prefixes: PrefixCache, naive: NaivePrefixCache, ids: list[int], depth: int
) -> int:
    """The length that both find. Of several entries, `naive` uses the same as `prefixes`."""
    length, candidates = naive.longest(ids, depth)
    prefix = prefixes.lookup(ids, depth)
    if prefix is None:
        assert length == 0
    else:
        assert (prefix.length, prefix.num_layers) == (length, depth)
        naive.use(candidates[int(prefix.keys[0, 0, 0, 0])])
    return length


# Ids that share some of their bytes.
token_ids = st.lists(st.sampled_from([1, 256, 70_000]), min_size=1, max_size=6)
actions = st.tuples(st.sampled_from(["store", "pin", "lookup"]), token_ids, st.integers(1, 3))


@given(st.lists(actions, max_size=40), st.integers(0, 500))
def test_any_operations_find_and_keep_what_a_search_of_all_entries_would(
    operations: list[tuple[str, list[int], int]], max_bytes: int
) -> None:
    cache = tiny_cache(3, 6)
    prefixes, naive = PrefixCache(max_bytes), NaivePrefixCache(max_bytes)
    for tag, (action, ids, depth) in enumerate(operations):
        if action != "lookup":
            assert cache.pool is not None
            cache.pool.keys.fill_(tag)
            is_pinned = action == "pin"
            prefixes.store(ids, cache, depth, is_pinned=is_pinned)
            naive.store(Kept(ids, depth, is_pinned, tag))
            # Uses the entry that was stored, or used in its place, in both.
            lookup_in_both(prefixes, naive, [*ids, 0], depth)
        lookup_in_both(prefixes, naive, ids, depth)
        assert prefixes.num_bytes == naive.num_bytes
        assert prefixes.num_bytes <= max(max_bytes, naive.num_pinned_bytes)
        room = max_bytes - naive.num_pinned_bytes
        assert prefixes.has_room_for(room) and not prefixes.has_room_for(room + 1)
    for action, ids, depth in operations:
        length = lookup_in_both(prefixes, naive, [*ids, 0], depth)
        assert action != "pin" or length == len(ids)


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
        found = scores_of(run_all(runner, [warm])[warm])
        assert found == pytest.approx(scores_of(expected[sequence]), abs=1e-3)
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


def test_a_broken_sequence_is_not_reused(model: QwenModel) -> None:
    runner = new_runner(model, max_prefix_bytes=2**30)
    sequence = Sequence(random_ids(20), SamplingParams(max_tokens=1), [], lambda event: None)
    runner.admit(sequence)
    sequence.num_computed = 20
    runner.release(sequence, is_sound=False)
    assert runner.admit(sequence) == 0
