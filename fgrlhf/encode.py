"""Records to token ids: prompt and response are tokenised apart, their ids concatenated (rule 3).

Joint tokenisation would merge pieces across the boundary and break the prompt as a prefix. The
prompt begins with BOS; the response ends with EOS, an action like any other. A response that does
not fit the context is cut and then ends without EOS, as a truncated one does.
"""

from collections.abc import Callable
from typing import NamedTuple

from fgrlhf.align import Alignment, align, align_words, gap_credit
from fgrlhf.config import UserError
from fgrlhf.edits import Edit, Pair, normalise_edit, render_prompt
from fgrlhf.files import each
from fgrlhf.readers import read_edits, read_pairs

UNITS = ("token", "word")


class PreferenceIds(NamedTuple):
    """One preference in ids, with the sets of equation (3). EOS is the last id of a response."""

    prompt: list[int]
    chosen: list[int]                           # y+ with EOS
    rejected: list[int]                         # y- with EOS
    plus: list[int]                             # U1+: indices into chosen
    minus: list[int]                            # U1-: indices into rejected
    unchanged: list[tuple[int, int]]            # U0: (index into chosen, index into rejected)
    change: float = 0.0                         # token edit distance / longer side, in [0, 1]


def encode_prompt(tokenizer, record, template: str, limit: int,
                  keep_end: bool = False) -> list[int]:
    """BOS and the rendered prompt's ids, at most `limit` of them.

    A longer prompt raises UserError naming the record, or with `keep_end` loses its beginning.
    """
    ids = tokenizer.encode(render_prompt(record, template), bos=True)
    if len(ids) <= limit:
        return ids
    if keep_end:
        return ids[:1] + ids[len(ids) + 1 - limit:]
    raise UserError(f"record {record.id!r}: prompt: expected at most {limit} tokens, "
                    f"got {len(ids)}; shorten it or use a model with a longer context")


def encode_response(tokenizer, text: str, prompt: list[int], context: int) -> list[int]:
    """The ids of a finished response, EOS included, cut to the room the prompt leaves."""
    return tokenizer.encode(text, eos=True)[:max(0, context - len(prompt))]


def two_sides(record: Edit | Pair) -> tuple[str, str]:
    """(better, worse): the texts y+ and y-."""
    if isinstance(record, Edit):
        return record.edited, record.original
    return record.chosen, record.rejected


def encode_preference(tokenizer, record: Edit | Pair, prompt: list[int], context: int,
                      unit: str = "token", credit_gap: bool = True) -> PreferenceIds:
    """An edit (edited over original) or a pair, aligned token by token or word by word.

    A pure insertion changes no token of the rejected side, a pure deletion none of the chosen one.
    With `credit_gap` the unchanged token right behind the gap stands in for it: it is what the
    policy chose there. An early EOS is thus charged with an omission.
    """
    better, worse = two_sides(record)
    chosen, rejected = (encode_response(tokenizer, text, prompt, context)
                        for text in (better, worse))
    alignment, change = align_sides(tokenizer, worse, better, rejected, chosen, unit)
    credit = gap_credit(alignment, credit_gap)
    return PreferenceIds(prompt, chosen, rejected, credit.edited, credit.original,
                         [(j, i) for i, j in credit.pairs], change)


def align_sides(tokenizer, worse: str, better: str, rejected: list[int], chosen: list[int],
                unit: str) -> tuple[Alignment, float]:
    """The alignment of two responses by tokens or words, and the share of tokens that changed."""
    alignment = align(rejected, chosen)
    change = alignment.distance / max(len(rejected), len(chosen), 1)
    if unit == "word":
        alignment = align_words(worse, better, tokenizer.spans(rejected), tokenizer.spans(chosen))
    return alignment, change


def encode_preferences(records: list[Edit | Pair], tokenizer, context: int, template: str,
                       prompt_tokens: int | None = None, unit: str = "token",
                       credit_gap: bool = True) -> list[PreferenceIds]:
    """Every record by `encode_preference`.

    A prompt longer than `prompt_tokens` loses its beginning; without that limit one that leaves no
    room for a response is refused.
    """
    limit = min(prompt_tokens or context, context - 1)
    prompts = [encode_prompt(tokenizer, record, template, limit, prompt_tokens is not None)
               for record in records]
    return [encode_preference(tokenizer, record, prompt, context, unit, credit_gap)
            for record, prompt in zip(records, prompts)]


def read_preferences(path: str, normalise: bool = False, limit: int | None = None,
                     on_bad_record: str = "stop") -> list[Edit | Pair]:
    """Edits where the file holds edits, pairs otherwise; an edit that changes nothing is left out.

    normalise: collapse runs of whitespace in edits. limit: the first so many records only. For
    `on_bad_record` see files.each.
    """
    try:
        edits = read_edits(path, on_bad_record)
        records = [normalise_edit(r) if normalise else r for r in edits]
    except UserError:
        records = read_pairs(path, on_bad_record)     # knows edits too, names the fault of either
    records = [r for r in records if not isinstance(r, Edit) or r.original != r.edited][:limit]
    if not records:
        raise UserError(f"{path}: expected at least one record with two different texts, got none")
    return records


def read_encoded(path: str, encode: Callable[[list], list[PreferenceIds]], normalise: bool,
                 limit: int | None, on_bad_record: str) -> tuple[list, list[PreferenceIds]]:
    """The records of `read_preferences` and what `encode` makes of each, in one order."""
    records = read_preferences(path, normalise, limit, on_bad_record)
    both = each(records, lambda record: (record, *encode([record])), on_bad_record, path)
    return [record for record, _ in both], [ids for _, ids in both]


def span_types(tokenizer, ids: list[int], spans) -> list[str]:
    """The type of the human error span each token overlaps, "" where there is none (so EOS)."""
    return [next((s.type for s in spans if max(s.start, start) < min(s.end, end)), "")
            for start, end in tokenizer.spans(ids)]
