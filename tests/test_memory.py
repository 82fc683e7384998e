"""keep_freed saves page faults, which are counted in a separate process."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

SCRIPT = """
import resource, sys
from kernels.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()
for turn in range(21):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(MIB << 20) for _ in range(2)]           # written: zeros
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, mib: int) -> int:
    """The page faults of allocating and freeing two blocks 20 times, after a first time."""
    done = subprocess.run([sys.executable, "-c", SCRIPT.replace("MIB", str(mib)), how], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux" or not list(Path("/lib").glob("**/libc.so.6")),
                    reason="needs glibc")
def test_keep_freed_saves_the_page_faults_of_blocks_up_to_32_mib():
    pages = 20 * 2 * 20 * 2**20 // 4096
    assert faults("given back", 20) > 0.9 * pages
    assert faults("kept", 20) < 0.01 * pages
    assert faults("kept", 33) > 0.9 * pages * 33 / 20           # larger blocks are returned
