"""Records to token ids (paper, section 2.1): the prompt template, the ids, and U0 / U1 of an edit.

Prompt and response are tokenised separately and their ids are concatenated (rule 3). Joint
tokenisation would merge pieces across the boundary and break the prompt as a prefix. The prompt
begins with BOS. The response ends with EOS, which is an action like any other token. A response
that does not fit the context is cut; it then has no EOS, like a truncated response.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fgrlhf.align import Alignment, align, align_words, gap_credit
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import each
from fgrlhf.data.readers import read_edits, read_pairs
from fgrlhf.data.records import Edit, Pair, normalise_edit
from fgrlhf.engine.config import arg
from fgrlhf.tokenizer import Tokenizer

UNITS = ("token", "word")


# ----- prompts ------------------------------------------------------------------------------------

def _alpaca(record) -> str:
    if record.input:
        return ("Below is an instruction that describes a task, paired with an input that provides "
                "further context. Write a response that appropriately completes the request.\n\n"
                f"### Instruction:\n{record.prompt}\n\n### Input:\n{record.input}\n\n### Response:")
    return ("Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{record.prompt}\n\n### Response:")


def _qa(record) -> str:
    passages = "".join(f"{passage.title}: {passage.text}\n\n" for passage in record.context)
    return f"{passages}### Question:\n{record.prompt}\n\n### Response:"


def _plain(record) -> str:
    return f"{record.prompt}\n{record.input} ->" if record.input else f"{record.prompt} ->"


TEMPLATES = {"alpaca": _alpaca, "qa": _qa, "plain": _plain}


@dataclass(frozen=True, kw_only=True)
class ReadingRecords:
    """How records are read"""

    template: str = arg("plain", choices=tuple(TEMPLATES), help="how a record becomes a prompt")
    on_bad_record: str = arg("stop", choices=("stop", "skip"), help="a record that cannot be used: "
                             "stop there, or leave it out, count it and list it")


def render_prompt(record, template: str) -> str:
    """Renders the text that the policy sees before the response.

        alpaca    the instruction prompt of Stanford Alpaca, with or without `input`
        qa        the passages of `context`, then the question; `input` is not shown
        plain     "prompt ->", for tiny models

    No template ends in a blank, because the first piece of the response brings its own. `record` is
    any record with prompt, input and context. Raises UserError for an unknown template.
    """
    if template not in TEMPLATES:
        raise UserError(f"template: expected one of {', '.join(TEMPLATES)}, got {template!r}; "
                        "choose one of these")
    return TEMPLATES[template](record)


def encode_prompt(tokenizer: Tokenizer, record, template: str, limit: int,
                  keep_end: bool = False) -> list[int]:
    """Returns BOS and the ids of the rendered prompt, at most `limit` ids.

    With `keep_end` a longer prompt loses its beginning; without it UserError names the record.
    """
    ids = tokenizer.encode(render_prompt(record, template), bos=True)
    if len(ids) <= limit:
        return ids
    if keep_end:
        return ids[:1] + ids[len(ids) + 1 - limit:]
    raise UserError(f"record {record.id!r}: prompt: expected at most {limit} tokens, "
                    f"got {len(ids)}; shorten it or use a model with a longer context")


def encode_response(tokenizer: Tokenizer, text: str, prompt: list[int], context: int) -> list[int]:
    """Returns the ids of a finished response, EOS included, cut to the room the prompt leaves."""
    return tokenizer.encode(text, eos=True)[:max(0, context - len(prompt))]


# ----- preferences --------------------------------------------------------------------------------

class PreferenceIds(NamedTuple):
    """One preference in ids, with the sets of equation (3). EOS is the last id of a response."""

    prompt: list[int]
    chosen: list[int]                           # y+ with EOS
    rejected: list[int]                         # y- with EOS
    plus: list[int]                             # U1+, gap credit included: indices into chosen
    minus: list[int]                            # U1-, gap credit included: indices into rejected
    unchanged: list[tuple[int, int]]            # U0: (index into chosen, index into rejected)
    change: float = 0.0                         # token edit distance / length of the longer side


def two_sides(record: Edit | Pair) -> tuple[str, str]:
    """Returns the texts (y+, y-), the better side first."""
    if isinstance(record, Edit):
        return record.edited, record.original
    return record.chosen, record.rejected


def encode_preference(tokenizer: Tokenizer, record: Edit | Pair, prompt: list[int], context: int,
                      unit: str = "token", credit_gap: bool = True) -> PreferenceIds:
    """Aligns the two sides of a record, token by token or word by word.

    A pure insertion changes no token of the rejected side, and a pure deletion no token of the
    chosen side. With `credit_gap` the unchanged token right behind the gap is credited instead,
    because the policy chose that token there. An early EOS is thus charged with an omission.
    """
    better, worse = two_sides(record)
    chosen, rejected = (encode_response(tokenizer, text, prompt, context)
                        for text in (better, worse))
    alignment, change = align_sides(tokenizer, worse, better, rejected, chosen, unit)
    credit = gap_credit(alignment, credit_gap)
    return PreferenceIds(prompt, chosen, rejected, credit.edited, credit.original,
                         [(j, i) for i, j in credit.pairs], change)     # chosen first


def align_sides(tokenizer: Tokenizer, worse: str, better: str, rejected: list[int],
                chosen: list[int], unit: str) -> tuple[Alignment, float]:
    """Returns the alignment by tokens or by words, and token edit distance / longer side."""
    alignment = align(rejected, chosen)
    change = alignment.distance / max(len(rejected), len(chosen), 1)
    if unit == "word":
        alignment = align_words(worse, better, tokenizer.spans(rejected), tokenizer.spans(chosen))
    return alignment, change


def encode_preferences(records: list[Edit | Pair], tokenizer: Tokenizer, context: int,
                       template: str, prompt_tokens: int | None = None, unit: str = "token",
                       credit_gap: bool = True) -> list[PreferenceIds]:
    """Encodes every record by `encode_preference`.

    A prompt longer than `prompt_tokens` loses its beginning. Without that limit, a prompt that
    leaves no room for a response raises UserError.
    """
    limit = min(prompt_tokens or context, context - 1)
    prompts = [encode_prompt(tokenizer, record, template, limit, prompt_tokens is not None)
               for record in records]
    return [encode_preference(tokenizer, record, prompt, context, unit, credit_gap)
            for record, prompt in zip(records, prompts)]


def read_preferences(path: str, normalise: bool = False, limit: int | None = None,
                     on_bad_record: str = "stop") -> list[Edit | Pair]:
    """Reads edits if the file holds edits, otherwise pairs. Leaves out edits that change nothing.

    normalise: collapse runs of whitespace in edits. limit: only the first so many records.
    on_bad_record: see files.each.
    """
    try:
        edits = read_edits(path, on_bad_record)
        records = [normalise_edit(r) if normalise else r for r in edits]
    except UserError:
        records = read_pairs(path, on_bad_record)     # reads edits too, and names the fault of both
    records = [r for r in records if not isinstance(r, Edit) or r.original != r.edited][:limit]
    if not records:
        raise UserError(f"{path}: expected at least one record with two different texts, got none")
    return records


def read_encoded(path: str, encode: Callable[[list], list[PreferenceIds]], normalise: bool,
                 limit: int | None, on_bad_record: str) -> tuple[list, list[PreferenceIds]]:
    """Returns the records of `read_preferences` and their encoding, in the same order."""
    records = read_preferences(path, normalise, limit, on_bad_record)
    both = each(records, lambda record: (record, *encode([record])), on_bad_record, path)
    return [record for record, _ in both], [ids for _, ids in both]


def span_types(tokenizer: Tokenizer, ids: list[int], spans) -> list[str]:
    """Returns, for each token, the type of the error span that it overlaps, or "" (so for EOS)."""
    return [next((s.type for s in spans if max(s.start, start) < min(s.end, end)), "")
            for start, end in tokenizer.spans(ids)]
