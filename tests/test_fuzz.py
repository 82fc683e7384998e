"""Mutated records through every reader: each gives a record, or a refusal of one line.

    python -m tests.test_fuzz 20000 [reader]

makes 20000 mutated records per reader, in one process, and prints a table. The suite makes 400
records per reader, or FGRLHF_FUZZ. For every 100 records there are three kinds of files:

    JSON lines      every line must be accounted for: read, left out or refused, with its place
    an array        every element too, and the first and the last, which are good, must be read
    single records  stop, or are read: in arrays, compressed, cut off, as UTF-16, with random bytes

A file may take 10 seconds, and the process 1 GiB of memory.
"""

import contextlib
import gzip
import io
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.qa_feedback import read_qa_feedback_pairs
from fgrlhf.data.readers import (
    read_annotations, read_demonstrations, read_edits, read_outputs, read_pairs, read_preferences,
    read_prompts)
from fgrlhf.data.records import plain
from tests.test_data import EDIT, JUDGED, OUTPUT, PAIR
from tests.test_formats import COACH, DEFACTO, QA, TALK, assistant, system, user

COUNT = int(os.environ.get("FGRLHF_FUZZ", 400))
SECONDS, MEBIBYTES, BATCH = 10, 1024, 100
KINDS = ("read", "refused", "files read", "files refused")

READERS = {                              # a reader, and a record that it reads
    "edits": (read_edits, EDIT), "pairs": (read_pairs, PAIR),
    "preferences": (read_preferences, EDIT), "prompts": (read_prompts, OUTPUT),
    "demonstrations": (read_demonstrations, OUTPUT), "outputs": (read_outputs, OUTPUT),
    "annotations": (read_annotations, JUDGED), "QA-Feedback pairs": (read_qa_feedback_pairs, QA)}
