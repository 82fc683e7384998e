"""Writes the built-in world to files, and annotates answers (paper, sections 2.1 and 3.1).

    python -m fgrlhf.simulate world    --world 0 --seed 0 --out DIR
    python -m fgrlhf.simulate annotate --world 0 --seed 0 --outputs A.json --others B.json --out DIR

`world` writes requests, demonstrations for SFT and a tokenizer. `annotate` takes two answers to
each request: it writes which answer is preferred, and a minimal edit of the other answer.
"""

import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from fgrlhf import tokenizer
from fgrlhf.data import readers, records
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import arg, dispatch, run
from fgrlhf.simulate.annotators import (
    compare_errors, minimal_edit, prefer, restyle, rewrite, spoil)
from fgrlhf.simulate.origin import check_requests
from fgrlhf.simulate.world import World, world_arg
from fgrlhf.templates import render_prompt

IDLE_DRAWS = 10 ** 6    # the rarest request of a plain world comes once in 1.4 million draws


@dataclass(frozen=True)
class WorldConfig:
    out: str = arg(help="folder for demonstrations.jsonl, train.jsonl, dev.jsonl, test.jsonl "
                         "and tokenizer.model")
    world: int | str = world_arg("seed of the world: its facts, habits and systematic errors",
                                 0)
    seed: int = arg(0, help="seed of the requests and demonstrations")
    demonstrations: int = arg(12000, least=1, help="number of demonstrations, on train prompts")
    train: int = arg(3000, least=1, help="number of train prompts, for annotation and PPO")
    dev: int = arg(300, least=1, help="number of dev prompts, to choose settings and checkpoints")
    test: int = arg(600, least=1, help="number of test prompts, for the final evaluation only")
    vocab_size: int = arg(640, least=260, most=2 ** 31 - 1, help="size of the tokenizer; 259 "
                          "pieces are bytes and control tokens")


@dataclass(frozen=True)
class AnnotateConfig:
    outputs: str = arg(help="AlpacaEval outputs: the first answer to each prompt")
    others: str = arg(help="AlpacaEval outputs: the second answer to each prompt, in the same "
                            "order")
    out: str = arg(help="folder for pairs.jsonl and edits.jsonl")
    world: int | str = world_arg("seed of the world", 0)
    seed: int = arg(0, help="seed of the coin, the noise, the misses and the needless edits")
    noise: float = arg(0.0, least=0, most=1,
                       help="share of preference labels that a fair coin decides (AlpacaFarm: 0.5)")
    miss: float = arg(0.0, least=0, most=1, help="probability that the editor misses an error")
    needless: float = arg(0.0, least=0, most=1, help="probability that an edit also swaps the "
                          "wording of a sentence")
    longer: float = arg(0.0, least=0, most=1, help="share of labels that the longer answer wins")
    rewrite: float = arg(0.0, least=0, most=1, help="probability that the editor writes a new "
                         "right answer and keeps nothing")
    harmful: float = arg(0.0, least=0, most=1, help="probability that an edit also puts a wrong "
                         "value in place of a right one")
    style: float = arg(0.0, least=0, most=1, help="probability that an edit also brings every "
                       "sentence into the editor's own wording")
    taste: float = arg(0.0, least=0, most=1, help="two groups of annotators like opposite "
                       "wordings: the share of labels and of edits that follow the taste of a "
                       "prompt's group")
    unseen: float = arg(0.0, least=0, most=1, help="share of facts and sums that the annotators "
                        "never see: requests that ask for one are not annotated. With --spans they "
                        "are, and the spans of their wrong values have the type unseen")
    skip_ties: bool = arg(False, help="leave out prompts whose two answers have the same number of "
                           "errors: nobody can prefer one")
    limit: int | None = arg(None, least=1, help="stop after N annotated prompts")
    spans: bool = arg(False, help="write the spans of the errors into edits.jsonl (for "
                       "evaluation only)")


def write_world(config: WorldConfig) -> None:
    """Writes the prompts of each split, the demonstrations, and a tokenizer trained on them."""
    world = World(config.world)
    rng = random.Random(f"requests-{world.seed}-{config.seed}")
    wanted = {"train": config.train, "dev": config.dev, "test": config.test}
    prompts = draw_prompts(world, rng, wanted)
    demonstrations: list[records.Demonstration] = []
    while len(demonstrations) < config.demonstrations:
        text = world.request(rng)
        if split_of(text) == "train":
            demonstrations.append(records.Demonstration(f"demo-{len(demonstrations)}", text,
                                                        world.demonstrate(text, rng),
                                                        dataset=world.dataset))
    out = Path(config.out)
    texts = [render_prompt(d, "plain") + " " + d.output for d in demonstrations[:4000]]
    tokenizer.train(texts, config.vocab_size, out / "tokenizer.model")      # may refuse the size
    for split, count in wanted.items():
        records.write_jsonl(out / f"{split}.jsonl",
                            [records.Prompt(f"{split}-{i}", text, dataset=world.dataset)
                             for i, text in enumerate(prompts[split][:count])])
    records.write_jsonl(out / "demonstrations.jsonl", demonstrations)


