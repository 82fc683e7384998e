"""Simulated annotators in the built-in world: a pairwise one and a minimal editor.

They stand in for AlpacaFarm and its annotators (the paper's sections 3 and 4) where no human, no
language model and no download is at hand.

    annotator      prefers the answer with fewer errors; a tie is a coin toss, and so is a share
                   `noise` of the labels
    editor         starts from the answer called worse and applies the mends; misses an error with
                   probability `miss`, swaps the wording of a sentence, needlessly, with `needless`

Nothing but the world's seed is shared: the oracle judges text, the annotator sees two texts, the
editor one.

    python -m fgrlhf.simulate world    --world 0 --seed 0 --out DIR
    python -m fgrlhf.simulate annotate --world 0 --seed 0 --outputs A.json --others B.json --out DIR
"""

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from fgrlhf import edits, readers, tokenizer
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.world import World


def split_of(prompt: str) -> str:
    """train, dev or test by a stable hash of the text (Python's own differs per process)."""
    return ("test", "dev", *["train"] * 6)[zlib.crc32(prompt.encode()) % 8]


def compare_errors(world: World, prompt: str, first: str, second: str) -> int:
    """Errors of the first answer minus errors of the second."""
    return len(world.errors(prompt, first)) - len(world.errors(prompt, second))


def prefer(world: World, prompt: str, first: str, second: str, rng: random.Random,
           noise: float = 0.0) -> int:
    """The annotator: 1 or 2, whichever has fewer errors; a share `noise` of labels is a toss."""
    difference = compare_errors(world, prompt, first, second)
    if difference == 0 or rng.random() < noise:
        return rng.choice((1, 2))
    return 1 if difference < 0 else 2


def minimal_edit(world: World, prompt: str, answer: str, rng: random.Random, miss: float = 0.0,
                 needless: float = 0.0) -> str:
    """The editor: apply the mend of each error but the missed ones; sometimes swap a synonym."""
    text = answer
    for error in reversed(world.errors(prompt, answer)):
        if rng.random() >= miss:
            text = text[:error.start] + error.fix + text[error.end:]
    if rng.random() < needless:
        text = swap_wording(text, next((item.key[0] for item in world.items(prompt)), None))
    return text.strip()


def swap_wording(text: str, land: str | int | None) -> str:
    """The first sentence in its other wording: a change that mends nothing and harms nothing."""
    swaps = ((r"(\d) is (\d)", r"\1 makes \2"), (r"(\d) makes (\d)", r"\1 is \2"),
             (rf"The (\w+) of {land} is", r"Its \1 is"), (r"Its (\w+) is", rf"The \1 of {land} is"))
    for old, new in swaps:
        swapped = re.sub(old, new, text, count=1)
        if swapped != text:
            return swapped
    return text


# ----- command line -------------------------------------------------------------------------------

@dataclass(frozen=True)
class WorldConfig:
    out: str = arg(help="folder for demonstrations, train, dev and test .jsonl, tokenizer.model")
    world: int = arg(0, help="seed of the world itself: its facts, habits and mistakes")
    seed: int = arg(0, help="seed of the requests and demonstrations drawn from it")
    demonstrations: int = arg(12000, least=1, help="SFT demonstrations, on train prompts")
    train: int = arg(3000, least=1, help="train prompts, for annotation and PPO")
    dev: int = arg(300, least=1, help="dev prompts: settings and checkpoints are chosen here")
    test: int = arg(600, least=1, help="test prompts: looked at once")
    vocab_size: int = arg(640, help="sentencepiece pieces, 259 of them bytes and control")


@dataclass(frozen=True)
class AnnotateConfig:
    outputs: str = arg(help="AlpacaEval outputs: the first answer to each prompt")
    others: str = arg(help="AlpacaEval outputs: the second answer to each, in the same order")
    out: str = arg(help="folder for pairs.jsonl and edits.jsonl")
    world: int = arg(0, help="seed of the world")
    seed: int = arg(0, help="seed of coin tosses, noise, misses and needless edits")
    noise: float = arg(0.0, least=0,
                       help="share of preference labels replaced by a fair coin (AlpacaFarm: 0.5)")
    miss: float = arg(0.0, least=0, help="probability that the editor overlooks an error")
    needless: float = arg(0.0, least=0, help="probability of one swapped synonym in an edit")
    skip_ties: bool = arg(False, help="leave out pairs of as many errors (for evaluation only)")
    spans: bool = arg(False, help="write the oracle's spans into edits.jsonl (for evaluation only)")


