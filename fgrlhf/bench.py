"""Times training, generation and whole PPO iterations against the bare matmuls of that work.

    python -m fgrlhf.bench                                  # the tables of BENCHMARKS.md
    python -m fgrlhf.bench --width 64 --work "fine-grained" --repeats 20 --matmuls
    python -m fgrlhf.bench --device cuda --json loop.json

A LLaMA of 6 layers, V 2048, untied; 2048 tokens a training step; 64 prompts of 32 tokens with 64
new ones for generation; 64 episodes of 16 + 48 tokens, 2 epochs of 2 minibatches of one pass each,
for an iteration, which is train_ppo.py's own `collect` and `update`. In "ends early" the EOS has
probability 0.0148 at every step: 34 tokens on average, at most 48. The learning rate is 0, so that
every round does the same work.

The floor of a row is its matmuls alone (floor.py; --matmuls lists them), one after the other into
buffers that exist already. --profile says instead where a row's time goes.
"""

import argparse
import json
import math
import resource
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch

from fgrlhf.align import align
from fgrlhf.floor import Floor, iteration_floor
from fgrlhf.model import LLaMA, LLaMAConfig, build
from fgrlhf.optimizer import Optimizer
from fgrlhf.players import Critic, Players
from fgrlhf.reward import RewardModel
from fgrlhf.rollout import Sequences, by_length, sample
from fgrlhf.sft import loss_of
from kernels import timing
from kernels.memory import keep_freed
from train_ppo import Config, collect, minibatches, scoring_groups, update

V, EOS, END = 2048, 2, 0.0148
MODELS = {D: LLaMAConfig(D, 6, H, H, V, F, max_seq_len=256)
          for D, H, F in ((256, 8, 704), (64, 4, 176))}


class Work(NamedTuple):
    run: Callable[[], object]
    floor: Callable[[], object]
    tokens: int                         # prompt and response tokens that exist


# ----- the rows -----------------------------------------------------------------------------------

def model_of(width: int, device: str, seed: int = 0) -> LLaMA:
    return build(MODELS[width], seed).to(device)


def random_ids(rows: int, length: int) -> list[list[int]]:
    """From EOS + 1 on."""
    return torch.randint(EOS + 1, V, (rows, length), generator=torch.Generator().manual_seed(0)
                         ).tolist()


def training_step(width: int, device: str) -> Work:
    """Cross-entropy of 16 x 128 tokens, backward, clipping, Adam."""
    model = model_of(width, device)
    optimizer, ones = Optimizer(model, 0.0), torch.ones(16, dtype=torch.long, device=device)
    sequences = Sequences(torch.tensor(random_ids(16, 129), device=device), ones, 128 * ones)

    def run():
        loss_of(model, sequences).backward()
        optimizer.step()
    floor = Floor(model)
    floor.trunk([128] * 16, gradient=True)
    floor.head(16 * 128, gradient=True)
    return Work(run, floor, 16 * 128)


def generation(width: int, device: str) -> Work:
    """64 prompts of 32 tokens, 64 new tokens each."""
    model, prompts = model_of(width, device), random_ids(64, 32)
    floor = Floor(model)
    floor.generation(32, [64] * 64)
    draw = torch.Generator()
    return Work(lambda: sample(model, prompts, -1, 64, 1.0, draw.manual_seed(0)), floor, 64 * 96)


@torch.no_grad()
def end_early(model: LLaMA) -> None:
    """Give EOS the same probability END at every step, whatever came before.

    Coordinate 0 is 1 in every embedding, far above the others: after the last norm it is nearly a
    constant, and only EOS reads it.
    """
    model.tok_embeddings.weight[:, 0] = 1.0
    model.head[:, 0] = 0.0
    ids = torch.tensor(random_ids(8, 32), device=model.head.device)
    model.head[EOS, 0] = math.log(END / (1 - END) * (V - 1)) / model.hidden(ids)[..., 0].mean()


def iteration(method: str, early: bool, width: int, device: str) -> Work:
    """One iteration of train_ppo.py, from sampling to the last optimizer step."""
    policy = model_of(width, device)
    if early:
        end_early(policy)
    ref = model_of(width, device).requires_grad_(False)
    ref.load_state_dict(policy.state_dict())
    reward = RewardModel(model_of(width, device, 1), "token" if method == "fine-grained"
                         else "sequence").requires_grad_(False)
    critic = Critic(reward).requires_grad_(True) if method == "rlhf" else None
    config = Config(method, "", "", "", "", rollouts=64, max_new_tokens=48, epochs=2, minibatches=2,
                    microbatch=0, lr=0.0, value_lr=0.0)
    optimizers = {name: Optimizer(part, 0.0) for name, part in
                  (("policy", policy), ("critic", critic)) if part is not None}
    setup = Players(SimpleNamespace(eos_id=EOS if early else -1), policy, ref, reward, critic,
                  optimizers, random_ids(64, 16), None)

    def run():
        batch = collect(config, setup, 1)
        update(config, policy, critic, optimizers, batch.rollout, batch.advantages, batch.values,
               batch.returns, 1)
        return batch.rollout.sequences
    sequences = run()
    updates = [part for epoch in range(config.epochs) for rows in minibatches(config, 64, 1, epoch)
               for part in by_length(sequences, rows, config.microbatch)]
    floor = iteration_floor(policy, sequences, scoring_groups(config, sequences, 1), updates,
                            method == "rlhf")
    return Work(run, floor, int(sequences.lengths.sum()))


ROWS: dict[str, Callable[[int, str], Work]] = {
    "training step": training_step,
    "generation": generation,
    "PPO with critic": lambda *where: iteration("rlhf", False, *where),
    "PPO, ends early": lambda *where: iteration("rlhf", True, *where),
    "fine-grained": lambda *where: iteration("fine-grained", False, *where),
    "fine-grained, ends early": lambda *where: iteration("fine-grained", True, *where),
}