def draw_prompts(world: World, rng: random.Random, wanted: dict[str, int]) -> dict[str, list[str]]:
    """Draws different requests until every split has at least the number that is wanted.

    Raises UserError when IDLE_DRAWS draws in a row give no new request to a split that lacks some.
    """
    prompts: dict[str, dict[str, None]] = {split: {} for split in wanted}
    idle = 0
    while lacking := [split for split, n in wanted.items() if len(prompts[split]) < n]:
        if idle == IDLE_DRAWS:
            split = lacking[0]
            raise UserError(f"--{split} {wanted[split]}: expected at most {len(prompts[split])}, "
                            f"because {world.name} gave no further {split} request in "
                            f"{IDLE_DRAWS:,} draws; lower --{split}, or choose a --world with more "
                            "lands or items")
        text = world.request(rng)
        split = split_of(text)
        idle = 0 if split in lacking and text not in prompts[split] else idle + 1
        prompts[split].setdefault(text)
    return {split: list(texts) for split, texts in prompts.items()}


def annotate(config: AnnotateConfig) -> None:
    """Writes, for each prompt, a preference and a minimal edit of the worse answer."""
    world = World(config.world)
    rng = random.Random(f"annotate-{world.seed}-{config.seed}")
    firsts, seconds = readers.read_outputs(config.outputs), readers.read_outputs(config.others)
    if [o.instruction for o in firsts] != [o.instruction for o in seconds]:
        raise UserError(f"{config.others}: expected the prompts of {config.outputs} in the same "
                        "order; write both with `eval.py outputs` from one prompt file")
    check_requests(world, firsts, config.outputs)
    check_requests(world, seconds, config.others)
    unseen = world.unseen(config.unseen)
    pairs, edits, annotated, ties = [], [], 0, 0
    for i, (first, second) in enumerate(zip(firsts, seconds)):
        prompt, texts = first.instruction, (first.output, second.output)
        if config.limit == annotated:
            break
        if not config.spans and any(item.key in unseen for item in world.items(prompt)):
            continue
        liked = rng.choice((0, 1)) if config.taste else 0           # the group of this prompt
        better = prefer(world, prompt, *texts, rng, config.noise, config.longer, config.taste,
                        liked)
        if compare_errors(world, prompt, *texts) == 0:
            ties += 1
            if config.skip_ties:
                continue
        annotated += 1
        chosen, rejected = texts[better - 1], texts[2 - better]
        if chosen != rejected and chosen and rejected:
            pairs.append(records.Pair(f"pair-{i}", prompt, chosen, rejected, annotator="simulated",
                                      dataset=world.dataset))
        edited = edit(config, world, prompt, rejected, rng, liked)
        if rejected and edited and edited != rejected:
            kind = lambda e: "unseen" if e.kind == "value" and e.key in unseen else e.kind
            spans = tuple(records.Span(e.start, e.end, kind(e))
                          for e in world.errors(prompt, rejected)
                          if e.start < e.end)              # an omission has no characters
            edits.append(records.Edit(f"edit-{i}", prompt, rejected, edited, annotator="simulated",
                                      spans=spans if config.spans else None,
                                      dataset=world.dataset))
    if config.limit and annotated < config.limit:
        raise UserError(f"{config.outputs}: expected answers for {config.limit} annotated prompts, "
                        f"got {annotated} in {len(firsts)}; answer more prompts, or lower --limit")
    out = Path(config.out)
    records.write_jsonl(out / "pairs.jsonl", pairs)
    records.write_jsonl(out / "edits.jsonl", edits)
    print(f"{annotated} prompts annotated: {len(pairs)} pairs and {len(edits)} edits in {out}; "
          f"{ties} ties {'left out' if config.skip_ties else 'decided by a coin'} "
          "(two identical answers give no pair, a perfect answer no edit, a blank text neither)")


def edit(config: AnnotateConfig, world: World, prompt: str, answer: str, rng: random.Random,
         liked: int) -> str:
    """Returns the edit of an answer by an editor with all the habits that the flags give.

    Draws nothing for a habit of probability 0, so the other draws stay as they are.
    """
    if config.rewrite and rng.random() < config.rewrite:
        text = rewrite(world, prompt, rng)
    else:
        text = minimal_edit(world, prompt, answer, rng, config.miss, config.needless)
    if config.harmful and rng.random() < config.harmful:
        text = spoil(world, prompt, text, rng)
    if config.style and rng.random() < config.style:
        text = restyle(world, prompt, text, 1)
    if config.taste and rng.random() < config.taste:
        text = restyle(world, prompt, text, liked)
    return text


def split_of(prompt: str) -> str:
    """train, dev or test, by a hash of the text. Python's own hash differs between processes."""
    return ("test", "dev", *["train"] * 6)[zlib.crc32(prompt.encode()) % 8]


if __name__ == "__main__":
    commands = {"world": (WorldConfig, write_world), "annotate": (AnnotateConfig, annotate)}
    run(lambda: dispatch(commands, __doc__))