def write_world(config: WorldConfig) -> None:
    """Demonstrations, prompts by split, and the world's own small tokenizer."""
    world, rng = World(config.world), random.Random(f"requests-{config.world}-{config.seed}")
    prompts: dict[str, dict[str, None]] = {"train": {}, "dev": {}, "test": {}}
    wanted = {"train": config.train, "dev": config.dev, "test": config.test}
    while any(len(prompts[s]) < n for s, n in wanted.items()):
        text = world.request(rng)
        prompts[split_of(text)].setdefault(text)
    out = Path(config.out)
    for split, count in wanted.items():
        edits.write_jsonl(out / f"{split}.jsonl",
                          [edits.Prompt(f"{split}-{i}", text)
                           for i, text in enumerate(list(prompts[split])[:count])])
    demonstrations: list[edits.Demonstration] = []
    while len(demonstrations) < config.demonstrations:
        text = world.request(rng)
        if split_of(text) == "train":
            demonstrations.append(edits.Demonstration(f"demo-{len(demonstrations)}", text,
                                                      world.demonstrate(text, rng)))
    edits.write_jsonl(out / "demonstrations.jsonl", demonstrations)
    texts = [edits.render_prompt(d, "plain") + " " + d.output for d in demonstrations[:4000]]
    tokenizer.train(texts, config.vocab_size, out / "tokenizer.model")


def annotate(config: AnnotateConfig) -> None:
    """For each prompt a preference, and a minimal edit of the answer called worse."""
    world, rng = World(config.world), random.Random(f"annotate-{config.world}-{config.seed}")
    firsts, seconds = readers.read_outputs(config.outputs), readers.read_outputs(config.others)
    if [o.instruction for o in firsts] != [o.instruction for o in seconds]:
        raise UserError(f"{config.others}: expected the prompts of {config.outputs} in the same "
                        "order; write both with `eval.py outputs` from one prompt file")
    if foreign := [o.instruction for o in firsts if not world.items(o.instruction)]:
        raise UserError(f"{config.outputs}: {foreign[0][:60]!r} is no request of world "
                        f"{world.seed}; give the --world the prompts were written with")
    pairs, edited = [], []
    for i, (first, second) in enumerate(zip(firsts, seconds)):
        prompt, texts = first.instruction, (first.output, second.output)
        better = prefer(world, prompt, *texts, rng, config.noise)
        chosen, rejected = texts[better - 1], texts[2 - better]
        tied = config.skip_ties and compare_errors(world, prompt, *texts) == 0
        if chosen != rejected and chosen and rejected and not tied:
            pairs.append(edits.Pair(f"pair-{i}", prompt, chosen, rejected, annotator="simulated"))
        mended = minimal_edit(world, prompt, rejected, rng, config.miss, config.needless)
        if rejected and mended and mended != rejected:
            spans = tuple(edits.Span(e.start, e.end, e.kind) for e in world.errors(prompt, rejected)
                          if e.start < e.end)              # an omission has no characters
            edited.append(edits.Edit(f"edit-{i}", prompt, rejected, mended, annotator="simulated",
                                     spans=spans if config.spans else None))
    out = Path(config.out)
    edits.write_jsonl(out / "pairs.jsonl", pairs)
    edits.write_jsonl(out / "edits.jsonl", edited)
    print(f"{len(firsts)} annotations of each kind: {len(pairs)} pairs and {len(edited)} edits in "
          f"{out} (identical answers make no pair, perfect ones no edit, blank ones neither)")


def main() -> None:
    import sys
    commands = {"world": (WorldConfig, write_world), "annotate": (AnnotateConfig, annotate)}
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in commands:
        wanted = name in ("-h", "--help")
        print(__doc__ if wanted else f"error: expected one of {', '.join(commands)}, got {name!r}; "
              "see --help", file=sys.stdout if wanted else sys.stderr)
        raise SystemExit(0 if wanted else 2)
    config, action = commands[name]
    action(parse(config, sys.argv[2:], f"python -m fgrlhf.simulate {name}", __doc__))


if __name__ == "__main__":
    run(main)
