"""Chooses which part of an article is the prompt of its summary, and counts what each part shows.

    evidence    the sentence that the annotator chose, with the summary in view; the article when
                the annotator chose none
    lead-N      the first sentences of the article, as many as N words have room for, and the first
                sentence in any case; "lead" is lead-60
    article     the whole article

The rules lead-N and article need no annotator. This prints how many names and numbers each of them
shows, without a model:

    python -m fgrlhf.real.prompts --data DeFacto/data/train.jsonl

The lengths are the mean over the edits, and the most. A name or number is a word with a digit, or
with a capital and not the first of the summary. It is shown when the prompt has it in any case of
letters. The three shares are over all edits together, aligned word by word in lower case:

    added       words of the edit that are changed, U1+
    kept        words that both texts have, U0
    taken out   words of the original that are changed, U1-

A reward model that only looks words up in its prompt ranks a kept word above one that was taken out
with the probability (1 + share kept - share taken out) / 2, the look-up AUC. A tie counts one half.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from fgrlhf.align import align
from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.compare.tables import Table, as_text
from fgrlhf.data.defacto import read_evidence_edits, read_summaries
from fgrlhf.data.fields import UserError, show
from fgrlhf.data.records import Demonstration, Edit
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.real.made_up import words

EVIDENCE, ARTICLE = "evidence", "article"
LEAD_WORDS = 60
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019]?\s+")
KINDS = ("added", "kept", "taken out")


@dataclass(frozen=True)
class Config:
    data: str = arg(help="a file of DeFacto as published")
    rules: str = arg("evidence,lead-25,lead-60,lead-120,article", help="rules, with commas between "
                     "them")
    tokenizer: str | None = arg(None, help="a model, whose tokens are counted too")


# ----- rules --------------------------------------------------------------------------------------

def known_rule(text: str) -> str:
    """Returns the rule of that name, "lead" as lead-60. Raises UserError for another name."""
    rule = f"lead-{LEAD_WORDS}" if text == "lead" else text
    if rule not in (EVIDENCE, ARTICLE) and not re.fullmatch("lead-[1-9][0-9]{0,5}", rule):
        raise UserError(f"expected evidence, article, lead or lead-N with a number of words N from "
                        f"1, got {show(text)}")
    return rule


def prompt_arg(use: str = ""):
    """Returns the field of a command's configuration for --prompt. use: begins the help text."""
    return arg(EVIDENCE, read=known_rule, help=f"{use}what of the article is the prompt: evidence, "
               "the sentence that the annotator chose; lead-N, the first sentences up to N words; "
               "article, all of it")


def described(rule: str) -> str:
    """Says in a sentence or two what the prompts of a rule are."""
    if rule == EVIDENCE:
        return ("The prompt of a summary is the sentence that an annotator chose as evidence. The "
                "annotator had seen the summary.")
    return "The prompt of a summary is the whole article." if rule == ARTICLE else (
        "The prompt of a summary is the beginning of its article: the first sentences, up to "
        f"{rule.removeprefix('lead-')} words.")


def lead(article: str, count: int) -> str:
    """Returns the first sentences of a text, with `count` words at most, but always the first one.

    A sentence ends behind . ! or ?, and a quotation mark behind that. Words are what blanks divide.
    """
    ends = [match.end() for match in SENTENCE_END.finditer(article)] + [len(article)]
    room = [end for end in ends if len(article[:end].split()) <= count]
    return article[:max(room, default=ends[0])].strip()


def read_split(path: str | Path, rule: str) -> tuple[list[Demonstration], list[Edit]]:
    """Reads the candidates of a file and the edits of those with an error.

    Their prompts follow the rule. The article is the only passage of a candidate's context.
    """
    summaries, edits = read_summaries(path), read_evidence_edits(path)
    return asked(rule, summaries, summaries), asked(rule, summaries, edits)


def asked(rule: str, summaries: list[Demonstration], records: list) -> list:
    """Returns the records, candidates or their edits, with the prompts of a rule.

    summaries: the candidates, which have the articles. The records have the evidence as prompts.
    """
    if rule == EVIDENCE:
        return records
    articles = {summary.id: summary.context[0].text for summary in summaries}
    cut = (lambda text: text) if rule == ARTICLE else (
        lambda text: lead(text, int(rule.removeprefix("lead-"))))
    return [replace(record, prompt=cut(articles[record.id])) for record in records]


# ----- what a rule shows --------------------------------------------------------------------------

def names_of(edit: Edit) -> dict[str, list[str]]:
    """Returns the names and numbers of an edit by KINDS, in lower case."""
    original, edited = words(edit.original), words(edit.edited)
    changes = align([word.lower() for word in original], [word.lower() for word in edited])

    def some(texts: list[str], wanted: Iterable[bool]) -> list[str]:
        return [text.lower() for i, (text, is_wanted) in enumerate(zip(texts, wanted)) if is_wanted
                and (any(map(str.isdigit, text)) or i > 0 and any(map(str.isupper, text)))]
    return dict(zip(KINDS, (some(edited, changes.edited_changed),
                            some(edited, [not changed for changed in changes.edited_changed]),
                            some(original, changes.original_changed))))


def shown(edits: list[Edit]) -> dict[str, tuple[int, int]]:
    """Returns for each of KINDS how many names and numbers the prompts show, and of how many."""
    hits, total = Counter(), Counter()
    for edit in edits:
        there = {word.lower() for word in words(edit.prompt)}
        for kind, found in names_of(edit).items():
            hits[kind] += sum(word in there for word in found)
            total[kind] += len(found)
    return {kind: (hits[kind], total[kind]) for kind in KINDS}


def row(rule: str, edits: list[Edit], counts: dict[str, Callable[[str], int]]) -> dict[str, str]:
    """Returns the cells of a rule. The edits have its prompts. counts: the length by each unit."""
    cells = {}
    for unit, count in counts.items():
        lengths = [count(edit.prompt) for edit in edits]
        cells |= {unit: f"{fmean(lengths):.0f}", f"most {unit}": str(max(lengths))}
    share = {kind: hits / total if total else math.nan
             for kind, (hits, total) in shown(edits).items()}
    cells |= {f"{kind} %": f"{100 * value:.1f}" for kind, value in share.items()}
    return cells | {"look-up AUC": f"{(1 + share['kept'] - share['taken out']) / 2:.2f}"}


def main(config: Config) -> None:
    rules = [known_rule(rule) for rule in config.rules.split(",")]
    counts: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split())}
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
        counts["tokens"] = lambda text: len(tokenizer.encode(text))
    summaries, edits = read_split(config.data, EVIDENCE)
    rows = {rule: row(rule, asked(rule, summaries, edits), counts) for rule in rules}
    table = Table("prompt", "", list(rows[rules[0]]),
                  {rule: [(text, "") for text in cells.values()] for rule, cells in rows.items()})
    totals = ", ".join(f"{total} {kind}" for kind, (_, total) in shown(edits).items())
    print(f"{len(edits)} edits; names and numbers: {totals}\n\n{as_text(table, 104)}")


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
