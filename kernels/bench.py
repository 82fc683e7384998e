"""Times every kernel against bare matmuls of its size, its plain form, and other libraries.

    python -m kernels.bench                                    # the tables of kernels/README.md
    python -m kernels.bench --sizes 500x96x400 --work ppo --repeats 50
    python -m kernels.bench --device cuda --dtype bfloat16 --json bench.json

The floor of the time is the matmuls only, written to existing buffers. The floor of the memory is
the results and one chunk of logits. timing.py says how both are measured; freed memory is kept, as
in training. TRL and Liger take part when they are installed.
"""

import argparse
import functools
import json

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kernels import (
    clipped_surrogate, exact_kl, linear_cross_entropy, linear_logp, linear_ppo, timing)
from kernels.memory import keep_freed

CLIP = 0.2
MATMULS = {"ppo": 3, "cross_entropy": 3, "logp": 1, "logp_entropy": 1, "logp_gradient": 4, "kl": 2,
           "kl_gradient": 6}
GRADIENT = "ppo", "cross_entropy", "logp_gradient", "kl_gradient"


class Problem:
    """The inputs of one size: hidden [N, D], head [V, D], numbers per token [N], a reference."""

    def __init__(self, n: int, d: int, v: int, device: str, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, device=device).to(dtype)
        self.hidden = randn(n, d).requires_grad_()
        self.head = (randn(v, d) / d ** 0.5).requires_grad_()
        self.targets = torch.randint(v, (n,), generator=generator, device=device)
        self.advantages, self.noise = randn(n).float(), 0.1 * randn(n).float()
        self.logp_old = linear_logp.score(
            self.hidden.detach(), self.head.detach(), self.targets, 1.0, False).logp + self.noise
        self.hidden_ref, self.head_ref = randn(n, d), randn(v, d) / d ** 0.5

    def floor(self, matmuls: int):
        """Returns a function that runs only the matmuls (logits, grad hidden, grad head)."""
        hidden, head = self.hidden.detach(), self.head.detach()
        logits = hidden.new_empty(len(hidden), len(head))
        grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)
        kinds = [lambda: torch.mm(hidden, head.T, out=logits),
                 lambda: torch.mm(logits, head, out=grad_hidden),
                 lambda: torch.mm(logits.T, hidden, out=grad_head)]
        order = {1: (0,), 2: (0, 0), 3: (0, 1, 2), 4: (0, 0, 1, 2), 6: (0, 0, 0, 0, 1, 2)}[matmuls]
        return lambda: [kinds[i]() for i in order]


def surrogate(p: Problem, logp: Tensor) -> Tensor:
    return clipped_surrogate.reference(
        logp, p.logp_old, p.advantages, CLIP, denominator=len(logp)).loss


