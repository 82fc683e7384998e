"""The stages of a profile: every command of one seed, with its settings and what it needs first.

Each seed has its own world, SFT model, answers to annotate, reward models and PPO runs. All systems
of a seed start from its SFT model and use the same number of annotations, one per prompt. Prompts
whose two answers have the same number of errors are not annotated, because nobody can prefer one.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fgrlhf.presets import PRESETS
from fgrlhf.reproduce.pipeline import Stage


ANNOTATIONS = 1000              # annotated prompts, with one pair and one edit each
FEWER = (125, 250, 500)         # annotations, in the profile of that name
ANSWERED = 1800                 # prompts with two answers; those with a tie are not annotated
DEV, TEST = 200, 400            # dev and test prompts
ITERATIONS = 30                 # of every PPO run
# Chosen on the dev prompts of other worlds; SETTINGS.md in this folder has the sweep.
RLHF = ("--method", "rlhf", "--gamma", "1", "--gae-lambda", "0.95", "--beta", "0.2", "--lr", "6e-4")
METHOD = ("--method", "fine-grained", "--gamma", "0", "--beta", "0.5", "--lr", "1.2e-3")
PAPER = ("--method", "fine-grained", "--gamma", "0", "--beta", "0.5", "--lr", "6e-4")
RLOO = ("--method", "rloo", "--beta", "0.2", "--lr", "3e-4")
GRPO = ("--method", "grpo", "--beta", "0.2", "--lr", "3e-4")
TLCR = ("--method", "rlhf", "--gamma", "1", "--gae-lambda", "0.95", "--beta", "2", "--lr", "6e-4")
IMITATION = ("--epochs", "6", "--lr", "4e-3")
DPO = ("--sft-weight", "1", "--beta", "0.3", "--lr", "2e-3")
DPO_ALONE = ("--beta", "1", "--lr", "1e-3")
IMPERFECT = ("--miss", "0.3", "--needless", "0.1")
# The learning rates with --lora-rank; SETTINGS.md says which were tried.
LORA = {"token": ("--lr", "1e-2"), "sequence": ("--lr", "3e-3"), "method": ("--lr", "5e-3"),
        "rlhf": ("--lr", "2.5e-3", "--value-lr", "2.5e-3"), "imitation": ("--lr", "8e-3")}
# The learning rates of the training scripts, where no option gives another.
RATES = {"fgrlhf.sft": {"--lr": 5e-3, "--muon-lr": 1e-2}, "fgrlhf.dpo": {"--lr": 1e-3},
         "train_rm.py": {"--lr": 3e-3, "--muon-lr": 5e-3},
         "train_ppo.py": {"--lr": 1.2e-3, "--value-lr": 6e-4}}
# The grids of the sweep. A system that was best at the edge of the first six got more points.
SIX = [(beta, lr) for beta in ("0.2", "0.5", "1.0") for lr in ("6e-4", "1.2e-3")]
LOWER = [("0.1", "6e-4"), ("0.2", "3e-4")]
GRIDS = {"fine-grained": SIX, "fine-grained-paper": SIX, "rlhf": SIX + LOWER, "rloo": SIX + LOWER,
         "grpo": SIX + LOWER,
         "tlcr": SIX + [("2.0", "6e-4"), ("2.0", "3e-4"), ("4.0", "6e-4")]}
IMITATION_GRID = [(epochs, lr) for epochs in ("3", "6") for lr in ("1e-3", "2e-3", "4e-3")]
IMITATION_GRID += [("6", "8e-3"), ("12", "4e-3")]
DPO_GRID = [(beta, lr) for beta in ("0.1", "0.3") for lr in ("5e-4", "1e-3", "2e-3")]
DPO_GRID += [("0.3", "4e-3"), ("1.0", "2e-3"), ("1.0", "4e-3")]
DPO_ALONE_GRID = [(beta, lr) for beta in ("0.1", "0.3", "1.0") for lr in ("1e-4", "3e-4", "1e-3")]
DPO_ALONE_GRID += [("1.0", "3e-3"), ("3.0", "1e-3"), ("3.0", "3e-3")]
TEMPERATURES = ("0.7", "0.5", "0.3")    # of the answers, and 1 and greedy


class Seed:
    """Builds the stages of one seed. `at` turns a name into a path in the folder of the seed."""

    init = "tiny"                       # the preset of all models
    longest: tuple[str, ...] = ()       # the flag of a limit to answers other than the default

    def __init__(self, seed: int, folder: Path, device: str, dtype: str = "float32",
                 lora_rank: int = 0):
        self.seed, self.world, self.folder = str(seed), str(seed), folder
        self.lora_rank, self.stages = lora_rank, []
        self.rlhf, self.method = RLHF + self.adapters("rlhf"), METHOD + self.adapters("method")
        self.paper = PAPER + self.adapters("method")
        self.rloo, self.grpo = RLOO + self.adapters("method"), GRPO + self.adapters("method")
        self.tlcr = TLCR + self.adapters("rlhf")
        self.common = ("--device", device) + (("--dtype", dtype) if dtype != "float32" else ())

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def add(self, name: str, *command: str, needs: tuple[str, ...] = (),
            computes: bool = True) -> None:
        """Adds a stage. computes: it has a model, and so the flags of the device."""
        prefix = self.folder.name
        if computes and "fgrlhf.simulate" not in command:       # the world needs no device
            command += self.common
        self.stages.append(Stage(f"{prefix}.{name}", command,
                                 tuple(f"{prefix}.{need}" for need in needs)))

    def adapters(self, kind: str) -> tuple[str, ...]:
        """The options that --lora-rank adds to a stage that trains from the SFT model."""
        return ("--lora-rank", str(self.lora_rank), *LORA[kind]) if self.lora_rank else ()

    def outputs(self, name: str, policy: str, prompts: str, *options: str, needs=()) -> None:
        """Adds the answers of a policy to the prompts of a file."""
        self.add(name, "eval.py", "outputs", "--policy", self.at(policy), "--prompts",
                 self.at(f"world/{prompts}.jsonl"), "--out", self.at(f"outputs/{name}.json"),
                 *options, *self.longest, needs=needs)

    def annotate(self, name: str, first: str, second: str, *options: str) -> None:
        """Adds the preferred one of two answers to each prompt, and an edit of the other."""
        self.add(name, "-m", "fgrlhf.simulate", "annotate", "--world", self.world,
                 "--seed", self.seed, "--outputs", self.at(f"outputs/{first}.json"),
                 "--others", self.at(f"outputs/{second}.json"), "--out", self.at(name), *options,
                 needs=(first, second))

    def reward(self, name: str, data: str, *options: str, held_out: str = "held-out") -> None:
        """Adds a reward model that starts from the SFT model, evaluated on held-out edits."""
        kind = "sequence" if "sequence" in options else "token"
        if "--likelihood" not in options:                       # which trains nothing
            options += self.adapters(kind)
        self.add(name, "train_rm.py", "--data", self.at(data), "--model", self.at("sft/policy"),
                 "--seed", self.seed, "--out", self.at(name),
                 "--eval-edits", self.at(f"{held_out}/edits.jsonl"),
                 "--eval-pairs", self.at(f"{held_out}/pairs.jsonl"), "--resume", *options,
                 needs=(data.split("/")[0], held_out))

    def ppo(self, name: str, reward: str, *options: str, iterations: int = ITERATIONS,
            test: bool = True) -> None:
        """Adds a PPO run from the SFT model, and its best policy's answers to the test prompts."""
        self.add(name, "train_ppo.py", "--policy", self.at("sft/policy"),
                 "--reward", self.at(f"{reward}/reward"), "--prompts", self.at("world/train.jsonl"),
                 "--dev-prompts", self.at("world/dev.jsonl"),
                 "--dev-reference", self.at("outputs/sft-dev.json"), "--world", self.world,
                 "--seed", self.seed, "--iterations", str(iterations), "--out", self.at(name),
                 "--lr-decay", "--resume", *options, *self.longest, needs=(reward, "sft-dev"))
        if test:
            self.test(name, f"{name}/best", name)

    def directly(self, name: str, module: str, data: str, *options: str,
                 prompts: str = "test") -> None:
        """Adds a policy trained on annotations without a reward model, and its answers.

        module: fgrlhf.sft imitates the better side, fgrlhf.dpo compares both.
        """
        self.add(name, "-m", module, "--data", self.at(data), "--model", self.at("sft/policy"),
                 "--seed", self.seed, "--muon-lr", "0", "--out", self.at(name), "--resume",
                 *options, *self.adapters("imitation"), needs=(data.split("/")[0],))
        if prompts == "test":
            self.test(name, f"{name}/policy", name)
        else:
            self.outputs(f"{name}-dev", f"{name}/policy", prompts, "--seed", "3", needs=(name,))

    def test(self, system: str, policy: str, need: str) -> None:
        """Adds the sampled and the greedy answers of a policy to the test prompts."""
        self.outputs(f"{system}-test", policy, "test", "--seed", "7", "--greedy-out",
                     self.at(f"outputs/{system}-test-greedy.json"), needs=(need,))


