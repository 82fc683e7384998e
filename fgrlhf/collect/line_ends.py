"""Keeps the line ends of a response through an editor that knows only one kind of them."""

import re
from itertools import accumulate

from fgrlhf.collect.change import PART
from fgrlhf.collect.long import align_long

LINE_END = re.compile(r"\r\n|\r|\n")


def keep_line_ends(original: str, edited: str) -> str:
    r"""Returns `edited` with the line ends of `original`, line by line.

    The page and most language models write every line end as "\n". Here a line end that was kept is
    written as in the original. A new line end is written like the kept line end before it, or else
    like the first line end of the original.
    """
    plain, ends = LINE_END.sub("\n", edited), LINE_END.findall(original)
    if set(ends) <= {"\n"}:
        return plain
    pattern = re.compile(rf"\n|{PART.pattern}")
    a, b = pattern.findall(LINE_END.sub("\n", original)), pattern.findall(plain)
    number = list(accumulate(part == "\n" for part in a))               # of each line end, from 1
    kept = {j: ends[number[i] - 1] for i, j in align_long(a, b).pairs if b[j] == "\n"}
    new, end = [], ends[0]
    for j in (j for j, part in enumerate(b) if part == "\n"):
        new.append(end := kept.get(j, end))
    lines = plain.split("\n")
    return "".join(line + end for line, end in zip(lines, [*new, ""]))
