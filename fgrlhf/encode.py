"""Records to token ids (paper, section 2.1): prompt and response in ids, and U0 / U1 of an edit.

Prompt and response are tokenised separately and their ids are concatenated (rule 3 of the ten in
fgrlhf/README.md). Joint tokenisation would merge pieces across the boundary and break the prompt as
a prefix. The prompt begins with BOS, where the tokenizer adds one. The response ends with EOS, an
action like any other token.

A response that does not fit the context is refused, or cut and counted. A cut response has no EOS,
like a truncated one. Both sides of an edit are aligned before they are cut.

A reward model may know the better side by signs that have nothing to do with the prompt. Two
controls hide something from it, in training and in evaluation: the texts of the prompt ("prompt"),
and the final full stop and the EOS of both responses ("ends").
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fgrlhf.align import Alignment, align, gap_credit
from fgrlhf.align_words import align_words
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import LeftOut, each
from fgrlhf.data.readers import read_preferences
from fgrlhf.data.records import Edit, Pair, Span
from fgrlhf.engine.config import arg
from fgrlhf.templates import (
    check_template, encode_filled, say_hidden_passages, shorten, template_arg)
from fgrlhf.tokenizer import Tokenizer

UNITS = ("token", "word")
HIDDEN = ("nothing", "prompt", "ends", "both")
COUNTED = {                     # what an Encoder counts, and how `counted` says it
    "prompts_cut": "prompts lost their beginning (--prompt-tokens)",
    "responses_cut": "responses lost their end and EOS (--cut-responses)",
    "responses_changed_by_tokenizer": "responses lost blanks or characters in the tokenizer",
    "equal_in_tokens": "",                                          # files.each says it
    "without_changed_token": "records without a changed token",
}


@dataclass(frozen=True, kw_only=True)
class ReadingRecords:
    """How records are read"""

    template: str = template_arg("plain")
    on_bad_record: str = arg("stop", choices=("stop", "skip"), help="a record that cannot be used: "
                             "stop there, or leave it out, count it and list it")


@dataclass(frozen=True, kw_only=True)
class ReadingResponses(ReadingRecords):
    """How records are read and made to fit the model"""

    prompt_tokens: int | None = arg(None, least=2, help="shorten a longer prompt to N tokens: its "
                                    "text loses the beginning, and the template is kept (default: "
                                    "refuse it)")
    cut_responses: bool = arg(False, help="cut a response that does not fit the model's context "
                              "(default: refuse it)")


# ----- prompts ------------------------------------------------------------------------------------

def encode_prompt(tokenizer: Tokenizer, record, template: str, limit: int,
                  advice: str = "shorten it or use a model with a longer context") -> list[int]:
    """Returns the ids of the prompt of a record, BOS first where the tokenizer wants it.

    Raises UserError, which names the record, when the prompt has no token or more than `limit`.
    """
    ids = _encode_whole(tokenizer, record, template)
    if len(ids) > limit:
        raise UserError(f"record {record.id!r}: prompt: expected at most {limit} tokens, "
                        f"got {len(ids)}; {advice}")
    return ids


def lower_new_tokens(context: int, max_new_tokens: int) -> str:
    """Returns the advice for a prompt that leaves no room for a response of `max_new_tokens`."""
    return (f"lower --max-new-tokens, which takes {max_new_tokens} of the model's context of "
            f"{context}, or shorten the prompt")


def _encode_whole(tokenizer: Tokenizer, record, template: str) -> list[int]:
    """Returns the ids of the prompt. There is one at least: it predicts the response's first id."""
    ids = encode_filled(tokenizer, record, template)
    if not ids:
        raise UserError(f"record {record.id!r}: prompt: expected a token, because this model "
                        "begins without BOS, got a text without a token; repair the text, or "
                        "choose another --template")
    return ids


# ----- preferences --------------------------------------------------------------------------------

