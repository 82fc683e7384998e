"""align: against all paths on small inputs, a slow table on larger ones, answers by hand, and the
error spans that humans marked in real texts."""

import json
import random
from functools import lru_cache
from itertools import accumulate

import pytest

from fgrlhf import align as alignments
from fgrlhf.align import Alignment, align, gap_credit
from fgrlhf.align_words import _words, align_words
from fgrlhf.data.fields import UserError
from fgrlhf.tokenizer import Tokenizer

STEPS = {"=": (1, 1), "substitute": (1, 1), "delete": (1, 0), "insert": (0, 1)}
ORDER = list(STEPS)                                         # "=" is a match


def moves_from(a, b, i, j, substitution=True):
    """The moves that leave cell (i, j), by the definition in the module's docstring."""
    if i < len(a) and j < len(b):
        if a[i] == b[j]:
            yield "="
        elif substitution:
            yield "substitute"
    if i < len(a):
        yield "delete"
    if j < len(b):
        yield "insert"


def all_paths(a, b, substitution=True, i=0, j=0):
    """Every path from (i, j) to the end, as a tuple of moves."""
    if (i, j) == (len(a), len(b)):
        yield ()
    for move in moves_from(a, b, i, j, substitution):
        di, dj = STEPS[move]
        for rest in all_paths(a, b, substitution, i + di, j + dj):
            yield (move, *rest)


def count_runs(path):
    return sum(move != "=" and (k == 0 or path[k - 1] == "=") for k, move in enumerate(path))


def count_edits(path):
    return sum(move != "=" for move in path)


def alignment_of(a, b, path) -> Alignment:
    pairs, i, j = [], 0, 0
    for move in path:
        if move == "=":
            pairs.append((i, j))
        i, j = i + STEPS[move][0], j + STEPS[move][1]
    return Alignment([i not in [p for p, _ in pairs] for i in range(len(a))],
                     [j not in [q for _, q in pairs] for j in range(len(b))],
                     pairs, count_edits(path))


def random_pair(rng, alphabet, longest):
    return tuple([rng.randrange(alphabet) for _ in range(rng.randrange(longest + 1))] for _ in "ab")


def edit_somewhere(rng, a, rate, vocabulary):
    """A copy of `a` with about rate * len(a) insertions, deletions and substitutions."""
    b = []
    for token in a:
        kind = 3 * rng.random() / rate          # below 1 substitute, below 2 insert, below 3 delete
        b += [rng.randrange(vocabulary)] * (kind < 2)
        b += [token] * (1 <= kind < 2 or kind >= 3)
    return b


def by_slow_table(a, b, run_cost=0, substitution=True):
    """The definition as a recursion over (i, j, in a run); its value is (cost, runs, moves)."""
    @lru_cache(maxsize=None)
    def best(i, j, in_run):
        if (i, j) == (len(a), len(b)):
            return 0, 0, ()
        options = []
        for move in moves_from(a, b, i, j, substitution):
            edit = move != "="
            cost, runs, rest = best(i + STEPS[move][0], j + STEPS[move][1], edit)
            new = edit and not in_run
            options.append((cost + edit + run_cost * new, runs + new, (ORDER.index(move), *rest)))
        return min(options)

    for k in range(len(a) + len(b), -1, -8):            # from the end: recursion stays shallow
        for i in range(max(0, k - len(b)), min(k, len(a)) + 1):
            best(i, k - i, False), best(i, k - i, True)
    return alignment_of(a, b, [ORDER[move] for move in best(0, 0, False)[2]])


def distance_by_plain_table(a, b):
    row = list(range(len(b) + 1))
    for i in range(len(a)):
        above, row = row, [i + 1]
        for j in range(len(b)):
            row.append(min(above[j] + (a[i] != b[j]), above[j + 1] + 1, row[j] + 1))
    return row[-1]


# -- token mode ------------------------------------------------------------------------------------

