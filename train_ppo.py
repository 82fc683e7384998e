r"""Fine-grained PPO (the paper, section 2.2) and the PPO-RLHF it is compared with, in one loop.

    python train_ppo.py --method fine-grained --policy runs/sft/policy \
        --reward runs/rm-token/reward --prompts train.jsonl --out runs/fine-grained
    python train_ppo.py --method rlhf --policy runs/sft/policy \
        --reward runs/rm-sequence/reward --prompts train.jsonl --out runs/rlhf

The fine-grained method deletes four things from PPO: the critic, its loss, GAE, and the reward at
the end of the response. The reward of each token minus beta times its KL is, once standardised, its
advantage. One iteration:

    1. sample a batch of responses, keeping log pi_old of every token
    2. score them once, by the reference and by the reward model
    3. equation (5): r~_t = r_t - beta (logp_old_t - logp_ref_t)
    4. equation (6): A_t = standardised r~_t        | rlhf: GAE with a critic, then standardised
    5. equation (7): clipped updates                | rlhf: updates of the critic too
    6. log; every few iterations evaluate on dev prompts and keep the best policy

With --dev-prompts, --dev-reference and --world, the oracle of the built-in world compares the dev
answers with fixed answers (those of the SFT policy), and OUT/best is the policy with the best dev
win rate. OUT/policy is the last policy. --resume continues a stopped run.

The machinery behind the algorithm (fgrlhf/engine) is that of fgrlhf/sft.py, and `Players` holds the
models.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import fgrlhf                               # before torch: it sets how OpenMP's threads wait
from torch import Tensor

from fgrlhf.advantage import (
    penalise_kl, penalise_missing_eos, reward_to_go, standardise, without_eos)
from fgrlhf.baseline import generalised_advantage, value_loss
from fgrlhf.checkpoint import load_tokenizer, save_model
from fgrlhf.checks import accuracy, signs, startup
from fgrlhf.data.fields import UserError
from fgrlhf.encode import ReadingRecords, encode_prompt, lower_new_tokens
from fgrlhf.engine import distributed
from fgrlhf.engine.config import Machinery, arg, parse, refuse_unused, run
from fgrlhf.engine.distributed import Sums, microbatches
from fgrlhf.engine.draws import generator, permutation
from fgrlhf.engine.encoding import Encoding
from fgrlhf.engine.players import Players, inputs_of, load, prepare, prompt_room
from fgrlhf.engine.run import Run
from fgrlhf.engine.summary import Ending, command
from fgrlhf.group import METHODS as GROUPED
from fgrlhf.group import group_advantage
from fgrlhf.judge import answers
from fgrlhf.own_reward import is_own
from fgrlhf.ppo import (
    check_first_ratio, exact_kl_of, policy_loss, rollout_metrics, samples_of)
from fgrlhf.reward import save_reward
from fgrlhf.rollout import Rollout, sample_on_ranks
from fgrlhf.sequences import Scorer, Sequences, by_length
from fgrlhf.simulate.oracle import OracleJudge
from fgrlhf.simulate.world import world_arg
from fgrlhf.tokenizer import Tokenizer


# The flags that each method uses, of those that not every method uses.
USED = {"fine-grained": ("standardise",), **dict.fromkeys(GROUPED, ("standardise", "group")),
        "rlhf": ("gae_lambda", "value_lr", "value_clip", "save_critic")}


@dataclass(frozen=True, kw_only=True)
class Config(ReadingRecords, Machinery):                # and --template, --seed, --resume, ...
    method: str = arg(choices=("fine-grained", "rlhf", *GROUPED), help="token advantages; critic "
                      "and GAE; or other responses to the same prompt as the baseline (group.py)")
    policy: str = arg(help="folder of the SFT model; policy and frozen reference start from it")
    reward: str = arg(help="folder of the reward model; or module:function, a Python function of "
                      "your own (fgrlhf/own_reward.py)")
    prompts: str = arg(help="prompts to sample responses to")
    out: str = arg(help="folder for the policies and the logs")
    iterations: int = arg(30, least=1, help="number of iterations (rollout and update)")
    rollouts: int = arg(64, least=1, help="responses per iteration")
    max_new_tokens: int = arg(64, least=1, help="longest response; a longer one is truncated")
    temperature: float = arg(1.0, help="temperature of sampling, scoring and updating")
    beta: float = arg(0.5, least=0, help="KL coefficient: calibrated reward that a nat costs")
    gamma: float | None = arg(None, least=0, help="fine-grained: 0, the default, is the paper's "
                              "myopic advantage; above 0 it is a discounted reward-to-go. rlhf: "
                              "gamma of GAE, by default 1")
    standardise: str = arg("rms", choices=("rms", "mean-std", "none"),
                           help="fine-grained, rloo, grpo: how advantages are standardised per "
                           "batch")
    reward_eos: bool = arg(True, help="fine-grained: reward EOS like any token. Without, EOS gets "
                           "0, the average over rejected training responses: a reward model that "
                           "has seen shorter edits pays for every EOS")
    missing_eos_penalty: float = arg(0.0, least=0, help="taken off the reward of the last token "
                                     "of a response without EOS")
    mask_truncated: bool = arg(False, help="a response without EOS takes no part in the update: "
                               "neither in the loss, nor in the mean over tokens, nor in equation "
                               "(6)")
    group: int = arg(4, least=2, help="rloo, grpo: responses per prompt, a divisor of --rollouts")
    clip_eps: float = arg(0.2, least=0, help="the ratio is clipped to [1 - eps, 1 + eps]")
    epochs: int = arg(2, least=1, help="passes over each batch of rollouts")
    minibatches: int = arg(2, least=1, help="updates per pass")
    lr: float = arg(1.2e-3, least=0, help="Adam's learning rate")
    warmup: int = arg(5, least=0, help="warm-up steps")
    lr_decay: bool = arg(False, help="after warm-up, let the learning rates fall linearly to 0 at "
                         "the last planned update")
    max_kl: float = arg(0.0, least=0, help="end the updates above this KL(old || new); 0: never")
    gae_lambda: float = arg(0.95, least=0, help="rlhf: lambda of GAE")
    value_lr: float = arg(6e-4, least=0, help="rlhf: the critic's learning rate")
    value_clip: float = arg(0.2, least=0, help="rlhf: clip of the critic's change per batch")
    dev_prompts: str | None = arg(None, help="dev prompts, to choose the best policy")
    dev_reference: str | None = arg(None, help="the reference's outputs on the dev prompts")
    world: int | str | None = world_arg("seed of the built-in world whose oracle judges dev "
                                        "answers", None)
    eval_every: int = arg(5, least=1, help="iterations between dev evaluations; also after "
                          "iterations 2, 4, ... up to twice this number")
    save_critic: bool = arg(False, help="rlhf: keep the critic in OUT/critic")
    save_samples: bool = arg(False, help="keep the responses of every iteration, with their "
                             "rewards and KL, in OUT/samples.jsonl")
    exact_kl: int = arg(0, least=0, help="also log the KL over the whole vocabulary, of this many "
                        "responses per iteration")
    skip_checks: bool = arg(False, help="start without the startup checks")
    microbatch: int = arg(16, least=0, help="responses per forward pass; changes memory and speed, "
                          "not results; 0: the whole minibatch")
    decode_batch: int = arg(0, least=0, help="responses decoded at once; changes memory and speed, "
                            "not results; 0: all")
    offload: bool = arg(False, help="keep reference and reward model in host memory between uses")
    save_every: int = arg(10, least=1, help="iterations between training states for --resume")
    keep_last: bool = arg(False, help="keep the training state of the last iteration, from which "
                          "--resume with more --iterations goes on")

    def __post_init__(self):
        if self.gamma is None:                              # config.json shows the resolved value
            gamma = 1.0 if self.method == "rlhf" else 0.0
            object.__setattr__(self, "gamma", gamma)        # the dataclass is frozen


class Batch(NamedTuple):
    """One iteration's responses with all that the update needs: [B, T], except the sequences."""

    sequences: Sequences
    mask: Tensor                        # True on response tokens that are updated: all, except
                                        # with --mask-truncated
    logp_old: Tensor
    logp_ref: Tensor
    rewards: Tensor                     # calibrated, before the KL is taken off
    advantages: Tensor
    values: Tensor | None               # of the critic before the update; only for rlhf
    returns: Tensor | None

    def rows(self, index: Tensor) -> "Batch":
        """Returns the selected rows, with the padding cut to the longest of them."""
        sequences = self.sequences.rows(index)
        T = int(sequences.response_lengths.max())
        per_token = self[1:]                                # every field but the sequences
        return Batch(sequences, *(None if x is None else x[index, :T] for x in per_token))

    def updated_rows(self) -> list[int]:
        """Returns the rows that take part in the update: all, except with --mask-truncated."""
        return self.mask.any(-1).nonzero()[:, 0].tolist()

    def tensors(self) -> dict[str, Tensor]:
        """Returns every tensor by name."""
        named = self._asdict() | self.sequences._asdict()
        return {name: x for name, x in named.items() if isinstance(x, Tensor)}


