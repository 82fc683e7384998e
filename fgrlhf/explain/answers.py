"""Shows the answers of several files side by side, with a reward model's rewards.

`eval.py answers` calls `show`. The files have AlpacaEval's format, as `eval.py outputs` writes. R
is the reward of the whole answer, equation (1). For a token-level reward model the tokens with the
lowest rewards are named, and the HTML page has the reward of every token. The rewards are on the
model's own scale.
"""

import sys
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch

from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.compare.page import table_section
from fgrlhf.compare.tables import Table, as_text
from fgrlhf.data.files import write_atomic
from fgrlhf.data.outputs import input_of, joined, tell_empty
from fgrlhf.data.readers import read_outputs
from fgrlhf.data.records import Output
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.engine.places import HTML, refuse_outputs
from fgrlhf.explain.explained import surfaces
from fgrlhf.explain.text import visible
from fgrlhf.judge import check_same_prompts, encode_outputs
from fgrlhf.reproduce.excerpts import heat_maps
from fgrlhf.reproduce.markup import Html, document, section, table, tag, typeset
from fgrlhf.reward import load_reward, response_rewards
from fgrlhf.sequences import pack

WIDTH = 104                                     # columns of the terminal
LOWEST = 3                                      # tokens that are named for each answer


class Answer(NamedTuple):
    """One answer of one file."""

    label: str                          # names the file
    prompt: str                         # instruction and input
    text: str
    R: float | None = None              # equation (1); None without a reward model
    tokens: list[str] = []              # of a token-level reward model, with their rewards
    rewards: list[float] = []


def read_answers(files: Sequence[str], template: str) -> list[list[Output]]:
    """Reads the answers of each file to the same prompts, in the order of the first file."""
    first = read_outputs(files[0])
    read = [first, *(joined(read_outputs(file), first, (file, files[0])) for file in files[1:])]
    for outputs in read[1:]:
        check_same_prompts(outputs, first, template)
    return read


def answers_of(outputs: list[Output], label: str) -> list[Answer]:
    """Returns the answers without rewards."""
    return [Answer(label, "\n".join(filter(None, (one.instruction, input_of(one)))), one.output)
            for one in outputs]


@torch.no_grad()
def rewarded(folder: str, encoding: Encoding,
             columns: list[tuple[list[Output], list[Answer]]]) -> list[list[Answer]]:
    """Adds R and the rewards of the tokens, by the reward model in `folder`."""
    model, tokenizer, result = load_reward(folder), load_tokenizer(folder), []
    encoded = zip(*encode_outputs(model, tokenizer, encoding,
                                  [output for outputs, _ in columns for output in outputs]))
    for _, answers in columns:
        result.append([])
        for answer, (prompt, ids) in zip(answers, encoded):
            batch = pack([prompt], [ids], device=model.device)
            if model.kind == "token":
                found = model.token_rewards(batch)
                R = response_rewards(found, batch.response_lengths, model.response)
                answer = answer._replace(tokens=surfaces(tokenizer, ids), rewards=found[0].tolist())
            else:
                R = model.sequence_rewards(batch)
            result[-1].append(answer._replace(R=R.item()))
    return result


def show(files: Sequence[str], labels: Sequence[str], reward: str | None, template: str,
         limit: int, html: str | None) -> None:
    """Prints the answers of all files to each prompt, and writes the page to `html`.

    labels: a name for each file. reward: the folder of a reward model, or None. Raises UserError
    when the files do not answer the same prompts.
    """
    refuse_outputs([("--html", html, HTML)], [("--reward", reward),
                                              *(("a file of answers", file) for file in files)])
    encoding = Encoding(template)
    if reward:
        encoding = check_encoding(reward, template=template) or encoding
    read = read_answers(files, encoding.template if reward else "")
    for file, outputs in zip(files, read):
        tell_empty([output.output for output in outputs], file)
    over = f"{len(read[0])} prompts"
    if len(read[0]) > limit:
        over = f"the first {limit} of {over}"
        print(f"shown are the answers to {over}; --limit changes that", file=sys.stderr)
    read = [outputs[:limit] for outputs in read]
    columns = [answers_of(outputs, label) for outputs, label in zip(read, labels)]
    if reward:
        columns = rewarded(reward, encoding, list(zip(read, columns)))
    rows, summary, sentences = list(zip(*columns)), means(columns, over), compared(columns, over)
    width = max(map(len, labels))
    if html:
        write_atomic(html, page(rows, summary, sentences).encode("utf-8", "replace"))
    for row in rows:
        print("\n".join([visible(row[0].prompt), *(lines(one, width) for one in row), ""]))
    print("\n".join([as_text(summary, WIDTH), "", *sentences]).strip())
    if html:
        print(f"\n{html}")


