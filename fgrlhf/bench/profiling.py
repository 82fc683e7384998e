"""Splits the time of a piece of work into parts, by PyTorch's profiler, on a CPU.

The time of the profiler itself is in the last two parts.
"""

import resource
import time

import torch

from fgrlhf.bench.work import ROWS, Work

PARTS = {                               # PyTorch's names of the operations
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
    """Returns the milliseconds of the third call of `work` by part, and its page faults."""
    work.run(), work.run()
    faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        work.run()
        wall = 1e3 * (time.perf_counter() - start)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    spent = {event.key.removeprefix("aten::"): event.self_cpu_time_total / 1e3
             for event in seen.key_averages()}
    parts = {part: sum(spent.pop(name, 0.0) for name in names.split())
             for part, names in PARTS.items()}
    parts["views, autograd, other operations"] = sum(spent.values())
    parts["Python between operations"] = max(0.0, wall - sum(parts.values()))
    return parts, faults


def print_profile(name: str, width: int, device: str) -> None:
    """Prints the milliseconds of each part of a row, and their shares."""
    parts, faults = parts_of(ROWS[name](width, device))
    total = sum(parts.values())
    print(f"  {name}: {total:.0f} ms, {faults} page faults")
    for part, spent in parts.items():
        print(f"    {part:<42} {spent:9.1f} ms {100 * spent / total:5.1f}%", flush=True)
