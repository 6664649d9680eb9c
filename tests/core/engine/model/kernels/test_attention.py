"""Attention over keys and values in bfloat16, against PyTorch's in float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from server.core.engine.model.kernels import decode, prompt

SHAPES = [(4, 4, 64), (14, 2, 64), (4, 2, 128)]  # H, H_kv, D


def bits(x: Tensor) -> NDArray[np.uint16]:
    result: NDArray[np.uint16] = x.view(torch.uint16).numpy()
    return result


def random_slots(num: int, num_kv: int, size: int, capacity: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(num, num_kv, size, capacity).bfloat16()


def random_heads(num_tokens: int, shape: tuple[int, int, int], seed: int = 1) -> Tensor:
    num_heads, num_kv, size = shape
    generator = torch.Generator().manual_seed(seed)
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv, size, generator=generator)
    heads[:, :num_heads] *= size**-0.5
    return heads


def expected(heads: Tensor, num_heads: int, keys: Tensor, values: Tensor, begin: int) -> Tensor:
    """(T, H D). keys, values: (H_kv, D, capacity), with the new tokens' in them."""
    end = begin + len(heads)
    mask = torch.ones(len(heads), end, dtype=torch.bool).tril(begin)
    mixed = F.scaled_dot_product_attention(
        heads[None, :, :num_heads].transpose(1, 2), keys[None, ..., :end].mT.float(),
        values[None, ..., :end].mT.float(), attn_mask=mask, scale=1.0, enable_gqa=True,
    )  # fmt: skip
    return mixed[0].transpose(0, 1).flatten(1)


def attend(heads: Tensor, num_heads: int, keys: Tensor, values: Tensor, begin: int) -> Tensor:
    mixed = np.empty((len(heads), num_heads * heads.shape[2]), np.float32)
    prompt.attend(heads.numpy(), num_heads, bits(keys), bits(values), begin, mixed)
    return torch.from_numpy(mixed)


@pytest.mark.parametrize(("num_tokens", "begin"), [(1, 0), (5, 0), (1, 200), (30, 63), (200, 50)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompt_attends_to_what_it_may_see(
    shape: tuple[int, int, int], num_tokens: int, begin: int
) -> None:
    num_heads, num_kv, size = shape
    keys, values = random_slots(2, num_kv, size, 256)
    # What lies behind the prompt is never read, not even to be masked.
    keys[..., begin + num_tokens :] = values[..., begin + num_tokens :] = torch.nan
    heads = random_heads(num_tokens, shape)
    mixed = attend(heads, num_heads, keys, values, begin)
    new = slice(begin, begin + num_tokens)
    assert torch.equal(keys[..., new], heads[:, num_heads:-num_kv].permute(1, 2, 0).bfloat16())
    assert torch.equal(values[..., new], heads[:, -num_kv:].permute(1, 2, 0).bfloat16())
    exact = expected(heads, num_heads, keys, values, begin)
    assert (mixed - exact).abs().mean() < 0.005 * exact.abs().mean()


@pytest.mark.parametrize("sizes", [(1,), (7, 64, 25)])
def test_a_divided_prompt_is_equal_to_the_last_bit(sizes: tuple[int, ...]) -> None:
    shape = num_heads, num_kv, size = (4, 2, 64)
    keys, values = random_slots(2, num_kv, size, 256)
    heads, begin, pieces = random_heads(150, shape), 0, []
    whole = attend(heads, num_heads, keys.clone(), values.clone(), 0)
    while begin < len(heads):
        piece = heads[begin : begin + sizes[len(pieces) % len(sizes)]]
        pieces.append(attend(piece, num_heads, keys, values, begin))
        begin += len(piece)
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sampled_tokens_attend_to_their_own_slots_only(shape: tuple[int, int, int]) -> None:
    num_heads, num_kv, size = shape
    capacity, lengths = 1280, [0, 63, 1023, 1024, 1200]
    keys, values = random_slots(2 * len(lengths), num_kv, size, capacity).chunk(2)
    for slot, length in enumerate(lengths):
        keys[slot, ..., length:] = values[slot, ..., length:] = torch.nan
    heads = random_heads(len(lengths), shape)

    def decoded(rows: list[int]) -> Tensor:
        mixed = np.empty((len(rows), num_heads * size), np.float32)
        begins = np.array(rows) * keys[0].numel()
        decode.attend(
            heads[rows].numpy(), num_heads, bits(keys).reshape(-1), bits(values).reshape(-1),
            begins, np.full(len(rows), capacity), np.array(lengths)[rows], mixed,
        )  # fmt: skip
        return torch.from_numpy(mixed)

    together = decoded([3, 0, 4, 1, 2])
    for row, slot in enumerate([3, 0, 4, 1, 2]):
        exact = expected(heads[slot : slot + 1], num_heads, keys[slot], values[slot], lengths[slot])
        torch.testing.assert_close(together[row : row + 1], exact, atol=1e-5, rtol=1e-4)
        assert torch.equal(decoded([slot])[0], together[row])


def test_a_score_that_is_no_number_is_not_hidden() -> None:
    heads, (keys, values) = random_heads(3, (2, 2, 64)), random_slots(2, 2, 64, 128)
    heads[0, 2, 5] = torch.nan  # a key of the first head, which all three tokens see
    mixed = attend(heads, 2, keys, values, 0)
    assert mixed[:, :64].isnan().all()
    assert mixed[:, 64:].isfinite().all()
