"""The stages of the profile real: human edits of summaries, and a pretrained LLaMA.

The policy is trained on all candidates of DeFacto's train, right and wrong. Reward models are
linear probes of the pretrained model. The policies answer the first prompts of val. They are judged
by the names and numbers that they make up, and by a reward model on the edits of the other
summaries of val, which no policy and no other reward model has seen.
"""

from fgrlhf.real.prompts import EVIDENCE
from fgrlhf.reproduce.stages import Seed

MODEL = "models/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = "20"                    # of 30, chosen on folds of train, see REWARDS.md
TEST = 160                      # prompts of val
LONGEST = "48"                  # tokens of an answer
# Two rates of each system but SFT were tried on dev prompts, and five settings of PPO-RLHF, see
# TUNING.md.
SFT = ("--lr", "3e-5", "--muon-lr", "0", "--warmup", "5")
PPO = ("--iterations", "16", "--rollouts", "32", "--epochs", "1", "--minibatches", "2",
       "--lr-decay", "--warmup", "3", "--save-samples", "--save-every", "4", "--keep", "1")
TOKENS = ("--method", "fine-grained", "--beta", "0.5", "--no-reward-eos")
# PPO-RLHF learnt not to end without the penalty and, with a smaller beta, to write nothing.
RLHF = ("--method", "rlhf", "--lr", "1.5e-4", "--value-lr", "1.5e-4", "--beta", "1",
        "--missing-eos-penalty", "3")
DPO = ("--sft-weight", "1", "--beta", "0.1", "--epochs", "1", "--lr", "3e-5", "--warmup", "5",
       "--microbatch", "8")
REWARDS = {"rm-paper": ("--loss", "paper"), "rm-ours": ("--epochs", "20"),
           "rm-sequence": ("--kind", "sequence")}
TOKEN_LEVEL = ("rm-paper", "rm-ours")
PUBLISHED = ("candidates", "annotators")
POLICIES = {"rlhf": ("rm-sequence", RLHF),
            "fine-grained-paper": ("rm-paper", (*TOKENS, "--lr", "5e-5")),
            "fine-grained": ("rm-ours", (*TOKENS, "--lr", "1.5e-4"))}


def plan(seed: Seed, data: str, prompt: str = EVIDENCE) -> None:
    """Adds every stage. data: the folder of DeFacto's files. prompt: a rule of prompts.py."""
    rule = () if prompt == EVIDENCE else ("--prompt", prompt)
    seed.add("model", "-m", "fgrlhf.checkpoint", "fetch-smollm2", "--out", "models", computes=False)
    seed.add("data", "-m", "fgrlhf.real.files", "--data", data, "--out", seed.at("data"),
             "--test", str(TEST), *rule, computes=False)
    _reward_models(seed)
    rewards = ",".join(seed.at(f"{name}/reward") for name in TOKEN_LEVEL)
    seed.add("analysis", "-m", "fgrlhf.real.analysis", "--rewards", rewards,
             "--data", f"{data}/val.jsonl", "--hidden-states", seed.at("states.pt"),
             "--out", seed.at("analysis.json"), *rule, needs=TOKEN_LEVEL)
    seed.add("probes", "-m", "fgrlhf.real.probes", "--data", seed.at("data/train-edits.jsonl"),
             "--eval-edits", seed.at("data/val-edits.jsonl"), "--published", f"{data}/val.jsonl",
             "--model", MODEL, "--layer", LAYER, "--hidden-states", seed.at("states.pt"),
             "--out", seed.at("probes.json"), *rule, needs=TOKEN_LEVEL)
    trained = ("--template", "plain", "--seed", seed.seed, "--resume")
    seed.add("sft", "-m", "fgrlhf.sft", "--data", seed.at("data/train-summaries.jsonl"),
             "--model", MODEL, *SFT, "--out", seed.at("sft"), *trained, needs=("model", "data"))
    # The longest runs come first, so that two cores are busy to the end.
    _imitate(seed, "dpo-sft", "fgrlhf.dpo", DPO, trained)
    for name, (reward, method) in POLICIES.items():
        seed.add(name, "train_ppo.py", *method, "--policy", seed.at("sft/policy"), "--reward",
                 seed.at(f"{reward}/reward"), "--prompts", seed.at("data/train-prompts.jsonl"),
                 "--max-new-tokens", LONGEST, *PPO, "--out", seed.at(name), *trained,
                 needs=("sft", reward))
    _imitate(seed, "imitation", "fgrlhf.sft", (*SFT, "--epochs", "2"), trained)
    for name in ("sft", *POLICIES, "imitation", "dpo-sft"):
        _test(seed, name)
    published = ",".join(seed.at(f"data/{name}.json") for name in PUBLISHED)
    _judge(seed, "published", published, "--out", seed.at("judged/published.json"), needs=())


def _reward_models(seed: Seed) -> None:
    """Adds the probes, and the judge, a sequence-level probe on the edits of other summaries.

    The first of them computes the hidden states of all edits, which the others read.
    """
    train, val, others = (seed.at(f"data/{name}-edits.jsonl") for name in ("train", "val", "judge"))
    judge = ("rm-judge", train, others, ("--kind", "sequence"))
    needs = ("model", "data")
    for name, held_out, edits, options in (
            *((name, val, train, options) for name, options in REWARDS.items()), judge):
        seed.add(name, "train_rm.py", "--data", edits, "--eval-edits", held_out, "--model", MODEL,
                 "--template", "plain", "--freeze", "--layer", LAYER,
                 "--hidden-states", seed.at("states.pt"), "--intervals", "300",
                 "--seed", seed.seed, "--resume", *options, "--out", seed.at(name), needs=needs)
        needs = ("rm-paper",)


def _imitate(seed: Seed, name: str, module: str, options: tuple, trained: tuple) -> None:
    """Adds a policy that learns from the edits without a reward model."""
    seed.add(name, "-m", module, "--data", seed.at("data/train-edits.jsonl"), "--model",
             seed.at("sft/policy"), *options, "--out", seed.at(name), *trained, needs=("sft",))


def _test(seed: Seed, name: str) -> None:
    """Adds a policy's sampled and greedy answers, and what the judges say about them."""
    answers = [seed.at(f"outputs/{name}-{decoding}.json") for decoding in ("sampled", "greedy")]
    seed.add(f"{name}-test", "eval.py", "outputs", "--policy", seed.at(f"{name}/policy"),
             "--prompts", seed.at("data/val-prompts.jsonl"), "--limit", str(TEST), "--template",
             "plain", "--max-new-tokens", LONGEST, "--seed", "8" if name == "sft" else "7",
             "--out", answers[0], "--greedy-out", answers[1], needs=(name,))
    samples = ("--samples", seed.at(f"{name}/samples.jsonl"),
               "--prompts", seed.at("data/train-prompts.jsonl")) if name in POLICIES else ()
    _judge(seed, name, ",".join(answers), *samples, "--out", seed.at(f"judged/{name}.json"),
           needs=(f"{name}-test",))


def _judge(seed: Seed, name: str, outputs: str, *options: str, needs: tuple[str, ...]) -> None:
    seed.add(f"{name}-judged", "-m", "fgrlhf.real.judge", "--reward", seed.at("rm-judge/reward"),
             "--outputs", outputs, *options, needs=("rm-judge", *needs))
