"""The pieces of work that are timed: a training step, generation, and whole PPO iterations.

All use a random LLaMA of 6 layers, V 2048, untied, of width 256 or 64.

    training step     16 rows of 128 tokens: cross-entropy, backward, clipping, Adam
    generation        64 prompts of 32 tokens, 64 new tokens each
    PPO iteration     64 responses of 48 tokens to prompts of 16 tokens, then 2 epochs of 2
                      minibatches, each one forward pass: `make_experience` and `update` of
                      train_ppo.py. "Ends early": EOS has probability 0.0148 at every step, so a
                      response has 34 tokens on average

The learning rate is 0, so that every round does the same work.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from fgrlhf.baseline import Critic
from fgrlhf.bench.floor import Floor, iteration_floor
from fgrlhf.engine.draws import random_ids
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.players import Players, prepare
from fgrlhf.model import LLaMA, LLaMAConfig, build
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import sample
from fgrlhf.sequences import Sequences, by_length
from fgrlhf.sft import loss_of
from train_ppo import Config, make_experience, minibatches, scored_together, update

V, EOS, END = 2048, 2, 0.0148
MODELS = {D: LLaMAConfig(D, 6, H, H, V, F, max_seq_len=256)
          for D, H, F in ((256, 8, 704), (64, 4, 176))}


class Work(NamedTuple):
    run: Callable[[], object]
    floor: Callable[[], object]         # the bare matmuls of `run`
    tokens: int                         # prompt and response tokens, without padding


def model_of(width: int, device: str, seed: int = 0) -> LLaMA:
    """Builds a random model of one of the two widths."""
    return build(MODELS[width], seed).to(device)


def training_step(width: int, device: str) -> Work:
    model = model_of(width, device)
    optimizer, ones = Optimizer(model, 0.0), torch.ones(16, dtype=torch.long, device=device)
    sequences = Sequences(torch.tensor(random_ids([129] * 16, V), device=device), ones, 128 * ones)

    def run():
        loss_of(model, sequences).backward()
        optimizer.step()
    floor = Floor(model)
    floor.trunk([128] * 16, gradient=True)
    floor.head(16 * 128, gradient=True)
    return Work(run, floor, 16 * 128)


def generation(width: int, device: str) -> Work:
    model, prompts = model_of(width, device), random_ids([32] * 64, V)
    floor = Floor(model)
    floor.generation(32, [64] * 64)
    draw = torch.Generator()
    return Work(lambda: sample(model, prompts, -1, 64, 1.0, draw.manual_seed(0)), floor, 64 * 96)


def iteration(method: str, early: bool, width: int, device: str) -> Work:
    policy = model_of(width, device)
    if early:
        end_early(policy)
    ref = model_of(width, device).requires_grad_(False)
    ref.load_state_dict(policy.state_dict())
    reward = RewardModel(model_of(width, device, 1), "token" if method == "fine-grained"
                         else "sequence").requires_grad_(False)
    critic = Critic(reward).requires_grad_(True) if method == "rlhf" else None
    config = Config(method=method, policy="", reward="", prompts="", out="", rollouts=64,
                    max_new_tokens=48, epochs=2, minibatches=2, microbatch=0, lr=0.0, value_lr=0.0)
    players = prepare(config, Players(SimpleNamespace(eos_id=EOS if early else -1), policy, ref,
                                      reward, critic, random_ids([16] * 64, V), {}))

    def run():
        _, batch = make_experience(config, players, 1)
        update(config, players, batch, 1)
        return batch.sequences
    sequences = run()
    updates = [part for epoch in range(config.epochs)
               for rows in minibatches(config, 1, epoch, list(range(config.rollouts)))
               for part in by_length(sequences, rows, config.microbatch)]
    groups = scored_together(config, sequences, 1, sequences.response_mask)
    floor = iteration_floor(policy, sequences, groups, updates, method == "rlhf")
    return Work(run, floor, int(sequences.lengths.sum()))


@torch.no_grad()
def end_early(model: LLaMA) -> None:
    """Gives EOS the probability END at every step, for any text before it.

    Coordinate 0 is 1 in every embedding, far above the others. After the last norm it is nearly a
    constant, and only the row of EOS in the head reads it.
    """
    model.tok_embeddings.weight[:, 0] = 1.0
    model.head[:, 0] = 0.0
    ids = torch.tensor(random_ids([32] * 8, V), device=model.head.device)
    model.head[EOS, 0] = math.log(END / (1 - END) * (V - 1)) / model.hidden(ids)[..., 0].mean()


ROWS: dict[str, Callable[[int, str], Work]] = {
    "training step": training_step,
    "generation": generation,
    "PPO with critic": lambda *where: iteration("rlhf", False, *where),
    "PPO, ends early": lambda *where: iteration("rlhf", True, *where),
    "fine-grained": lambda *where: iteration("fine-grained", False, *where),
    "fine-grained, ends early": lambda *where: iteration("fine-grained", True, *where),
}