def train(config: Config) -> None:
    """Trains the policy: loads the models, repeats steps 1 to 6, saves."""
    device = distributed.start(distributed.pick_device(config.device))
    check_flags(config)
    tokenizer = load_tokenizer(config.policy)
    log = Run(config, tokenizer.sha256, *inputs_of(config),     # refuses an --out that is in use
              keep_last=config.keep_last)
    judge = dev_judge(config, tokenizer)
    players = load(config, device)
    if log.writes:
        accuracy.warn(config.reward, accuracy.recorded(config.reward))
    check_seconds = 0.0
    if not config.skip_checks:                  # samples some responses, tries rules 1, 2, 4, 5, 6
        check_seconds = startup.require(startup.subject(config, players), config.seed)
    players = prepare(config, players)
    learning, state = players.learning(), players.state()
    best = {"win_rate": -1.0, "iteration": 0} | log.restore(**state)

    for iteration in log.steps(config.iterations, config.method):
        rollout, batch = make_experience(config, players, iteration)        # steps 1 to 4
        with log.guard(iteration, learning, **batch.tensors()):     # stops at NaN and infinity
            statistics = measure(config, players, rollout, batch, log)
            if iteration == 1:                  # the policy is still the reference
                check_first_ratio(batch.logp_ref, batch.logp_old, what="KL in iteration 1",
                                  cause="the reference is not the policy as it starts")
            metrics = update(config, players, batch, iteration) | statistics        # step 5
        # step 6
        metrics["rollout/episodes"] = iteration * config.rollouts
        if judge and evaluates(config, iteration):
            metrics |= evaluate(config, players, judge, log, best, iteration)
        if config.save_samples:
            drawn = prompts_of(config, len(players.prompts), iteration)
            log.append("samples.jsonl", {"step": iteration, "responses": samples_of(
                rollout, batch.logp_ref, batch.rewards, players.tokenizer,
                [(i, players.prompt_ids[i]) for i in drawn])})
        log.end_step(iteration, metrics, best, **state)

    finish(config, players, log, best if judge else {}, check_seconds)


