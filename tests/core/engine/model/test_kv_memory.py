"""Slots of the KV memory: neighbours stay neighbours, nothing is lost, nothing leaks."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.engine.model import kv_memory
from server.core.engine.model.kv_cache import KVCache, KVPrefix
from server.core.engine.model.kv_memory import KVMemory

LAYERS = 2
SHAPE: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": 3, "head_dim": 4}


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
    # Nothing after the prefix changed, in any layer.
    assert other.first(10, LAYERS).keys[:, :, 6:].unique().tolist() == [2]


def test_the_slot_of_a_broken_sequence_is_finite_when_it_is_reused() -> None:
    memory, a, b = make(), KVCache(), KVCache()
    assert memory.reserve(a, 10) and memory.reserve(b, 10)
    write(a, 10, float("nan"))
    memory.free(a, is_sound=False)
    assert memory.reserve(a, 10)
    assert a.pool is not None
    assert a.pool.values.isfinite().all()


def test_a_lone_sequence_grows_to_the_last_token_of_the_memory() -> None:
    memory, cache = make(max_tokens=600), KVCache()
    for i in range(600):
        assert memory.reserve(cache, 1)
        write(cache, 1, i)
    prefix = cache.first(600, LAYERS)
    assert prefix.keys[1, 2, :, 3].tolist() == list(range(600))
    assert prefix.values[0, 1, 2].tolist() == [-i for i in range(600)]
    assert not memory.reserve(KVCache(), 1)


def test_a_slot_is_added_beside_the_others_and_moves_nothing() -> None:
    memory, caches = make(), [KVCache() for _ in range(5)]
    for cache in caches:
        assert memory.reserve(cache, 100)
    assert [cache.slot for cache in caches] == list(range(5))
    assert len({cache.pool for cache in caches}) == 1


def test_if_saving_a_layer_fails_a_sequence_stays_in_its_slot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory, a, b = make(), KVCache(), KVCache()
    assert memory.reserve(a, 100) and memory.reserve(b, 100)
    write(a, 100, 1)
    write(b, 100, 2)

    def fail(prefix: KVPrefix) -> KVPrefix:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(KVPrefix, "clone", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            memory.reserve(a, 100)
    assert (a.capacity, a.length, memory.num_tokens) == (128, 100, 256)
    assert a.first(100, LAYERS).keys.unique().tolist() == [1]
    assert memory.reserve(a, 100)
    assert a.first(100, LAYERS).keys.unique().tolist() == [1]
    assert b.first(100, LAYERS).keys.unique().tolist() == [2]


HEAD_DIM = 64  # so that a few tokens fill a page


class Model:
    """A KV memory and its expected content."""

    def __init__(self, num_kv_heads: int, max_tokens: int, max_context: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_memory, "MIN_CAPACITY", 4)
            self.memory = KVMemory(
                LAYERS, num_kv_heads, HEAD_DIM, max_tokens=max_tokens, max_context=max_context
            )
        self.num_kv_heads, self.max_tokens, self.max_context = num_kv_heads, max_tokens, max_context
        self.capacities = [c for c in (4, 8, 16, 32, 64) if c < max_context] + [max_context]
        self.expected: dict[KVCache, KVPrefix] = {}
        self.next_number = 1

    def prefix(self, num_tokens: int) -> KVPrefix:
        """A prefix of unique numbers."""
        count = LAYERS * self.num_kv_heads * num_tokens * HEAD_DIM
        numbers = torch.arange(self.next_number, self.next_number + count).float()
        self.next_number += count
        shape = (LAYERS, self.num_kv_heads)
        keys, values = numbers.view(*shape, -1, HEAD_DIM), -numbers.view(*shape, HEAD_DIM, -1)
        return KVPrefix(keys, values, keys.shape[2])

    def extend(self, cache: KVCache, num_tokens: int) -> None:
        """Checks that memory is reserved exactly if it suffices; writes tokens there."""
        num_tokens = min(num_tokens, self.max_context - cache.length)
        capacity = next(c for c in self.capacities if c >= cache.length + num_tokens)
        others = sum(other.capacity for other in self.expected if other is not cache)
        has_room = capacity <= cache.capacity or others + capacity <= self.max_tokens
        assert self.memory.reserve(cache, num_tokens) is has_room
        if not has_room:
            return
        new, end = self.prefix(num_tokens), cache.length + num_tokens
        if before := self.expected.get(cache):
            keys, values = [before.keys, new.keys], [before.values, new.values]
            self.expected[cache] = KVPrefix(torch.cat(keys, 2), torch.cat(values, 3), end)
        else:
            self.expected[cache] = new
        assert cache.pool is not None
        slot = cache.pool.view(cache.slot, end)
        slot.keys[:, :, cache.length :] = new.keys
        slot.values[..., cache.length :] = new.values
        cache.length = end

    def fill(self, source: KVCache, num_tokens: int) -> None:
        """Starts another sequence with the first tokens of `source`."""
        length = min(num_tokens, source.length)
        if not length or not self.memory.reserve(cache := KVCache(), length):
            return
        self.memory.fill(cache, self.expected[source].first(length))
        self.expected[cache] = self.expected[source].first(length).clone()

    def free(self, cache: KVCache, *, is_sound: bool) -> None:
        pool = cache.pool
        assert pool is not None
        if not is_sound:
            pool.keys[:, cache.slot] = torch.nan
            pool.values[:, cache.slot] = torch.inf
        self.memory.free(cache, is_sound=is_sound)
        del self.expected[cache]
        assert (cache.pool, cache.length, cache.capacity) == (None, 0, 0)

    def check(self) -> None:
        caches = list(self.expected)
        pools = {cache.pool for cache in caches if cache.pool is not None}
        for cache, expected in self.expected.items():
            assert cache.length == expected.length
            prefix = cache.first(cache.length, LAYERS)
            assert torch.equal(prefix.keys, expected.keys)
            assert torch.equal(prefix.values, expected.values)
        for pool in pools:
            first = pool.caches[0].slot
            slots = list(range(first, first + len(pool.caches)))
            assert [cache.slot for cache in pool.caches] == slots
            assert pool.keys.isfinite().all() and pool.values.isfinite().all()
        assert sum(len(pool.caches) for pool in pools) == self.memory.num_sequences == len(caches)
        total = sum(cache.capacity for cache in caches)
        assert self.memory.num_tokens == total <= self.max_tokens
        for is_keys in (True, False):
            self.check_places([slot_bytes(cache, is_keys) for cache in caches])

    def check_places(self, slots: list[range]) -> None:
        slots = sorted(slots, key=lambda slot: slot.start)
        assert all(a.stop <= b.start for a, b in pairwise(slots))
        if slots:
            assert slots[0].start >= 0
            assert slots[-1].stop <= 4 * self.max_tokens * self.num_kv_heads * HEAD_DIM


def slot_bytes(cache: KVCache, is_keys: bool) -> range:
    """The bytes of the arena's first layer that hold the sequence's keys or values."""
    assert cache.pool is not None
    tensor = cache.pool.keys if is_keys else cache.pool.values
    slot = tensor[0, cache.slot]
    begin = slot.data_ptr() - tensor.untyped_storage().data_ptr()
    return range(begin, begin + slot.nbytes)


OPERATIONS = st.tuples(
    st.sampled_from(["rest", "add", "add", "grow", "grow", "grow", "free", "fill", "break"]),
    st.integers(0, 30),  # which sequence
    st.integers(1, 45),  # tokens
)


@settings(max_examples=80, deadline=None)
@given(
    num_kv_heads=st.integers(1, 2),
    max_context=st.sampled_from([3, 16, 32, 37, 50]),
    num_spare_tokens=st.integers(0, 150),
    operations=st.lists(OPERATIONS, min_size=30, max_size=90),
)
def test_any_order_of_operations_keeps_every_sequence_apart(
    num_kv_heads: int,
    max_context: int,
    num_spare_tokens: int,
    operations: list[tuple[str, int, int]],
) -> None:
    model = Model(num_kv_heads, max_context + num_spare_tokens, max_context)
    for name, which, num_tokens in operations:
        caches = list(model.expected)
        if name == "rest":
            model.memory.rest()
        elif name == "add" or not caches:
            model.extend(KVCache(), num_tokens)
        else:
            cache = caches[which % len(caches)]
            if name == "grow":
                model.extend(cache, num_tokens)
            elif name == "fill":
                model.fill(cache, num_tokens)
            else:
                model.free(cache, is_sound=name == "free")
        model.check()


# An arena of 64 MiB, 16 layers and 16,384 tokens. A layer of the longest sequence is 4 MiB.
# Prints in MiB by how much the resident memory grew at most, and by how much at the end, at rest.
SCRIPT = """
import contextlib, mmap, os, random, re, sys
from pathlib import Path
import torch
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.kv_memory import KVMemory

