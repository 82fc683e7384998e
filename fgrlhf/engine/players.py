"""The models of a PPO run: how they are loaded, and shared out over ranks and devices.

train_ppo.py has the algorithm. The functions here read its Config.
"""

from typing import NamedTuple

import torch
from torch import nn

from fgrlhf.baseline import Critic
from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import each
from fgrlhf.data.readers import read_prompts
from fgrlhf.encode import encode_prompt
from fgrlhf.engine import distributed, lora
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.states import TrainableState
from fgrlhf.model import LLaMA
from fgrlhf.reward import RewardModel, load_reward
from fgrlhf.tokenizer import Tokenizer


class Players(NamedTuple):
    """The models of one run, the tokenizer they share, and the prompts."""

    tokenizer: Tokenizer
    policy: LLaMA
    ref: LLaMA                          # the policy as it starts, frozen
    reward_model: RewardModel           # frozen
    critic: Critic | None               # only for method rlhf
    prompts: list[list[int]]            # ids, BOS first
    optimizers: dict[str, Optimizer]    # "policy" and, for rlhf, "critic"; see `prepare`

    def learning(self) -> dict[str, nn.Module]:
        """The models that learn, by name."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def parts(self) -> dict:
        """The parts of a training state, by name."""
        return {name: TrainableState(model) for name, model in self.learning().items()} | {
            f"optimizer_{name}": optimizer for name, optimizer in self.optimizers.items()}


def load(config, device: torch.device) -> Players:
    """Reads models and prompts. Raises UserError for whatever does not fit together."""
    tokenizer = load_tokenizer(config.policy)
    if load_tokenizer(config.reward).sha256 != tokenizer.sha256:
        raise UserError(f"--reward {config.reward}: its tokenizer is not the one of "
                        f"--policy {config.policy}")
    dtype = getattr(torch, config.dtype)
    trunks = {} if config.lora_rank else None           # one trunk, shared by all models of the run

    def read_policy() -> LLaMA:
        if config.lora_rank:
            return load_adapted(config.policy, device, dtype, config.lora_rank, config.seed, trunks)
        return load_model(config.policy, device, dtype)
    policy, ref = read_policy(), read_policy().requires_grad_(False)
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
    return Players(tokenizer, policy, ref, reward_model, critic, prompts, {})


def prepare(config, players: Players) -> Players:
    """Shares the models out over ranks and devices, and gives those that learn an optimizer."""
    if config.offload and (config.lora_rank or distributed.size() > 1):
        raise UserError("--offload: expected one process and --lora-rank 0; a shared trunk and "
                        "sharded models stay where they are")
    for model in (players.policy, players.ref, players.reward_model, players.critic):
        if model is not None:
            distributed.shard(model)
    for model in players.learning().values():
        getattr(model, "trunk", model).activation_checkpointing = config.checkpoint_activations
    for model in (players.ref, players.reward_model) if config.offload else ():
        model.to("cpu")
    rates = {"policy": config.lr, "critic": config.value_lr}
    steps = config.lr_decay * config.iterations * config.epochs * config.minibatches
    return players._replace(optimizers={
        name: Optimizer(model, rates[name], config.warmup, steps)
        for name, model in players.learning().items()})
