"""Freed memory stays with the process.

glibc gives freed memory back to the kernel, which hands it out anew as pages of zeros: 48,000 page
faults a training step of 2048 tokens at D 256, 0.07-0.1 of its 0.95 seconds. Results do not change.
"""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3             # mallopt's names for them
LARGEST_KEPT = 2**25                                # bytes; more than this glibc does not take


def keep_freed() -> None:
    """Reuse blocks of up to 32 MiB, the larger ones still go back; does nothing without glibc.

    The environment's MALLOC_MMAP_THRESHOLD_ loses against this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, -1)                                         # never
        mallopt(MMAP_THRESHOLD, LARGEST_KEPT)