def lines(one: Answer, width: int) -> str:
    """Returns the lines of one answer. width: of the labels."""
    value = "" if one.R is None else f" R = {one.R:+9.3f}  "
    ranked = sorted(zip(one.rewards, one.tokens))[:LOWEST]
    named = ", ".join(f"{visible(token.strip()) or 'blank'} {reward:+.2f}"
                      for reward, token in ranked)
    start = f"  {one.label:{width}} {value} "
    shown = start + visible(one.text).strip()
    return "\n".join([shown.rstrip()] + [f"{'':{len(start)}}lowest: {named}"] * bool(named))


def means(columns: Sequence[Sequence[Answer]], over: str) -> Table:
    """Returns the mean number of words and the mean R of each file. over: which prompts."""
    rows = {"words per answer": [f"{fmean(len(one.text.split()) for one in answers):.1f}"
                                 for answers in columns]}
    if columns[0][0].R is not None:
        rows["mean R"] = [f"{fmean(one.R for one in answers):+.3f}" for answers in columns]
    return Table("Means", f"Over {over}.", [one[0].label for one in columns],
                 {name: [(text, "") for text in cells] for name, cells in rows.items()})


def compared(columns: Sequence[Sequence[Answer]], over: str) -> list[str]:
    """Returns a sentence about each file but the first: how often its R is higher.

    over: which prompts, as "20 prompts" or "the first 20 of 100 prompts".
    """
    first = columns[0]
    if first[0].R is None:
        return []
    return [f"R is higher in {answers[0].label} than in {first[0].label} for "
            f"{sum(b.R > a.R for a, b in zip(first, answers))} of {over}, equal for "
            f"{sum(b.R == a.R for a, b in zip(first, answers))}." for answers in columns[1:]]


# ----- the page -----------------------------------------------------------------------------------

def page(rows: Sequence[Sequence[Answer]], summary: Table, sentences: Sequence[str]) -> str:
    """Returns the whole HTML document: the answers in a table, and the rewards of their tokens."""
    names = " \N{MIDDLE DOT} ".join(summary.header)
    meaning = ["R is the reward of the whole answer, equation (1), on the reward model's own "
               "scale."] * bool(sentences)
    header = tag("header", tag("h1", "Answers side by side"), tag("p", names, class_="muted"),
                 [tag("p", sentence) for sentence in (*meaning, *sentences)])
    body = [tag("tr", tag("th", row[0].prompt, scope="row", dir="auto"), *map(_cell, row))
            for row in rows]
    shown = section("Answers", table(None, ["prompt", *summary.header], [body], text=True))
    heat = [{"prompt": one.prompt, "label": one.label, "tokens": one.tokens,
             "rewards": one.rewards} for row in rows for one in row if one.rewards]
    return document(f"Answers side by side: {names}", [
        header, table_section(summary), shown, *[heat_maps(heat, underlined=None)] * bool(heat)])


def _cell(one: Answer) -> Html:
    value = "" if one.R is None else f": R = {typeset(f'{one.R:+.3f}')}"
    label = tag("span", one.label + value, class_="role", dir="ltr")
    return tag("td", one.text, label, class_="text", dir="auto")