def rate_factor(preset: str) -> float:
    """Returns the factor of all learning rates for a preset: the width of tiny over its width.

    All rates were chosen for tiny. A step of Adam, and here of Muon, changes each weight by as much
    at every width, while what the weights of a row do to a hidden state adds up over the width.
    """
    return PRESETS["tiny"].dim / PRESETS[preset].dim


def multiply_rates(stage: Stage, factor: float) -> Stage:
    """Multiplies every learning rate of a stage by a factor."""
    script = next((word for word in stage.command[:2] if word in RATES), None)
    if script is None or factor == 1:
        return stage
    words = list(stage.command)
    for flag, rate in RATES[script].items():
        if flag == "--value-lr" and "rlhf" not in words:            # there is no critic
            continue
        if flag in words:                                           # the last one counts
            rate = float(words[len(words) - words[::-1].index(flag)])
        words += [flag, f"{rate * factor:g}"]
    return replace(stage, command=tuple(words))


def start(seed: Seed) -> None:
    """Adds world, SFT model, answers to annotate, annotations and the dev reference."""
    begin(seed, ANSWERED, "--dev", str(DEV), "--test", str(TEST))
    seed.outputs("sft-dev-second", "sft/policy", "dev", "--seed", "4", needs=("sft",))
    decided = ("--skip-ties", "--limit", str(ANNOTATIONS))
    seed.annotate("annotations", "first", "second", *decided)
    seed.annotate("held-out", "sft-dev", "sft-dev-second", "--spans", "--skip-ties")


