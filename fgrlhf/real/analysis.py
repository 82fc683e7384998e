"""Measures which errors a token-level reward model finds in human edits, and which it misses.

    python -m fgrlhf.real.analysis --rewards runs/real/seed0/rm-ours/reward,.. \
        --data defacto/val.jsonl --hidden-states states.pt --out analysis.json

For each reward model, on the candidates of a split of DeFacto:

    detects     AUC of "the annotator found an error" by the lowest and by the mean r_t
    errors      AUC within a summary of the tokens that the annotator took out, for summaries with
                only intrinsic errors (the article says it otherwise) and only extrinsic ones (the
                article does not say it)
    words       for each type of word: how many tokens, how many of them taken out, the mean reward
                of both, and the AUC over all tokens of the type
    eos         mean and standard deviation of the reward of EOS behind edits and behind originals
    worst       the tokens taken out with the highest reward, and those kept with the lowest

OUT also has the AUC of "found an error" by the number of made-up names (made_up.py) and by length.
A word that the prompt has is "seen", whatever it means there. --prompt is that of real.files.
"""

import json
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fgrlhf.checkpoint import AnyTokenizer, load_tokenizer
from fgrlhf.data.fields import UserError, take
from fgrlhf.data.files import require_json, write_atomic
from fgrlhf.data.records import Demonstration
from fgrlhf.encode import Encoder, PreferenceIds
from fgrlhf.engine.config import Computation, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.encoding import check_encoding
from fgrlhf.engine.lora import fingerprint
from fgrlhf.evaluate import auc, auc_within
from fgrlhf.frozen import FrozenStates
from fgrlhf.real.made_up import WORD, made_up, words
from fgrlhf.real.prompts import EVIDENCE, prompt_arg, read_split
from fgrlhf.reward import RewardModel, load_reward
from fgrlhf.sequences import pack

FUNCTION = frozenset(
    "a an the and or but of in on at to for from by with about into over after before between "
    "against during as is are was were be been being has have had will would can could may might "
    "it its he his him she her they them their this that these those who which what when where "
    "while not no than then there more most also out up down off".split())
TYPES = ("name, seen", "name, not seen", "number, seen", "number, not seen", "function word",
         "other word, seen", "other word, not seen", "punctuation")


@dataclass(frozen=True, kw_only=True)
class Config(Computation):
    rewards: str = arg(help="folders of token-level probes of one trunk, with commas between them")
    data: str = arg(help="a split of DeFacto as published")
    hidden_states: str = arg(help="the file of train_rm.py --hidden-states")
    out: str = arg(help="file for the figures")
    prompt: str = prompt_arg()


class Token(NamedTuple):
    """One token of a candidate."""

    text: str
    type: str
    removed: bool
    reward: float


class Label(NamedTuple):
    """The three answers of the annotator about a candidate."""

    has_error: bool
    intrinsic: bool
    extrinsic: bool


class Candidate(NamedTuple):
    """A summary by DeFacto's model, and the ids of its edit."""

    summary: Demonstration
    label: Label
    ids: PreferenceIds

    @property
    def edited(self) -> bool:
        return self.ids.chosen != self.ids.rejected


def type_of(word: str, first: bool, seen: set[str]) -> str:
    """Returns one of TYPES. first: it begins the summary, so that its capital says nothing."""
    where = "seen" if word.lower() in seen else "not seen"
    if not word or not any(c.isalnum() for c in word):
        return "punctuation"
    if any(c.isdigit() for c in word):
        return f"number, {where}"
    if word[0].isupper() and not first:
        return f"name, {where}"
    return "function word" if word.lower() in FUNCTION else f"other word, {where}"


def types_of(summary: str, prompt: str, spans: list[tuple[int, int]]) -> list[str]:
    """Returns the type of each token, that of the word in which the token begins or ends."""
    seen = {word.lower() for word in words(prompt)}
    found = [(match.start(), match.end(), match[0]) for match in WORD.finditer(summary)]
    result = []
    for start, end in spans:
        inside = [(begin, word) for begin, stop, word in found if begin < end and start < stop]
        begin, word = inside[0] if inside else (0, "")
        result.append(type_of(word, begin == 0, seen))
    return result


def read_labels(path: str) -> dict[str, Label]:
    """Reads what the annotators said about each candidate, by the id of its record."""
    found = {}
    for place, value in require_json(path):
        found[str(take(value, "doc_id", int, place))] = Label(*(
            take(value, name, bool, place)
            for name in ("has_error", "intrinsic_error", "extrinsic_error")))
    return found


def read_candidates(path: str, encoder: Encoder, rule: str = EVIDENCE) -> list[Candidate]:
    """Reads all candidates of a split. A candidate without an edit is its own edit.

    rule: says what the prompts are, see prompts.py.
    """
    labels, (summaries, edited) = read_labels(path), read_split(path, rule)
    edits = {edit.id: encoder.preference(edit) for edit in edited}
    result = []
    for summary in summaries:
        prompt, ids = encoder.demonstration(summary)
        result.append(Candidate(summary, labels[summary.id], edits.get(summary.id)
                                or PreferenceIds(prompt, ids, ids, [], [], [])))
    return result