@pytest.mark.parametrize("alphabet, longest, cases",
                         [(2, 5, 1500), (3, 5, 1500), (2, 6, 150), (5, 6, 150)])
def test_align_is_the_first_of_all_paths_by_edits_runs_and_moves(alphabet, longest, cases):
    rng = random.Random(alphabet * longest)
    for _ in range(cases):
        a, b = random_pair(rng, alphabet, longest)
        path = min(all_paths(a, b),
                   key=lambda p: (count_edits(p), count_runs(p), [ORDER.index(x) for x in p]))
        assert align(a, b) == alignment_of(a, b, path), (a, b)


@pytest.mark.parametrize("alphabet, rate", [(2, 0.3), (4, 0.1), (4, 0.9), (40, 0.3), (30000, 0.1)])
def test_align_equals_a_slow_table_on_longer_sequences(alphabet, rate):
    rng = random.Random(alphabet)
    for _ in range(12):
        a = [rng.randrange(alphabet) for _ in range(rng.randrange(20, 60))]
        b = edit_somewhere(rng, a, rate, alphabet)
        assert align(a, b) == by_slow_table(a, b), (a, b)


def test_align_is_consistent_beyond_the_machine_word():
    rng = random.Random(0)
    for rate in (0.05, 0.3, 0.9):
        a = [rng.randrange(50) for _ in range(300)]
        b = edit_somewhere(rng, a, rate, 50)
        got = align(a, b)
        assert got.distance == distance_by_plain_table(a, b)
        assert all(a[i] == b[j] for i, j in got.pairs)
        assert all(i < k and j < l for (i, j), (k, l) in zip(got.pairs, got.pairs[1:]))
        assert got.original_changed == [i not in {i for i, _ in got.pairs} for i in range(len(a))]
        assert got.edited_changed == [j not in {j for _, j in got.pairs} for j in range(len(b))]
        gaps = [(-1, -1), *got.pairs, (len(a), len(b))]     # a run costs its longer side
        assert got.distance == sum(max(k - i, l - j) - 1 for (i, j), (k, l) in zip(gaps, gaps[1:]))


@pytest.mark.parametrize("original, edited, changed, edited_changed", [
    ("abc", "abc", "...", "..."),                           # identical
    ("", "", "", ""),
    ("", "ab", "", "xx"),
    ("ab", "", "xx", ""),
    ("abbc", "abc", "..x.", "..."),                         # the later b
    ("abc", "abbc", "...", "..x."),
    ("abcabc", "abc", "...xxx", "..."),                     # right-most of two deletions of one run
    ("axbxc", "abc", ".x.x.", "..."),                       # two runs cannot be one
    ("ab", "bc", "xx", "xx"),                               # two substitutions, one run
    ("aab", "ab", ".x.", ".."),
    ("axyb", "abyb", ".x..", ".x.."),                       # an early b would cost more
])
def test_align_labels_by_hand(original, edited, changed, edited_changed):
    got = align(original, edited)
    assert "".join(".x"[c] for c in got.original_changed) == changed
    assert "".join(".x"[c] for c in got.edited_changed) == edited_changed


def test_align_counts_the_same_edits_and_runs_when_sides_or_directions_swap():
    """The cost is symmetric; the labels are not, as the tie-break knows left from right."""
    def cost(a, b):
        got = align(a, b)
        gaps = [(-1, -1), *got.pairs, (len(a), len(b))]
        return got.distance, sum((k, l) != (i + 1, j + 1) for (i, j), (k, l) in zip(gaps, gaps[1:]))

    rng = random.Random(1)
    for _ in range(300):
        a, b = random_pair(rng, 3, 30)
        assert cost(a, b) == cost(b, a) == cost(a[::-1], b[::-1])


def test_align_keeps_a_common_prefix():
    """Follows from the definition, and lets a port strip it; stripping a suffix would be wrong."""
    rng = random.Random(2)
    for _ in range(500):
        a, b = random_pair(rng, 2, 10)
        assert align([7, 8, *a], [7, 8, *b]).pairs[:2] == [(0, 0), (1, 1)]