def begin(seed: Seed, answered: int, *sizes: str) -> None:
    """Adds world, SFT model, two answers of it to each of `answered` prompts, the dev reference."""
    seed.add("world", "-m", "fgrlhf.simulate", "world", "--world", seed.world, "--seed", seed.seed,
             "--out", seed.at("world"), *sizes)
    seed.add("sft", "-m", "fgrlhf.sft", "--data", seed.at("world/demonstrations.jsonl"),
             "--init", seed.init, "--tokenizer", seed.at("world/tokenizer.model"),
             "--seed", seed.seed, "--epochs", "2", "--batch", "16", "--muon-lr", "5e-3",
             "--out", seed.at("sft"), "--resume", needs=("world",))
    limit = ("--limit", str(answered))
    for name, prompts, *options in (("first", "train", "--seed", "1", *limit),
                                    ("second", "train", "--seed", "2", *limit),
                                    ("sft-dev", "dev", "--seed", "3")):
        seed.outputs(name, "sft/policy", prompts, *options, needs=("sft",))


def compare_systems(seed: Seed) -> None:
    """Adds the systems of the comparison, profile quick."""
    edits, pairs = "annotations/edits.jsonl", "annotations/pairs.jsonl"
    seed.reward("rm-token", edits)
    seed.reward("rm-paper", edits, "--loss", "paper")
    seed.reward("rm-sequence", pairs, "--kind", "sequence", "--epochs", "3")
    seed.ppo("rlhf", "rm-sequence", *seed.rlhf)
    seed.ppo("fine-grained-paper", "rm-paper", *seed.paper)
    seed.ppo("fine-grained", "rm-token", *seed.method)
    seed.directly("dpo-sft", "fgrlhf.dpo", edits, *DPO)                 # short stages last
    seed.directly("imitation", "fgrlhf.sft", edits, *IMITATION)
    seed.test("sft", "sft/policy", "sft")
    seed.outputs("sft-reference", "sft/policy", "test", "--seed", "8", needs=("sft",))


