"""Matrices of 8-bit integers: ours and oneDNN's product, and the contract of a linear layer."""

import numpy as np
import pytest
import torch

from server.core.engine.model.kernels import matrix
from server.core.engine.model.kernels.matrix import Int8Matrix, quantize

MANY = 10**6


@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 8, 13, 48])
@pytest.mark.parametrize("shape", [(64, 64), (200, 128), (70, 320), (1, 64)], ids=str)
def test_ours_and_onednn_give_the_same_sums(shape: tuple[int, int], num_rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    x = quantize(torch.randn(num_rows, shape[1]).numpy())
    ours = Int8Matrix([weight], num_many=MANY).raw_product(x)
    assert np.array_equal(ours, Int8Matrix([weight], num_many=0).raw_product(x))
    scales = weight.abs().amax(1, keepdim=True) / 127
    integers = (weight / scales).round().to(torch.int64).numpy()
    assert np.array_equal(ours, (x.integers.astype(np.int64) @ integers.T).astype(np.float32))


def test_the_largest_sums_do_not_overflow() -> None:
    x = quantize(np.ones((2, 8192), np.float32))
    assert (
        Int8Matrix([torch.ones(3, 8192)], num_many=MANY).raw_product(x) == 8192 * 127 * 255
    ).all()


@pytest.mark.parametrize("num_many", [0, 5, MANY])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_a_linear_layer(has_bias: bool, num_many: int) -> None:
    torch.manual_seed(0)
    weight, x, residual = torch.randn(150, 128), torch.randn(9, 128), torch.randn(9, 150)
    bias = torch.randn(150) * 10 if has_bias else None
    exact = torch.nn.functional.linear(x, weight, bias)
    layer = Int8Matrix(weight.split(40), bias, num_many=num_many)
    y = layer(x)
    assert (y - exact).abs().mean() < 0.02 * (x @ weight.T).abs().mean()
    expected = residual + y
    layer.add_to(residual, x)
    torch.testing.assert_close(residual, expected)
    for i in range(len(x)):
        assert torch.equal(layer(x[i : i + 1])[0], y[i])


def test_a_sample_keeps_large_columns_from_taking_the_bits_of_others() -> None:
    torch.manual_seed(0)
    sizes = torch.ones(128)
    sizes[[3, 70]] = 100
    weight, sample, x = (torch.randn(n, 128) for n in (200, 32, 20))
    weight, sample, x = weight / sizes, sample * sizes, x * sizes
    error, smoothed = (
        (Int8Matrix(weight.split(90), sample=rows)(x) - x @ weight.T).abs().mean()
        for rows in (None, sample)
    )
    assert smoothed < error / 4


def test_the_number_of_rows_from_which_onednn_is_faster_is_measured() -> None:
    assert matrix.measure_num_many() in (16, 32, 64, 128, 256)


def test_another_layout_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert matrix.is_layout_known()
    prepack = torch.ops.onednn.qlinear_prepack
    monkeypatch.setattr(
        torch.ops.onednn, "qlinear_prepack", lambda x, shape: prepack(x.roll(1, 0), shape)
    )
    assert not matrix.is_layout_known()