# ----- where the time goes ------------------------------------------------------------------------

PARTS = {                               # torch's names of the operations
    "matmuls": "mm addmm bmm baddbmm",
    "attention": "_scaled_dot_product_flash_attention_for_cpu "
                 "_scaled_dot_product_flash_attention_for_cpu_backward _softmax",
    "norms, gates, rotation, sums of gradients": "mul mul_ add add_ sub neg div div_ pow mean sum "
                                                 "rsqrt silu silu_backward addcmul",
    "loss and sampling": "exp exp2 exp2_ log2 amax sub_ cumsum searchsorted gather scatter_add_ "
                         "sigmoid clamp",
    "optimizer": "_fused_adamw_ linalg_vector_norm _foreach_norm _foreach_mul_",
    "embedding, copies, fills": "embedding_dense_backward index_select index index_put "
                                "_index_put_impl_ index_copy_ copy_ fill_ zero_ cat arange "
                                "polar",
}


def parts_of(work: Work) -> tuple[dict[str, float], int]:
    """(Milliseconds of a third call of `work` by the parts above, the rest by its kind; the page
    faults of that call)."""
    work.run(), work.run()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        work.run()
        wall = 1e3 * (time.perf_counter() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e3
             for event in seen.key_averages()}
    rows = {part: sum(spent.pop(name, 0.0) for name in names.split())
            for part, names in PARTS.items()}
    rows["views, autograd, other operations"] = sum(spent.values())
    rows["Python between operations"] = max(0.0, wall - sum(rows.values()))
    return rows, faults


def print_profile(width: int, options) -> None:
    """Wall-clock milliseconds and shares; the profiler's own time is in the last two rows."""
    for name in options.work:
        rows, faults = parts_of(ROWS[name](width, options.device))
        total = sum(rows.values())
        print(f"  {name}: {total:.0f} ms, {faults} page faults")
        for part, spent in rows.items():
            print(f"    {part:<42} {spent:9.1f} ms {100 * spent / total:5.1f}%", flush=True)


# ----- alignment ----------------------------------------------------------------------------------

def plain_table(a: list[int], b: list[int]) -> int:
    """Levenshtein's distance by the table as one would write it; no alignment comes of it."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1,
                              table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def edited(length: int) -> tuple[list[int], list[int]]:
    """A text and its minimal edit: one token in ten replaced, deleted or preceded by another."""
    draw = torch.Generator().manual_seed(0)
    original = torch.randint(V, (length,), generator=draw).tolist()
    result = []
    for token, kind in zip(original, torch.randint(30, (length,), generator=draw).tolist()):
        result += {0: [V], 1: [], 2: [V, token]}.get(kind, [token])
    return original, result


# ----- the tables ---------------------------------------------------------------------------------

def loop_table(width: int, options) -> dict:
    rows = {}
    for name in options.work:
        work = ROWS[name](width, options.device)
        runs = {"floor": work.floor, name: work.run}
        timed = timing.in_turn(runs, dict.fromkeys(runs, "floor"), options.repeats,
                               timing.clock_of(options))
        peak = timing.peak_in_fresh_process("fgrlhf.bench", ["--width", str(width)], name, options)
        rows[name] = timed[name] | {
            "floor_seconds": timed["floor"]["seconds"], "tokens": work.tokens, "peak_mib": peak,
            "matmuls": [[*map(list, shapes), n] for shapes, n in work.floor.shapes.items()]}
        memory = "" if peak is None else f"{peak:8.1f} MiB"
        token = 1e6 * rows[name].get("seconds", math.nan) / work.tokens
        print(timing.table_row(name, rows[name], f"{token:7.1f} us a token {memory}"), flush=True)
        for a, b, n in rows[name]["matmuls"] if options.matmuls else ():
            print(f"      {n:6} x {a} @ {b}")
    return {"width": width, "rows": rows}


def alignment_table(options) -> dict:
    rows = {}
    for length in (256, 1024):
        a, b = edited(length)
        runs = {"plain table": lambda: plain_table(a, b), "align": lambda: align(a, b)}
        rows[str(length)] = timing.in_turn(runs, dict.fromkeys(runs, "plain table"),
                                           options.repeats, timing.clock_of(options))
        for name, row in rows[str(length)].items():
            print(timing.table_row(f"{name}, {length} tokens", row), flush=True)
    return {"alignment": rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fgrlhf.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=list(MODELS), choices=MODELS)
    parser.add_argument("--work", nargs="*", default=list(ROWS), choices=ROWS,
                        help="rows; none: the alignment alone")
    parser.add_argument("--matmuls", action="store_true", help="list the floor's matmuls")
    parser.add_argument("--profile", action="store_true", help="where the time goes, no ratios")
    timing.add_flags(parser, repeats=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed()                                        # as the training scripts do
    if options.peak_of:
        work = ROWS[options.peak_of](options.width[0], options.device)
        print(timing.peak_mib(work.run, options.device))
        return
    if options.profile:
        for width in options.width:
            print(f"D {width}, 6 layers, V {V}")
            print_profile(width, options)
        return
    machine, tables = timing.machine(options), []
    print(f"medians of {options.repeats} rounds, [quartiles]; 1x = the bare matmuls of the row")
    for width in options.width if options.work else ():
        print(f"\nD {width}, 6 layers, V {V}")
        tables.append(loop_table(width, options))
    print("\nalignment of a text and its edit; 1x = a plain Python table")
    tables.append(alignment_table(options))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "tables": tables}, file, indent=1)


if __name__ == "__main__":
    main()
