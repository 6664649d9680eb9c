"""Our forward against transformers, whole and in pieces."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.core.model.attention import Segment
from server.core.model.config import read_model_config
from server.core.model.kv_cache import KVCache, KVMemory
from server.core.model.qwen import QwenModel, load_qwen

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> QwenModel:
    return load_qwen(checkpoint, read_model_config(checkpoint), "float32")


@pytest.fixture
def memory(model: QwenModel) -> KVMemory:
    return model.new_memory(max_tokens=4096, max_context=256)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def run(model: QwenModel, memory: KVMemory, ids: list[int], cache: KVCache) -> Tensor:
    """Logits (T, V) of the tokens behind those in the cache."""
    return run_all(model, memory, [(ids, cache)])[0]


def run_all(
    model: QwenModel, memory: KVMemory, parts: list[tuple[list[int], KVCache]]
) -> list[Tensor]:
    """The same for several sequences in one forward."""
    segments = []
    for ids, cache in parts:
        assert memory.reserve(cache, len(ids))
        segments.append(Segment(ids, range(cache.length, cache.length + len(ids)), cache))
    with torch.inference_mode():
        return [model.logits(hidden) for hidden in model.forward(segments)]


def expected(oracle: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([ids])).logits[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_logits_equal_those_of_transformers(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel
) -> None:
    ids = random_ids(60)
    assert_close(run(model, memory, ids, KVCache()), expected(oracle, ids))


def test_prefill_then_decode_equals_one_prefill(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel
) -> None:
    ids, cache = random_ids(24), KVCache()
    rows = [run(model, memory, ids[:16], cache)]
    rows += [run(model, memory, [token_id], cache) for token_id in ids[16:]]
    assert_close(torch.cat(rows), expected(oracle, ids))


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prefill_in_chunks_equals_one_prefill(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel, chunk: int
) -> None:
    # Longer than the smallest slot, so that the sequence moves on the way.
    ids, cache = random_ids(140), KVCache()
    rows = [run(model, memory, ids[i : i + chunk], cache) for i in range(0, len(ids), chunk)]
    assert_close(torch.cat(rows), expected(oracle, ids))


def test_a_batch_of_prefills_and_decodes_equals_its_sequences_alone(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel
) -> None:
    lengths = (5, 17, 1, 30, 9, 200, 12)
    prompts = [random_ids(n, seed=n) for n in lengths]
    # Decodes side by side in memory and apart, prefills from nothing and from a prefix, and
    # one sequence in a larger slot.
    num_cached = [4, 0, 0, 29, 8, 199, 6]
    caches = [KVCache() for _ in prompts]
    for ids, count, cache in zip(prompts, num_cached, caches, strict=True):
        if count:
            run(model, memory, ids[:count], cache)
    parts = [
        (ids[count:], cache) for ids, count, cache in zip(prompts, num_cached, caches, strict=True)
    ]
    for ids, logits in zip(prompts, run_all(model, memory, parts), strict=True):
        assert_close(logits[-1], expected(oracle, ids)[-1])
    assert [cache.length for cache in caches] == [len(ids) for ids in prompts]


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_fewer_bits_stay_near_float32(
    checkpoint: Path, memory: KVMemory, oracle: PreTrainedModel, dtype: str, error: float
) -> None:
    model = load_qwen(checkpoint, read_model_config(checkpoint), dtype)
    ids = random_ids(40)
    theirs = expected(oracle, ids)
    ours = run(model, memory, ids, KVCache())
    assert (ours - theirs).abs().mean() < error * theirs.std()