def full(seed: Seed) -> None:
    """Adds the systems of the comparison, rivals, controls and ablations, profile full."""
    compare_systems(seed)
    more_rivals(seed)
    controls_and_ablations(seed)
    mechanism(seed)
    for system in ("sft", "rlhf", "fine-grained-paper", "fine-grained", "imitation", "dpo-sft",
                   "fine-grained-imperfect", "imitation-imperfect", "dpo-sft-imperfect"):
        policy = "best" if system.startswith(("rlhf", "fine-grained")) else "policy"
        seed.outputs(f"{system}-test-t", f"{system}/{policy}", "test", "--seed", "7",
                     "--temperature", TEMPERATURES[0], "--temperatures", ",".join(TEMPERATURES[1:]),
                     needs=(system,))


def more_rivals(seed: Seed) -> None:
    """Adds RLOO and GRPO, TLCR's form, DPO without the SFT term, and best-of-n."""
    edits, pairs = "annotations/edits.jsonl", "annotations/pairs.jsonl"
    seed.ppo("rloo", "rm-sequence", *seed.rloo)
    seed.ppo("grpo", "rm-sequence", *seed.grpo)
    seed.reward("rm-tlcr", edits, "--loss", "tlcr")
    seed.ppo("tlcr", "rm-tlcr", *seed.tlcr)
    seed.ppo("rlhf-long", "rm-sequence", *seed.rlhf, iterations=2 * ITERATIONS)
    seed.directly("dpo", "fgrlhf.dpo", edits, *DPO_ALONE)
    seed.directly("dpo-pairs", "fgrlhf.dpo", pairs, *DPO_ALONE)
    for reward in ("sequence", "paper", "token"):
        seed.outputs(f"best-of-{reward}-test", "sft/policy", "test", "--seed", "9", "--best-of",
                     "16", "--reward", seed.at(f"rm-{reward}/reward"), needs=(f"rm-{reward}",))


def mechanism(seed: Seed) -> None:
    """Adds the command that compares token rewards and GAE with measured advantages.

    The critic is trained with a policy that does not move (learning rate 0).
    """
    seed.ppo("rlhf-critic", "rm-sequence", *seed.rlhf, "--lr", "0", "--save-critic", test=False)
    rewards = ("rm-token", "rm-paper", "rm-token-sum", "rm-tlcr", "rm-token-pairs")
    seed.add("advantages", "-m", "fgrlhf.simulate.advantages", "--world", seed.seed,
             "--policy", seed.at("sft/policy"), "--prompts", seed.at("world/dev.jsonl"),
             "--rewards", ",".join(seed.at(f"{name}/reward") for name in rewards),
             "--critic", seed.at("rlhf-critic/critic"), "--critic-reward",
             seed.at("rm-sequence/reward"), "--out", seed.at("advantages.json"),
             "--limit", "50", "--completions", "32", needs=(*rewards, "rlhf-critic"))