def make_experience(config: Config, players: Players, iteration: int) -> tuple[Rollout, Batch]:
    """Takes steps 1 to 4: responses, their scores, equations (5) and (6)."""
    # 1. sample a batch of responses
    prompts = [players.prompts[i] for i in prompts_of(config, len(players.prompts), iteration)]
    rollout = sample_on_ranks(players.policy, prompts, players.tokenizer.eos_id,
                              config.max_new_tokens, config.temperature,
                              generator(config.seed, "rollout", iteration), config.decode_batch)
    # 2. score them once
    sequences, mask = rollout.sequences, rollout.sequences.response_mask
    updated_mask = mask & ~rollout.truncated[:, None] if config.mask_truncated else mask
    scorer = Scorer(sequences, scored_together(config, sequences, iteration, updated_mask),
                    config.temperature)
    if config.dtype != "float32":
        # In bfloat16 decoding token by token rounds differently from a pass over whole responses.
        # logp_old is scored again here, so that only the startup check compares it with sampling.
        rollout = rollout._replace(logp_old=scorer.logp(players.policy))
    logp_old, logp_ref = rollout.logp_old, scorer.logp(players.ref)
    rewards = scorer.rewards(players.reward_model)          # calibrated
    if not config.reward_eos:
        rewards = without_eos(rewards, sequences, players.tokenizer.eos_id)
    if config.missing_eos_penalty:
        rewards = penalise_missing_eos(rewards, sequences, rollout.truncated,
                                       config.missing_eos_penalty)
    # 3. equation (5): the reward of each token minus beta times its KL
    penalised = penalise_kl(rewards, logp_old, logp_ref, mask, config.beta)
    # 4. the advantage of each token, then equation (6)
    values = returns = None
    if config.method == "fine-grained":
        advantages = reward_to_go(penalised, mask, config.gamma)    # gamma 0, the paper's: r~_t
    elif config.method in GROUPED:
        # a rival: one advantage per response
        advantages = group_advantage(penalised, mask, config.group, config.method)
    else:
        # the baseline: GAE with the values of the critic
        values = scorer.values(players.critic)
        advantages, returns = generalised_advantage(penalised, values, mask, config.gamma,
                                                    config.gae_lambda)
    how = "mean-std" if config.method == "rlhf" else config.standardise
    advantages = standardise(advantages, updated_mask, how)
    return rollout, Batch(sequences, updated_mask, logp_old, logp_ref, rewards, advantages, values,
                          returns)


