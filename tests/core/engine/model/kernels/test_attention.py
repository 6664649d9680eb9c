"""Attention over keys and values in bfloat16, against PyTorch's in float32."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.core.engine.model.attention.segment import Segment
from server.core.engine.model.kernels.attention import IN_BLOCKS, KERNEL_ATTENTION
from server.core.engine.model.kv_cache import KVCache, KVPrefix
from server.core.engine.model.kv_memory import KVMemory

SHAPES = [(4, 4, 64), (14, 2, 64), (4, 2, 128)]  # H, H_kv, D
Shape = tuple[int, int, int]


class Slots:
    """Sequences in a memory of one layer. New slots are full of large numbers."""

    def __init__(self, shape: Shape, max_context: int = 2112) -> None:
        self.num_heads, self.num_kv, self.size = shape
        self.memory = KVMemory(
            1,
            self.num_kv,
            self.size,
            IN_BLOCKS,
            max_tokens=8 * max_context,
            max_context=max_context,
        )
        self.caches = list[KVCache]()

    def add(self, num_tokens: int) -> KVCache:
        """A sequence with room for `num_tokens`."""
        cache = KVCache()
        assert self.memory.reserve(cache, num_tokens)
        self.caches.append(cache)
        assert cache.pool is not None
        cache.pool.keys[:, cache.slot] = cache.pool.values[:, cache.slot] = 1e30
        return cache

    def heads(self, num_tokens: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        shape = num_tokens, self.num_heads + 2 * self.num_kv, self.size
        heads = torch.randn(shape, generator=generator)
        heads[:, : self.num_heads] *= self.size**-0.5
        return heads

    def attend(self, parts: Sequence[tuple[KVCache, int]], heads: Tensor) -> Tensor:
        """The attention of new tokens, as many as given for each sequence: (T, H D)."""
        segments = [
            Segment([0] * num, range(cache.length, cache.length + num), cache, num == 1)
            for cache, num in parts
        ]
        mixed = KERNEL_ATTENTION.make_run(0, segments)(0, heads)
        for cache, num in parts:
            cache.length += num
        return mixed

    def stored(self, cache: KVCache) -> tuple[Tensor, Tensor]:
        """The stored keys and values, (H_kv, S, D) and (H_kv, D, S)."""
        return cache.first(cache.length, 1).by_token()

    def expected(self, cache: KVCache, heads: Tensor) -> Tensor:
        """The attention of its last T tokens: (T, H D)."""
        keys, values = self.stored(cache)
        begin = cache.length - len(heads)
        mask = torch.ones(len(heads), cache.length, dtype=torch.bool).tril(begin)
        mixed = F.scaled_dot_product_attention(
            heads[None, :, : self.num_heads].transpose(1, 2), keys[None], values[None].mT,
            attn_mask=mask, scale=1.0, enable_gqa=True,
        )  # fmt: skip
        return mixed[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize(
    ("begin", "num_tokens"), [(0, 1), (0, 5), (200, 1), (63, 30), (50, 200), (1000, 40)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_attends_to_earlier_positions_and_itself(
    shape: Shape, begin: int, num_tokens: int
) -> None:
    slots = Slots(shape)
    cache = slots.add(begin + num_tokens)
    slots.attend([(cache, begin)], slots.heads(begin, seed=2)) if begin else None
    heads = slots.heads(num_tokens)
    mixed = slots.attend([(cache, num_tokens)], heads)
    keys, values = (x[:, begin:] for x in (slots.stored(cache)[0], slots.stored(cache)[1].mT))
    of_keys, of_values = heads[:, slots.num_heads :].transpose(0, 1).bfloat16().chunk(2)
    assert torch.equal(keys, of_keys.float())
    assert torch.equal(values, of_values.float())
    exact = slots.expected(cache, heads)
    assert (mixed - exact).abs().mean() < 0.005 * exact.abs().mean()


@pytest.mark.parametrize("sizes", [(1,), (7, 64, 25), (1024, 63)])
def test_a_divided_prompt_is_equal_to_the_last_bit(sizes: tuple[int, ...]) -> None:
    slots = Slots((4, 2, 64))
    heads, pieces = slots.heads(1150), list[Tensor]()
    whole = slots.attend([(slots.add(len(heads)), len(heads))], heads)
    cache = slots.add(len(heads))
    while cache.length < len(heads):
        piece = heads[cache.length :][: sizes[len(pieces) % len(sizes)]]
        pieces.append(slots.attend([(cache, len(piece))], piece))
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sequences_attend_to_their_own_slots_and_do_not_change_each_other(shape: Shape) -> None:
    slots = Slots(shape)
    lengths, counts = [0, 63, 1023, 1024, 1200, 128], [1, 1, 1, 1, 1, 70]
    caches = [slots.add(2000) for _ in lengths]
    for seed, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        if length:
            slots.attend([(cache, length)], slots.heads(length, seed))
    heads = [slots.heads(count, seed=10 + i) for i, count in enumerate(counts)]
    order = [3, 0, 5, 4, 1, 2]
    parts = [(caches[i], counts[i]) for i in order]
    together = slots.attend(parts, torch.cat([heads[i] for i in order]))
    for i, mixed in zip(order, together.split([counts[i] for i in order]), strict=True):
        exact = slots.expected(caches[i], heads[i])
        assert (mixed - exact).abs().mean() < 0.005 * exact.abs().mean()
        caches[i].length = lengths[i]
        assert torch.equal(slots.attend([(caches[i], counts[i])], heads[i]), mixed)


def test_a_nan_score_is_not_hidden() -> None:
    slots = Slots((2, 2, 64))
    heads = slots.heads(3)
    heads[0, 2, 5] = torch.nan  # a key of the first head, to which all three tokens attend
    mixed = slots.attend([(slots.add(3), 3)], heads)
    assert mixed[:, :64].isnan().all()
    assert mixed[:, 64:].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 64, 100])
def test_a_copied_prefix_is_equal_and_holds_only_its_blocks(num_tokens: int) -> None:
    slots = Slots((4, 2, 64))
    source, target = slots.add(300), slots.add(300)
    slots.attend([(source, 200)], slots.heads(200))
    prefix = source.first(num_tokens, 1).clone()
    assert prefix.num_bytes == slots.memory.num_bytes(num_tokens)
    slots.memory.fill(target, prefix)
    assert target.length == num_tokens
    for ours, theirs in zip(target.first(num_tokens, 1).by_token(), prefix.by_token(), strict=True):
        assert torch.equal(ours, theirs)
    source.length, heads = num_tokens, slots.heads(3, seed=4)
    assert torch.equal(slots.attend([(target, 3)], heads), slots.attend([(source, 3)], heads))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 64, 100])
def test_keys_and_values_by_token_are_laid_out_and_read_back(shape: Shape, num_tokens: int) -> None:
    _, num_kv, size = shape
    keys = torch.randn(2, num_kv, num_tokens, size).bfloat16()
    values = torch.randn(2, num_kv, size, num_tokens).bfloat16()
    laid_out = IN_BLOCKS.laid_out(keys, values)
    shapes = IN_BLOCKS.shapes(IN_BLOCKS.rounded(num_tokens), size)
    assert [tuple(x.shape) for x in laid_out] == [(2, num_kv, *each) for each in shapes]
    prefix = KVPrefix(*laid_out, num_tokens, IN_BLOCKS)
    for layer in range(2):
        read_keys, read_values = prefix.layer(layer).by_token()
        assert torch.equal(read_keys, keys[layer].float())
        assert torch.equal(read_values, values[layer].float())