def torch_logp(chunk: int | None):
    """-logp by torch's linear_cross_entropy (new in 2.13). chunk None: its automatic size."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy as theirs
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda p, how: theirs(p.hidden, p.head, p.targets, reduction=how, options=options)


def peers(work: str) -> dict:
    """name -> f(problem) for the installed libraries: torch, TRL, Liger."""
    found = {}
    try:
        auto, fixed = torch_logp(None), torch_logp(512)
        if work == "ppo":
            found["torch auto"] = lambda p: surrogate(p, -auto(p, "none"))
            found["torch 512"] = lambda p: surrogate(p, -fixed(p, "none"))
        elif work == "cross_entropy":
            found["torch auto"] = lambda p: auto(p, "mean")
            found["torch 512"] = lambda p: fixed(p, "mean")
        elif work in ("logp", "logp_gradient"):
            found["torch auto"] = lambda p: -auto(p, "none").sum()
            found["torch 512"] = lambda p: -fixed(p, "none").sum()
    except ImportError:
        pass
    try:
        from trl.trainer.utils import selective_log_softmax
        if work == "ppo":
            found["trl"] = lambda p: surrogate(
                p, selective_log_softmax(p.hidden @ p.head.T, p.targets))
        elif work in ("logp", "logp_gradient"):
            found["trl"] = lambda p: selective_log_softmax(p.hidden @ p.head.T, p.targets).sum()
    except ImportError:
        pass
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
        if work == "ppo":
            grpo = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo",
                                            epsilon_low=CLIP, epsilon_high=CLIP)

            def liger(p):                     # 8 responses, because it takes one advantage for each
                ids = p.targets.view(8, -1)
                return grpo(p.hidden.view(8, ids.shape[1], -1), p.head, ids, torch.ones_like(ids),
                            p.advantages[:8], old_per_token_logps=p.logp_old.view(8, -1))[0]
            found["liger"] = liger
    except ImportError:
        pass
    return found


def variants(work: str, only: list[str] = []) -> dict:
    """name -> f(problem), which returns a scalar. Its backward pass is timed too if in GRADIENT.

    only: the names that are wanted, [] for all. Other libraries are imported only when one of their
    rows is wanted.
    """
    def of(form: str):
        return {
            "ppo": lambda p: getattr(linear_ppo, form)(
                p.hidden, p.head, p.targets, p.logp_old, p.advantages, CLIP).loss,
            "cross_entropy": lambda p: getattr(linear_cross_entropy, form)(
                p.hidden, p.head, p.targets).loss,
            "logp_entropy": lambda p: getattr(linear_logp, form)(
                p.hidden, p.head, p.targets, 1.0, True).logp.sum(),
            "kl": lambda p: getattr(exact_kl, form)(
                p.hidden, p.head, p.hidden_ref, p.head_ref).sum(),
        }.get(work.removesuffix("_gradient"), lambda p: getattr(linear_logp, form)(
            p.hidden, p.head, p.targets).logp.sum())

    def plain(p):                             # the usual code, without statistics and entropy
        if work == "ppo":
            return surrogate(p, linear_logp.reference(p.hidden, p.head, p.targets).logp)
        if work == "cross_entropy":
            return cross_entropy((p.hidden @ p.head.T).float(), p.targets)
        return of("reference")(p)

    @functools.cache
    def compiled():                           # only when it is called: the compiler imports slowly
        torch.compiler.reset()                # a function may have 8 compiled forms at most
        return torch.compile(plain, dynamic=False)
    own = {"fused": of("fused"), "plain": plain, "plain compiled": lambda p: compiled()(p)}
    found = own if only and set(only) <= set(own) else own | peers(work)
    return {name: loss for name, loss in found.items() if not only or name in only}


def call(work: str, loss, problem: Problem) -> None:
    """Runs the forward pass and, if the work has a gradient, the backward pass to a new .grad."""
    problem.hidden.grad = problem.head.grad = None
    if work in GRADIENT:
        loss(problem).backward()
    else:
        with torch.no_grad():
            loss(problem)


def measure(work: str, problem: Problem, options) -> dict:
    """Times the floor and all variants in rounds: name -> {seconds, ratio, quartiles}."""
    runs = {"floor": problem.floor(MATMULS[work])}
    for name, loss in variants(work, options.only).items():
        runs[name] = lambda loss=loss: call(work, loss, problem)
    return timing.in_turn(runs, dict.fromkeys(runs, "floor"), options.repeats,
                          timing.clock_of(options))


def peak_of(work: str, name: str, problem: Problem) -> float:
    """The MiB that a first call adds at its peak, in a process that has done nothing else.

    Matmuls of the same size run before, so that the memory that their library keeps is not counted.
    """
    loss = variants(work, [name])[name]
    call(work, loss, Problem(8, 8, 16, problem.hidden.device.type, problem.hidden.dtype))
    problem.floor(3)()
    return timing.peak_mib(lambda: call(work, loss, problem), problem.hidden.device.type)


def floor_mib(work: str, n: int, d: int, v: int, width: int) -> float:
    """The MiB of the results and of the logits of 256 tokens."""
    results = (n * d + v * d) * width if work in GRADIENT else 4 * n
    return (results + min(n, 256) * v * width) / 2**20


def size(text: str) -> str:
    """An argparse type: returns the text NxDxV, three numbers of at least 1."""
    numbers = text.split("x")
    if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
        raise argparse.ArgumentTypeError(f"expected NxDxV, as 2048x256x4096, got {text!r}")
    return text


def parse_flags() -> argparse.Namespace:
    """Reads the command line. A bad flag gives one line on stderr, and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda why: parser.exit(2, f"error: {why}; see {parser.prog} --help\n")
    parser.add_argument("--sizes", nargs="+", default=["2048x256x4096", "2048x512x32000"],
                        type=size, help="NxDxV: tokens x width x vocabulary")
    parser.add_argument("--work", nargs="+", default=list(MATMULS), choices=MATMULS,
                        help="the tables to make (default: all)")
    parser.add_argument("--only", nargs="+", default=[],
                        help="the rows to run, by name (default: all)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
                        help="of hidden states and head")
    timing.add_flags(parser, repeats=9)
    options = parser.parse_args()
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected a number of at least 1, got "
                         f"{getattr(options, name)}")
    name = options.peak_of
    if name is not None and name not in variants(options.work[0], [name]):
        parser.error(f"argument --peak-of: expected a row of {options.work[0]}, got {name!r}")
    try:
        torch.zeros(1, device=options.device).item()
    except Exception as error:                          # each backend raises its own kind
        reason = str(error).splitlines()[0].split(". ")[0]
        parser.error(f"argument --device: {options.device} is not usable here ({reason}); give cpu "
                     "or cuda")
    return options


def main() -> None:
    options = parse_flags()
    torch.set_num_threads(options.threads)
    timing.use(options.device)
    if not options.peak_of:
        keep_freed()                                    # as the training scripts do
    machine, tables = None if options.peak_of else timing.machine(options), []
    for size in options.sizes:
        n, d, v = map(int, size.split("x"))
        problem = Problem(n, d, v, options.device, getattr(torch, options.dtype))
        if options.peak_of:
            print(peak_of(options.work[0], options.peak_of, problem))
            return
        for work in options.work:
            rows = measure(work, problem, options)
            for name, row in rows.items():
                # The memory of the compiler itself is larger than that of the work.
                if name not in ("floor", "plain compiled") and "failed" not in row:
                    flags = ["--sizes", size, "--work", work, "--dtype", options.dtype]
                    row["peak_mib"] = timing.peak_in_fresh_process(
                        "kernels.bench", flags, name, options)
            least = floor_mib(work, n, d, v, problem.hidden.element_size())
            tables.append({"work": work, "N": n, "D": d, "V": v, "floor_mib": least, "rows": rows})
            show(tables[-1])
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "tables": tables}, file, indent=1)


def show(table: dict) -> None:
    """Prints one table: median time with its ratio to the floor, and peak memory with its ratio."""
    work, rows = table["work"], table["rows"]
    count = MATMULS[work]
    print(f"\n{work}: N {table['N']}, D {table['D']}, V {table['V']}. "
          f"Floor: {count} matmul{'s' * (count > 1)}, {1e3 * rows['floor']['seconds']:.2f} ms; "
          f"{table['floor_mib']:.1f} MiB")
    print(f"  {'':<25} {'time':>12} {'/floor':>7} {'[quartiles]':14} {'memory':>13} {'/floor':>7}")
    for name, row in rows.items():
        peak = row.get("peak_mib")
        memory = "" if peak is None else f"{peak:9.1f} MiB {peak / table['floor_mib']:6.2f}x"
        print(timing.table_row(name, row, memory), flush=True)


if __name__ == "__main__":
    main()
