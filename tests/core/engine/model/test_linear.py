"""Linear layers of every weight type against float32, by one contract."""

import pytest
import torch

from server.core.engine.model.linear import Int4Linear, Int8Linear, Linear, linear_factory

# Mean error over the mean size of a result, for normally distributed weights.
MAX_ERRORS = {"float32": 1e-6, "bfloat16": 0.005, "int8": 0.012, "int4": 0.12}
# Columns, rows: odd numbers of rows, and more than one block of them.
SHAPES = [(64, 17), (64, 47), (128, 200), (704, 256)]


def make(dtype: str, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    return linear_factory(dtype)(weight.split(90), bias)


@pytest.mark.parametrize("num_tokens", [1, 3, 33])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", MAX_ERRORS)
def test_every_type_stays_near_float32(
    dtype: str, shape: tuple[int, int], has_bias: bool, num_tokens: int
) -> None:
    torch.manual_seed(0)
    columns, rows = shape
    weight, x = torch.randn(rows, columns), torch.randn(num_tokens, columns)
    bias = 10 * torch.randn(rows) if has_bias else None
    exact = torch.nn.functional.linear(x, weight, bias)
    with torch.inference_mode():
        y = make(dtype, weight, bias)(x)
    assert y.dtype == torch.float32
    assert y.shape == exact.shape
    size = torch.nn.functional.linear(x, weight).abs().mean()
    allowed = MAX_ERRORS[dtype] * size + (0.02 if dtype == "bfloat16" and has_bias else 0)
    assert (y - exact).abs().mean() < allowed


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_scale_of_weights_and_activations_does_not_matter(dtype: str, scale: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(70, 64), torch.randn(2, 64)
    # Rows of very different sizes: each has its own scale.
    weight *= torch.logspace(-3, 3, 70)[:, None]
    x *= torch.tensor([[scale], [1.0]])
    exact, y = x @ weight.T, make(dtype, weight)(x)
    errors = (y - exact).abs().mean(1) / exact.abs().mean(1)
    assert (errors < MAX_ERRORS[dtype]).all()


@pytest.mark.parametrize("dtype", MAX_ERRORS)
def test_zeros_give_zeros(dtype: str) -> None:
    assert make(dtype, torch.randn(20, 64))(torch.zeros(2, 64)).abs().max() < 1e-30
    assert make(dtype, torch.zeros(20, 64))(torch.randn(2, 64)).abs().max() < 1e-30


def test_an_int8_row_is_the_same_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    layer, x = Int8Linear([torch.randn(300, 128)], torch.randn(300)), torch.randn(40, 128)
    x[7] *= 1000
    x[9] *= 1e-5
    together = layer(x)
    # To the last bit: sooner or later, rounding differences are quantized to other integers.
    for i in range(len(x)):
        assert torch.equal(layer(x[i : i + 1])[0], together[i])
    assert torch.equal(layer(x[5:9]), together[5:9])


def test_int8_sums_do_not_overflow() -> None:
    # All products at their largest: 16-bit sums of pairs would be clipped.
    layer = Int8Linear([torch.ones(8, 1024)])
    assert layer(torch.ones(1, 1024)) == pytest.approx(torch.full((1, 8), 1024.0), rel=1e-3)


def test_int4_does_not_depend_on_the_blocks_of_rows() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 64), torch.randn(3, 64)
    expected = Int4Linear([weight])(x)
    for size in (1, 63, 64, 130):
        assert torch.equal(Int4Linear(weight.split(size))(x), expected)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_sample_keeps_large_columns_from_taking_the_bits_of_others(dtype: str) -> None:
    torch.manual_seed(0)
    sizes = torch.ones(128)
    sizes[[3, 70]] = 100
    weight, bias = torch.randn(200, 128) / sizes, torch.randn(200)
    sample, x = torch.randn(32, 128) * sizes, torch.randn(20, 128) * sizes
    exact = torch.nn.functional.linear(x, weight, bias)
    error, smoothed = (
        (linear_factory(dtype)(weight.split(90), bias, rows)(x) - exact).abs().mean()
        for rows in (None, sample)
    )
    assert smoothed < error
    assert smoothed < MAX_ERRORS[dtype] * exact.abs().mean()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_sample_of_zeros_does_no_harm(dtype: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(200, 64), torch.randn(3, 64)
    layer, exact = linear_factory(dtype)([weight], sample=torch.zeros(4, 64)), x @ weight.T
    assert (layer(x) - exact).abs().mean() < MAX_ERRORS[dtype] * exact.abs().mean()
