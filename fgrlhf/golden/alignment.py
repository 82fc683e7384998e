"""Alignment (paper, section 2.1) by exhaustive search: all paths are listed, the best is taken.

    tokens   match 0, substitute 1, delete 1, insert 1
    words    match 0, delete 1, insert 1, and 2 per run; no substitution
    then     the fewest runs, then the first in dictionary order of the moves, match < substitute <
             delete < insert

A run is a maximal stretch of moves without a match. All responses are short, because the number of
paths grows like 5.8^n.
"""

import unicodedata

import torch

from fgrlhf.golden.case import Case
from fgrlhf.golden.text import tokenizer

Pairs = list[tuple[int, int]]

MATCH, SUBSTITUTE, DELETE, INSERT = range(4)
# Ties, repeats, a swap, pure insertions and deletions at either end and in the middle, nothing in
# common, nothing changed, an empty side. 9 is EOS.
PAIRS = (("1223 9", "123 9"), ("1212 9", "2121 9"), ("112", "121"), ("123 9", "132 9"),
         ("12 9", "1234 9"), ("3412 9", "12 9"), ("1234 9", "14 9"), ("123", "456"),
         ("123 9", "123 9"), ("", "12"), ("12", ""), ("11111 9", "111 9"), ("12341", "21143"),
         ("232", "3122"), ("12 9", "312 9"), ("312", "231"), ("222", "1121"))
TEXTS = (("The cat sat.", "the cat sat!"), ("a red log", "a big red dog"),
         ("it is the mat of the dog", "here lies the log on the sand"),
         ("12 cats 😀 sat", "13 cats 😀 and sat"), ("few words", "few words more"),
         ("  the  log , and", "log and"), ("cats", "dogs"),
         ('[("a cat"). --', "A cat -- now!"), ("log sat", "a log sat"),
         ("the log is a red dog", "the log was a red cat"), ("猫が座る。", "猫は座る"),
         ("ที่นี่", "ที่นั่น"))


def paths(a: list, b: list, substitute: bool, i: int = 0, j: int = 0):
    """Yields every sequence of moves from (i, j) to the two ends."""
    if i == len(a) and j == len(b):
        yield ()
    if i < len(a) and j < len(b) and (substitute or a[i] == b[j]):
        move = MATCH if a[i] == b[j] else SUBSTITUTE
        yield from ((move, *rest) for rest in paths(a, b, substitute, i + 1, j + 1))
    if i < len(a):
        yield from ((DELETE, *rest) for rest in paths(a, b, substitute, i + 1, j))
    if j < len(b):
        yield from ((INSERT, *rest) for rest in paths(a, b, substitute, i, j + 1))


def best_pairs(a: list, b: list, words: bool = False) -> tuple[Pairs, int]:
    """Returns (the matches of the path that the definition picks, its number of edits)."""
    def key(moves):
        edits = sum(move != MATCH for move in moves)
        runs = sum(move != MATCH and (k == 0 or moves[k - 1] == MATCH)
                   for k, move in enumerate(moves))
        return edits + (2 * runs if words else 0), runs, moves

    pairs, i, j, best = [], 0, 0, min(paths(a, b, not words), key=key)
    for move in best:
        if move == MATCH:
            pairs.append((i, j))
        i, j = i + (move != INSERT), j + (move != DELETE)
    return pairs, sum(move != MATCH for move in best)


def align_ids(a: list[int], b: list[int]) -> tuple[list[list[bool]], Pairs, int]:
    """Returns (changed flags of both sides, the unchanged pairs, the distance)."""
    pairs, distance = best_pairs(a, b)
    changed = [[k not in {pair[side] for pair in pairs} for k in range(len(row))]
               for side, row in enumerate((a, b))]
    return changed, pairs, distance


def writes_no_blanks(character: str) -> bool:
    """True for the scripts of Thailand, China and Japan that TEXTS uses."""
    return unicodedata.name(character, "").startswith(("THAI", "CJK UNIFIED", "HIRAGANA"))


