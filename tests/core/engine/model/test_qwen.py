"""Our forward pass against transformers, whole and in chunks."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.attention.step import StepAttention
from server.core.engine.model.config import read_model_config
from server.core.engine.model.kv_cache import KVCache
from server.core.engine.model.kv_memory import KVMemory
from server.core.engine.model.qwen import QwenModel, load_qwen

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
    """Logits (T, V) of the tokens after those in the cache."""
    return run_all(model, memory, [(ids, cache)])[0]


def run_all(
    model: QwenModel, memory: KVMemory, parts: list[tuple[list[int], KVCache]]
) -> list[Tensor]:
    """The same for several sequences in one forward."""
    segments = []
    for ids, cache in parts:
        assert memory.reserve(cache, len(ids))
        positions = range(cache.length, cache.length + len(ids))
        segments.append(Segment(ids, positions, cache, is_decode=len(ids) == 1))
    with torch.inference_mode():
        return [model.logits(hidden) for [hidden] in model.forward(segments)]


def expected(oracle: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = oracle(torch.tensor([ids])).logits
    return logits[0]


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
    # Longer than the smallest slot, so that the sequence moves to another one.
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


def test_a_decoded_token_in_int8_is_the_same_to_the_last_bit_alone_and_among_others(
    checkpoint: Path,
) -> None:
    # Float products add in another order for other numbers of rows; integers do not.
    model = load_qwen(checkpoint, read_model_config(checkpoint), "int8")
    memory = model.new_memory(max_tokens=4096, max_context=256)
    lengths = (5, 17, 3, 126, 9, 200)
    prompts = [random_ids(n + 1, seed=n) for n in lengths]

    def filled() -> list[KVCache]:
        caches = [KVCache() for _ in prompts]
        for ids, cache in zip(prompts, caches, strict=True):
            run(model, memory, ids[:-1], cache)
        return caches

    alone = [
        run(model, memory, ids[-1:], cache) for ids, cache in zip(prompts, filled(), strict=True)
    ]
    parts = [(ids[-1:], cache) for ids, cache in zip(prompts, filled(), strict=True)]
    # A prompt shares the step, too.
    together = run_all(model, memory, [*parts, (random_ids(40), KVCache())])
    for one, same in zip(alone, together, strict=False):
        assert torch.equal(one, same)


@pytest.mark.parametrize("sizes", [(1, 130), (13, 64, 7)])
def test_a_prompt_in_int8_is_the_same_to_the_last_bit_however_it_is_divided(
    checkpoint: Path, sizes: tuple[int, ...]
) -> None:
    model = load_qwen(checkpoint, read_model_config(checkpoint), "int8")
    memory = model.new_memory(max_tokens=4096, max_context=256)
    ids = random_ids(200)
    whole, divided = KVCache(), KVCache()
    expected_logits = run(model, memory, ids, whole)
    pieces, begin, next_size = [], 0, itertools.cycle(sizes)
    while begin < len(ids):
        piece = ids[begin : begin + next(next_size)]
        # A prompt of another sequence shares the step.
        other = KVCache()
        parts = [segment(memory, piece, divided), segment(memory, ids[:30], other)]
        [hidden], _ = forward(model, parts)
        with torch.inference_mode():
            pieces.append(model.logits(hidden))
        memory.free(other)
        begin += len(piece)
    assert torch.equal(torch.cat(pieces), expected_logits)
    num_layers = model.config.num_layers
    mine, theirs = (cache.first(len(ids), num_layers) for cache in (divided, whole))
    assert torch.equal(mine.keys, theirs.keys)
    assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.01), ("int8", 0.06)])
def test_fewer_bits_stay_near_float32(
    checkpoint: Path, oracle: PreTrainedModel, dtype: str, error: float
) -> None:
    model = load_qwen(checkpoint, read_model_config(checkpoint), dtype)
    memory = model.new_memory(max_tokens=4096, max_context=256)
    ids = random_ids(40)
    theirs = expected(oracle, ids)
    ours = run(model, memory, ids, KVCache())
    assert (ours - theirs).abs().mean() < error * theirs.std()


# --- hidden states after a layer ------------------------------------------------------


def segment(
    memory: KVMemory, ids: list[int], cache: KVCache, layers: tuple[int, ...] | None = None
) -> Segment:
    """The tokens after those in the cache, which gets room for them."""
    assert memory.reserve(cache, len(ids))
    return Segment(ids, range(cache.length, cache.length + len(ids)), cache, layers=layers)


def forward(model: QwenModel, segments: list[Segment]) -> list[list[Tensor]]:
    with torch.inference_mode():
        return model.forward(segments)


def expected_states(oracle: PreTrainedModel, ids: list[int]) -> list[Tensor]:
    """(T, C) after each layer, the first at 1; those after the last layer are normalised."""
    with torch.inference_mode():
        states = oracle(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [each[0] for each in states]


def assert_states(
    oracle: PreTrainedModel, layers: tuple[int, ...], ours: list[Tensor], theirs: list[Tensor]
) -> None:
    """ours: after each of `layers`. theirs: after all layers, of at least as many tokens."""
    num_layers = len(theirs) - 1
    assert len(ours) == len(layers)
    for layer, rows in zip(layers, ours, strict=True):
        if layer == num_layers:
            with torch.inference_mode():
                rows = oracle.model.norm(rows)
        assert_close(rows, theirs[layer][-len(rows) :])


def test_hidden_states_after_every_layer_equal_those_of_transformers(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel
) -> None:
    ids, num_layers = random_ids(60), model.config.num_layers
    theirs = expected_states(oracle, ids)
    for count in (1, 2, num_layers):
        for layers in itertools.combinations(range(1, num_layers + 1), count):
            [ours] = forward(model, [segment(memory, ids, KVCache(), layers)])
            assert_states(oracle, layers, ours, theirs)


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_hidden_states_of_chunks_equal_those_of_the_whole(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel, chunk: int
) -> None:
    ids, cache = random_ids(140), KVCache()
    theirs = expected_states(oracle, ids)
    rows = [
        forward(model, [segment(memory, ids[i : i + chunk], cache, (1, 2))])[0]
        for i in range(0, len(ids), chunk)
    ]
    assert_states(oracle, (1, 2), [torch.cat(parts) for parts in zip(*rows, strict=True)], theirs)
    assert cache.length == len(ids)


@pytest.mark.parametrize("seed", range(12))
def test_segments_of_any_depths_equal_each_of_them_alone(
    model: QwenModel, memory: KVMemory, oracle: PreTrainedModel, seed: int
) -> None:
    """Two steps of decodes, prefills and prompts after a prefix, each of any depth."""
    rng, num_layers = random.Random(seed), model.config.num_layers
    every_layer = range(1, num_layers + 1)
    wanted = [None, None, None, *((layer,) for layer in every_layer), (1, 2), tuple(every_layer)]
    parts = []
    for number in range(9):
        layers = rng.choice(wanted)
        num_cached, num_new = rng.choice([0, 0, 5, 40, 125]), rng.choice([1, 1, 1, 2, 9, 60])
        ids, cache = random_ids(num_cached + num_new + 1, seed=100 * seed + number), KVCache()
        if num_cached:
            forward(model, [segment(memory, ids[:num_cached], cache, layers)])
        parts.append((ids, cache, layers))
    theirs = [expected_states(oracle, ids) for ids, _, _ in parts]
    # All but the last token of each, then all last tokens.
    for end in (-1, None):
        rng.shuffle(order := list(range(len(parts))))
        segments = [
            segment(memory, parts[i][0][parts[i][1].length : end], *parts[i][1:]) for i in order
        ]
        for i, states in zip(order, forward(model, segments), strict=True):
            layers = parts[i][2] or (num_layers,)
            assert_states(oracle, layers, states, [each[:end] for each in theirs[i]])
    assert [cache.length for _, cache, _ in parts] == [len(ids) for ids, _, _ in parts]


def test_a_layer_computes_only_the_rows_that_reach_it(
    model: QwenModel, memory: KVMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows: dict[int, int] = {}
    attend = StepAttention.__call__

    def count(self: StepAttention, layer: int, queries: Tensor, *others: Tensor) -> Tensor:
        num_rows[layer] = len(queries)
        return attend(self, layer, queries, *others)

    monkeypatch.setattr(StepAttention, "__call__", count)
    lengths: dict[tuple[int, ...] | None, int] = {(1,): 5, (1, 2): 7}
    segments = [segment(memory, random_ids(n), KVCache(), layers) for layers, n in lengths.items()]
    forward(model, segments)
    assert num_rows == {0: 12, 1: 7}
    num_rows.clear()
    segments = [
        segment(memory, random_ids(n), KVCache(), layers)
        for layers, n in {None: 3, **lengths}.items()
    ]
    forward(model, segments)
    assert num_rows == {0: 15, 1: 10} | dict.fromkeys(range(2, model.config.num_layers), 3)


def test_returned_states_do_not_change_in_later_layers_and_steps(
    model: QwenModel, memory: KVMemory
) -> None:
    every_layer = tuple(range(1, model.config.num_layers + 1))
    parts = [(random_ids(9, seed=i), KVCache(), every_layer[: i + 1]) for i in range(3)]
    states = forward(model, [segment(memory, *part) for part in parts])
    before = [[rows.clone() for rows in each] for each in states]
    forward(model, [segment(memory, random_ids(3), cache, layers) for _, cache, layers in parts])
    for each, copies in zip(states, before, strict=True):
        assert len({rows.data_ptr() for rows in each}) == len(each)
        assert all(map(torch.equal, each, copies))


def test_the_keys_and_values_of_an_early_leaver_are_those_of_its_layers(
    model: QwenModel, memory: KVMemory
) -> None:
    ids, shallow, deep = random_ids(30), KVCache(), KVCache()
    forward(model, [segment(memory, ids, shallow, (2,)), segment(memory, ids, deep)])
    ours, theirs = shallow.first(30, 2), deep.first(30, 2)
    assert ours.num_layers == theirs.num_layers == 2
    assert_close(ours.keys, theirs.keys)
    assert_close(ours.values, theirs.values)
