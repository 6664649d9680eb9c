"""Slots of the KV memory: neighbours stay neighbours, nothing is lost, nothing leaks."""

import random

import torch

from server.core.engine.model.kv_cache import KVCache, KVMemory

LAYERS = 2
SHAPE = {"num_layers": LAYERS, "num_kv_heads": 3, "head_dim": 4}


def make(max_tokens: int = 4096, max_context: int = 600) -> KVMemory:
    return KVMemory(**SHAPE, max_tokens=max_tokens, max_context=max_context)


def write(cache: KVCache, num_tokens: int, value: float) -> None:
    """Appends tokens whose keys are `value` and whose values are its negative."""
    assert cache.pool is not None
    end = cache.length + num_tokens
    cache.pool.keys[:, cache.slot, :, cache.length : end] = value
    cache.pool.values[:, cache.slot, ..., cache.length : end] = -value
    cache.length = end


def test_a_sequence_keeps_its_tokens_when_it_moves_to_a_larger_slot() -> None:
    memory, cache = make(), KVCache()
    for i in range(0, 600, 50):
        assert memory.reserve(cache, 50)
        write(cache, 50, i)
    assert memory.num_sequences == 1
    assert cache.capacity == 600
    prefix = cache.first(600, LAYERS).clone()
    assert prefix.keys[1, 2, :, 3].tolist() == [i // 50 * 50 for i in range(600)]
    assert prefix.values[0, 0, 1].tolist() == [-(i // 50 * 50) for i in range(600)]


def test_memory_is_counted_in_slots_and_bounded() -> None:
    memory, a, b = make(max_tokens=700), KVCache(), KVCache()
    assert memory.reserve(a, 100)
    assert memory.num_tokens == 128
    write(a, 100, 1)
    assert not memory.reserve(b, 590)  # 128 + 600 tokens are too many
    assert memory.num_sequences == 1
    assert memory.reserve(b, 200)
    assert memory.num_tokens == 128 + 256
    memory.free(a)
    memory.free(b)
    assert memory.num_tokens == 0
    assert memory.reserve(a, 600), "one sequence alone always fits"


def test_a_clone_of_the_first_tokens_is_a_copy() -> None:
    memory, cache = make(), KVCache()
    assert memory.reserve(cache, 10)
    write(cache, 10, 1)
    prefix = cache.first(4, LAYERS).clone()
    cache.length = 0
    write(cache, 10, 2)
    assert prefix.keys.unique().tolist() == [1]
    other = KVCache()
    assert memory.reserve(other, 4)
    memory.fill(other, prefix)
    assert other.length == 4
    assert torch.equal(other.first(4, LAYERS).clone().values, prefix.values)
    assert prefix.num_bytes == 2 * 2 * 3 * 4 * 4 * 4


def test_a_prefix_of_the_first_layers_fills_these_and_no_others() -> None:
    memory, cache, other = make(), KVCache(), KVCache()
    assert memory.reserve(cache, 10) and memory.reserve(other, 10)
    write(cache, 10, 1)
    prefix = cache.first(6, 1).clone()
    assert (prefix.length, prefix.num_layers) == (6, 1)
    assert prefix.num_bytes == cache.first(6, LAYERS).num_bytes / 2
    write(other, 10, 2)
    memory.fill(other, prefix)
    assert other.length == 6
    filled = other.first(6, LAYERS).clone()
    assert filled.keys[0].unique().tolist() == [1] and filled.values[0].unique().tolist() == [-1]
    assert filled.keys[1].unique().tolist() == [2] and filled.values[1].unique().tolist() == [-2]
    write(other, 4, 2)
    # Nothing behind the prefix was touched, in any layer.
    assert other.first(10, LAYERS).keys[:, :, 6:].unique().tolist() == [2]


def test_a_slot_of_a_broken_sequence_holds_numbers_only_when_it_is_given_again() -> None:
    memory, a, b = make(), KVCache(), KVCache()
    assert memory.reserve(a, 10) and memory.reserve(b, 10)
    write(a, 10, float("nan"))
    memory.free(a, is_sound=False)
    assert memory.reserve(a, 10)
    assert a.pool is not None
    assert a.pool.values.isfinite().all()


def test_any_order_of_growing_and_freeing_keeps_every_sequence_apart() -> None:
    rng = random.Random(0)
    memory = make(max_tokens=3000)
    caches: dict[KVCache, float] = {}
    for number in range(1, 400):
        if caches and rng.random() < 0.3:
            cache = rng.choice(list(caches))
            memory.free(cache)
            del caches[cache]
            assert cache.capacity == cache.length == 0
        else:
            is_new = not caches or rng.random() < 0.5
            cache = KVCache() if is_new else rng.choice(list(caches))
            num_tokens = min(rng.randint(1, 200), 600 - cache.length)
            if not memory.reserve(cache, num_tokens):
                continue
            write(cache, num_tokens, caches.setdefault(cache, float(number)))
        for cache, value in caches.items():
            if cache.length:
                prefix = cache.first(cache.length, LAYERS).clone()
                assert prefix.keys.unique().tolist() == [value]
                assert prefix.values.unique().tolist() == [-value]
        pools = {cache.pool for cache in caches}
        assert memory.num_sequences == len(caches) == sum(len(p.caches) for p in pools if p)
        assert memory.num_tokens == sum(cache.capacity for cache in caches) <= 3000
        for pool in pools:
            assert pool is not None
            assert [cache.slot for cache in pool.caches] == list(range(len(pool.caches)))
    assert caches
