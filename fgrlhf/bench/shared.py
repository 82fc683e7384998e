"""Times work on rows that share a prompt, against the same work with the prompt in every row.

A random LLaMA of SmolLM2-135M's sizes, an article of 370 tokens and responses of 30 tokens, as in
human edits of news summaries:

    edit, training          both sides of an edit: equation (4) and its gradient, no optimizer
    edit, scoring           their token rewards, without gradient
    4 responses, rollout    4 responses sampled to the article
    4 responses, scoring    their log-probabilities under the model
"""

from collections.abc import Callable
from unittest.mock import patch

import torch

from fgrlhf.encode import PreferenceIds
from fgrlhf.model import LLaMAConfig, build
from fgrlhf.reward import PreferenceBatch, RewardModel, token_loss
from fgrlhf.rollout import sample
from fgrlhf.sequences import pack, score
from kernels.token_preference import Options

ARTICLE, RESPONSE, GROUP = 370, 30, 4


def whole(run: Callable) -> Callable:
    """Returns `run` with every prompt computed in every row."""
    def without():
        with (patch("fgrlhf.sequences.same_prompts", lambda *_: None),
              patch("fgrlhf.rollout.same_prompts", lambda *_: None)):
            return run()
    return without


def rows_of(config: LLaMAConfig, device: str) -> dict[str, Callable]:
    """Returns the work of each row of the table, with prompts that are computed once."""
    draw, policy = torch.Generator().manual_seed(0), build(config).to(device)
    reward = RewardModel(policy, "token")
    ids = lambda n: torch.randint(3, config.vocab_size, (n,), generator=draw).tolist()
    article, chosen, rejected = ids(ARTICLE), ids(RESPONSE), ids(RESPONSE)
    changed = list(range(0, RESPONSE, 5))
    edit = PreferenceBatch.of([PreferenceIds(article, chosen, rejected, changed, changed, [])],
                              device)
    group = pack([article] * GROUP, [ids(RESPONSE) for _ in range(GROUP)], device=device)

    def training():
        token_loss(reward, edit, Options("sum", "anchor", 0.0, 1.0)).loss.backward()
        reward.zero_grad()

    def scoring(function: Callable, *arguments) -> Callable:
        return torch.inference_mode()(lambda: function(*arguments))
    return {"edit, training": training,
            "edit, scoring": scoring(reward.token_rewards, edit.sequences),
            "4 responses, rollout": lambda: sample(policy, [article] * GROUP, -1, RESPONSE, 1.0,
                                                   draw.manual_seed(0)),
            "4 responses, scoring": scoring(score, policy, group)}