SEEDS = [EDIT, PAIR, OUTPUT, JUDGED, QA, DEFACTO, COACH, {"id": "d", "prompt": "p", "output": "o"},
         {"prompt": [system("s"), user("p")], "chosen": "c", "rejected": [assistant("r")]},
         {"chosen": [*TALK, assistant("c")], "rejected": [*TALK, assistant("r")]},
         {"messages": [user("p"), assistant([{"type": "text", "text": "o"}])]},
         {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
         {"prompt": "p", "completion": "c", "label": False},
         {"question": "q", "passages": [["t", "s"]], "answer": "a"}]
JUNK = [None, True, 0, -1, 7, 1.5, 10**400, 1e308, float("nan"), float("inf"), "", " ", "\ud800",
        "\n\nHuman: ", "x" * 20_000, [], {}, [None], [[]], {"": 0}, {"start": 0}, [{"content": 1}],
        [{"role": "user", "content": "u"}] * 3, [{"start": 0, "end": 10**30, "type": ""}]]


# ----- mutations ----------------------------------------------------------------------------------

def mutate(value, rng: random.Random):
    """Leaves out, damages or adds a field, takes one from another format, or returns junk."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rng.choice([rest, rest | {key: mutate(value[key], rng)}, value | {"?\n": 1},
                           value | {rng.choice(list(rng.choice(SEEDS))): mutate("z", rng)}])
    if isinstance(value, list) and value and rng.random() < 0.6:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice([[mutate(value[i], rng)], [], value[i:]]) + value[i + 1:]
    return rng.choice(JUNK)


def damaged(good: dict, rng: random.Random) -> bytes:
    """A mutated record on one line, which is one JSON value; in 1 of 20 a field is there twice."""
    record = rng.choice([*SEEDS, *[good] * len(SEEDS)])
    for _ in range(rng.choice([0, 1, 1, 1, 2])):
        record = mutate(record, rng)
    if isinstance(record, dict) and rng.random() < 0.5:
        record = record | {"id": rng.choice([str(rng.random()), rng.randrange(10**6)])}
    text = json.dumps(record, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.05:
        text = text.replace('{"', '{"input": "", "input": "", "', 1)
    return text.encode("utf-8", errors="surrogatepass")


def scratch(raw: bytes, rng: random.Random) -> bytes:
    """Replaces, deletes or inserts one to three bytes, or cuts the end off."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(raw) + 1)
        raw[at:at + rng.randint(0, 1)] = rng.randbytes(rng.randint(0, 1))
    return bytes(raw[:rng.randrange(len(raw) + 1)] if rng.random() < 0.1 else raw)


def whole_file(good: dict, rng: random.Random) -> bytes:
    """One or two records as a file, usually in a shape or an encoding that people have."""
    records = b",".join(rng.choice([json.dumps(good).encode(), damaged(good, rng)])
                        for _ in range(rng.randint(1, 2)))
    raw = rng.choice([b"[%s]", b"[%s", b"%s", b"\xef\xbb\xbf[\n%s\n]\n", b"[%s]]",
                      b"{\n%s"]) % records
    shape = rng.randrange(8)
    if shape == 0:
        raw = raw.decode("utf-8", errors="replace").encode(rng.choice(["utf-16", "utf-16-be"]))
    elif shape == 1:
        raw = gzip.compress(raw)
    elif shape == 2:
        raw = rng.choice([b"PAR1", b"PK\x03\x04", b"<", b"id,prompt\n", b"\0", b"\n \n"]) + raw
    elif shape == 3:
        raw = rng.choice([b"[", b'{"a":', b'"', b"[,"]) * rng.choice([10, 3000, 100_000]) + raw
    return scratch(raw, rng) if rng.random() < 0.4 else raw


# ----- what must hold -----------------------------------------------------------------------------

def read(reader, path: Path, on_bad_record: str) -> tuple[list | None, str, float]:
    """Returns (records, None if they were refused; the report or the refusal; seconds)."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            made, report = reader(path, on_bad_record), ""
        except UserError as error:
            made, report = None, str(error)
            assert report.startswith(str(path)) and len(report) < 1200, report
            assert "\n" not in report and report.isprintable(), report
    return made, report or err.getvalue(), time.perf_counter() - started


def accounted(path: Path, made: list, report: str, total: int) -> int:
    """Checks that each of `total` records was made or is in the report. Returns the refused."""
    left_out = refused = 0
    for line in report.splitlines():
        if match := re.fullmatch(rf"{path}: left out (\d+) bad records of (\d+):", line):
            refused = int(match[1])
            assert int(match[2]) == total, (line, total)
        elif match := re.fullmatch(rf"{path}: left out (\d+) of (\d+) records: .+", line):
            left_out = int(match[1])
            assert int(match[2]) == total, (line, total)
        else:
            assert re.match(rf"  {path}(:\d+|: record \d+): ", line), line
            assert len(line) < 1000 and line.isprintable(), line
    assert report.count(f"\n  {path}") == refused, report
    if not any(isinstance(record, list) for record in made):       # QA-Feedback: six pairs each
        assert len(made) + left_out + refused == total, (len(made), left_out, refused, total)
    return refused


def one_batch(name: str, number: int, path: Path) -> tuple[Counter, float]:
    """Tries BATCH records in the three kinds of files. Returns what came of them, and seconds."""
    rng, (reader, good) = random.Random(f"{name}/{number}"), READERS[name]
    counts, slowest = Counter(), 0.0
    several = reader is read_qa_feedback_pairs                     # makes several pairs per record
    lines = [damaged(good, rng) for _ in range(BATCH)]
    lines = [line if rng.random() < 0.6 else scratch(line, rng) for line in lines]
    first, last = (json.dumps(good | {"id": id}).encode() for id in ("first", "last"))
    data = first + b"\n" + b"\n".join(lines)
    path.write_bytes(data)
    made, report, seconds = read(reader, path, "skip")
    slowest = max(slowest, seconds)
    total = sum(bool(line.strip()) for line in data.split(b"\n"))
    assert made is not None, report
    counts["refused"] += accounted(path, [[]] if several else made, report, total)
    counts["read"] += len(made)

    values = [first, *(damaged(good, rng) for _ in range(BATCH // 2)), last]
    path.write_bytes(rng.choice([b"[%s]", b" [\n%s\n]"]) % rng.choice([b",", b",\n"]).join(values))
    made, report, seconds = read(reader, path, "skip")
    slowest = max(slowest, seconds)
    assert made is not None, report
    accounted(path, [[]] if several else made, report, len(values))
    if not several:
        for record, raw in ((made[0], first), (made[-1], last)):
            path.with_name("one").write_bytes(raw)
            [alone] = reader(path.with_name("one"))
            fields = {key: value for key, value in plain(alone).items() if key != "id"}
            assert fields.items() <= plain(record).items(), (alone, record)

    for _ in range(BATCH // 10):
        path.write_bytes(whole_file(good, rng))
        made, report, seconds = read(reader, path, rng.choice(["stop", "skip"]))
        slowest = max(slowest, seconds)
        counts["files read" if made else "files refused"] += 1
    return counts, slowest


def main(count: int, names: list[str]) -> int:
    slowest, wrong = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or READERS:
            counts = Counter()
            for number in range(-(-count // BATCH)):
                try:
                    result, seconds = one_batch(name, number, Path(folder) / "fuzz.jsonl")
                except Exception as error:
                    wrong += 1
                    print(f"{name}: batch {number}: {type(error).__name__}: {str(error)[:600]}")
                    continue
                counts += result
                slowest = max(slowest, seconds)
            print(f"{name:18}" + "".join(f"{kind} {counts[kind]:<8}" for kind in KINDS),
                  flush=True)
            if not min(counts[kind] for kind in KINDS):
                wrong += 1
                print(f"{name}: expected some of each kind")
    peak = peak_memory()
    print(f"{count} records per reader: {wrong} wrong, slowest file {slowest:.2f} s, "
          f"peak {peak} MiB")
    return int(wrong > 0 or peak > MEBIBYTES or slowest > SECONDS)


def peak_memory() -> int:
    """The peak of this process in MiB. On Linux ru_maxrss also has what its parent held."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def test_mutated_records_are_read_or_refused():
    """A process of its own: its peak memory is that of the mutations, and it may crash."""
    done = subprocess.run([sys.executable, "-m", "tests.test_fuzz", str(COUNT)],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and f"{COUNT} records per reader: 0 wrong" in done.stdout, (
        done.stdout[-3000:] + done.stderr[-3000:])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
