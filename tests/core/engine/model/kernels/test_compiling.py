"""The threads of kernels."""

import threading

import numba
import torch

from server.core.engine.model.kernels.compiling import match_threads


def test_kernels_use_as_many_threads_as_pytorch_in_whatever_thread_they_are_called() -> None:
    counts = []

    def count() -> None:
        match_threads()
        counts.append(numba.get_num_threads())

    before = torch.get_num_threads()
    try:
        for num in (1, before):
            torch.set_num_threads(num)
            thread = threading.Thread(target=count)
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [1, min(before, numba.config.NUMBA_NUM_THREADS)]  # type: ignore[attr-defined] # set on import
