"""Compiles functions for this processor with numba, once: the result is cached on disk.

A kernel is compiled for given types when its module is imported, so that no request waits for it.
"""

from collections.abc import Callable
from typing import Any

import numba
import torch

# Allows sums in another order, in vectors. NaN and infinity keep their meaning: a model that
# computes them must be noticed.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp"}
_njit: Any = numba.njit

Kernel = Callable[..., None]


def kernel(signature: Any) -> Callable[[Kernel], Kernel]:
    """Compiles a function whose `numba.prange` loops run on all threads, without the GIL."""

    def decorate(function: Kernel) -> Kernel:
        options = {"parallel": True, "nogil": True, "fastmath": _FASTMATH}
        try:
            compiled: Kernel = _njit(signature, cache=True, **options)(function)
        except RuntimeError:
            # Neither the package's folder nor the user's is writable: compiles at each start.
            compiled = _njit(signature, **options)(function)
        return compiled

    return decorate


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles a function that kernels call; it becomes part of each of them."""
    compiled: Callable[..., Any] = _njit(fastmath=_FASTMATH)(function)
    return compiled


def match_threads() -> None:
    """Makes kernels that this thread calls use as many threads as PyTorch does.

    numba uses the OpenMP that PyTorch has loaded, so these are the same threads.
    """
    most: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch.get_num_threads(), most))
