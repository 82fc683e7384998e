"""Aligns texts of any length in bounded time, for the measure of change and for the page."""

import zlib
from itertools import accumulate

from fgrlhf.align import Alignment, align
from fgrlhf.data.fields import UserError

LARGE = 3000 * 3000                               # cells (n times m) of one exact alignment
LONGEST = 10_000                                  # parts of one side; each cell costs that much


def align_long(a: list[str], b: list[str]) -> Alignment:
    """Aligns as `align` does, but in bounded time and memory.

    When `_exact` gives up, equal blocks of about 50 parts are found first. Parts are then
    aligned only between these blocks. The distance is an upper bound of the Levenshtein distance.
    """
    if whole := _exact(a, b):
        return whole
    blocks, other_blocks, equal = _equal_blocks(a, b)
    starts = [0, *accumulate(map(len, blocks)), len(a)]
    other_starts = [0, *accumulate(map(len, other_blocks)), len(b)]
    pairs, distance, i, j = [], 0, 0, 0           # everything before a[i] and b[j] is aligned
    for block, other_block in [*equal, (len(blocks), len(other_blocks))]:
        i_end, j_end = starts[block], other_starts[other_block]
        if part := _exact(a[i:i_end], b[j:j_end]):
            pairs += [(i + p, j + q) for p, q in part.pairs]
            distance += part.distance
        else:                                     # rewritten: everything has changed
            distance += max(i_end - i, j_end - j)
        i, j = starts[block + 1], other_starts[other_block + 1]
        pairs += zip(range(i_end, i), range(j_end, j))
    kept, other_kept = {i for i, _ in pairs}, {j for _, j in pairs}
    return Alignment([i not in kept for i in range(len(a))],
                     [j not in other_kept for j in range(len(b))], pairs, distance)


def _exact(a: list[str], b: list[str]) -> Alignment | None:
    """Returns the alignment of two short lists; None if they are long or too different."""
    if len(a) * len(b) > LARGE or max(len(a), len(b)) > LONGEST:
        return None
    try:
        return align(a, b)
    except UserError:
        return None


def _equal_blocks(a: list[str], b: list[str]) -> tuple[list, list, list]:
    """Returns the blocks of a, the blocks of b, and the increasing pairs of equal blocks.

    The first and the last block are the parts that both texts have in common at their ends.
    """
    start = _common(a, b)
    end = _common(a[start:][::-1], b[start:][::-1])
    n, m = len(a) - end, len(b) - end
    blocks, other_blocks = ([side[:start], *_blocks(side[start:stop]), side[stop:]]
                            for side, stop in ((a, n), (b, m)))
    try:
        found = align([tuple(block) for block in blocks], [tuple(block) for block in other_blocks])
    except UserError:                             # too many blocks, or hardly any equal ones
        return blocks, other_blocks, [(0, 0), (len(blocks) - 1, len(other_blocks) - 1)]
    return blocks, other_blocks, found.pairs


def _blocks(parts: list[str]) -> list[list[str]]:
    """Cuts a list behind parts whose checksum is a multiple of 32, into blocks of 16 to 512 parts.

    The cuts depend on the parts and not on their positions, so an edit changes few blocks.
    """
    blocks, first = [], 0
    for end, part in enumerate(parts, 1):
        if end - first >= 16 and zlib.crc32(part.encode()) % 32 == 0 or end - first == 512:
            blocks.append(parts[first:end])
            first = end
    return [*blocks, parts[first:]]


def _common(a: list[str], b: list[str]) -> int:
    """Returns how many parts a and b have in common at their beginning."""
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