def words_of(text: str) -> list[tuple[str, int, int]]:
    """(key, start, end) of each word. The key has lower case and no punctuation at its ends.

    In a script without blanks a word is a character with its combining marks.
    """
    pieces: list[tuple[int, int]] = []
    for k, character in enumerate(text):
        joins = pieces and pieces[-1][1] == k and (
            unicodedata.category(character) in ("Mn", "Mc") if writes_no_blanks(text[k - 1]) else
            not writes_no_blanks(character))
        if joins and not character.isspace():
            pieces[-1] = pieces[-1][0], k + 1
        elif not character.isspace():
            pieces.append((k, k + 1))
    found = []
    for start, end in pieces:
        word = text[start:end].lower()
        kept = [n for n, c in enumerate(word) if unicodedata.category(c)[0] in "LNM"]
        found.append((word[kept[0]:kept[-1] + 1] if kept else word, start, end))
    return found


def two_words_a_piece(text: str) -> Pairs:
    """Spans of pieces of two words each, and of EOS: the pieces of this tokenizer are smaller."""
    starts = [start for _, start, _ in words_of(text)][::2] + [len(text)] * 2
    return list(zip(starts, starts[1:]))


def home(span: tuple[int, int], words: list[tuple[str, int, int]]) -> list[int]:
    """The words that a piece belongs to: those it overlaps, or the next, or len(words), the end."""
    start, end = span
    over = [w for w, (_, first, last) in enumerate(words) if max(start, first) < min(end, last)]
    after = [w for w, (_, first, last) in enumerate(words) if first >= start]
    return over or after[:1] or [len(words)]


def align_words(texts: tuple[str, str], spans: list[Pairs]) -> tuple[list[list[bool]], Pairs, int]:
    """Returns (changed flags of both sides, the unchanged pairs of pieces, the word edits)."""
    words = [words_of(text) for text in texts]
    matches, edits = best_pairs(*([key for key, *_ in side] for side in words), words=True)
    matches.append((len(words[0]), len(words[1])))                 # the ends always match
    homes = [[home(span, side) for span in row] for row, side in zip(spans, words)]
    kept = [{match[side] for match in matches} for side in (0, 1)]
    changed = [[any(w not in kept[side] for w in where) for where in homes[side]]
               for side in (0, 1)]
    pairs = []
    for match in matches:
        inside = [[p for p, where in enumerate(homes[side]) if where[0] == match[side]]
                  for side in (0, 1)]
        shown = [[texts[side][slice(*spans[side][p])].lower() for p in inside[side]]
                 for side in (0, 1)]
        alike, _ = best_pairs(*([piece.strip() or piece for piece in side] for side in shown))
        pairs += [(inside[0][p], inside[1][q]) for p, q in alike
                  if not changed[0][inside[0][p]] and not changed[1][inside[1][q]]]
    return changed, pairs, edits


def credit(changed: list[list[bool]], pairs: Pairs) -> tuple[list[list[bool]], Pairs]:
    """Returns (credited flags of both sides, the pairs that remain).

    Where an edit only inserted or only deleted, the token behind the gap is credited.
    """
    credited = [list(side) for side in changed]
    ends = (len(changed[0]), len(changed[1]))
    for before, after in zip([(-1, -1), *pairs], [*pairs, ends]):
        gap = [any(changed[side][before[side] + 1:after[side]]) for side in (0, 1)]
        for side in (0, 1):
            first = before[side] + 1
            if gap[1 - side] and not gap[side] and first < ends[side]:
                credited[side][first] = True
    return credited, [(i, j) for i, j in pairs if not credited[0][i] and not credited[1][j]]


def outputs(rows: list) -> dict[str, torch.Tensor]:
    """The flags of all rows, one after the other, and the pairs as (row, i, j)."""
    flags = lambda side: torch.tensor([f for changed, *_ in rows for f in changed[side]])
    pairs = [(n, i, j) for n, (_, found, *_) in enumerate(rows) for i, j in found]
    return {"original": flags(0), "edited": flags(1), "pairs": torch.tensor(pairs)}


