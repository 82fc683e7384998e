r"""Evaluate policies and reward models (the paper, section 3.2).

    python eval.py outputs      --policy DIR --prompts FILE --out A.json
    python eval.py outputs      --policy DIR --prompts FILE --out B.json --best-of 16 --reward DIR
    python eval.py win-rate     --outputs A.json --reference B.json --judge oracle --world 0
    python eval.py win-rate     --outputs A.json --reference B.json --judge reward --reward DIR
    python eval.py win-rate     --outputs A.json --reference B.json --judge llm --model NAME \
                                --judgements FILE
    python eval.py win-rate     --outputs A.json --reference B.json --judge human \
                                --judgements FILE
    python eval.py win-rate     --judge annotations --annotations FILE
    python eval.py reward-model --reward DIR --data FILE
    python eval.py reward-model --scores SCORES --tokenizer DIR --data FILE
    python eval.py answers      A.json B.json --reward DIR --html answers.html

outputs writes answers in AlpacaEval's format. win-rate asks a judge which of two answers is better:
the oracle of the built-in world, a reward model, a language model, people in the browser (blind),
or judgements that somebody recorded. reward-model measures the accuracy on pairs, and the token AUC
where records have spans. answers shows the answers of several files side by side.

Answers are joined by instruction, input and context, in any order. Figures go to stdout as one JSON
object (answers prints text), progress to stderr. win_rate is the mean over prompts of 1 (win), 1/2
(tie) and 0 (loss). A recorded preference between 1 and 2 counts preference - 1, as in AlpacaEval;
discrete_win_rate counts it as a win, a tie or a loss. A null preference is a failed judgement: it
is left out and counted.
AlpacaEval's length_controlled_winrate is not computed; avg_length is there to compare lengths.
"""

import json
import sys
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import fgrlhf                               # before torch: it sets how OpenMP's threads wait
import torch
from torch.nn.utils.rnn import pad_sequence

from fgrlhf.checkpoint import load_model, load_tokenizer, open_tokenizer
from fgrlhf.collect import human
from fgrlhf.collect.cache import Cache
from fgrlhf.collect.client import Client, Options
from fgrlhf.collect.judge import by_llm
from fgrlhf.collect.judgements import refuse_judgements_of_people
from fgrlhf.collect.jury import by_people
from fgrlhf.compare.runs import names_of
from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import each
from fgrlhf.data.outputs import joined, tell_empty
from fgrlhf.data.readers import read_annotations, read_outputs, read_prompts
from fgrlhf.data.records import Edit, Output, Pair, write_jsonl, write_outputs
from fgrlhf.data.scores import read_scores
from fgrlhf.encode import (
    HIDDEN, Encoder, PreferenceIds, ReadingRecords, ReadingResponses, encode_prompt,
    lower_new_tokens, read_encoded)
from fgrlhf.engine.config import Computation, arg, dispatch, refuse_unused, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.engine.places import ANSWERS, records_with, refuse_outputs
from fgrlhf.evaluate import Judged, constant, reward_intervals, reward_table, win_rates
from fgrlhf.explain.answers import show as side_by_side
from fgrlhf.judge import answers, best_of, by_reward, preferences_of
from fgrlhf.model import MOST
from fgrlhf.reward import RewardModel, judge_preferences, judge_tokens, load_reward
from fgrlhf.simulate.oracle import by_oracle
from fgrlhf.simulate.world import World, world_arg
from fgrlhf.templates import check_template, say_hidden_passages, template_arg
from fgrlhf.tokenizer import Tokenizer

JUDGEMENTS = records_with("judgements", "instruction", "output_1", "output_2", "preference")
# The flags of win-rate that a judge needs, and those that it can use.
NEEDED = {"oracle": ("outputs", "reference", "world"), "reward": ("outputs", "reference", "reward"),
          "llm": ("outputs", "reference", "model", "judgements"),
          "human": ("outputs", "reference", "judgements"), "annotations": ("annotations",)}
USED = NEEDED | {
    "reward": (*NEEDED["reward"], "template"),
    "llm": (*NEEDED["llm"], *(field.name for field in fields(Options))),
    "human": (*NEEDED["human"], "limit", "judges", *(f.name for f in fields(human.Options)))}


