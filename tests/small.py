"""The smallest model and batches the tests share, and a slow loop for what scoring means."""

from pathlib import Path

import torch

from fgrlhf.checkpoint import save_model
from fgrlhf.data import records
from fgrlhf.model import LLaMA, LLaMAConfig, build
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.sequences import Sequences, pack
from fgrlhf.tokenizer import train


def llama(seed: int = 0, vocab_size: int = 24, dtype=torch.float32, **sizes) -> LLaMA:
    """A LLaMA of width 16 with weights far from 0, its distributions far from uniform."""
    sizes = dict(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, max_seq_len=40) | sizes
    model = build(LLaMAConfig(vocab_size=vocab_size, **sizes), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() == 2 else 1)
    return model.to(dtype)


def ids(count: int, seed: int = 0, vocab_size: int = 24) -> list[int]:
    return torch.randint(3, vocab_size, (count,),
                         generator=torch.Generator().manual_seed(seed)).tolist()


def ragged(prompts=(3, 1, 6, 2), responses=(5, 9, 1, 4), seed: int = 0) -> Sequences:
    """A batch of unequal prompts and responses, one of them a single token."""
    return pack([ids(n, seed + i) for i, n in enumerate(prompts)],
                [ids(n, seed + 50 + i) for i, n in enumerate(responses)])


def with_garbage(sequences: Sequences, more: int = 0, seed: int = 7) -> Sequences:
    """The same batch with random ids in the padding, EOS and PAD too, and `more` columns of it."""
    B, S = sequences.tokens.shape
    tokens = torch.randint(0, 24, (B, S + more), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(sequences.prompt_lengths + sequences.response_lengths):
        tokens[row, :length] = sequences.tokens[row, :length]
    return sequences._replace(tokens=tokens)


def slow_logp(model: LLaMA, prompt: list[int], response: list[int],
              temperature: float = 1.0) -> list[float]:
    """log pi of each response token by its definition: one unpadded forward pass a token."""
    result = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]]))[0, -1].double() / temperature
        result.append((logits - logits.logsumexp(0))[token].item())
    return result


def gradients(model) -> dict[str, torch.Tensor]:
    """A copy of every gradient, which is cleared."""
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def ppo_folder(path: Path) -> Path:
    """Folders "policy", and "token" and "sequence" (reward models); prompts.jsonl, five of them."""
    tokenizer = train(["name the river", "it is red"] * 5, 275, path / "t.model")
    save_model(llama(vocab_size=275, max_seq_len=48), path / "policy", tokenizer=tokenizer)
    for kind in ("token", "sequence"):
        torch.manual_seed(0)
        model = RewardModel(llama(seed=1, vocab_size=275, max_seq_len=48), kind)
        model.mean.fill_(0.2), model.scale.fill_(1.5)
        save_reward(model, path / kind, tokenizer)
    records.write_jsonl(path / "prompts.jsonl",
                      [records.Prompt(str(i), "name the river"[:3 + 2 * i]) for i in range(5)])
    return path
