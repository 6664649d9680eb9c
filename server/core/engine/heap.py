"""Keeps what the process holds at rest from growing with its load, where malloc is glibc's.

Activations and kept prefixes have ever other sizes and leave gaps between what is kept. glibc gives
a gap back only when it is told to, and the free end of a heap only if it is the first one's; by
default every thread has a heap of its own. See mallopt(3) and malloc_trim(3).
"""

import ctypes
import platform
from functools import cache

_M_ARENA_MAX = -8  # malloc.h
_MADV_COLLAPSE = 25  # madvise(2), since Linux 6.1
_HUGE_PAGE = 2 * 2**20


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def share_one_heap() -> None:
    """Lets all threads allocate from one heap. Call before any thread starts."""
    if libc := _glibc():
        libc.mallopt(_M_ARENA_MAX, 1)


def trim_heap() -> None:
    """Gives memory that nothing is in back to the system; takes milliseconds, without the GIL."""
    if libc := _glibc():
        libc.malloc_trim(0)


def use_huge_pages(address: int, num_bytes: int) -> None:
    """Moves memory to huge pages; without effect where the system has none.

    Weights are read from end to end at every step, which takes 10 % less time from huge pages.
    """
    libc = _glibc()
    begin = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    size = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE - begin
    if libc and size > 0:
        # A refusal (its result is -1) leaves the memory as it is.
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_COLLAPSE)
