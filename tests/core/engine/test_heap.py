"""Free memory is returned to the system, whichever thread allocated it."""

import platform
import subprocess
import sys

import numpy as np
import pytest

from server.core.engine.heap import use_huge_pages

# A thread allocates 100 MiB in small blocks and keeps every fourth. Prints how much of it was on
# the process's main heap and how much was returned to the system, in MiB.
SCRIPT = """
import re, threading, torch
from pathlib import Path
from server.core.engine.heap import share_one_heap, trim_heap

def resident_mib(of=".*"):
    maps = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)
    chosen = "".join(each for each in maps if re.search(of + "$", each.partition("\\n")[0]))
    return sum(map(int, re.findall(r"^Rss: +([0-9]+)", chosen, flags=re.M))) / 1024

def work():
    before = resident_mib("heap.")
    blocks = [torch.ones(64 * 1024, dtype=torch.uint8) for _ in range(1600)]
    on_main, full = resident_mib("heap.") - before, resident_mib()
    kept, blocks = blocks[::4], None
    trim_heap()
    print(on_main, full - resident_mib(), len(kept))

share_one_heap()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_all_threads_have_one_heap_and_trimming_it_leaves_no_gaps() -> None:
    output = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True)
    on_main_mib, returned_mib, _ = map(float, output.split())
    assert on_main_mib > 95
    assert returned_mib > 70


def test_memory_on_huge_pages_keeps_its_content() -> None:
    numbers = np.arange(2**20)  # 8 MiB
    use_huge_pages(numbers.ctypes.data, numbers.nbytes)
    assert np.array_equal(numbers, np.arange(2**20))


@pytest.mark.parametrize("num_bytes", [0, 1, 2**20])
def test_less_than_a_huge_page_stays_where_it_is(num_bytes: int) -> None:
    use_huge_pages(np.zeros(2**20, np.uint8).ctypes.data, num_bytes)