def distances(rows: list) -> dict[str, torch.Tensor]:
    return {"distance": torch.tensor([distance for *_, distance in rows])}


def token_cases() -> list[Case]:
    ids = [[[int(c) for c in side if c != " "] for side in pair] for pair in PAIRS]
    given = {"original": [a for a, _ in ids], "edited": [b for _, b in ids]}
    aligned = [align_ids(a, b) for a, b in ids]
    token = Case(
        "align-token", "2.1", "U0, U1-, U1+",
        "Levenshtein alignment of ids: the least cost, then the fewest runs of edits, then the "
        "first path in dictionary order of its moves from the start of the texts to their end, "
        "match < substitute < delete < insert. A run is a maximal stretch of moves that are no "
        "matches, whatever their kinds. A match costs 0 and each edit 1. original, edited: True "
        "where a token changed, the rows one after the other. pairs: unchanged tokens as (row, i, "
        "j), sorted by row and then i; i and j count within the row. distance: edits of each row.",
        {}, given,
        outputs(aligned) | distances(aligned))
    gap = Case(
        "gap-credit", "2.1", "U1-, U1+",
        "The tokens that are credited with an edit, in the alignment of align-token. Changed "
        "tokens are always credited. Where the edit only inserted between two pairs, in front of "
        "the first or behind the last, the original's first token behind the gap is credited; "
        "where it only deleted, the edited side's. When no token follows, none is. "
        "original, edited: True where a token is credited. pairs: the U0 that remains, as (row, i, "
        "j).",
        {}, given, outputs([credit(changed, pairs) for changed, pairs, _ in aligned]))
    return [token, gap]


def word_case() -> Case:
    made = tokenizer()
    spans = [[made.spans(made.encode(text, eos=True)) for text in pair] for pair in TEXTS]
    spans[-1] = [two_words_a_piece(text) for text in TEXTS[-1]]
    aligned = [align_words(pair, both) for pair, both in zip(TEXTS, spans)]
    return Case(
        "align-word", "2.1", "U0, U1-, U1+",
        "Alignment of words. A word is a stretch without whitespace. In Thai, Chinese characters "
        "and hiragana, which are written without blanks, each character with the combining marks "
        "behind it is a word (the project does the same in Lao, Burmese, Khmer and katakana, which "
        "this case does not have). Words match when they are equal in lower case and without the "
        "characters at their ends that are no letter, number or mark (Unicode L, N, M); a word "
        "without any letter, number or mark is compared whole. Lower case and whitespace are those "
        "of Python's str.lower and str.isspace. The moves are match, delete and insert: there is "
        "no substitution. A deletion or insertion costs 1 and each run 2 more. Paths of equal cost "
        "are chosen as in align-token. distance: the number of deletions and insertions of words, "
        "without the cost of runs. The result is projected to pieces "
        "(spans: half-open, in code points). A piece belongs to every word that it overlaps. A "
        "piece that overlaps none belongs to the next word or, behind the last word, to the end of "
        "the text. The end of one text always matches the end of the other. A piece is changed "
        "when one of its words is not matched. Pairs: for every two words that match, and for the "
        "two ends, take on each side the pieces whose first word it is. align-token, with its own "
        "costs, aligns these pieces by their texts, in lower case and without whitespace at the "
        "ends (kept when all of a text is whitespace). Two pieces that match are a pair when "
        "neither is changed. Outputs "
        "as align-token, with an entry of original and edited for every piece of the spans.",
        {}, {"original": [a for a, _ in TEXTS], "edited": [b for _, b in TEXTS],
             "original_spans": [a for a, _ in spans], "edited_spans": [b for _, b in spans]},
        outputs(aligned) | distances(aligned))


def cases() -> list[Case]:
    return [*token_cases(), word_case()]
