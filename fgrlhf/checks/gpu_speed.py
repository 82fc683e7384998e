"""Speed on a GPU: steps of `python -m fgrlhf.checks gpu`.

    ceilings    bytes per second of a copy, operations per second of a matmul
    head        the loss kernels at LLaMA-7B's output matrix against their bare matmuls
    decode      a decoding step against reading every weight once
    train       a step of supervised training against its matmuls at the measured speed

All models are random, in bfloat16, and made on the device. A time is the median of several calls
after a first one. The device has finished its work before the clock is read. gpu_ppo.py has the
steps with PPO.
"""

import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch

from fgrlhf.bench.floor import Floor
from fgrlhf.engine import lora
from fgrlhf.engine.draws import random_ids
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.model import LLaMA, LLaMAConfig, parameter_count
from fgrlhf.presets import PRESETS
from fgrlhf.rollout import lay_out, sample, sample_by_step
from fgrlhf.sequences import Sequences
from fgrlhf.sft import loss_of
from kernels import bench, timing

DTYPE = torch.bfloat16


def model_on(sizes: LLaMAConfig, device: torch.device, seed: int = 0) -> LLaMA:
    """Makes a random bfloat16 model on the device, without a copy of it in host memory."""
    with torch.device("meta"):
        model = LLaMA(sizes).to(DTYPE)
    model = model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)                            # norms; init_weights draws the matrices
    return model.init_weights(torch.Generator(device).manual_seed(seed))


def seconds_of(run: Callable[[], object], repeats: int = 3) -> float:
    """Returns the median time of a call, after one call that warms up."""
    rows = timing.in_turn({"run": run}, {"run": "run"}, repeats, time.perf_counter)
    if "failed" in rows["run"]:
        raise RuntimeError(rows["run"]["failed"])
    return rows["run"]["seconds"]


def sizes_of(place, preset: str) -> tuple[str, LLaMAConfig]:
    """Returns the name and the sizes of a preset, or of "tiny" in a rehearsal."""
    name = "tiny" if place.small else preset
    return name, PRESETS[name]


def reset_peak(device: torch.device) -> None:
    """Lets the next peak of a GPU's memory count from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int | None:
    """Returns the peak of the bytes that tensors have on a GPU. It is not measured on a CPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


# ----- ceilings, kernels --------------------------------------------------------------------------

def ceilings(place) -> Iterator[dict]:
    """Measures the copy bandwidth and the speed of square matmuls."""
    size, copied = (256, 2**22) if place.small else (8192, 2**30)
    found = timing.ceilings(str(place.device), size, copied, repeats=30)
    copy, narrow, wide = (found[name] for name in (
        "copy_bytes_per_second", "matmul_flops_per_second_bfloat16",
        "matmul_flops_per_second_float32"))
    yield {"name": "copy, bytes read and written", "bytes_per_second": copy,
           "result": f"{copy / 1e9:,.0f} GB/s"}
    yield {"name": f"bfloat16 matmul, {size} x {size} x {size}", "flops_per_second": narrow,
           "result": f"{narrow / 1e12:,.2f} TFLOP/s"}
    yield {"name": "float32 matmul without TF32", "wide_flops_per_second": wide,
           "result": f"{wide / 1e12:,.2f} TFLOP/s"}


def head(place) -> Iterator[dict]:
    """Times the kernels at N 4096, D 4096, V 32000 in bfloat16, in turn with their matmuls."""
    n, d, v = (64, 64, 500) if place.small else (4096, 4096, 32000)
    problem = bench.Problem(n, d, v, str(place.device), DTYPE)
    options = SimpleNamespace(only=["fused", "plain"], repeats=5, clock="wall")
    for work, count in bench.MATMULS.items():
        rows = bench.measure(work, problem, options)
        ours, plain, result = rows["fused"], rows["plain"], "failed: "
        if "failed" in ours:
            yield {"name": work, "passed": False, "result": ours["failed"]}
            continue
        result = (f"{1e3 * ours['seconds']:.2f} ms, {ours['ratio']:.3f} of {count} matmul(s) "
                  f"[{ours['quartiles'][0]:.3f}, {ours['quartiles'][1]:.3f}]; plain "
                  f"{plain['failed'] if 'failed' in plain else format(plain['ratio'], '.3f')}")
        if place.device.type == "cuda":
            loss = bench.variants(work, ["fused"])["fused"]
            problem.hidden.grad = problem.head.grad = None
            peak = timing.peak_mib(lambda: bench.call(work, loss, problem), "cuda")
            result += f"; {peak:,.0f} MiB more"
        yield {"name": f"{work}, N {n}, D {d}, V {v}", "rows": rows, "result": result}


