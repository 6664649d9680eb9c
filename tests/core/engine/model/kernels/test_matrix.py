"""Matrices of few bits: our products and oneDNN's, and the contract of a linear layer."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.core.engine.model.kernels import matrix
from server.core.engine.model.kernels.matrix import (
    Columns,
    Floats,
    KernelMatrix,
    Pack,
    PackedRows,
    Quantized,
    int8_packer,
    pack_int4,
    quantize,
)
from server.core.engine.model.kernels.rows import RAW

Bytes = NDArray[np.uint8]

MANY = 10**6
OURS, ONEDNN = int8_packer(MANY), int8_packer(0)
MAX_ERRORS: dict[Pack, float] = {OURS: 0.02, ONEDNN: 0.02, int8_packer(5): 0.02, pack_int4: 0.12}


def random_bytes(*shape: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def sums(rows: PackedRows, x: Bytes) -> Floats:
    """The raw product of integers."""
    ones, zeros = np.ones(len(rows.scales), np.float32), np.zeros(len(rows.scales), np.float32)
    of_x = Quantized(x, np.ones(len(x), np.float32), np.zeros(len(x), np.float32))
    return rows.packed.multiply(of_x, Columns(ones, ones, zeros), RAW)


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 8, 13, 48])
@pytest.mark.parametrize("shape", [(64, 64), (200, 128), (70, 320), (1, 64)], ids=str)
def test_ours_and_onednn_give_the_same_sums(shape: tuple[int, int], num_rows: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), random_bytes(num_rows, shape[1])
    ours = sums(OURS([weight], None), x)
    assert np.array_equal(ours, sums(ONEDNN([weight], None), x))
    scales = weight.abs().amax(1, keepdim=True) / 127
    integers = (weight / scales).round().to(torch.int64).numpy()
    assert np.array_equal(ours, (x.astype(np.int64) @ integers.T).astype(np.float32))


@pytest.mark.parametrize("num_rows", [1, 48])
def test_ours_and_onednn_give_the_same_values_to_the_last_bit(num_rows: int) -> None:
    # Which of them computes depends on the number of rows and on a measured threshold. Where
    # activations are quantized, the last bit may change a token.
    torch.manual_seed(0)
    weight, bias = torch.randn(896, 320) * 0.02, torch.randn(896)
    x, residual = quantize(torch.randn(num_rows, 320).numpy()), torch.randn(num_rows, 896)
    ours, theirs = (KernelMatrix([weight], bias, pack=pack) for pack in (OURS, ONEDNN))
    assert np.array_equal(ours.product(x), theirs.product(x))
    added = [residual.numpy().copy(), residual.numpy().copy()]
    ours.add_product(added[0], x)
    theirs.add_product(added[1], x)
    assert np.array_equal(added[0], added[1])


def test_the_largest_sums_do_not_overflow() -> None:
    x = np.full((2, 8192), 255, np.uint8)
    for pack in (OURS, pack_int4):
        assert (sums(pack([torch.ones(3, 8192)], None), x) == 8192 * 127 * 255).all()


@pytest.mark.parametrize("shape", [(64, 64), (200, 128), (70, 320), (1, 64)], ids=str)
def test_4_bits_give_the_same_sums_directly_and_expanded_to_8(
    shape: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    weight, x = (
        torch.randn(shape) * torch.logspace(-2, 2, shape[0])[:, None],
        random_bytes(7, shape[1]),
    )
    packed = pack_int4(weight.split(50), None)
    expanded = sums(packed, x)
    for num in (1, 2, 5, 6, 7, 13):
        assert np.array_equal(sums(packed, x[:num]), expanded[:num])
    # One column of x at a time gives the integers themselves.
    units = sums(packed, np.eye(shape[1], dtype=np.uint8)).T
    assert np.abs(units).max() <= 128
    assert np.array_equal(
        expanded, (x.astype(np.int64) @ units.T.astype(np.int64)).astype(np.float32)
    )
    errors = torch.from_numpy(units) * packed.scales[:, None] - weight
    groups, of_groups = weight.view(len(weight), -1, 32), errors.view(len(weight), -1, 32)
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    # A rounding to the nearest of 16 has an error of 0.29 steps.
    assert (of_groups.square().mean(-1).sqrt() / steps).mean() < 0.33


def test_4_bits_are_rounded_least_in_the_most_important_columns() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(64, 64), torch.ones(64)
    importance[[5, 40]] = 1000

    def error(weights_of_columns: torch.Tensor | None) -> torch.Tensor:
        packed = pack_int4([weight], weights_of_columns)
        units = torch.from_numpy(sums(packed, np.eye(64, dtype=np.uint8)).T)
        return (units * packed.scales[:, None] - weight).square()[:, [5, 40]].mean()

    assert error(importance) < 0.7 * error(None)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pack", MAX_ERRORS, ids=["ours", "onednn", "both", "int4"])
def test_a_kernel_matrix_is_a_linear_layer(pack: Pack, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, x, residual = torch.randn(150, 128), torch.randn(9, 128), torch.randn(9, 150)
    bias = torch.randn(150) * 10 if has_bias else None
    exact = torch.nn.functional.linear(x, weight, bias)
    layer = KernelMatrix(weight.split(40), bias, pack=pack)
    y = layer(x)
    assert (y - exact).abs().mean() < MAX_ERRORS[pack] * (x @ weight.T).abs().mean()
    expected = residual + y
    layer.add_to(residual, x)
    torch.testing.assert_close(residual, expected)
    for i in range(len(x)):
        assert torch.equal(layer(x[i : i + 1])[0], y[i])


@pytest.mark.parametrize("pack", [OURS, pack_int4], ids=["int8", "int4"])
def test_a_sample_keeps_large_columns_from_taking_the_bits_of_others(pack: Pack) -> None:
    torch.manual_seed(0)
    sizes = torch.ones(128)
    sizes[[3, 70]] = 100
    weight, sample, x = (torch.randn(n, 128) for n in (200, 32, 20))
    weight, sample, x = weight / sizes, sample * sizes, x * sizes
    error, smoothed = (
        (KernelMatrix(weight.split(90), sample=rows, pack=pack)(x) - x @ weight.T).abs().mean()
        for rows in (None, sample)
    )
    assert smoothed < error / 2


@pytest.mark.parametrize("pack", [OURS, pack_int4], ids=["int8", "int4"])
def test_zeros_give_zeros_and_a_sample_of_zeros_does_no_harm(pack: Pack) -> None:
    weight, x = torch.randn(20, 64), torch.randn(2, 64)
    assert KernelMatrix([weight], pack=pack)(torch.zeros(2, 64)).abs().max() < 1e-30
    assert KernelMatrix([torch.zeros(20, 64)], pack=pack)(x).abs().max() < 1e-30
    layer, exact = KernelMatrix([weight], sample=torch.zeros(4, 64), pack=pack), x @ weight.T
    assert (layer(x) - exact).abs().mean() < MAX_ERRORS[pack] * exact.abs().mean()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("pack", [OURS, pack_int4], ids=["int8", "int4"])
def test_a_weight_that_is_not_finite_is_not_hidden(pack: Pack, number: float) -> None:
    weight = torch.randn(70, 64)
    weight[3, 40] = number
    y = KernelMatrix([weight], pack=pack)(torch.randn(2, 64))
    assert not y[:, 3].isfinite().any()
    assert y[:, 4:].isfinite().all()


def test_the_number_of_rows_from_which_onednn_is_faster_is_measured() -> None:
    assert matrix.measure_num_many() in (16, 32, 64, 128, 256)


def test_another_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix.is_layout_known()
    prepack = torch.ops.onednn.qlinear_prepack
    monkeypatch.setattr(
        torch.ops.onednn, "qlinear_prepack", lambda x, shape: prepack(x.roll(1, 0), shape)
    )
    assert not matrix.is_layout_known()
