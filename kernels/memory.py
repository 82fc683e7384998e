"""Keeps freed memory in the process, so that the next step reuses it.

By default glibc returns freed memory to the kernel, which later gives it back as pages of zeros. A
training step of 2048 tokens at D 256 then has 48,000 page faults, which take 0.07-0.1 of its 0.95
seconds. Results do not depend on this.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3             # mallopt's names for them
LARGEST_KEPT = 2**25                                # bytes; the largest that glibc accepts


def keep_freed() -> None:
    """Keeps freed blocks of up to 32 MiB; larger blocks are still returned. Without glibc: nothing.

    It overrides the environment variable MALLOC_MMAP_THRESHOLD_.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)                                         # never trim
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
