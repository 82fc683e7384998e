r"""Compares token rewards and GAE with the true advantage of each token, which the oracle can tell.

    python -m fgrlhf.simulate.advantages --world 0 --policy runs/sft/policy --prompts dev.jsonl \
        --rewards runs/rm-token/reward,runs/rm-paper/reward --out advantages.json

The method uses the reward of a token as its advantage. In the built-in world the advantage can be
measured: with V(s) the expected return of the policy from the state s,

    A_t = V(s_{t+1}) - V(s_t)       s_t: the prompt and the response before token t
    V(s) ~ -mean errors of --completions responses that the policy samples from s on

The return is minus the number of errors of the whole response, so V after the last token is exact.
A reward of +1 from a token thus means that the response will have one error less than expected.

For each estimate (r_t of each reward model; GAE with --critic and --critic-reward, lambda .95) the
command writes, over all tokens and by their place:

    correlation     Pearson's, with the measured A_t
    sign            share of the tokens with |A_t| >= .5 where the estimate, less its median over
                    all tokens, has the sign of A_t

Two halves of the completions give two measurements of A_t. Their correlation, corrected for twice
the length by Spearman and Brown, says how far the measurement itself can be trusted: no estimate
can be expected to correlate by more than its square root, `ceiling`.
"""

import json
import math
import sys
from dataclasses import dataclass

import fgrlhf                               # before torch: it sets how OpenMP's threads wait
import numpy as np
import torch
from tqdm import tqdm

from fgrlhf.baseline import Critic, generalised_advantage
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.data.readers import read_prompts
from fgrlhf.encode import encode_prompt
from fgrlhf.engine.config import Computation, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.draws import generator
from fgrlhf.engine.encoding import check_encoding
from fgrlhf.engine.places import records_with, refuse_outputs
from fgrlhf.reward import describe_reward, load_reward
from fgrlhf.rollout import Rollout, sample
from fgrlhf.simulate.origin import check_requests
from fgrlhf.simulate.world import World, world_arg

DECISIVE = 0.5                  # errors: below it the sign of a measured advantage is noise
PLACES = ("error", "behind", "elsewhere")


@dataclass(frozen=True, kw_only=True)
class Config(Computation):
    world: int | str = world_arg("seed of the world")
    policy: str = arg(help="folder of the policy, whose advantages are measured")
    prompts: str = arg(help="prompts of the world")
    rewards: str = arg(help="folders of token-level reward models, with commas between them")
    out: str = arg(help="file for the figures")
    critic: str | None = arg(None, help="folder of a critic (train_ppo.py --save-critic)")
    critic_reward: str | None = arg(None, help="folder of the reward model it was trained with")
    limit: int = arg(60, least=1, help="number of prompts, with one response each")
    completions: int = arg(16, least=2, help="responses sampled from each state, an even number")
    max_new_tokens: int = arg(64, least=1, help="longest response")
    seed: int = arg(0, help="seed of the sampling")


@torch.no_grad()
def values_of(policy, tokenizer, world: World, prompt: str, prompt_ids: list[int],
              response: list[int], config: Config, draw: torch.Generator) -> np.ndarray:
    """Returns V of every state of a response, [T + 1, 2]: one measurement by each half."""
    T, half = len(response), config.completions // 2
    V = np.empty((T + 1, 2))
    V[T] = -len(world.errors(prompt, tokenizer.decode(response).strip()))
    states = [prompt_ids + response[:t] for t in range(T) for _ in range(2 * half)]
    rollout = sample(policy, states, tokenizer.eos_id, config.max_new_tokens, 1.0, draw)
    tokens, begins, lengths = rollout.sequences
    begin, returns = len(prompt_ids), []
    for row in range(len(states)):
        end = int(begins[row] + lengths[row])
        text = tokenizer.decode(tokens[row, begin:end].tolist()).strip()
        returns.append(-len(world.errors(prompt, text)))
    V[:T] = np.array(returns).reshape(T, 2, half).mean(-1)
    return V


def places_of(world: World, prompt: str, text: str, tokenizer, response: list[int]) -> list[str]:
    """Returns, for each token, whether it is in an error, behind the first one, or elsewhere."""
    errors = world.errors(prompt, text)
    blanks = len(tokenizer.decode(response)) - len(tokenizer.decode(response).lstrip())
    first, places = min((e.start for e in errors), default=math.inf), []
    for start, end in tokenizer.spans(response):
        start, end = start - blanks, end - blanks
        inside = any(max(e.start, start) < min(e.end, end) for e in errors)
        places.append("error" if inside else "behind" if start >= first else "elsewhere")
    return places