class PreferenceIds(NamedTuple):
    """One preference in ids, with the sets of equation (3).

    EOS ends both responses, unless a response is cut or `hide` leaves the ends out.
    """

    prompt: list[int]
    chosen: list[int]                           # y+
    rejected: list[int]                         # y-
    plus: list[int]                             # U1+, gap credit included: indices into chosen
    minus: list[int]                            # U1-, gap credit included: indices into rejected
    unchanged: list[tuple[int, int]]            # U0: (index into chosen, index into rejected)
    change: float = 0.0                         # token edit distance / length of the longer side
    removed: tuple[int, ...] = ()               # the tokens of y- that the editor took out

    def swapped(self) -> "PreferenceIds":
        """Returns the opposite preference. `removed` is empty: no editor made the opposite edit."""
        return PreferenceIds(self.prompt, self.rejected, self.chosen, self.minus, self.plus,
                             [(j, i) for i, j in self.unchanged], self.change)


def two_sides(record: Edit | Pair) -> tuple[str, str]:
    """Returns the texts (y+, y-), the better side first."""
    if isinstance(record, Edit):
        return record.edited, record.original
    return record.chosen, record.rejected


@dataclass(frozen=True)
class Encoder:
    """Turns records into ids for one model, and counts what did not go in as it is.

    context: the most tokens of a prompt and a response together. template: a known name or a
    template's text. prompt_tokens: the record's text in a longer prompt loses its beginning; None
    refuses a prompt that leaves no room for a response. cut_responses: a response that does not fit
    loses its end; False refuses it. unit, credit_gap: see `preference`. hide: one of HIDDEN, see
    above. `prompt`, `response`, `demonstration` and `preference` raise UserError with the record's
    id.
    """

    tokenizer: Tokenizer
    context: int
    template: str
    prompt_tokens: int | None = None
    cut_responses: bool = False
    unit: str = "token"
    credit_gap: bool = True
    hide: str = "nothing"
    counts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        check_template(self.tokenizer, self.template)

    @property
    def hides_ends(self) -> bool:
        return self.hide in ("ends", "both")

    def prompt(self, record) -> list[int]:
        """Returns the ids of the prompt, BOS first where the tokenizer wants it."""
        if self.hide in ("prompt", "both"):                         # the template is left
            record = replace(record, prompt="", input=None, context=())
        if self.prompt_tokens is None:
            return encode_prompt(self.tokenizer, record, self.template, self.context - 1,
                                 "shorten it, pass --prompt-tokens, or use a model with a longer "
                                 "context")
        limit = min(self.context - 1, self.prompt_tokens)
        ids = _encode_whole(self.tokenizer, record, self.template)
        if len(ids) > limit:
            ids = shorten(self.tokenizer, record, self.template, limit)
            self.counts["prompts_cut"] += 1
        return ids

    def response(self, record, text: str, prompt: list[int]) -> list[int]:
        """Returns the ids of a response that fit behind `prompt`, with EOS unless it is cut."""
        ids = self._whole(text)
        return ids[:self._room(record, prompt, [ids])]

    def demonstration(self, record) -> tuple[list[int], list[int]]:
        """Returns the ids of the prompt and of the response to imitate, `record.output`."""
        with self._counting():
            prompt = self.prompt(record)
            return prompt, self.response(record, record.output, prompt)

    def preference(self, record: Edit | Pair) -> PreferenceIds:
        """Aligns the two sides of a record, token by token or word by word, and cuts them to fit.

        A pure insertion changes no token of the rejected side, and a pure deletion no token of the
        chosen side. With `credit_gap` the unchanged token right behind the gap is credited instead.
        After an insertion it is a token of y-, which the policy wrote in place of the missing text:
        an early EOS is charged with an omission. After a deletion it is the token of y+ that
        follows at once.
        """
        with self._counting():
            prompt, (better, worse) = self.prompt(record), two_sides(record)
            if self.hides_ends:
                better, worse = (text.rstrip().removesuffix(".") for text in (better, worse))
            chosen, rejected = self._whole(better), self._whole(worse)
            try:
                alignment, change = self.align_by_unit(worse, better, rejected, chosen)
            except UserError as error:
                raise UserError(f"record {record.id!r}: {error}") from None
            credit = gap_credit(alignment, self.credit_gap)
            room = self._room(record, prompt, [chosen, rejected])
            inside = lambda positions: [t for t in positions if t < room]
            ids = PreferenceIds(
                prompt, chosen[:room], rejected[:room],
                plus=inside(credit.edited), minus=inside(credit.original),
                unchanged=[(j, i) for i, j in credit.pairs if max(i, j) < room],      # y+ first
                change=change,
                removed=tuple(inside(i for i, out in enumerate(alignment.original_changed) if out)))
            if ids.chosen == ids.rejected:
                self.counts["equal_in_tokens"] += 1
            elif not (ids.plus or ids.minus):
                self.counts["without_changed_token"] += 1
            return ids

    def align_by_unit(self, worse: str, better: str, rejected: list[int],
                      chosen: list[int]) -> tuple[Alignment, float]:
        """Returns the alignment by tokens or words, and token edit distance / longer side."""
        alignment = align(rejected, chosen)
        change = alignment.distance / max(len(rejected), len(chosen), 1)
        if self.unit == "word":
            eos = not self.hides_ends
            alignment = align_words(worse, better, self.tokenizer.offsets(worse, eos=eos),
                                    self.tokenizer.offsets(better, eos=eos))
        return alignment, change

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        """Takes back the counts of a record that is refused."""
        before = self.counts.copy()
        try:
            yield
        except UserError:
            self.counts.clear()
            self.counts.update(before)
            raise

    def _whole(self, text: str) -> list[int]:
        """Returns all ids of a response, before any cut."""
        ids = self.tokenizer.encode(text, eos=not self.hides_ends)
        self.counts["responses_changed_by_tokenizer"] += self.tokenizer.decode(ids) != text
        return ids

    def _room(self, record, prompt: list[int], responses: list[list[int]]) -> int:
        """Returns how many tokens `prompt` leaves. Refuses longer responses, or counts them."""
        room = self.context - len(prompt)
        too_long = [len(ids) for ids in responses if len(ids) > room]
        if too_long and not self.cut_responses:
            raise UserError(
                f"record {record.id!r}: response: expected at most {room} tokens behind its prompt "
                f"of {len(prompt)}, because the context of the model is {self.context}, got "
                f"{max(too_long)}; use a model with a longer context, or pass --cut-responses")
        self.counts["responses_cut"] += len(too_long)
        return room

    def counted(self, path: str) -> dict[str, int]:
        """Returns the counts by name, for done.json, and says on stderr those that are not 0."""
        said = [f"{self.counts[name]} {text}" for name, text in COUNTED.items()
                if self.counts[name] and text]
        if said:
            print(f"{path}: " + ", ".join(said), file=sys.stderr)
        return {name: self.counts[name] for name in COUNTED}