# ----- decoding, training -------------------------------------------------------------------------

def decode(place, preset: str) -> Iterator[dict]:
    """Times a decoding step at batch 1 and 64, against reading every weight once.

    The time of a step is the difference of two lengths, so the prefill and the capture of the graph
    are not part of it. The KV cache is read too, but is not counted in the floor.
    """
    name, sizes = sizes_of(place, preset)
    policy = model_on(sizes, place.device)
    short, long, many = (4, 12, 4) if place.small else (16, 144, 64)
    looked_up = 0 if sizes.tie_embeddings else sizes.vocab_size * sizes.dim
    weights = (parameter_count(sizes) - looked_up) * DTYPE.itemsize
    for batch in (1, many):
        prompts = random_ids([32] * batch, sizes.vocab_size)

        def graph(count: int) -> None:
            sample(policy, prompts, -1, count, 1.0, torch.Generator().manual_seed(0))

        def loop(count: int) -> None:
            tokens, lengths = lay_out(prompts, count, sizes.max_seq_len, place.device)
            uniform = torch.rand(batch, count, dtype=torch.float64, device=place.device)
            sample_by_step(policy, tokens, lengths, uniform, -1, 1.0)
        whole = seconds_of(lambda: graph(long))
        step = (whole - seconds_of(lambda: graph(short))) / (long - short)
        ends = [seconds_of(lambda: loop(count)) for count in (short, 3 * short)]
        step, eager = max(step, 1e-6), max((ends[1] - ends[0]) / (2 * short), 1e-6)    # noise
        yield {"name": f"{name}, batch {batch}", "seconds": step, "bytes": weights,
               "loop_seconds": eager, "call_seconds": whole,
               "result": f"{1e3 * step:.2f} ms per step, {batch / step:,.0f} tokens/s; without "
               f"graph {1e3 * eager:.2f} ms; a whole call of {long} tokens {whole:.2f} s"}


def training_flops(sizes: LLaMAConfig, lengths: list[int], adapted: bool) -> int:
    """Counts the operations in the matmuls of a training step on rows of these lengths.

    Adapters need no gradient of the trunk's weights: one product per weight forward, one backward.
    """
    with torch.device("meta"):
        floor = Floor(LLaMA(sizes))
    if adapted:
        for _ in range(2):
            floor.trunk(lengths)
            floor.head(sum(lengths))
        for length in lengths * sizes.n_layers:             # 4 products backward, 2 are there
            floor.attention(1, length, gradient=False)
    else:
        floor.trunk(lengths, gradient=True)
        floor.head(sum(lengths), gradient=True)
    return sum(2 * math.prod(a) * b[-1] * n for (a, b), n in floor.shapes.items())


def train(place, preset: str, rows: int, rank: int = 0) -> Iterator[dict]:
    """Times a training step on `rows` rows of 512 tokens. rank: of adapters, 0 trains all."""
    name, sizes = sizes_of(place, preset)
    length = 16 if place.small else 512
    model = model_on(sizes, place.device)
    model = lora.adapt(model, rank) if rank else model
    optimizer = Optimizer(model, 1e-6)
    ones = torch.ones(rows, dtype=torch.long, device=place.device)
    tokens = torch.tensor(random_ids([length + 1] * rows, sizes.vocab_size),
                          device=place.device)
    sequences = Sequences(tokens, ones, length * ones)

    def step() -> None:
        loss_of(model, sequences).backward()
        optimizer.step()
    reset_peak(place.device)
    seconds, peak = seconds_of(step, 5), peak_bytes(place.device)
    flops = training_flops(sizes, [length] * rows, rank > 0)
    how = f"adapters of rank {rank}" if rank else "all weights"
    yield {"name": f"{name}, {how}, {rows} x {length} tokens", "seconds": seconds, "flops": flops,
           "peak_bytes": peak, "result": f"{rows * length / seconds:,.0f} tokens/s, "
           f"{1e3 * seconds:.1f} ms per step" + (f", peak {peak / 1e9:.2f} GB" if peak else "")}