def resident_mib(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def write(cache, length):
    cache.pool.view(cache.slot, length).keys.fill_(1)
    cache.pool.view(cache.slot, length).values.fill_(1)
    cache.length = length

def work(memory, num_steps):
    rng, caches = random.Random(0), []
    for _ in range(num_steps):
        if caches and rng.random() < 0.3:
            memory.free(caches.pop(rng.randrange(len(caches))))
            continue
        if not caches or rng.random() < 0.4:
            caches.append(KVCache())
        cache = rng.choice(caches)
        num_tokens = min(int(2 ** rng.uniform(0, 13)), 16384 - cache.length)
        if memory.reserve(cache, num_tokens):
            write(cache, cache.length + num_tokens)
        else:
            memory.free(cache)
            caches.remove(cache)
    for cache in caches:
        memory.free(cache)
    cache = KVCache()
    for length in (100, 1000, 8192, 16384):
        assert memory.reserve(cache, length - cache.length)
        write(cache, length)
    memory.free(cache)

def measure(advice):
    memory = KVMemory(16, 2, 16, max_tokens=16384, max_context=16384)
    with contextlib.suppress(OSError):  # where the kernel has no huge pages
        for pages in memory._arena._maps:
            pages.madvise(getattr(mmap, advice))
    before = resident_mib("VmRSS")
    work(memory, 400)
    memory.rest()
    print(advice, resident_mib("VmHWM") - before, resident_mib("VmRSS") - before, flush=True)

torch.set_num_threads(1)
for advice in sys.argv[1:]:
    # Each in a process of its own, or it would find the memory of the one before.
    if os.fork():
        assert os.wait()[1] == 0
    else:
        measure(advice)
        break
"""
ADVICE = ("MADV_HUGEPAGE", "MADV_NOHUGEPAGE")


@pytest.fixture(scope="module")
def measured_mib() -> dict[str, tuple[float, float]]:
    """The peak and the memory at rest under each advice; Python's start takes most of the time."""
    output = subprocess.check_output([sys.executable, "-c", SCRIPT, *ADVICE], text=True)
    lines = [line.split() for line in output.splitlines()]
    return {advice: (float(peak), float(rest)) for advice, peak, rest in lines}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("advice", ADVICE)
def test_memory_stays_within_its_bound_and_goes_back_at_rest(
    measured_mib: dict[str, tuple[float, float]], advice: str
) -> None:
    peak_mib, rest_mib = measured_mib[advice]
    assert 60 < peak_mib < 64 + 12
    assert rest_mib < 12
