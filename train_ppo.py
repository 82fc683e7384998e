"""Fine-grained PPO (the paper's) and the PPO-RLHF it is compared with, from one loop.

    python train_ppo.py --method fine-grained --policy runs/sft/policy \
        --reward runs/rm-token/reward --prompts train.jsonl --out runs/fine-grained
    python train_ppo.py --method rlhf --policy runs/sft/policy \
        --reward runs/rm-sequence/reward --prompts train.jsonl --out runs/rlhf

What the fine-grained method deletes from PPO: the critic, its loss, GAE, and the terminal reward.
Each token's own reward, less its KL, is its advantage (equations (5)-(7)). One iteration:

    1. sample a batch of responses, keeping log pi_old of every token
    2. score them once by the reference and by the reward model
    3. r~_t = r_t - beta (logp_old_t - logp_ref_t)
    4. advantages: standardised r~_t               | rlhf: GAE with a critic, then standardised
    5. a few epochs of clipped updates             | rlhf: of the critic too
    6. log; from time to time evaluate on dev prompts and keep the best policy

With --dev-prompts, --dev-reference and --world the built-in oracle compares dev answers with the
reference's, and OUT/best is the policy of the best dev win rate. OUT/policy is the last one.
Leaves config.json, metrics.jsonl, timing.jsonl; --resume continues a stopped run.
"""

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fgrlhf import distributed, monitor
from fgrlhf.advantage import generalised_advantage, penalise_kl, reward_to_go, standardise
from fgrlhf.checkpoint import save_model
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import TEMPLATES
from fgrlhf.judge import answers
from fgrlhf.model import DTYPES
from fgrlhf.players import Players, at_hand, load, optimise
from fgrlhf.ppo import check_first_ratio, policy_loss, value_loss
from fgrlhf.rollout import Rollout, Sequences, by_length, in_groups, sample_shared, score
from fgrlhf.run import Run, batches, generator, pick_device