def check_models(folders: list[str], models: list[RewardModel]) -> None:
    """Refuses reward models that do not read the same hidden states of the same prompts."""
    states = {(fingerprint(model.trunk), model.layer) for model in models}
    if any(model.kind != "token" for model in models) or len(states) > 1:
        raise UserError("--rewards: expected token-level reward models with one trunk and one "
                        "--layer, as train_rm.py --freeze makes them")
    for folder in folders:
        check_encoding(folder, template="plain")


def rewarded(model: RewardModel, prompt: list[int], response: list[int]) -> list[float]:
    """Returns the calibrated reward of each token of the response."""
    with torch.no_grad():
        return model.ppo_rewards(pack([prompt], [response]))[0].tolist()


def by_type(tokens: list[Token]) -> dict[str, dict[str, float]]:
    """Returns the figures of each type of word."""
    table = {}
    mean = lambda values: sum(values) / len(values) if values else None
    for name in TYPES:
        some = [t for t in tokens if t.type == name]
        out, kept = ([t.reward for t in some if t.removed == side] for side in (True, False))
        table[name] = {"tokens": len(some), "removed": len(out), "r_removed": mean(out),
                       "r_kept": mean(kept), "auc": auc([-t.reward for t in some],
                                                        [t.removed for t in some])
                       if out and kept else None}
    return table


def tokens_of(one: Candidate, rewards: list[float], tokenizer: AnyTokenizer) -> list[Token]:
    """Returns the tokens of an edited candidate, without EOS, with their types and rewards."""
    text, spans = one.summary.output, tokenizer.spans(one.ids.rejected)[:len(rewards)]
    types = types_of(text, one.summary.prompt, spans)
    return [Token(f"{text[start:end].strip()} | {text}", kind, t in one.ids.removed, reward)
            for t, ((start, end), kind, reward) in enumerate(zip(spans, types, rewards))]


def figures_of(model: RewardModel, candidates: list[Candidate], tokenizer: AnyTokenizer) -> dict:
    """Returns the figures of one reward model that the docstring of this module lists."""
    rewards = [rewarded(model, one.ids.prompt, one.ids.rejected)[:-1] for one in candidates]
    wrong = [one.label.has_error for one in candidates]
    edited = [(one, values) for one, values in zip(candidates, rewards) if one.edited]
    tokens = [token for one, values in edited for token in tokens_of(one, values, tokenizer)]

    def of_kind(name: str, other: str) -> dict[str, float]:
        """Only candidates with errors of this kind and not of the other."""
        groups = [([-r for r in values], [t in one.ids.removed for t in range(len(values))])
                  for one, values in edited
                  if getattr(one.label, name) and not getattr(one.label, other)]
        return {"summaries": len(groups), "auc_within": auc_within(groups)}

    def eos(side: str) -> list[float]:
        ends = [rewarded(model, one.ids.prompt, getattr(one.ids, side))[-1] for one, _ in edited]
        return [torch.tensor(ends).mean().item(), torch.tensor(ends).std().item()]
    return {"detects": {"lowest r": auc([-min(values) for values in rewards], wrong),
                        "mean r": auc([-sum(values) / len(values) for values in rewards], wrong)},
            "errors": {"intrinsic": of_kind("intrinsic", "extrinsic"),
                       "extrinsic": of_kind("extrinsic", "intrinsic")},
            "eos": {"edits": eos("chosen"), "originals": eos("rejected")},
            "words": by_type(tokens),
            "worst": {
                "taken out": sorted((t for t in tokens if t.removed), key=lambda t: -t.reward)[:8],
                "kept": sorted((t for t in tokens if not t.removed), key=lambda t: t.reward)[:8]}}


def analyse(config: Config) -> None:
    device, folders = pick_device(config.device), config.rewards.split(",")
    models = [load_reward(folder, device, getattr(torch, config.dtype)) for folder in folders]
    check_models(folders, models)
    tokenizer = load_tokenizer(folders[0])
    candidates = read_candidates(
        config.data, Encoder(tokenizer, models[0].trunk.config.max_seq_len, "plain"),
        config.prompt)
    states = FrozenStates(models[0].trunk, models[0].layer)
    states.read(config.hidden_states)
    states.add([one.ids for one in candidates])

    wrong = [one.label.has_error for one in candidates]
    summaries = [one.summary for one in candidates]
    result = {"detects": {
        "made-up names": auc([len(made_up(s.output, s.context[0].text)) for s in summaries], wrong),
        "length": auc([len(words(s.output)) for s in summaries], wrong)}}
    for folder, model in zip(folders, models):
        model.frozen = states
        result[folder] = figures_of(model, candidates, tokenizer)
    text = json.dumps(result, indent=1)
    write_atomic(config.out, (text + "\n").encode())


if __name__ == "__main__":
    run(lambda: analyse(parse(Config, __doc__)))