def measure(config: Config, players: Players, rollout: Rollout, batch: Batch,
            log: Run) -> dict[str, float]:
    """Returns the metrics of the responses, before the update."""
    statistics = rollout_metrics(rollout, batch.logp_ref, batch.rewards)
    if config.exact_kl:
        with log.untimed(), distributed.gathered(players.policy, players.ref,
                                                 device=batch.mask.device):
            statistics["rollout/kl_exact"] = exact_kl_of(
                players.policy, players.ref, batch.sequences, config.temperature, config.exact_kl,
                config.microbatch)
    return statistics


def update(config: Config, players: Players, batch: Batch, iteration: int) -> dict[str, float]:
    """Takes step 5: epochs of minibatch updates by equation (7), and of the critic for rlhf.

    Returns the means of the last epoch's statistics and the last gradient norms.
    """
    updated, metrics = batch.updated_rows(), {}
    masked = {"ppo/masked": len(batch.mask) - len(updated)} if config.mask_truncated else {}
    for epoch in range(config.epochs):
        done: list[dict[str, float]] = []       # the statistics of each minibatch of the epoch
        for rows in minibatches(config, iteration, epoch, updated):
            tokens, sums = int(batch.mask[rows].sum()), Sums()
            for part, weight in microbatches(rows, config.microbatch,
                                             partial(by_length, batch.sequences)):
                b = batch.rows(part)            # weight is 1, or 0 for a rank that has no rows left
                # equation (7)
                out = policy_loss(players.policy, b.sequences, b.logp_old, b.advantages,
                                  config.clip_eps, config.temperature, tokens)
                if epoch == 0 and not done and weight:
                    check_first_ratio(out.logp, b.logp_old[b.sequences.response_mask])
                (weight * out.loss).backward()
                sums.add(weight, {"ppo/loss": out.loss, "ppo/clip_fraction": out.clip_fraction,
                                  "ppo/kl_k3": out.kl_k3, "ppo/entropy": out.entropy})
                if players.critic is not None:
                    loss = value_loss(players.critic(b.sequences), b.values, b.returns, b.mask,
                                      config.value_clip, tokens)
                    (weight * loss).backward()
                    sums.add(weight, {"ppo/value_loss": loss})
            done.append(sums.over_ranks())
            metrics = {name: sum(one[name] for one in done) / len(done) for name in done[0]}
            for name, optimizer in players.optimizers.items():
                metrics[f"ppo/gradient_norm_{name}"] = optimizer.step()     # clips, steps, clears
            if config.max_kl and done[-1]["ppo/kl_k3"] > config.max_kl:
                return metrics | masked | {"ppo/stopped_early": 1.0}
    return metrics | masked


