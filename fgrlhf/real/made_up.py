"""Names and numbers in a summary that its article does not hold: made-up facts, without a model.

    named(s)        the words of s with a capital or a digit, but not the first of a sentence
    made_up(s, a)   those of them that a does not have in any case of letters
    rate            made_up / named, over all summaries together

A word is right by this measure when it occurs anywhere in the article, even about somebody else,
and "1,000" for "a thousand" is wrong. A summary that names nothing makes nothing up, so the number
of names belongs next to the rate. On DeFacto's `val` the rate is .37 for summaries that an
annotator called wrong, .12 for the annotator's edits of them and .13 for summaries called right.
"""

import re
import unicodedata

WORD = re.compile(r"\w+(?:[.,]\d+)*")
BEGINS = re.compile(r"(?:^|[.!?][\"'\u201d\u2019]?\s)[\s\"'\u201c\u2018]*$")     # a sentence


def words(text: str) -> list[str]:
    """Returns the words of a text; a number keeps its points and commas."""
    return WORD.findall(unicodedata.normalize("NFC", text))         # an accent is part of its word


def named(summary: str) -> list[str]:
    """Returns the words with a capital or a digit, without the first word of each sentence."""
    summary = unicodedata.normalize("NFC", summary)
    return [match[0] for match in WORD.finditer(summary)
            if any(c.isupper() or c.isdigit() for c in match[0])
            and not BEGINS.search(summary[:match.start()])]


def made_up(summary: str, article: str) -> list[str]:
    """Returns the names and numbers of the summary that are not in the article."""
    there = {word.lower() for word in words(article)}
    return [word for word in named(summary) if word.lower() not in there]


def copied(summary: str, article: str) -> float:
    """Returns the share of neighbouring words that are neighbours in the article too, in [0, 1]."""
    pairs = lambda text: [*zip(found := [word.lower() for word in words(text)], found[1:])]
    own, there = pairs(summary), set(pairs(article))
    return sum(pair in there for pair in own) / len(own) if own else 0.0
