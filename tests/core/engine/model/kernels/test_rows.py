"""Operations on rows between products, against the same in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from server.core.engine.model.kernels import rows
from server.core.engine.model.kernels.matrix import Quantized, empty_rows, quantize

EPSILON = np.float32(1e-3)


def random(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def value(x: Quantized) -> NDArray[np.float64]:
    integers = x.integers.astype(np.float64)
    return (integers - x.zeros[:, None]) * x.scales[:, None].astype(np.float64)


def assert_near(x: Quantized, exact: NDArray[np.float64]) -> None:
    """No number is further off than half a step of its row."""
    steps = np.abs(value(x) - exact) / x.scales[:, None]
    assert steps.max() < 0.51
    low, high = np.minimum(exact.min(1), 0), np.maximum(exact.max(1), 0)
    assert x.scales == pytest.approx((high - low) / 255, rel=1e-5)


@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_rows_are_quantized_each_to_its_own_range(num_rows: int) -> None:
    x = random(num_rows, 192) * np.logspace(-3, 3, num_rows, dtype=np.float32)[:, None]
    x[0] = np.abs(x[0]) + 5  # zero is always in the range
    assert_near(quantize(x), x.astype(np.float64))


def test_a_row_of_zeros_stays_zero() -> None:
    assert not value(quantize(np.zeros((2, 64), np.float32))).any()


@pytest.mark.parametrize("number", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_row_with_a_number_that_is_not_finite_is_not_finite_as_a_whole(number: float) -> None:
    x = random(3, 64)
    x[1, 40] = number
    quantized = quantize(x)
    with np.errstate(invalid="ignore"):
        values = value(quantized)
    assert not np.isfinite(values[1]).any()
    assert np.isfinite(values[[0, 2]]).all()


def test_rows_are_normalised_and_quantized_in_one_pass() -> None:
    hidden, factors = random(5, 128), random(128, seed=1)
    normalised = empty_rows(5, 128)
    rows.normalise(hidden, factors, EPSILON, *normalised)
    exact = hidden.astype(np.float64)
    exact = exact * factors / np.sqrt((exact**2).sum(1, keepdims=True) + EPSILON)
    assert_near(normalised, exact)


def columns(num: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and sums."""
    return np.abs(random(num, seed=2)) + np.float32(0.1), random(num, seed=3)


def test_a_raw_product_is_gated_and_quantized_in_one_pass() -> None:
    raw, (scales, sums) = random(6, 256) * 10, columns(256)
    row_scales, row_zeros = np.abs(random(6)), np.round(random(6, seed=1) * 3)
    gated = empty_rows(6, 128)
    rows.gate(raw, row_scales, row_zeros, scales, sums, *gated)
    exact = (raw.astype(np.float64) * scales - row_zeros[:, None] * sums) * row_scales[:, None]
    gate, up = exact[:, :128], exact[:, 128:]
    assert_near(gated, gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("is_added", [False, True])
def test_a_raw_product_gets_its_value(is_added: bool) -> None:
    raw, (scales, sums), bias = random(6, 100), columns(100), random(100, seed=4)
    row_scales, row_zeros, y = np.abs(random(6)), random(6, seed=1), random(6, 100, seed=5)
    exact = (raw * scales - row_zeros[:, None] * sums) * row_scales[:, None] + bias
    exact = exact + y if is_added else exact
    rows.finish(
        raw, row_scales, row_zeros, scales, sums, bias, y, rows.ADDED if is_added else rows.VALUE
    )
    np.testing.assert_allclose(y, exact, atol=1e-5)


@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_normalised_and_rotated(has_norms: bool) -> None:
    heads, angles = random(3, 5, 16), random(3, 8, seed=1)
    norms = random(4, 16, seed=2) if has_norms else np.empty((4, 0), np.float32)
    exact = heads.astype(np.complex128)[:, :4].real
    if has_norms:
        exact = exact * norms / np.sqrt((exact**2).sum(-1, keepdims=True) + EPSILON)
    rotated = (exact[..., ::2] + 1j * exact[..., 1::2]) * np.exp(1j * angles)[:, None]
    values = heads[:, 4].copy()
    rotations = np.stack((np.cos(angles), np.sin(angles)), -1).reshape(3, 16)
    rows.rotate(heads, rotations, norms, EPSILON)
    np.testing.assert_allclose(heads[:, :4, ::2], rotated.real, atol=1e-5)
    np.testing.assert_allclose(heads[:, :4, 1::2], rotated.imag, atol=1e-5)
    assert np.array_equal(heads[:, 4], values)