def read_encoded(path: str, encoder: Encoder, normalise: bool, limit: int | None,
                 on_bad_record: str) -> tuple[list[Edit | Pair], list[PreferenceIds]]:
    """Returns the edits and pairs of a file and their encoding, in the same order.

    limit: use only the first so many records. A record whose two sides give the same ids, because
    of a cut or of the tokenizer, teaches nothing. It is left out and counted, see files.each.
    """
    def encode(record):
        ids = encoder.preference(record)
        if not (ids.chosen and ids.rejected):                       # it was one full stop
            return LeftOut("nothing is left of a response without its end")
        if ids.chosen == ids.rejected:
            cut = ids.chosen[-1] != encoder.tokenizer.eos_id and not encoder.hides_ends
            return LeftOut("both sides have the same tokens" + " up to the cut" * cut)
        return record, ids
    both = each(read_preferences(path, on_bad_record, normalise)[:limit], encode, on_bad_record,
                path)
    say_hidden_passages([record for record, _ in both], encoder.template, path)
    return [record for record, _ in both], [ids for _, ids in both]


def span_types(tokenizer: Tokenizer, text: str, spans: tuple[Span, ...]) -> list[str]:
    """Returns, for each id of `text`, the type of the error span that it overlaps, or ""."""
    return [next((s.type for s in spans if max(s.start, start) < min(s.end, end)), "")
            for start, end in tokenizer.offsets(text)]