def prompts_of(config: Config, count: int, iteration: int) -> list[int]:
    """Returns the prompts of an iteration, from shuffled passes over all `count` prompts.

    With rloo and grpo each prompt comes --group times in a row.
    """
    group = config.group if config.method in GROUPED else 1
    prompts = config.rollouts // group
    drawn = range((iteration - 1) * prompts, iteration * prompts)       # counted over iterations
    passes = {k: permutation(count, config.seed, k) for k in {i // count for i in drawn}}
    return [passes[i // count][i % count] for i in drawn for _ in range(group)]


def minibatches(config: Config, iteration: int, epoch: int, updated: list[int]) -> list[list[int]]:
    """Returns the rows of each update of one epoch, in parts of equal size up to one row.

    updated: the rows that take part. With fewer rows than --minibatches there are fewer updates.
    """
    B, parts = len(updated), config.minibatches
    order = permutation(B, config.seed, iteration * config.epochs + epoch)
    cut = [order[B * i // parts:B * (i + 1) // parts] for i in range(parts)]
    return [[updated[i] for i in part] for part in cut if part]


def scored_together(config: Config, sequences: Sequences, iteration: int,
                    updated_mask: Tensor) -> list[Tensor]:
    """Returns this rank's rows, in the groups that share a forward pass when they are scored.

    updated_mask [B, T]: True on tokens that take part in the update.

    A bfloat16 matmul of another shape rounds a row differently, by up to 0.04 nats per token. In
    bfloat16 the groups are therefore those of the first epoch's updates, and the first ratio is 1
    to within 1e-6.
    """
    whole = [list(range(config.rollouts))]
    if config.dtype != "float32":
        updated, others = (rows.nonzero()[:, 0].tolist()
                            for rows in (updated_mask.any(-1), ~updated_mask.any(-1)))
        whole = [*minibatches(config, iteration, 0, updated), others]
    return [group for rows in whole for group in
            by_length(sequences, distributed.rank_rows(rows), config.microbatch)]


def check_flags(config: Config) -> None:
    """Refuses flags that contradict one another, before any model is loaded."""
    if config.rollouts < config.minibatches:
        raise UserError(f"--minibatches {config.minibatches}: "
                        f"expected 1..{config.rollouts} (--rollouts)")
    if config.method in GROUPED and config.rollouts % config.group:
        raise UserError(f"--group {config.group}: expected a divisor of --rollouts "
                        f"{config.rollouts}")
    if not config.reward_eos and (config.method != "fine-grained" or is_own(config.reward)):
        raise UserError("--no-reward-eos: expected --method fine-grained and a reward model, whose "
                        "average reward is 0; otherwise the reward at EOS is needed")
    if config.mask_truncated and config.missing_eos_penalty:
        raise UserError("--mask-truncated and --missing-eos-penalty: expected one of them, because "
                        "a response that takes no part in the update cannot pay a penalty")
    if not config.temperature > 0:
        raise UserError(f"--temperature {config.temperature}: expected a number above 0")
    for name in ("gamma", "gae_lambda"):
        if getattr(config, name) > 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected 0 to 1")
    refuse_unused(config, "method", USED)
    if config.method in GROUPED and config.gamma:
        raise UserError(f"--gamma {config.gamma}: expected --method fine-grained or rlhf; "
                        f"{config.method} has one advantage per response")
    missing = [config.dev_prompts is None, config.dev_reference is None, config.world is None]
    if any(missing) and not all(missing):
        raise UserError("--dev-prompts, --dev-reference and --world: expected all three or none")
    if config.offload and (config.lora_rank or distributed.size() > 1):
        raise UserError("--offload: expected one process and --lora-rank 0; a shared trunk and "
                        "sharded models stay where they are")


def dev_judge(config: Config, tokenizer: Tokenizer) -> OracleJudge | None:
    """Returns the judge of dev answers, or None. Refuses dev prompts that are too long."""
    if config.dev_prompts is None:
        return None
    judge = OracleJudge.load(config.world, config.dev_prompts, config.dev_reference)
    room = prompt_room(config)
    for record in judge.prompts:
        encode_prompt(tokenizer, record, config.template, room,             # refuses a long one
                      lower_new_tokens(room + config.max_new_tokens, config.max_new_tokens))
    return judge


def evaluates(config: Config, iteration: int) -> bool:
    """Returns True every --eval-every iterations, at the last, and at 2, 4, .. at first.

    Policies change fastest at first, and how fast is one of the questions.
    """
    early = iteration <= 2 * config.eval_every and iteration % 2 == 0
    return early or iteration % config.eval_every == 0 or iteration == config.iterations


def evaluate(config: Config, players: Players, judge: OracleJudge, log: Run, best: dict,
             iteration: int) -> dict[str, float]:
    """Judges the dev answers. If the policy is the best so far, updates `best` and OUT/best."""
    with log.untimed(), distributed.gathered(players.policy):
        outputs = answers(players.policy, players.tokenizer, judge.prompts, config.template,
                          config.max_new_tokens, config.temperature, config.seed, purpose="dev")
        metrics = judge.compare(outputs)
        if metrics["eval/win_rate"] > best["win_rate"]:
            best |= {"win_rate": metrics["eval/win_rate"], "iteration": iteration}
            if log.writes:
                save_model(players.policy, log.folder / "best", tokenizer=players.tokenizer,
                           encoding=Encoding(config.template))
    return metrics


def finish(config: Config, players: Players, log: Run, best: dict, check_seconds: float) -> None:
    """Saves the policy, says what came out and what is next, and names signs of trouble.

    best: the best dev win rate and its iteration, {} for a run without dev prompts.
    """
    with distributed.gathered(players.policy):
        if log.writes:
            save_model(players.policy, log.folder / "policy", tokenizer=players.tokenizer,
                       encoding=Encoding(config.template))
    if config.save_critic:                                          # only with rlhf: check_flags
        with distributed.gathered(players.critic):
            if log.writes:
                save_reward(players.critic, log.folder / "critic", players.tokenizer)
    chosen = best and {"best_iteration": best["iteration"], "best_dev_win_rate": best["win_rate"]}
    after = command("eval.py outputs --policy {policy} --prompts PROMPTS --out ANSWERS.json",
                    config.template, policy=log.folder / ("best" if best else "policy"))
    log.finish({"iterations": config.iterations, "prompts": len(players.prompts),
                "episodes": config.iterations * config.rollouts,
                "startup_checks": "skipped" if config.skip_checks else "passed",
                "check_seconds": round(check_seconds, 3), **chosen},
               Ending(f"policy by {config.method} PPO", after))
    for sign in signs.signs_of_run(log.folder) if log.writes else ():
        print(f"sign of trouble: {sign}", file=sys.stderr)


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