def controls_and_ablations(seed: Seed) -> None:
    edits, pairs = "annotations/edits.jsonl", "annotations/pairs.jsonl"
    sequence = ("--kind", "sequence", "--epochs", "3")
    # reward models on the other data: token on pairs, sequence on edits
    seed.reward("rm-sequence-edits", edits, *sequence)
    seed.ppo("sequence-edits", "rm-sequence-edits", *seed.rlhf)
    seed.reward("rm-token-pairs", pairs)
    seed.ppo("fine-grained-pairs", "rm-token-pairs", *seed.method)
    # an editor who misses errors
    seed.annotate("imperfect", "first", "second", *IMPERFECT, "--skip-ties", "--limit",
                  str(ANNOTATIONS))
    seed.reward("rm-token-imperfect", "imperfect/edits.jsonl")
    seed.ppo("fine-grained-imperfect", "rm-token-imperfect", *seed.method)
    seed.directly("imitation-imperfect", "fgrlhf.sft", "imperfect/edits.jsonl", *IMITATION)
    seed.directly("dpo-sft-imperfect", "fgrlhf.dpo", "imperfect/edits.jsonl", *DPO)
    # an editor with a habit that has nothing to do with errors: one of two wordings
    seed.annotate("style", "first", "second", "--style", "0.3", "--skip-ties", "--limit",
                  str(ANNOTATIONS))
    seed.reward("rm-token-style", "style/edits.jsonl")
    seed.ppo("fine-grained-style", "rm-token-style", *seed.method)
    seed.directly("imitation-style", "fgrlhf.sft", "style/edits.jsonl", *IMITATION)
    # ties decided by a coin, as AlpacaFarm's annotators do
    seed.annotate("ties", "first", "second", "--limit", str(ANNOTATIONS))
    seed.reward("rm-sequence-ties", "ties/pairs.jsonl", *sequence)
    seed.ppo("rlhf-ties", "rm-sequence-ties", *seed.rlhf)
    # other losses and rewards
    seed.reward("rm-likelihood", edits, "--likelihood")
    seed.ppo("likelihood", "rm-likelihood", *seed.method)
    seed.reward("rm-token-sum", edits, "--loss", "sum")
    seed.ppo("fine-grained-sum", "rm-token-sum", *seed.method)


def sweep(seed: Seed) -> None:
    """Adds six or more settings of each system.

    The dev prompts of worlds that are not reported decide.
    """
    edits = "annotations/edits.jsonl"
    seed.reward("rm-token", edits)
    seed.reward("rm-paper", edits, "--loss", "paper")
    seed.reward("rm-tlcr", edits, "--loss", "tlcr")
    seed.reward("rm-sequence", "annotations/pairs.jsonl", "--kind", "sequence", "--epochs", "3")
    for name, reward, settings in (("fine-grained", "rm-token", seed.method),
                                   ("fine-grained-paper", "rm-paper", seed.paper),
                                   ("rlhf", "rm-sequence", seed.rlhf),
                                   ("rloo", "rm-sequence", seed.rloo),
                                   ("grpo", "rm-sequence", seed.grpo),
                                   ("tlcr", "rm-tlcr", seed.tlcr)):
        for beta, lr in GRIDS[name]:
            seed.ppo(f"{name}-{beta}-{lr}", reward, *settings, "--beta", beta, "--lr", lr,
                     iterations=40, test=False)
    for epochs, lr in IMITATION_GRID:
        seed.directly(f"imitation-{epochs}-{lr}", "fgrlhf.sft", edits, "--epochs", epochs,
                      "--lr", lr, prompts="dev")
    for beta, lr in DPO_GRID:
        seed.directly(f"dpo-sft-{beta}-{lr}", "fgrlhf.dpo", edits, *DPO, "--beta", beta, "--lr", lr,
                      prompts="dev")
    for name, data in (("edits", edits), ("pairs", "annotations/pairs.jsonl")):
        for beta, lr in DPO_ALONE_GRID:
            seed.directly(f"dpo-{name}-{beta}-{lr}", "fgrlhf.dpo", data, "--beta", beta, "--lr", lr,
                          prompts="dev")


def annotations(seed: Seed) -> None:
    """Adds the systems of the comparison with fewer annotations, profile annotations."""
    compare_systems(seed)
    edits, pairs = "annotations/edits.jsonl", "annotations/pairs.jsonl"
    for count in FEWER:
        limit = ("--limit", str(count))
        seed.reward(f"rm-sequence-{count}", pairs, "--kind", "sequence", "--epochs", "3", *limit)
        seed.reward(f"rm-token-{count}", edits, *limit)
        seed.ppo(f"rlhf-{count}", f"rm-sequence-{count}", *seed.rlhf)
        seed.ppo(f"fine-grained-{count}", f"rm-token-{count}", *seed.method)
        seed.directly(f"imitation-{count}", "fgrlhf.sft", edits, *IMITATION, *limit)
        seed.directly(f"dpo-sft-{count}", "fgrlhf.dpo", edits, *DPO, *limit)


PROFILES: dict[str, Callable[[Seed], None]] = {
    "quick": compare_systems, "full": full, "sweep": sweep, "annotations": annotations}
