"""Keeps the memory of the idle process from growing with its load, where malloc is glibc's.

Activations and cached prefixes vary in size and leave gaps in the heap. glibc returns a gap to the
system only on request, and the free end of a heap only for the main heap; by default every thread
has its own heap. See mallopt(3) and malloc_trim(3).
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
    """Returns free memory to the system; takes milliseconds, without the GIL."""
    if libc := _glibc():
        libc.malloc_trim(0)


def use_huge_pages(address: int, num_bytes: int) -> None:
    """Moves memory to huge pages; no effect if the system has none.

    Every step reads all weights, which takes 10 % less time from huge pages.
    """
    libc = _glibc()
    begin = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    size = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE - begin
    if libc and size > 0:
        # If it fails (-1), the memory stays as it is.
        libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_COLLAPSE)
