"""Times training, generation and PPO iterations against the bare matmuls of the same work.

    python -m fgrlhf.bench                                  # the tables of README.md in this folder
    python -m fgrlhf.bench --width 64 --work "fine-grained" --repeats 20 --matmuls
    python -m fgrlhf.bench --profile --width 64 --work "fine-grained"
    python -m fgrlhf.bench --device cuda --json loop.json
    python -m fgrlhf.bench --shared-prompts --clock cpu --repeats 5
    python -m fgrlhf.bench --peers --clock cpu --repeats 3
    python -m fgrlhf.bench --peers "training step" --dtype bfloat16 --clock cpu --repeats 3

work.py describes the rows, shared.py those of --shared-prompts, peers.py those of --peers. The
floor of a row is its matmuls only, one after the other, into buffers that exist already (floor.py).
The floor of an alignment is a plain Python table.
"""

import argparse
import json
import math

import torch

from fgrlhf.align import align
from fgrlhf.bench import shared
from fgrlhf.bench.peers import SIDES, WORK, peer_table, seconds_of
from fgrlhf.bench.profiling import print_profile
from fgrlhf.bench.work import MODELS, ROWS, V
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import DTYPES, OneLineParser, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.presets import PRESETS
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


def shared_table(options) -> dict:
    """Times and prints work on rows that share a prompt, by SmolLM2-135M's sizes."""
    runs, floors = {}, {}
    for name, work in shared.rows_of(PRESETS["SmolLM2-135M"], options.device).items():
        runs |= {f"{name}, whole rows": shared.whole(work), name: work}
        floors |= dict.fromkeys(list(runs)[-2:], f"{name}, whole rows")
    rows = timing.in_turn(runs, floors, options.repeats, timing.clock_of(options))
    for name in rows:
        print(timing.table_row(f"{name:<32}", rows[name]), flush=True)
    return {"shared_prompts": rows}


def parse_flags() -> argparse.Namespace:
    parser = OneLineParser(prog="python -m fgrlhf.bench", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", nargs="+", type=int, default=list(MODELS), choices=MODELS,
                        help="widths of the model (default: all)")
    parser.add_argument("--work", nargs="*", default=list(ROWS), choices=ROWS,
                        help="rows (default: all); without a name only the alignment")
    parser.add_argument("--matmuls", action="store_true", help="list the matmuls of each floor")
    parser.add_argument("--shared-prompts", action="store_true",
                        help="only prompts that rows share, in a model of SmolLM2-135M's sizes")
    parser.add_argument("--peers", nargs="*", choices=WORK, metavar="ROW",
                        help="only the same work by transformers, where that is installed "
                        f"(default: {', '.join(WORK)})")
    parser.add_argument("--peer-of", nargs=2, metavar=("SIDE", "ROW"),
                        help=f"print only the seconds of one row of --peers, by one side "
                        f"({', '.join(SIDES)})")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of --peers")
    parser.add_argument("--profile", action="store_true",
                        help="print where the time of each row goes instead of ratios")
    timing.add_flags(parser, repeats=7)
    options = parser.parse_args()
    for name in ("repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"argument --{name}: expected a number of at least 1, got "
                         f"{getattr(options, name)}")
    if options.peak_of not in (None, *ROWS):
        parser.error(f"argument --peak-of: expected one of {', '.join(map(repr, ROWS))}, got "
                     f"{options.peak_of!r}")
    return options


def check_flags(options) -> None:
    """Raises UserError for a flag that the tables asked for would ignore."""
    if options.dtype != "float32" and options.peers is None and not options.peer_of:
        raise UserError(f"--dtype {options.dtype}: expected --peers; other tables are in float32")
    for name, reason in (("profile", "the parts are those of a CPU's time"),
                         ("peers", "both sides run on the CPU")):
        if getattr(options, name) not in (False, None) and not options.device.startswith("cpu"):
            raise UserError(f"--{name}: expected --device cpu, got {options.device}; {reason}")


def main() -> None:
    options = parse_flags()
    options.device = str(pick_device(options.device))
    check_flags(options)
    torch.set_num_threads(options.threads)
    if options.peer_of:
        print(seconds_of(*options.peer_of, getattr(torch, options.dtype), timing.clock_of(options)))
        return
    keep_freed()                                        # as the training scripts do
    if options.peak_of:
        work = ROWS[options.peak_of](options.width[0], options.device)
        print(timing.peak_mib(work.run, options.device))
        return
    machine, tables = timing.machine(options), []
    if options.profile:
        for width in options.width:
            print(f"\nD {width}, 6 layers, V {V}")
            for name in options.work:
                print_profile(name, width, options.device)
        return
    print(f"medians of {options.repeats} rounds, [quartiles]")
    if options.shared_prompts:
        print("\nprompts that rows share; 1x = the same work on whole rows")
        tables.append(shared_table(options))
    if options.peers is not None:
        print("\nseconds, and ratios of ours to a peer (median, least, largest)")
        tables.append(peer_table(options))
    if not options.shared_prompts and options.peers is None:
        for width in options.width if options.work else ():
            print(f"\nD {width}, 6 layers, V {V}; 1x = the bare matmuls of the row")
            tables.append(loop_table(width, options))
        print("\nalignment of a text and its edit; 1x = a plain Python table")
        tables.append(alignment_table(options))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "tables": tables}, file, indent=1)


if __name__ == "__main__":
    run(main)