def estimates(config: Config, rollout: Rollout, device) -> dict[str, np.ndarray]:
    """Returns the estimates of the advantage of each response token, [N], by name."""
    sequences, mask = rollout.sequences, rollout.sequences.response_mask
    found, dtype = {}, getattr(torch, config.dtype)
    with torch.no_grad():
        for folder in config.rewards.split(","):
            found[folder] = load_reward(folder, device, dtype).token_rewards(sequences)[mask]
        if config.critic:
            critic = Critic(load_reward(config.critic, device, dtype))
            rewards = load_reward(config.critic_reward, device, dtype).ppo_rewards(sequences)
            gae = generalised_advantage(rewards, critic(sequences), mask, 1.0, 0.95)[0]
            found["GAE"] = gae[mask]
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def compare(estimate: np.ndarray, measured: np.ndarray, places: np.ndarray) -> dict[str, float]:
    """Returns correlation and sign agreement, over all tokens and by place; see above."""
    centred, table = estimate - np.median(estimate), {}
    for name, chosen in (("", np.ones(len(places), bool)), *((f"/{p}", places == p)
                                                             for p in PLACES)):
        a, b = estimate[chosen], measured[chosen]
        decisive = chosen & (np.abs(measured) >= DECISIVE)
        if len(a) > 2 and a.std() and b.std():
            table[f"correlation{name}"] = float(np.corrcoef(a, b)[0, 1])
        if decisive.any():
            agree = np.sign(centred[decisive]) == np.sign(measured[decisive])
            table[f"sign{name}"] = float(agree.mean())
    return table


def check_flags(config: Config) -> None:
    """Refuses what cannot be compared or written, before anything is sampled."""
    kind = records_with("figures of this command", "responses", "ceiling", "estimates")
    refuse_outputs([("--out", config.out, kind)], [
        ("--policy", config.policy), ("--prompts", config.prompts), ("--critic", config.critic),
        ("--critic-reward", config.critic_reward),
        *(("--rewards", folder) for folder in config.rewards.split(","))])
    if config.completions % 2:
        raise UserError(f"--completions {config.completions}: expected an even number, because "
                        "each half is a measurement of its own")
    for folder in (config.policy, *config.rewards.split(","), config.critic_reward):
        if folder is not None:
            check_encoding(folder, template="plain")            # that of the built-in world
    if (config.critic is None) != (config.critic_reward is None):
        raise UserError("--critic and --critic-reward: expected both or neither")
    for folder in config.rewards.split(","):
        if describe_reward(folder)["kind"] != "token":
            raise UserError(f"--rewards {folder}: expected a token-level reward model, got a "
                            "sequence-level one")


def main(config: Config) -> None:
    check_flags(config)
    device, world = pick_device(config.device), World(config.world)
    tokenizer, dtype = load_tokenizer(config.policy), getattr(torch, config.dtype)
    policy = load_model(config.policy, device, dtype)
    prompts = read_prompts(config.prompts)[:config.limit]
    check_requests(world, prompts, config.prompts)
    room = policy.config.max_seq_len - config.max_new_tokens
    ids = [encode_prompt(tokenizer, prompt, "plain", room) for prompt in prompts]
    draw = generator(config.seed, "advantages")
    rollout = sample(policy, ids, tokenizer.eos_id, config.max_new_tokens, 1.0, draw)
    halves, places = [], []
    for row, prompt in enumerate(tqdm(prompts, desc="advantages")):
        begin, length = (int(x[row]) for x in rollout.sequences[1:])
        response = rollout.sequences.tokens[row, begin:begin + length].tolist()
        text = tokenizer.decode(response).strip()
        V = values_of(policy, tokenizer, world, prompt.prompt, ids[row], response, config, draw)
        halves.append(V[1:] - V[:-1])
        places += places_of(world, prompt.prompt, text, tokenizer, response)
    both = np.concatenate(halves)                                               # [N, 2]
    measured, places = both.mean(-1), np.array(places)
    repeat = float(np.corrcoef(both.T)[0, 1])
    reliability = 2 * repeat / (1 + repeat)                                     # Spearman and Brown
    result = {"responses": len(prompts), "tokens": len(measured),
              "ceiling": math.sqrt(max(reliability, 0)),
              "share": {place: float((places == place).mean()) for place in PLACES},
              "measured": {place: float(measured[places == place].mean()) for place in PLACES
                           if (places == place).any()},
              "estimates": {name: compare(estimate, measured, places)
                            for name, estimate in estimates(config, rollout, device).items()}}
    write_atomic(config.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    print(f"{config.out}: complete", file=sys.stderr)


if __name__ == "__main__":
    run(lambda: main(parse(Config, __doc__)))
