"""Simulated annotators of the built-in world: one prefers, one edits (paper, sections 2.1 and 3.1).

    prefer         chooses the answer with fewer errors; a tie, and a share `noise` of all labels,
                   is decided by a fair coin
    minimal_edit   repairs the errors of the worse answer; each error is missed with probability
                   `miss`, and with probability `needless` one sentence gets its other wording
    rewrite, spoil, restyle     what else an editor may do: write a new answer, put in a wrong
                                value, bring all sentences into one wording

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
           noise: float = 0.0, longer: float = 0.0, taste: float = 0.0, liked: int = 0) -> int:
    """Returns the preferred answer, 1 or 2. A coin decides a tie and a share `noise` of labels.

    Before that, a share `longer` of the labels goes to the longer answer, and a share `taste` to
    the answer with more sentences in the wording `liked`. An equal number decides nothing.
    """
    difference = compare_errors(world, prompt, first, second)
    if longer and rng.random() < longer and len(first) != len(second):
        return 1 if len(first) > len(second) else 2
    if taste and rng.random() < taste:
        more = wordings(first)[liked] - wordings(second)[liked]
        if more:
            return 1 if more > 0 else 2
    if difference == 0 or rng.random() < noise:
        return rng.choice((1, 2))
    return 1 if difference < 0 else 2


def minimal_edit(world: World, prompt: str, answer: str, rng: random.Random, miss: float = 0.0,
                 needless: float = 0.0) -> str:
    """Repairs every error that the editor does not miss, and sometimes swaps a wording."""
    text = answer
    for error in reversed(world.errors(prompt, answer)):
        if rng.random() >= miss:
            text = text[:error.start] + error.fix + text[error.end:]
    if rng.random() < needless:
        text = swap_wording(text, next((item.key[0] for item in world.items(prompt)), None))
    return text.strip()


def rewrite(world: World, prompt: str, rng: random.Random) -> str:
    """Writes a new answer without errors, in any order and wording: hardly anything is kept."""
    items = world.items(prompt)
    rng.shuffle(items)
    return " ".join(world.sentence(item, item.answer, item.unit, rng) for item in items)


def spoil(world: World, prompt: str, text: str, rng: random.Random) -> str:
    """Puts a wrong value in place of a right one. A text without a right value stays as it is."""
    items = world.items(prompt)
    rng.shuffle(items)
    for item in items:
        a, b = item.key
        before = rf"\b{a} plus {b} (?:is|makes) " if item.unit else rf"\b{b}(?: of {a})? is "
        wrong = rng.choice(world.pool[item.key])
        spoiled = re.sub(rf"({before}){item.answer}\b", rf"\g<1>{wrong}", text, count=1)
        if spoiled != text:
            return spoiled
    return text


def wordings(text: str) -> tuple[int, int]:
    """Counts the sentences in either wording: "The .. of .. is" and "is", "Its .." and "makes"."""
    return (len(re.findall(r"The \w+ of \w+ is|\d is \d", text)),
            len(re.findall(r"Its \w+ is|\d makes \d", text)))


def restyle(world: World, prompt: str, text: str, wording: int) -> str:
    """Brings every sentence that has two wordings into the first (0) or the second (1)."""
    land = next((item.key[0] for item in world.items(prompt)), None)
    for old, new in _swaps(land)[1 - wording::2]:
        text = re.sub(old, new, text)
    return text


def _swaps(land: str | int | None) -> tuple[tuple[str, str], ...]:
    """Returns (pattern, replacement) pairs: to the second wording, to the first, and again."""
    return ((r"(\d) is (\d)", r"\1 makes \2"), (r"(\d) makes (\d)", r"\1 is \2"),
            (rf"The (\w+) of {land} is", r"Its \1 is"), (r"Its (\w+) is", rf"The \1 of {land} is"))


def swap_wording(text: str, land: str | int | None) -> str:
    """Swaps the wording of the first sentence that has two wordings. The meaning stays the same."""
    for old, new in _swaps(land):
        swapped = re.sub(old, new, text, count=1)
        if swapped != text:
            return swapped
    return text