@dataclass(frozen=True, kw_only=True)
class OutputsConfig(ReadingRecords, Computation):
    policy: str = arg(help="model folder")
    prompts: str = arg(help="prompts to answer")
    out: str = arg(help="file for the answers, in AlpacaEval's model_outputs.json format")
    greedy_out: str | None = arg(None, help="also write greedy answers to this file")
    temperatures: str = arg("", help="also answer at these, as 0.7,0.5: each in a file next to "
                            "--out (answers.json: answers-0.7.json)")
    best_of: int = arg(1, least=1, help="sample N answers and keep the one with the highest reward")
    reward: str | None = arg(None, help="with --best-of: folder of the reward model")
    max_new_tokens: int = arg(64, least=1, help="longest answer")
    temperature: float = arg(1.0, least=0, help="0 is greedy")
    seed: int = arg(0, help="seed of the sampling")
    limit: int | None = arg(None, least=1, help="answer only the first N prompts")
    batch: int = arg(256, least=1, help="prompts decoded together")


@dataclass(frozen=True, kw_only=True)
class WinRateConfig(Computation, Options, human.Options):
    judge: str = arg(choices=("oracle", "reward", "llm", "human", "annotations"),
                     help="who decides")
    outputs: str | None = arg(None, help="the system's answers")
    reference: str | None = arg(None, help="the reference's answers to the same prompts")
    world: int | str | None = world_arg("oracle: seed of the built-in world", None)
    reward: str | None = arg(None, help="reward: folder of the reward model")
    template: str = template_arg("plain", "reward: how a record becomes a prompt")
    annotations: str | None = arg(None, help="annotations: recorded judgements of output_1 against "
                                             "output_2; the win rate is output_2's")
    judgements: str | None = arg(None, help="llm, human: file for the judgements, as --annotations "
                                            "reads them; a model's answers are cached in the same "
                                            "folder")
    limit: int | None = arg(None, least=1, help="human: judge N pairs, drawn with --seed")
    judges: int = arg(1, least=1, help="human: how many people judge each pair; with 2 their "
                                       "agreement is measured")
    seed: int = arg(0, least=0, help="seed of the bootstrap, and of what a person sees first")


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(ReadingResponses, Computation):
    reward: str | None = arg(None, help="folder of the reward model")
    scores: str | None = arg(None, help="in place of --reward: a file with a score for each token "
                             "of both responses of each record (fgrlhf/data/scores.py)")
    tokenizer: str | None = arg(None, help="with --scores: tokenizer.model, tokenizer.json, a GGUF "
                                "file, or a model folder")
    data: str = arg(help="held-out edits or pairs; token AUC where edits have spans")
    normalise: bool = arg(False, help="first collapse runs of whitespace in edits")
    hide: str = arg("nothing", choices=HIDDEN, help="control: judge responses without the text of "
                    "their prompt, without their final full stop and EOS, or without both")
    intervals: int = arg(0, least=0, help="draws of the bootstrap for 95% intervals; 0: none")


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    outputs: tuple[str, ...] = arg(help="FILE: two or more files of answers to the same prompts; "
                                        "the others are compared with the first")
    reward: str | None = arg(None, help="folder of a reward model, whose rewards are shown too")
    template: str = template_arg("plain", "with --reward: how a record becomes a prompt")
    limit: int = arg(20, least=1, help="show only the first N prompts")
    html: str | None = arg(None, help="also write an HTML page, with the reward of every token")


