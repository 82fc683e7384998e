"""The models of a PPO run: how they are loaded, and shared out over ranks and devices.

train_ppo.py has the algorithm. The functions here read its Config.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fgrlhf.baseline import Critic
from fgrlhf.checkpoint import load_model, load_to_train, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import each
from fgrlhf.data.readers import read_prompts
from fgrlhf.data.records import Prompt
from fgrlhf.encode import encode_prompt, lower_new_tokens
from fgrlhf.engine import distributed, lora
from fgrlhf.engine.encoding import check_encoding
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.states import TrainableState
from fgrlhf.model import LLaMA
from fgrlhf.own_reward import OwnReward, find, is_own, start_of_critic
from fgrlhf.reward import RewardModel, describe_reward, load_reward
from fgrlhf.templates import check_template, say_hidden_passages
from fgrlhf.tokenizer import Tokenizer


class Players(NamedTuple):
    """The models of one run, the tokenizer they share, and the prompts."""

    tokenizer: Tokenizer
    policy: LLaMA
    ref: LLaMA                          # the policy as it starts, frozen
    reward_model: RewardModel | OwnReward       # frozen
    critic: Critic | None               # only for method rlhf
    prompts: list[list[int]]            # ids, BOS first where the tokenizer adds one
    optimizers: dict[str, Optimizer]    # "policy" and, for rlhf, "critic"; see `prepare`
    prompt_ids: tuple[str, ...] = ()    # the `id` of the record of each prompt

    def learning(self) -> dict[str, nn.Module]:
        """The models that learn, by name."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    def state(self) -> dict:
        """The parts of a training state, by name."""
        return {name: TrainableState(model) for name, model in self.learning().items()} | {
            f"optimizer_{name}": optimizer for name, optimizer in self.optimizers.items()}


def inputs_of(config) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Returns the flags whose files a run depends on, and the file of a reward of one's own."""
    flags = ("policy", "reward", "prompts", "dev_prompts", "dev_reference")
    if not is_own(config.reward):
        return flags, ()
    # --reward is then a name, which --resume compares like any other setting
    return tuple(name for name in flags if name != "reward"), (find(config.reward).file,)


def prompt_room(config) -> int:
    """Returns how many tokens a prompt may have: the policy's context less the longest response.

    No weight is read. Raises UserError when there is no room for BOS and one token.
    """
    context = load_model(config.policy, device="meta").config.max_seq_len
    if config.max_new_tokens > context - 2:
        raise UserError(f"--max-new-tokens {config.max_new_tokens}: expected at most "
                        f"{context - 2}, because prompt and response share the context of "
                        f"{config.policy}, {context} tokens; lower it")
    return context - config.max_new_tokens


def check_reward(config, tokenizer: Tokenizer) -> None:
    """Refuses a reward model with another tokenizer, or of another kind than the method needs."""
    kind = describe_reward(config.reward)["kind"]
    if load_tokenizer(config.reward).sha256 != tokenizer.sha256:
        raise UserError(f"--reward {config.reward}: its tokenizer is not the one of "
                        f"--policy {config.policy}; train both from one SFT model")
    if config.method == "rlhf" and config.lora_rank and not lora.is_folder(config.reward):
        raise UserError(f"--reward {config.reward}: expected adapters for --method rlhf "
                        "--lora-rank, because the critic starts as this model and would train all "
                        "its weights; give train_rm.py --lora-rank too")
    if config.method == "fine-grained" and kind != "token":
        raise UserError(f"--reward {config.reward}: expected a token-level reward model for "
                        "--method fine-grained, got a sequence-level one; see train_rm.py --kind")


def load(config, device: torch.device) -> Players:
    """Reads prompts and models. Raises UserError for whatever does not fit together.

    Everything that can be refused without weights is refused before a weight is read.
    """
    tokenizer = load_tokenizer(config.policy)
    own = None
    if is_own(config.reward):
        own = OwnReward(find(config.reward), config.method, tokenizer)
    else:
        check_reward(config, tokenizer)
    check_encoding(config.policy, template=config.template)
    encoding = None if own else check_encoding(config.reward, template=config.template)
    check_template(tokenizer, config.template, trains=True, model=config.policy)
    room, judged = prompt_room(config), encoding and encoding.prompt_tokens
    advice = (lower_new_tokens(room + config.max_new_tokens, config.max_new_tokens)
              + "; --on-bad-record skip leaves it out")

    def encode(record: Prompt) -> tuple[str, list[int]]:
        ids = encode_prompt(tokenizer, record, config.template, room, advice)
        if judged and len(ids) > judged:
            raise UserError(f"record {record.id!r}: prompt: expected at most {judged} tokens, as "
                            f"{config.reward} was trained with --prompt-tokens {judged}, got "
                            f"{len(ids)}; shorten it, or pass --on-bad-record skip")
        return record.id, ids
    records = read_prompts(config.prompts, config.on_bad_record)
    prompts = each(records, encode, config.on_bad_record, config.prompts)
    say_hidden_passages(records, config.template, config.prompts)

    dtype = getattr(torch, config.dtype)
    trunks = {} if config.lora_rank else None           # one trunk, shared by all models of the run
    policy, ref = (load_to_train(config.policy, device, dtype, config.lora_rank, config.seed,
                                 trunks) for _ in range(2))
    ref.requires_grad_(False)
    reward_model = own or load_reward(config.reward, device, dtype, trunks).requires_grad_(False)
    critic = None
    if config.method == "rlhf":
        critic = lora.train(Critic(start_of_critic(policy, config.seed) if own else reward_model))
    return Players(tokenizer, policy, ref, reward_model, critic,
                   [ids for _, ids in prompts], {}, tuple(record_id for record_id, _ in prompts))


def prepare(config, players: Players) -> Players:
    """Shares the models out over ranks and devices, and gives those that learn an optimizer."""
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
