"""Our forward against transformers, whole and in pieces."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.core.model.config import read_model_config
from server.core.model.kv_cache import KVCache
from server.core.model.qwen import QwenModel, Segment, load_qwen

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> QwenModel:
    return load_qwen(checkpoint, read_model_config(checkpoint), torch.float32)


def random_ids(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 300), k=length)


def run(model: QwenModel, ids: list[int], cache: KVCache) -> Tensor:
    """Logits (T, V) of the tokens behind those in the cache."""
    positions = range(cache.length, cache.length + len(ids))
    with torch.inference_mode():
        return model.logits(model.forward([Segment(ids, positions, cache)]))


def expected(oracle: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([ids])).logits[0]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_logits_equal_those_of_transformers(model: QwenModel, oracle: PreTrainedModel) -> None:
    ids = random_ids(60)
    assert_close(run(model, ids, model.new_cache()), expected(oracle, ids))


def test_prefill_then_decode_equals_one_prefill(model: QwenModel, oracle: PreTrainedModel) -> None:
    ids, cache = random_ids(24), model.new_cache()
    rows = [run(model, ids[:16], cache)]
    rows += [run(model, [token_id], cache) for token_id in ids[16:]]
    assert_close(torch.cat(rows), expected(oracle, ids))


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_prefill_in_chunks_equals_one_prefill(
    model: QwenModel, oracle: PreTrainedModel, chunk: int
) -> None:
    # Longer than the first capacity of a KV cache, so that it grows on the way.
    ids, cache = random_ids(140), model.new_cache()
    rows = [run(model, ids[i : i + chunk], cache) for i in range(0, len(ids), chunk)]
    assert_close(torch.cat(rows), expected(oracle, ids))


def test_a_batch_of_prefills_and_decodes_equals_its_sequences_alone(
    model: QwenModel, oracle: PreTrainedModel
) -> None:
    prompts = [random_ids(n, seed=n) for n in (5, 17, 1, 30)]
    num_cached = [4, 0, 0, 29]  # decode, prefill, a single token, decode
    caches = [model.new_cache() for _ in prompts]
    for ids, count, cache in zip(prompts, num_cached, caches, strict=True):
        if count:
            run(model, ids[:count], cache)
    segments = [
        Segment(ids[count:], range(count, len(ids)), cache)
        for ids, count, cache in zip(prompts, num_cached, caches, strict=True)
    ]
    with torch.inference_mode():
        logits = model.logits(model.forward(segments))
    for ids, segment in zip(prompts, segments, strict=True):
        rows, logits = logits[: len(segment.token_ids)], logits[len(segment.token_ids) :]
        assert_close(rows[-1], expected(oracle, ids)[-1])
    assert [cache.length for cache in caches] == [len(ids) for ids in prompts]


def test_bfloat16_stays_near_float32(checkpoint: Path, oracle: PreTrainedModel) -> None:
    model = load_qwen(checkpoint, read_model_config(checkpoint), torch.bfloat16)
    ids = random_ids(40)
    theirs = expected(oracle, ids)
    ours = run(model, ids, model.new_cache())
    assert (ours - theirs).abs().mean() < 0.05 * theirs.std()
