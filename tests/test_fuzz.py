"""Mutated records through every reader: each gives a record, or a UserError with its place.

Each reader gets 20,000 records in JSONL files, and every refusal is checked. 600 more records are
files of their own, some of them JSON arrays, where one byte can damage everything.
"""

import json
import random
import time

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.data.qa_feedback import read_qa_feedback_pairs
from fgrlhf.data.readers import (
    read_annotations, read_demonstrations, read_edits, read_outputs, read_pairs, read_prompts)
from tests.test_data import EDIT, JUDGED, OUTPUT, PAIR

RANKED = EDIT | {"preferences": [1, 2, 0, 1, 2, 0]}
CANDIDATES = {"id": "e1", "candidates": {"2": "a", "3": "b", "4": "c"}}


def valid(path, record: dict):
    """A valid file in the folder of `path`."""
    other = path.with_name("fuzz-other")
    other.write_text(json.dumps(record))
    return other


READERS = [read_edits, read_pairs, read_prompts, read_demonstrations, read_outputs,
           read_annotations,
           lambda path, bad="stop": read_qa_feedback_pairs(path, valid(path, CANDIDATES), bad),
           lambda path, bad="stop": read_qa_feedback_pairs(valid(path, RANKED), path, bad)]
SEEDS = [EDIT, PAIR, OUTPUT, JUDGED, {"id": "d", "prompt": "p", "output": "o"},
         {"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": "r"},
         RANKED, CANDIDATES]
JUNK = [None, True, 0, -1, 10**400, 1e308, "", " ", "\ud800", "x" * 200, [], {}, [None], [[]],
        {"": 0}, {"start": 0}, [{"content": 1}], [{"start": 0, "end": 10**30, "type": ""}]]


def mutate(value, rng: random.Random):
    """Leaves out, damages or adds a field, takes one from another format, or returns junk."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rng.choice([rest, rest | {key: mutate(value[key], rng)}, value | {"?\n": 1},
                           value | {rng.choice(list(rng.choice(SEEDS))): mutate("z", rng)}])
    if isinstance(value, list) and value and rng.random() < 0.5:
        return [mutate(value[0], rng)] + value[1:]
    return rng.choice(JUNK)


def damaged(rng: random.Random, arrays: bool) -> bytes:
    """A mutated record as JSON. In 4 of 10 records one to three bytes are random."""
    record = mutate(rng.choice(SEEDS), rng)
    if isinstance(record, dict) and rng.random() < 0.3:
        record |= {"id": str(rng.random())}
    raw = bytearray(json.dumps(rng.choice([record, [record]]) if arrays else record).encode())
    if rng.random() < 0.4:
        for _ in range(rng.randint(1, 3)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    return bytes(raw)


@pytest.mark.parametrize("number", range(len(READERS)))
def test_readers_survive_20000_mutated_records(number, tmp_path, capsys):
    """With "skip" a reader gives records, and one line with the place for each refused one."""
    rng, path, reader = random.Random(number), tmp_path / "fuzz.jsonl", READERS[number]
    started, made, refused = time.perf_counter(), 0, 0
    for _ in range(40):
        records = [damaged(rng, arrays=False) for _ in range(500)]
        path.write_bytes(b'{"id": "x"}\n' + b"\n".join(records) + b"\n")      # never an array
        try:
            made += len(reader(path, "skip"))
        except UserError as error:
            assert str(error).startswith(str(tmp_path / "fuzz")) and "\n" not in str(error)
        err = capsys.readouterr().err
        for line in err.split("\n"):
            if line.startswith("  "):
                assert line.startswith(f"  {tmp_path}/fuzz") and len(line) < 700, line
                refused += 1
            else:
                assert line == "" or line.startswith(f"{tmp_path}/fuzz"), line
    assert made > 0 and refused > 5000, (made, refused)
    assert time.perf_counter() - started < 60


def test_readers_survive_mutated_files(tmp_path):
    rng, path, survived = random.Random(99), tmp_path / "fuzz", 0
    for _ in range(600):
        path.write_bytes(damaged(rng, arrays=True))
        for reader in READERS:
            try:
                assert reader(path)
                survived += 1
            except UserError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert survived > 150                                              # not everything was refused
