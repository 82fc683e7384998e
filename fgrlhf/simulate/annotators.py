"""Simulated annotators of the built-in world: one prefers, one edits (paper, sections 2.1 and 3.1).

    prefer         chooses the answer with fewer errors; a tie, and a share `noise` of all labels,
                   is decided by a fair coin
    minimal_edit   repairs the errors of the worse answer; each error is missed with probability
                   `miss`, and with probability `needless` one sentence gets its other wording;
                   an editor with one wording writes every missing sentence in the same wording

They stand in for AlpacaFarm's annotators, so no person, no language model and no download is
needed. The two share nothing except the world: one sees two answers, the other sees one.
"""

import random
import re

from fgrlhf.simulate.world import World


def compare_errors(world: World, prompt: str, first: str, second: str) -> int:
    """Returns the number of errors of the first answer minus that of the second."""
    return len(world.errors(prompt, first)) - len(world.errors(prompt, second))


def prefer(world: World, prompt: str, first: str, second: str, rng: random.Random,
           noise: float = 0.0) -> int:
    """Returns the preferred answer, 1 or 2. A coin decides a tie and a share `noise` of labels."""
    difference = compare_errors(world, prompt, first, second)
    if difference == 0 or rng.random() < noise:
        return rng.choice((1, 2))
    return 1 if difference < 0 else 2


def minimal_edit(world: World, prompt: str, answer: str, rng: random.Random, miss: float = 0.0,
                 needless: float = 0.0, one_wording: bool = False) -> str:
    """Repairs every error that the editor does not miss, and sometimes swaps a wording."""
    text = answer
    for error in reversed(world.errors(prompt, answer)):
        if rng.random() >= miss:
            fix = in_one_wording(error.fix) if one_wording else error.fix
            text = text[:error.start] + fix + text[error.end:]
    if rng.random() < needless:
        text = swap_wording(text, next((item.key[0] for item in world.items(prompt)), None))
    return text.strip()


def in_one_wording(text: str) -> str:
    """Puts sentences into the wordings "makes" and "Its". A corrected value stays as it is."""
    text = re.sub(r"(\d) is (\d)", r"\1 makes \2", text)
    return re.sub(r"The (\w+) of \w+ is", r"Its \1 is", text)


def wording_shares(answers: list[str]) -> dict[str, float]:
    """Returns the share of "makes" among sums, and of "Its" among sentences with a fact."""
    text = "\n".join(answers)
    count = lambda pattern: len(re.findall(pattern, text))
    makes, sums = count(r"\d makes \d"), count(r"\d (?:is|makes) \d")
    its, facts = count(r"\bIts \w+ is"), count(r"\b(?:Its \w+|The \w+ of \w+) is")
    return {"makes": makes / max(sums, 1), "its": its / max(facts, 1)}


def swap_wording(text: str, land: str | int | None) -> str:
    """Swaps the wording of the first sentence that has two wordings. The meaning stays the same."""
    swaps = ((r"(\d) is (\d)", r"\1 makes \2"), (r"(\d) makes (\d)", r"\1 is \2"),
             (rf"The (\w+) of {land} is", r"Its \1 is"), (r"Its (\w+) is", rf"The \1 of {land} is"))
    for old, new in swaps:
        swapped = re.sub(old, new, text, count=1)
        if swapped != text:
            return swapped
    return text
