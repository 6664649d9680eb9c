"""Memory that is reserved once and returned in parts."""

import mmap

import pytest
import torch

from server.core.engine.model.arena import Arena


def test_slots_of_any_capacity_are_views_of_the_same_zeros() -> None:
    arena = Arena(2, 3, 4, num_tokens=10)
    keys, values = arena.slots(4, 0)
    assert (keys.shape, values.shape) == ((2, 2, 3, 4, 4), (2, 2, 3, 4, 4))
    shifted, _ = arena.slots(9, 1)
    assert shifted.shape == (2, 1, 3, 9, 4)
    assert not keys.any() and not values.any()
    shifted[1] = 1
    assert not keys[0].any()
    assert keys[1].sum() == keys[1].numel() - 3 * 4  # token 0 is before the other slot
    assert not values.any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system cannot take back pages")
def test_returned_pages_are_zero_and_other_memory_stays() -> None:
    per_page = mmap.PAGESIZE // 16  # tokens of one layer's keys in a page
    arena = Arena(2, 1, 4, num_tokens=10 * per_page)
    keys, values = (tensor.view(2, 10 * per_page, -1) for tensor in arena.slots(per_page, 0))
    for tensor in (keys, values):
        tensor.fill_(1)
    arena.give_back(per_page - 1, 4 * per_page + 1)
    for tensor in (keys, values):
        is_kept = torch.ones(2, 10 * per_page, 4, dtype=torch.bool)
        is_kept[:, per_page : 4 * per_page] = False
        assert torch.equal(tensor != 0, is_kept)
    arena.give_back(7, 7)
    assert keys[:, 4 * per_page :].all()


@pytest.mark.parametrize("num_tokens", [2**50, 2**70])
def test_the_size_of_refused_memory_is_named(num_tokens: int) -> None:
    with pytest.raises(OSError, match=rf"cannot reserve twice {num_tokens * 16 // 2**20} MiB"):
        Arena(1, 1, 4, num_tokens=num_tokens)