@dataclass(frozen=True)
class Config:
    method: str = arg(choices=("fine-grained", "rlhf"), help="token advantages, or critic and GAE")
    policy: str = arg(help="folder of the SFT model: policy and frozen reference start from it")
    reward: str = arg(help="folder of the reward model")
    prompts: str = arg(help="prompts to sample responses to")
    out: str = arg(help="folder for the policies and the logs")
    template: str = arg("plain", choices=tuple(TEMPLATES), help="how a record becomes a prompt")
    on_bad_record: str = arg("stop", choices=("stop", "skip"), help="a record that cannot be used: "
                             "stop, or leave it out, count and list it")
    iterations: int = arg(30, least=1, help="rollout and update, this many times")
    rollouts: int = arg(64, least=1, help="episodes an iteration")
    decode_batch: int = arg(0, least=0, help="episodes decoded at once; changes memory and speed "
                            "alone; 0 takes all")
    max_new_tokens: int = arg(64, least=1, help="longest response; a longer one is truncated")
    temperature: float = arg(1.0, help="of sampling, scoring and updating alike")
    epochs: int = arg(2, least=1, help="passes over each batch of rollouts")
    minibatches: int = arg(2, least=1, help="updates a pass")
    microbatch: int = arg(16, least=0, help="sequences a forward pass, of similar length; changes "
                          "memory and speed alone; 0 takes the whole minibatch")
    lr: float = arg(1.2e-3, least=0, help="Adam's learning rate")
    warmup: int = arg(5, least=0, help="warm-up steps")
    lr_decay: bool = arg(False, help="after warm-up let the learning rates fall linearly to 0 at "
                         "the last iteration; without they stay constant")
    clip_eps: float = arg(0.2, least=0, help="clip of the ratio, and of the critic's change")
    beta: float = arg(0.5, least=0, help="KL coefficient, in units of calibrated reward a nat")
    gamma: float | None = arg(None, least=0, help="fine-grained: 0, the default, is the paper's "
                              "myopic advantage, above it a discounted reward-to-go. rlhf: GAE's, "
                              "default 1")
    gae_lambda: float = arg(0.95, least=0, help="rlhf: lambda of GAE")
    standardise: str = arg("rms", choices=("rms", "mean-std", "none"),
                           help="fine-grained: of the advantages, per batch (rlhf: mean-std)")
    value_lr: float = arg(6e-4, least=0, help="rlhf: the critic's learning rate")
    dev_prompts: str | None = arg(None, help="dev prompts for checkpoint choice")
    dev_reference: str | None = arg(None, help="the reference's outputs on the dev prompts")
    world: int | None = arg(None, help="seed of the built-in world whose oracle judges dev answers")
    eval_every: int = arg(5, least=1, help="iterations between dev evaluations")
    max_kl: float = arg(0.0, least=0, help="end the updates above this KL(old || new); 0 never")
    exact_kl: int = arg(8, least=0, help="log the KL over the whole vocabulary of this many "
                        "responses an iteration; 0 leaves it out")
    seed: int = arg(0, help="seed of prompt order, sampling and minibatches")
    save_every: int = arg(10, least=1, help="iterations between training states for --resume")
    keep: int = arg(2, least=1, help="training states kept: the newest, and those before it")
    resume: bool = arg(False, help="continue the unfinished run in --out")
    checkpoint_activations: bool = arg(False, help="keep one activation a block, make the rest "
                                       "again in backward")
    step_in_backward: bool = arg(False, help="step each weight as its gradient appears and hold no "
                                 "gradients; each is clipped alone; needs --microbatch 0")
    offload: bool = arg(False, help="keep reference and reward model in host memory between uses")
    lora_rank: int = arg(0, least=0, help="train adapters of this rank over frozen weights; 0 "
                         "trains all weights")
    dtype: str = arg("float32", choices=DTYPES,
                     help="of weights and activations; bfloat16 keeps float32 master weights")
    skip_checks: bool = arg(False, help="start without the startup checks (fgrlhf/checks.py)")
    device: str = arg("auto", help="auto, cpu, cuda, ...")

    def __post_init__(self):
        if self.gamma is None:                              # config.json shows the resolved value
            object.__setattr__(self, "gamma", 1.0 if self.method == "rlhf" else 0.0)


def advantages_of(config: Config, rewards: Tensor, values: Tensor | None, mask: Tensor):
    """(advantages, returns): the fine-grained method has no critic and hence no returns."""
    if values is None:
        advantages = reward_to_go(rewards, mask, config.gamma)
        return standardise(advantages, mask, config.standardise), None
    advantages, returns = generalised_advantage(rewards, values, mask, config.gamma,
                                                config.gae_lambda)
    return standardise(advantages, mask, "mean-std"), returns


