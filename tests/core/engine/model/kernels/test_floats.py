"""Arithmetic that numba lacks."""

import numba
import numpy as np
import pytest
import torch

from server.core.engine.model.kernels import floats


@numba.njit
def each(function, x, y):  # type: ignore[no-untyped-def]
    for i in range(len(x)):
        y[i] = function(x[i])
    return y


def test_the_exponential_is_exact_to_a_few_units_in_the_last_place() -> None:
    x = np.linspace(-86.9, 87.9, 100_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(each(floats.exp, x, np.empty_like(x)) / exact - 1).max() < 4e-7


def test_the_exponential_ends_in_zero_and_stays_finite() -> None:
    x = np.array([-np.inf, -1000, -87.5, 1000, np.inf, np.nan], np.float32)
    y = each(floats.exp, x, np.empty_like(x))
    assert (y[:3] == 0).all() and np.isfinite(y[3:5]).all() and (y[3:5] > 1e38).all()
    assert np.isnan(y[5])


def test_bfloat16_is_rounded_as_pytorch_rounds_it_and_read_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, generator=generator) * 10 ** torch.linspace(-30, 30, 10_000)
    # Ties between two neighbours go to the even one.
    x[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])
    bits = each(floats.to_bfloat16, x.numpy(), np.empty(len(x), np.uint16))
    rounded = x.bfloat16()
    assert np.array_equal(bits, rounded.view(torch.uint16).numpy())
    read = each(floats.from_bfloat16, bits, np.empty(len(x), np.float32))
    assert np.array_equal(read, rounded.float().numpy())


@pytest.mark.parametrize("row", [[-3.0, -1.0, -2.0], [0.0, -0.0], [-1e-40, 1e30, 5.0, np.inf]])
def test_the_largest_is_found_whatever_the_signs(row: list[float]) -> None:
    assert floats.largest(np.array(row, np.float32)) == max(row)


def test_a_nan_is_the_largest() -> None:
    assert np.isnan(floats.largest(np.array([1, np.nan, np.inf], np.float32)))