def outputs(config: OutputsConfig) -> dict:
    device, out = pick_device(config.device), Path(config.out)
    wanted = [("--out", config.out, config.temperature)]
    if config.greedy_out:
        wanted.append(("--greedy-out", config.greedy_out, 0.0))
    for temperature in filter(None, map(str.strip, config.temperatures.split(","))):
        file = out.parent / f"{out.stem}-{temperature}{out.suffix}"
        wanted.append(("--temperatures", str(file), positive(temperature)))
    if (config.best_of > 1) != (config.reward is not None):
        raise UserError("--best-of and --reward: expected both, and N at least 2, or neither")
    if config.best_of > 1 and config.temperature == 0:
        raise UserError(f"--best-of {config.best_of} --temperature 0: expected a temperature above "
                        "0, because greedy answers to a prompt are all the same; leave one out")
    prompts = read_prompts(config.prompts, config.on_bad_record)[:config.limit]
    refuse_outputs([(flag, path, ANSWERS) for flag, path, _ in wanted],
                   [("--policy", config.policy), ("--prompts", config.prompts),
                    ("--reward", config.reward)])
    context = load_model(config.policy, device="meta").config.max_seq_len    # reads no weights
    if config.max_new_tokens > context - 2:                         # BOS and a token of the prompt
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: expected at most "
                        f"{context - 2}, because prompt and answer share the context of "
                        f"{config.policy}, {context} tokens; ask for fewer tokens")
    check_encoding(config.policy, template=config.template)
    tokenizer = load_tokenizer(config.policy)
    check_template(tokenizer, config.template, model=config.policy)
    advice = (lower_new_tokens(context, config.max_new_tokens)
              + "; --on-bad-record skip leaves it out")
    fitting = lambda prompt: encode_prompt(tokenizer, prompt, config.template,
                                           context - config.max_new_tokens, advice) and prompt
    prompts = each(prompts, fitting, config.on_bad_record, config.prompts)
    say_hidden_passages(prompts, config.template, config.prompts)
    chooser = reward_model_of(config, device) if config.reward else None
    policy, counts = load_model(config.policy, device, getattr(torch, config.dtype)), Counter()
    ask = lambda temperature, purpose="answers": answers(
        policy, tokenizer, prompts, config.template, config.max_new_tokens, temperature,
        config.seed, str(config.policy), config.batch, purpose, counts,
        progress=True)
    for _, path, temperature in wanted:
        found = ask(temperature)
        if chooser and temperature:
            tries = [found, *(ask(temperature, f"try {k}") for k in range(2, config.best_of + 1))]
            found = best_of(*chooser, tries)
        write_outputs(path, found)
        tell_empty([output.output for output in found], path)
    if cut := counts["cut"]:
        print(f"{cut} of {counts['answers']} answers are cut at --max-new-tokens "
              f"{config.max_new_tokens}, before they end", file=sys.stderr)
    return {"outputs": len(prompts), "out": [path for _, path, _ in wanted]}


def positive(text: str) -> float:
    """Reads one of --temperatures."""
    with suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise UserError(f"--temperatures: expected numbers above 0 with commas between them, got "
                    f"{text!r}")


def reward_model_of(config, device: torch.device) -> tuple[RewardModel, Tokenizer, Encoding]:
    """Returns the reward model of --reward with its tokenizer and the encoding of its training."""
    encoding = check_encoding(config.reward, template=config.template)
    return (load_reward(config.reward, device, getattr(torch, config.dtype)),
            load_tokenizer(config.reward), encoding or Encoding(config.template))


def cache_of(judgements: str | Path) -> Path:
    """Returns the file in which the answers of a language model are kept."""
    path = Path(judgements)
    return path.with_name(path.stem + ".cache.jsonl")


def asked_llm(config: WinRateConfig, system: list[Output],
              reference: list[Output]) -> list[float | None]:
    """The preferences of a language model. Its judgements go to --judgements."""
    path = Path(config.judgements)
    refuse_judgements_of_people(path)
    asking = Client(config)
    asking.cache = Cache(cache_of(path))
    with closing(asking.cache):
        judged = by_llm(asking, system, reference)
    if all(annotation.preference is None for annotation in judged):
        raise UserError("--judge llm: expected at least one usable verdict, got none; look at "
                        f"{asking.cache.path}")
    write_jsonl(path, judged)
    return preferences_of(judged)


def preferences(config: WinRateConfig) -> tuple[list[float | None], list[str], dict]:
    """Returns the judge's preferences, the system's answers in the same order, and figures about
    the judges, if these are people.
    """
    if config.judge == "annotations":
        annotations = read_annotations(config.annotations)
        texts = [a.output_2 for a in annotations]
        tell_empty(texts, f"{config.annotations}, output_2,")
        tell_empty([a.output_1 for a in annotations], f"{config.annotations}, output_1,")
        return preferences_of(annotations), texts, {}
    reference = read_outputs(config.reference)
    system = joined(read_outputs(config.outputs), reference, (config.outputs, config.reference))
    texts = [output.output for output in system]
    tell_empty(texts, config.outputs)
    tell_empty([output.output for output in reference], config.reference)
    if config.judge == "human":
        return by_people(config, system, reference)
    if config.judge == "oracle":
        files = (config.outputs, config.reference)
        return by_oracle(World(config.world), system, reference, files), texts, {}
    if config.judge == "llm":
        return asked_llm(config, system, reference), texts, {}
    judge = reward_model_of(config, pick_device(config.device))
    return by_reward(*judge, system, reference), texts, {}


