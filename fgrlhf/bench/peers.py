"""Times the same work by this project and by transformers, where that is installed.

Both sides have a random LLaMA of SmolLM2-135M's sizes, in float32 or in --dtype:

    training step     4 rows of 256 tokens: cross-entropy, backward, clipping, Adam
    scoring           the log-probabilities of the same tokens, without gradient
    generation        32 prompts of 32 tokens, 32 new tokens each
    decoding          1 prompt of 8 tokens, 64 new tokens

Each side runs in a process of its own, and the sides take turns: fresh processes share no memory
and no caches. A ratio is our time to that of another side in the same round. "memory kept" is
transformers in a process that keeps freed memory (kernels/memory.py), as our scripts do. "matmuls"
is the floor of the work (floor.py), its matmuls only.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch

from fgrlhf.bench.floor import Floor
from fgrlhf.data.fields import UserError, show
from fgrlhf.engine.draws import random_ids
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.model import LLaMAConfig, build
from fgrlhf.presets import PRESETS
from fgrlhf.rollout import sample
from fgrlhf.sequences import Sequences, score
from fgrlhf.sft import loss_of
from kernels.memory import keep_freed

WORK = ("training step", "scoring", "generation", "decoding")


def ours(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Callable]:
    keep_freed()
    model = build(config).to(dtype)
    texts = torch.tensor(random_ids([257] * 4, config.vocab_size))
    ones = torch.ones(len(texts), dtype=torch.long)
    sequences, optimizer = Sequences(texts, ones, 256 * ones), Optimizer(model, 0.0)

    def training():
        loss_of(model, sequences).backward()
        optimizer.step()

    def drawn(rows: int, prompt: int, new: int) -> Callable:
        prompts = random_ids([prompt] * rows, config.vocab_size)
        return lambda: sample(model, prompts, -1, new, 1.0, torch.Generator().manual_seed(0))
    scoring = torch.inference_mode()(lambda: score(model, sequences))
    return dict(zip(WORK, (training, scoring, drawn(32, 32, 32), drawn(1, 8, 64))))


def theirs(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Callable]:
    from transformers import LlamaConfig, LlamaForCausalLM
    sizes = {"hidden_size": config.dim, "intermediate_size": config.ffn_dim,
             "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
             "num_key_value_heads": config.n_kv_heads, "vocab_size": config.vocab_size,
             "max_position_embeddings": config.max_seq_len, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).to(dtype)
    texts = torch.tensor(random_ids([257] * 4, config.vocab_size))
    before, after = texts[:, :-1], texts[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=True)

    def training():
        model(input_ids=before, labels=after, shift_labels=after).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def scoring():
        model(input_ids=before).logits.log_softmax(-1).gather(2, after[..., None])

    def drawn(rows: int, prompt: int, new: int) -> Callable:
        prompts = torch.tensor(random_ids([prompt] * rows, config.vocab_size))
        return lambda: model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
            max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
    scoring = torch.inference_mode()(scoring)
    return dict(zip(WORK, (training, scoring, drawn(32, 32, 32), drawn(1, 8, 64))))


def kept(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Callable]:
    keep_freed()
    return theirs(config, dtype)


def matmuls(config: LLaMAConfig, dtype: torch.dtype) -> dict[str, Callable]:
    model = build(config).to(dtype)
    training, scoring, generation, decoding = floors = [Floor(model) for _ in WORK]
    for floor, gradient in ((training, True), (scoring, False)):
        floor.trunk([256] * 4, gradient)
        floor.head(4 * 256, gradient)
    generation.generation(32, [32] * 32)
    decoding.generation(8, [64])
    return dict(zip(WORK, floors))


SIDES = {"ours": ours, "transformers": theirs, "memory kept": kept, "matmuls": matmuls}


def check_installed() -> None:
    """Raises UserError when transformers is not installed."""
    if find_spec("transformers") is None:
        raise UserError("--peers: expected an environment with transformers; install it there")


def seconds_of(side: str, name: str, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """Returns the time of the second call of the work. The first one warms up.

    Raises UserError for another side than SIDES or another row than WORK.
    """
    if side not in SIDES or name not in WORK:
        raise UserError(f"--peer-of: expected one of {', '.join(SIDES)}, and one of "
                        f"{', '.join(WORK)}, got {show(side)} and {show(name)}")
    if side in ("transformers", "memory kept"):
        check_installed()
    run = SIDES[side](PRESETS["SmolLM2-135M"], dtype)[name]
    run()
    start = clock()
    run()
    return clock() - start


def peer_table(options) -> dict:
    """Times and prints rows by every side, in processes that take turns.

    options.peers: names of WORK, or [] for all.

    Raises UserError when transformers is not installed, or when a process fails.
    """
    check_installed()
    rows = {}
    for name in options.peers or WORK:
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(options.repeats):
            for side, found in times.items():
                command = [sys.executable, "-m", "fgrlhf.bench", "--peer-of", side, name,
                           "--dtype", options.dtype, "--threads", str(options.threads),
                           "--clock", options.clock]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    last = (done.stderr.strip() or "no message").splitlines()[-1]
                    raise UserError(f"--peers: {side}, {name}: {last}")
                found.append(float(done.stdout.split()[-1]))
        rows[name] = {side: statistics.median(found) for side, found in times.items()}
        for side in list(SIDES)[1:]:
            ratios = [a / b for a, b in zip(times["ours"], times[side])]
            rows[name][f"ours : {side}"] = [statistics.median(ratios), min(ratios), max(ratios)]
        print(f"  {name:<14} {json.dumps(rows[name])}", flush=True)
    return {"peers": rows}