def test_align_refuses_what_does_not_compare_as_ids():
    import torch
    with pytest.raises(ValueError, match=r"edited_ids: expected a list of ids, got Tensor; pass"):
        align([1, 2], torch.tensor([1, 2]))


# -- word mode -------------------------------------------------------------------------------------

def spans_of(*pieces):
    """Half-open spans of pieces that concatenate to the text."""
    ends = accumulate(map(len, pieces))
    return [(end - len(piece), end) for end, piece in zip(ends, pieces)]


def align_pieces(original, edited):
    return align_words("".join(original), "".join(edited), spans_of(*original), spans_of(*edited))


def test_align_words_is_the_first_of_all_paths_by_cost_and_moves():
    """One piece a word and EOS: cost = inserted + deleted words + 2 for each run."""
    rng = random.Random(3)
    for _ in range(1500):
        a, b = random_pair(rng, rng.choice([2, 3, 5]), 5)
        path = min(all_paths(a, b, substitution=False),
                   key=lambda p: (count_edits(p) + 2 * count_runs(p), count_runs(p),
                                  [ORDER.index(x) for x in p]))
        expected = alignment_of(a, b, path)
        got = align_pieces([f" {x}" for x in a] + [""], [f" {x}" for x in b] + [""])
        assert got == Alignment(
            expected.original_changed + [False], expected.edited_changed + [False],
            expected.pairs + [(len(a), len(b))], expected.distance), (a, b)


@pytest.mark.parametrize("alphabet, rate", [(2, 0.3), (4, 0.3), (4, 0.9), (12, 0.4), (300, 0.2)])
def test_align_words_equals_a_slow_table_on_longer_texts(alphabet, rate):
    rng = random.Random(alphabet)
    for _ in range(12):
        a = [rng.randrange(alphabet) for _ in range(rng.randrange(20, 60))]
        b = edit_somewhere(rng, a, rate, alphabet)
        got = align_pieces([f" {x}" for x in a], [f" {x}" for x in b])
        assert got == by_slow_table(a, b, run_cost=2, substitution=False), (a, b)


@pytest.mark.parametrize("original, edited, words", [
    ("猫が座る。", "猫は座る。", 5),                              # Japanese: a word per character
    ("我住在北京", "我住在南京", 5),                              # Chinese
    ("แมวนั่งที่นี่", "แมวนอนที่นี่", 7),         # Thai: a letter with its marks
    ("Kyoto京都 is old", "Kyoto京都 was old", 5)])
def test_align_words_takes_single_characters_of_scripts_without_blanks(original, edited, words):
    found = [original[word.start:word.end] for word in _words(original)][:-1]
    assert len(found) == words and "".join(found) == original.replace(" ", "")
    each = lambda text: [(k, k + 1) for k in range(len(text))]
    got = align_words(original, edited, each(original), each(edited))
    changed = [c for c, flag in zip(original, got.original_changed) if flag]
    assert "".join(changed).strip() in ("が", "北", "นั่ง", "is")


def test_align_words_takes_a_vowel_sign_as_part_of_its_word():
    """In Hindi "of" is "का" or "की", by gender: the two differ in their last mark only."""
    aligned = align_pieces(["राम", " की", "!"], ["राम", " का", "."])
    assert aligned.original_changed[:2] == [False, True]


def test_long_texts_are_aligned_in_little_memory_or_refused(monkeypatch):
    """30,000 words are quick; as many tokens on each side would take 400 MB of bits."""
    words = [f"w{k % 20011}" for k in range(30_000)]
    pieces = [f" {word}" for word in words]
    got = align_pieces(pieces, [*pieces[:20_000], " new", *pieces[20_000:]])
    assert got.distance == 1 and got.edited_changed.index(True) == 20_000
    with pytest.raises(UserError, match="at most 16384 tokens each to align, got 30000 and 30000"):
        align(words, words)
    monkeypatch.setattr(alignments, "MOST_VISITED", 10_000)
    with pytest.raises(UserError, match="too many cheapest alignments"):
        align([f"a{k}" for k in range(100)], [f"b{k}" for k in range(300)])
    with pytest.raises(UserError, match="do not repeat themselves, got 2000 and 2000 words"):
        align_pieces([" ha", " ho"] * 1000, [" ho", " ha"] * 1000)          # 9 seconds