def minibatches(config: Config, B: int, iteration: int, epoch: int = 0) -> list[list[int]]:
    """The rows of each update of one epoch: a function of seed, iteration and epoch."""
    size = -(-B // config.minibatches)
    return batches(B, size, config.seed, iteration * config.epochs + epoch)


def scoring_groups(config: Config, sequences: Sequences, iteration: int) -> list[Tensor]:
    """The rows that one forward pass scores together.

    A bfloat16 matmul rounds a row differently in another shape, by up to 0.04 nats a token: there
    the groups are those of the first epoch's updates, and the first ratio is 1 to 1e-6 as ever.
    """
    B = len(sequences.tokens)
    together = [list(range(B))] if config.dtype == "float32" else minibatches(config, B, iteration)
    return [part for rows in together
            for part in by_length(sequences, distributed.mine(rows), config.microbatch)]


def update(config: Config, policy, critic, optimizers, rollout: Rollout, advantages: Tensor,
           values, returns, iteration: int) -> dict[str, float]:
    """Epochs of minibatches on one batch of rollouts.

    Returns the means of the last epoch's statistics, and its last minibatch's gradient norms.
    """
    B, mask = len(advantages), rollout.sequences.response_mask
    logged: dict[str, float] = {}
    for epoch in range(config.epochs):
        totals: dict[str, float] = {}
        for number, rows in enumerate(minibatches(config, B, iteration, epoch)):
            tokens, logged = int(mask[rows].sum()), {}
            group = lambda rows, size: ([torch.tensor(rows)] if config.step_in_backward else
                                        by_length(rollout.sequences, rows, size))
            for part, counts in distributed.shares(rows, config.microbatch, group):
                sequences, over = rollout.sequences.rows(part), tokens if counts else math.inf
                T = int(sequences.response_lengths.max())
                cut = lambda x: x[part, :T]
                out = policy_loss(policy, sequences, cut(rollout.logp_old), cut(advantages),
                                  config.clip_eps, config.temperature, over)
                if epoch == 0 and number == 0 and counts:
                    check_first_ratio(out.logp, cut(rollout.logp_old)[cut(mask)])
                out.loss.backward()
                statistics = {"ppo/loss": out.loss, "ppo/clip_fraction": out.clip_fraction,
                              "ppo/kl_k3": out.kl_k3, "ppo/entropy": out.entropy}
                if critic is not None:
                    loss = value_loss(critic(sequences), cut(values), cut(returns), cut(mask),
                                      config.clip_eps, over)
                    loss.backward()
                    statistics["ppo/value_loss"] = loss
                for name, value in statistics.items():
                    logged[name] = logged.get(name, 0.0) + value.item()
                    if not math.isfinite(logged[name]):             # before any optimizer steps
                        raise FloatingPointError(f"{name} is {value.item()}")
            logged = distributed.totals(logged)
            kl = logged["ppo/kl_k3"]
            for name, value in logged.items():
                totals[name] = totals.get(name, 0.0) + value
            norms = {f"ppo/gradient_norm_{n}": optimizer.step()
                     for n, optimizer in optimizers.items()}
            logged = {name: total / (number + 1) for name, total in totals.items()} | norms
            if config.max_kl and kl > config.max_kl:
                return logged | {"ppo/stopped_early": 1.0}
    return logged


def episode_prompts(count: int, config: Config, iteration: int) -> list[int]:
    """One iteration's prompts, from shuffled passes over all: a function of seed and iteration."""
    rows = []
    for k in range((iteration - 1) * config.rollouts, iteration * config.rollouts):
        epoch, cursor = divmod(k, count)
        if not rows or cursor == 0:
            order = batches(count, count, config.seed, epoch)[0]
        rows.append(order[cursor])
    return rows


def check_shapes(config: Config) -> None:
    """Flags that contradict one another are refused before any model is loaded."""
    if config.rollouts < config.minibatches or min(config.rollouts, config.minibatches) < 1:
        raise UserError(f"--minibatches {config.minibatches}: "
                        f"expected 1..{config.rollouts} (--rollouts)")
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: expected a number above 0")
    wanted = [config.dev_prompts is None, config.dev_reference is None, config.world is None]
    if any(wanted) and not all(wanted):
        raise UserError("--dev-prompts, --dev-reference and --world: expected all three or none")


class Batch(NamedTuple):
    """One iteration's rollouts with all that the update needs; every tensor is [B, T]."""

    rollout: Rollout
    logp_ref: Tensor
    rewards: Tensor                     # calibrated, before the KL is taken off
    advantages: Tensor
    values: Tensor | None               # the critic's, before the update
    returns: Tensor | None

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: what must be finite, and what a stopped run leaves to look at."""
        own = {name: part for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return own | self.rollout.sequences._asdict() | {"logp_old": self.rollout.logp_old}


def collect(config: Config, players: Players, iteration: int) -> Batch:
    """Steps 1 to 4 of one iteration."""
    policy, ref, reward_model, critic = (
        players.policy, players.ref, players.reward_model, players.critic)
    # 1. rollouts
    prompts = [players.prompts[i] for i in episode_prompts(len(players.prompts), config, iteration)]
    rollout = sample_shared(policy, prompts, players.tokenizer.eos_id, config.max_new_tokens,
                            config.temperature, generator(config.seed, "rollout", iteration),
                            config.decode_batch)
    # 2. reference, reward and critic, one pass each
    groups = scoring_groups(config, rollout.sequences, iteration)

    def once(model, function):
        with at_hand(config, players, model):
            return distributed.total(in_groups(function, rollout.sequences, groups))
    if config.dtype != "float32":       # decoding a token at a time rounds otherwise: score again
        logp_old = once(policy, lambda part: score(policy, part, config.temperature))
        rollout = rollout._replace(logp_old=logp_old)
    logp_ref = once(ref, lambda part: score(ref, part, config.temperature))
    rewards = once(reward_model, reward_model.ppo_rewards)
    values = once(critic, critic) if critic is not None else None
    # 3. the reward less its KL
    mask = rollout.sequences.response_mask
    penalised = penalise_kl(rewards, rollout.logp_old, logp_ref, mask, config.beta)
    # 4. advantages
    advantages, returns = advantages_of(config, penalised, values, mask)
    return Batch(rollout, logp_ref, rewards, advantages, values, returns)


def train(config: Config) -> None:
    check_shapes(config)
    players = load(config, distributed.start(pick_device(config.device)))
    policy, tokenizer, judge = players.policy, players.tokenizer, players.judge
    started = time.perf_counter()
    if not config.skip_checks:
        players.check(config)
    check_seconds = time.perf_counter() - started
    players = optimise(config, players)
    log = Run(config, tokenizer.sha256,
              ("policy", "reward", "prompts", "dev_prompts", "dev_reference"))
    best = log.restore(**players.parts()) or {"win_rate": -1.0, "iteration": 0}

    for iteration in log.steps(config.iterations, config.method):
        # 1. to 4. rollouts, reference and reward, KL, advantages
        batch = collect(config, players, iteration)
        with log.guard(iteration, players.trained(), **batch.tensors()):
            seen = monitor.rollout_metrics(batch.rollout, batch.logp_ref, batch.rewards)
            if config.exact_kl:
                with log.untimed(), at_hand(config, players, policy, players.ref):
                    seen["rollout/kl_exact"] = monitor.whole_kl(
                        policy, players.ref, batch.rollout.sequences, config.temperature,
                        config.exact_kl, config.microbatch)
            if iteration == 1:
                check_first_ratio(batch.logp_ref, batch.rollout.logp_old)    # the KL to itself is 0
            # 5. clipped updates
            logged = update(config, policy, players.critic, players.optimizers, batch.rollout,
                            batch.advantages, batch.values, batch.returns, iteration)
        # 6. log, evaluate, save
        logged |= seen | {"rollout/episodes": iteration * config.rollouts}
        if judge is not None and (iteration % config.eval_every == 0
                                  or iteration == config.iterations):
            with log.untimed(), distributed.gathered(policy):
                outputs = answers(policy, tokenizer, judge.prompts, config.template,
                                  config.max_new_tokens, 1.0, config.seed,
                                  purpose="dev")
                logged |= judge.compare(outputs)
                if logged["eval/win_rate"] > best["win_rate"]:
                    best = {"win_rate": logged["eval/win_rate"], "iteration": iteration}
                    if log.first:
                        save_model(policy, log.folder / "best", tokenizer=tokenizer)
        log.end_step(iteration, logged, best, **players.parts())

    with distributed.gathered(policy):
        if log.first:
            save_model(policy, log.folder / "policy", tokenizer=tokenizer)
    chosen = {"best_iteration": best["iteration"], "best_dev_win_rate": best["win_rate"]}
    log.finish({"iterations": config.iterations, "episodes": config.iterations * config.rollouts,
                "startup_checks": "skipped" if config.skip_checks else "passed",
                "check_seconds": round(check_seconds, 3),
                **(chosen if judge else {})})


if __name__ == "__main__":
    run(lambda: train(parse(Config, prog="train_ppo.py", description=__doc__)))
