"""Times training, generation and PPO iterations against the bare matmuls of the same work.

    python -m fgrlhf.bench                                  # the tables of README.md in this folder
    python -m fgrlhf.bench --width 64 --work "fine-grained" --repeats 20 --matmuls
    python -m fgrlhf.bench --profile --width 64 --work "fine-grained"
    python -m fgrlhf.bench --device cuda --json loop.json

work.py describes the rows. The floor of a row is its matmuls only, one after the other, into
buffers that exist already (floor.py). The floor of an alignment is a plain Python table.
"""

import argparse
import json
import math

import torch

from fgrlhf.align import align
from fgrlhf.bench.profiling import print_profile
from fgrlhf.bench.work import MODELS, ROWS, V
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import OneLineParser, run
from fgrlhf.engine.distributed import pick_device
from kernels import timing
from kernels.memory import keep_freed


def loop_table(width: int, options) -> dict:
    """Times and prints the rows of one width."""
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
        per_token = 1e6 * rows[name].get("seconds", math.nan) / work.tokens
        print(timing.table_row(name, rows[name], f"{per_token:7.1f} us per token {memory}"),
              flush=True)
        for a, b, n in rows[name]["matmuls"] if options.matmuls else ():
            print(f"      {n:6} x {a} @ {b}")
    return {"width": width, "rows": rows}


def plain_table(a: list[int], b: list[int]) -> int:
    """Computes the Levenshtein distance by its plain table, without an alignment."""
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1,
                              table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


def edited(length: int) -> tuple[list[int], list[int]]:
    """Makes a text and an edit of it: 1 token in 10 is replaced, deleted or preceded by another."""
    draw = torch.Generator().manual_seed(0)
    original = torch.randint(V, (length,), generator=draw).tolist()
    result = []
    for token, kind in zip(original, torch.randint(30, (length,), generator=draw).tolist()):
        result += {0: [V], 1: [], 2: [V, token]}.get(kind, [token])
    return original, result


def alignment_table(options) -> dict:
    """Times and prints the alignment of edits of two lengths."""
    rows = {}
    for length in (256, 1024):
        a, b = edited(length)
        runs = {"plain table": lambda: plain_table(a, b), "align": lambda: align(a, b)}
        rows[str(length)] = timing.in_turn(runs, dict.fromkeys(runs, "plain table"),
                                           options.repeats, timing.clock_of(options))
        for name, row in rows[str(length)].items():
            print(timing.table_row(f"{name}, {length} tokens", row), flush=True)
    return {"alignment": rows}


def parse_flags() -> argparse.Namespace:
    parser = OneLineParser(prog="python -m fgrlhf.bench", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=list(MODELS), choices=MODELS,
                        help="widths of the model (default: all)")
    parser.add_argument("--work", nargs="*", default=list(ROWS), choices=ROWS,
                        help="rows (default: all); without a name only the alignment")
    parser.add_argument("--matmuls", action="store_true", help="list the matmuls of each floor")
    parser.add_argument("--profile", action="store_true",
                        help="print where the time of each row goes instead of ratios")
    timing.add_flags(parser, repeats=7)
    return parser.parse_args()


def main() -> None:
    options = parse_flags()
    options.device = str(pick_device(options.device))
    torch.set_num_threads(options.threads)
    keep_freed()                                        # as the training scripts do
    if options.peak_of:
        work = ROWS[options.peak_of](options.width[0], options.device)
        print(timing.peak_mib(work.run, options.device))
        return
    machine, tables = timing.machine(options), []
    if options.profile and not options.device.startswith("cpu"):
        raise UserError(f"--profile: expected --device cpu, got {options.device}; the parts are "
                        "those of a CPU's time")
    if options.profile:
        for width in options.width:
            print(f"\nD {width}, 6 layers, V {V}")
            for name in options.work:
                print_profile(name, width, options.device)
        return
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
    run(main)