def test_align_words_changes_all_pieces_of_a_changed_word():
    got = align_pieces(["The", " Ser", "gei", " sat", ".", ""],
                       ["The", " Ser", "ena", " sat", ".", ""])
    assert got.original_changed == got.edited_changed == [False, True, True, False, False, False]
    assert got.pairs == [(0, 0), (3, 3), (4, 4), (5, 5)]
    assert got.distance == 2                                # a word deleted, a word inserted


def test_align_words_keeps_a_word_whose_case_or_punctuation_changed():
    got = align_pieces(["The", " cat", ",", " sat", "."], ["the", " cat", " sat", "!"])
    assert got.original_changed == [False] * 5 and got.edited_changed == [False] * 4
    assert got.pairs == [(0, 0), (1, 1), (3, 2)]            # ",", "." and "!" have no like


def test_align_words_does_not_let_one_common_word_split_a_rewritten_passage():
    """Keeping "of" costs 4 words and 2 runs, giving it up 6 words and 1 run: the same, in fewer."""
    original = [" start", " one", " two", " of", " end"]
    edited = [" start", " of", " three", " four", " end"]
    assert align_pieces(original, edited).pairs == [(0, 0), (4, 4)]


def test_align_words_reads_a_bare_punctuation_word_as_itself():
    got = align_pieces(["a", " -", " b"], ["a", " &", " b"])
    assert got.original_changed == got.edited_changed == [False, True, False]


def test_align_words_changes_a_piece_that_spans_a_changed_and_an_unchanged_word():
    got = align_pieces(["in", " a way", " out"], ["in", " a", " day", " out"])
    assert got.original_changed == [False, True, False]
    assert got.edited_changed == [False, False, True, False]
    assert got.pairs == [(0, 0), (2, 3)]


def test_align_words_pairs_no_piece_of_a_changed_word_when_it_begins_in_an_unchanged_one():
    """" a w" stands for the words a and w on one side, for a and the new word way on the other."""
    shorter, longer = [" a w", " z"], [" a w", "ay", " w", " z"]
    got = align_pieces(shorter, longer)
    assert got == ([False, False], [True, True, False, False], [(1, 3)], 1)
    got = align_pieces(longer, shorter)
    assert got == ([True, True, False, False], [False, False], [(3, 1)], 1)


@pytest.mark.parametrize("original, edited", [
    ([], []), ([""], [""]), ([" ", ""], [""]), (["a", " ", ""], ["a", ""])])
def test_align_words_leaves_blanks_and_eos_unchanged(original, edited):
    got = align_pieces(original, edited)
    assert not any(got.original_changed) and not any(got.edited_changed)
    if original:
        assert got.pairs[-1] == (len(original) - 1, len(edited) - 1)


def test_align_words_refuses_spans_of_another_text():
    with pytest.raises(ValueError, match=r"within the text's 3 characters, got \(3, 5\)"):
        align_words("abc", "abc", [(0, 3)], [(0, 3), (3, 5)])


# -- gap credit ------------------------------------------------------------------------------------

