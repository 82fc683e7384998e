"""Who takes part in a PPO run: policy, reference, reward model and, for the baseline, a critic.

`load` reads them and refuses what does not fit together, `optimise` shares them out over ranks and
gives those that learn an optimizer, `at_hand` brings one to the policy's device while it is needed.
train_ppo.py has the algorithm; its Config is what the functions here read.
"""

import contextlib
import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fgrlhf import checks, distributed, lora
from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer
from fgrlhf.config import UserError
from fgrlhf.encode import encode_prompt
from fgrlhf.files import each
from fgrlhf.judge import OracleJudge
from fgrlhf.model import LLaMA
from fgrlhf.optimizer import Optimizer, check_in_backward
from fgrlhf.readers import read_prompts
from fgrlhf.reward import RewardModel, load_reward
from fgrlhf.rollout import locate, states_before, unflatten
from fgrlhf.rules import Subject
from fgrlhf.tokenizer import Tokenizer


class Critic(nn.Module):
    """V(s_t), the baseline's alone: a copy of the reward model, read one position earlier."""

    def __init__(self, reward: RewardModel):
        super().__init__()
        self.trunk, self.head = lora.clone(reward.trunk), copy.deepcopy(reward.head)
        self.register_buffer("mean", reward.mean.clone())
        self.register_buffer("scale", reward.scale.clone())

    def forward(self, sequences) -> Tensor:
        """Values [B, T] in calibrated reward; values[:, t] is known before token t is chosen."""
        at = locate(sequences)
        hidden = states_before(self.trunk, sequences, at)                            # [N, D]
        values = (self.head(hidden.to(self.head.weight.dtype))[:, 0] - self.mean) / self.scale
        return unflatten(values, at, sequences)


class Players(NamedTuple):
    """What a run works with, besides its Config."""

    tokenizer: Tokenizer
    policy: LLaMA
    ref: LLaMA                          # the policy as it starts, frozen
    reward_model: RewardModel           # frozen
    critic: Critic | None               # rlhf alone
    optimizers: dict[str, Optimizer]    # "policy" and, for rlhf, "critic"
    prompts: list[list[int]]            # ids, BOS first
    judge: OracleJudge | None           # of dev answers

    def trained(self) -> dict[str, nn.Module]:
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def parts(self) -> dict:
        """What a training state holds."""
        return {name: lora.Own(model) for name, model in self.trained().items()} | {
            f"optimizer_{name}": optimizer for name, optimizer in self.optimizers.items()}

    def check(self, config) -> None:
        """The startup checks, while the policy is still the reference; UserError if one fails."""
        checks.require(Subject(self.policy, self.ref, self.reward_model, self.tokenizer,
                               self.prompts, config.max_new_tokens, config.temperature, config.beta,
                               config.rollouts, config.microbatch, self.critic), config.seed)


def load(config, device: torch.device) -> Players:
    """Read models, prompts and judge; whatever does not fit together is refused here."""
    tokenizer = load_tokenizer(config.policy)
    if load_tokenizer(config.reward).sha256 != tokenizer.sha256:
        raise UserError(f"--reward {config.reward}: its tokenizer is not the one of "
                        f"--policy {config.policy}")
    dtype = getattr(torch, config.dtype)
    trunks = {} if config.lora_rank else None           # shared by all models of the run
    read = lambda: (load_adapted(config.policy, device, dtype, config.lora_rank, config.seed,
                                 trunks) if config.lora_rank else
                    load_model(config.policy, device, dtype))
    policy, ref = read(), read().requires_grad_(False)
    reward_model = load_reward(config.reward, device, dtype, trunks).requires_grad_(False)
    if config.method == "fine-grained" and reward_model.kind != "token":
        raise UserError(f"--reward {config.reward}: expected a token-level reward model for "
                        "--method fine-grained, got a sequence-level one; see train_rm.py --kind")
    critic = lora.train(Critic(reward_model)) if config.method == "rlhf" else None

    room = policy.config.max_seq_len - config.max_new_tokens
    if room < 1:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: expected fewer than the "
                        f"policy's context of {policy.config.max_seq_len} tokens")
    encode = lambda record: encode_prompt(tokenizer, record, config.template, room)
    prompts = each(read_prompts(config.prompts, config.on_bad_record), encode, config.on_bad_record,
                   config.prompts)
    judge = None
    if config.dev_prompts:
        judge = OracleJudge.load(config.world, config.dev_prompts, config.dev_reference)
        for record in judge.prompts:                        # refuse a long one now, not later
            encode(record)
    return Players(tokenizer, policy, ref, reward_model, critic, {}, prompts, judge)


def optimise(config, players: Players) -> Players:
    """Share the models out over the ranks, then give those that learn their optimizers."""
    check_in_backward(config.step_in_backward, config.microbatch)
    if config.offload and (config.lora_rank or distributed.size() > 1):
        raise UserError("--offload: expected one process and --lora-rank 0; a shared trunk and "
                        "sharded models stay where they are")
    for model in (players.policy, players.ref, players.reward_model, players.critic):
        if model is not None:
            distributed.shard(model)
    for model in players.trained().values():
        getattr(model, "trunk", model).activation_checkpointing = config.checkpoint_activations
    for model in (players.ref, players.reward_model) if config.offload else ():
        model.to("cpu")
    rates = {"policy": config.lr, "critic": config.value_lr}
    steps = config.lr_decay * config.iterations * config.epochs * config.minibatches
    return players._replace(optimizers={name: Optimizer(
        model, rates[name], config.warmup, steps, in_backward=config.step_in_backward)
        for name, model in players.trained().items()})


@contextlib.contextmanager
def at_hand(config, players: Players, *models: nn.Module):
    """Inside, the models are whole and on the policy's device, for passes without gradient."""
    away = [m for m in models if config.offload and m in (players.ref, players.reward_model)]
    for model in away:
        model.to(players.policy.head.device)
    with distributed.gathered(*models):
        yield
    for model in away:
        model.to("cpu")