def win_rate(config: WinRateConfig) -> dict:
    for name in NEEDED[config.judge]:
        if getattr(config, name) is None:
            raise UserError(f"--judge {config.judge}: expected --{name} too")
    refuse_unused(config, "judge", USED)
    if config.judgements:
        files = [("--judgements", config.judgements, None)]         # people's are added to
        if config.judge == "llm":
            files = [("--judgements", config.judgements, JUDGEMENTS),
                     ("--judgements", str(cache_of(config.judgements)), None)]
        refuse_outputs(files,
                       [("--outputs", config.outputs), ("--reference", config.reference)])
    found, texts, people = preferences(config)
    people_judge = config.judge == "human"
    if people_judge and not any(preference is not None for preference in found):
        raise UserError(f"--judgements {config.judgements}: expected at least one judgement, got "
                        "none; run the same command again, and judge on the page")
    if all(preference is None for preference in found):
        place = config.annotations if config.judge == "annotations" else f"--judge {config.judge}"
        raise UserError(f"{place}: expected at least one preference, got none for {len(found)} "
                        "pairs; judge them again")
    table = win_rates(found, config.seed)
    if table["left_out"]:
        reason = "not judged yet, or skipped" if people_judge else "no usable judgement"
        print(f"{table['left_out']} of {len(found)} pairs left out: {reason}", file=sys.stderr)
    return table | {"avg_length": sum(map(len, texts)) // len(texts), "judge": config.judge
                    } | people


def reward_model(config: RewardModelConfig) -> dict:
    if (config.reward is None) == (config.scores is None):
        raise UserError("expected exactly one of --reward DIR and --scores FILE")
    if (config.scores is None) != (config.tokenizer is None):
        raise UserError("--scores and --tokenizer: expected both or neither, because the scores "
                        "belong to the tokens of a tokenizer")
    if config.reward:
        check_encoding(config.reward, template=config.template, prompt_tokens=config.prompt_tokens,
                       normalise=config.normalise, hide=config.hide)
        model = load_reward(config.reward, pick_device(config.device), getattr(torch, config.dtype))
        tokenizer, context = load_tokenizer(config.reward), model.trunk.config.max_seq_len
        judge = partial(judge_preferences, model)
    else:
        tokenizer, context = open_tokenizer(config.tokenizer), MOST["max_seq_len"]
        judge = partial(judge_scores, config.scores)
    encoder = Encoder(tokenizer, context, config.template, config.prompt_tokens,
                      config.cut_responses, hide=config.hide)
    records, examples = read_encoded(config.data, encoder, config.normalise, None,
                                     config.on_bad_record)
    counts = encoder.counted(config.data)
    judged = judge(records, examples, tokenizer)
    table = reward_table(judged)
    lengths = [n for j in judged if j.response == "sum" for n in j.lengths or ()]
    if said := constant([r for j in judged for r in (j.chosen, j.rejected)], lengths or None):
        print(f"{config.reward or config.scores}: {said}", file=sys.stderr)
    return table | reward_intervals(judged, config.intervals) | counts


def judge_scores(path: str, records: list[Edit | Pair], examples: list[PreferenceIds],
                 tokenizer: Tokenizer) -> list[Judged]:
    """Judges preferences by the token scores in a file. R is their mean, equation (1)."""
    scores, judged = read_scores(path), []
    for record, pair in zip(records, examples):
        if record.id not in scores:
            raise UserError(f"{path}: expected the scores of record {show(record.id)}, found none; "
                            "add a line with its id")
        found = scores[record.id]
        found.check_lengths(len(pair.chosen), len(pair.rejected))
        sides = [torch.tensor(side, dtype=torch.float64) for side in (found.chosen, found.rejected)]
        judged.append(judge_tokens(record, pair, pad_sequence(sides, batch_first=True), "mean",
                                   tokenizer))
    if other := scores.keys() - {record.id for record in records}:
        print(f"{path}: {len(other)} of {len(scores)} ids are not those of a judged record, such "
              f"as {show(min(other))}; their scores are not used", file=sys.stderr)
    return judged


def show_answers(config: AnswersConfig) -> None:
    if len(config.outputs) < 2:
        raise UserError(f"answers: expected two or more files of answers, got {config.outputs[0]}; "
                        "give another file behind it")
    names = names_of([file.removesuffix(".json") for file in config.outputs], set())
    side_by_side(config.outputs, names, config.reward, config.template, config.limit, config.html)


if __name__ == "__main__":
    commands = {"outputs": (OutputsConfig, outputs), "win-rate": (WinRateConfig, win_rate),
                "reward-model": (RewardModelConfig, reward_model)}
    printed = lambda action: lambda config: print(json.dumps(action(config), allow_nan=False))
    shown = {name: (config, printed(action)) for name, (config, action) in commands.items()}
    run(lambda: dispatch(shown | {"answers": (AnswersConfig, show_answers)}, __doc__))