@pytest.mark.parametrize("original, edited, credited, edited_credited, pairs", [
    ("abc$", "abc$", [], [], [(0, 0), (1, 1), (2, 2), (3, 3)]),
    ("abc$", "axc$", [1], [1], [(0, 0), (2, 2), (3, 3)]),    # a substitution has both sides
    ("ac$", "abc$", [1], [1], [(0, 0), (2, 3)]),    # insertion: c stands where b should
    ("abc$", "ac$", [1], [1], [(0, 0), (3, 2)]),    # deletion: c is what b should have been
    ("ab$", "abxy$", [2], [2, 3], [(0, 0), (1, 1)]),    # stopped too early: EOS answers
    ("abxy$", "ab$", [2, 3], [2], [(0, 0), (1, 1)]),
    ("ab", "abx", [], [2], [(0, 0), (1, 1)]),    # no token after the gap
    ("abx", "ab", [2], [], [(0, 0), (1, 1)]),
    ("a$", "xa$", [0], [0], [(1, 2)]),
    ("abpq$", "axbyzq$", [1, 2], [1, 3, 4], [(0, 0), (3, 5), (4, 6)]),
])
def test_gap_credit_by_hand(original, edited, credited, edited_credited, pairs):
    assert gap_credit(align(original, edited)) == (credited, edited_credited, pairs)


def test_gap_credit_credits_nobody_at_gaps_when_told():
    alignment = align("ac$", "abc$")
    assert gap_credit(alignment, at_gaps=False) == ([], [1], alignment.pairs)


def test_gap_credit_takes_the_first_piece_after_the_last_pair_in_word_mode():
    """"Next" is not paired with "ne"+"xt", and still is what stands where "and then" should."""
    alignment = align_pieces(["word", " Next", " one"],
                             ["word", " and", " then", " ne", "xt", " one"])
    assert alignment.pairs == [(0, 0), (2, 5)]
    assert gap_credit(alignment) == ([1], [1, 2], [(0, 0), (2, 5)])


def test_gap_credit_leaves_an_unpaired_piece_alone_where_both_sides_changed():
    """The comma that "word," lost is no gap token: foo and bar answer."""
    alignment = align_pieces(["word", ",", " foo", " end"], ["word", " bar", " end"])
    assert gap_credit(alignment) == ([2], [1], [(0, 0), (3, 2)])
    alignment = align_pieces(["word", " bar", " end"], ["word", ",", " foo", " end"])
    assert gap_credit(alignment) == ([1], [2], [(0, 0), (2, 3)])


# -- real edits ------------------------------------------------------------------------------------

def normalise(text, spans):
    """Single blanks, none outside; span offsets moved along."""
    place, result = [], ""
    for character in text:
        place.append(len(result))
        if not character.isspace():
            result += character
        elif result and result[-1] != " ":
            result += " "
    result, place = result.rstrip(), place + [len(result)]
    return result, [(place[span["start"]], place[span["end"]]) for span in spans]


def test_changed_labels_agree_with_human_error_spans(data_dir):
    """F1 of "piece changed" as "piece overlaps a human span", over all pieces of all records."""
    tokenizer = Tokenizer(data_dir / "llama_tokenizer" / "tokenizer.model")
    counts = {"token": [0, 0, 0], "word": [0, 0, 0]}        # both, changed, in a span
    for line in open(data_dir / "qa_feedback" / "edits.jsonl", encoding="utf-8"):
        record = json.loads(line)
        original, human = normalise(record["original"], record["spans"])
        edited, _ = normalise(record["edited"], [])
        ids, edited_ids = tokenizer.encode(original), tokenizer.encode(edited)
        spans = tokenizer.spans(ids)
        wrong = [any(start < e and s < end for s, e in human) for start, end in spans]
        by_word = align_words(original, edited, spans, tokenizer.spans(edited_ids))
        for mode, got in (("token", align(ids, edited_ids)), ("word", by_word)):
            counts[mode][0] += sum(c and w for c, w in zip(got.original_changed, wrong))
            counts[mode][1] += sum(got.original_changed)
            counts[mode][2] += sum(wrong)
    f1 = {mode: 2 * both / (changed + in_span) for mode, (both, changed, in_span) in counts.items()}
    assert f1 == {"token": pytest.approx(0.882, abs=0.002), "word": pytest.approx(0.937, abs=0.002)}
