"""Mistakes of users, through the real command lines: one line, exit status 2, nothing written.

tests/test_data.py has every fault that a reader can find, tests/test_scripts.py damaged models.
"""

import json
import re
from pathlib import Path

import pytest

from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.engine.encoding import Encoding, write_encoding
from tests import processes
from tests.small import ppo_folder

LONG = "name the river it is red " * 12                        # more tokens than the context of 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = ppo_folder(tmp_path_factory.mktemp("bad"))
    for kind in ("token", "sequence"):
        write_encoding(path / kind, Encoding("plain"))      # as train_rm.py does
    return path


def command(script: str, folder: Path, data: Path, out: Path) -> tuple:
    """The command of a script that reads records, with valid values for everything else."""
    policy, reward = ("--policy", folder / "policy"), ("--reward", folder / "token")
    return {"sft": ("fgrlhf.sft", "--data", data, "--model", folder / "policy", "--out", out),
            "train_rm": ("train_rm.py", "--data", data, "--model", folder / "policy", "--out", out,
                         "--epochs", 1),
            "train_ppo": ("train_ppo.py", "--method", "fine-grained", *policy, *reward, "--prompts",
                          data, "--out", out, "--rollouts", 2, "--iterations", 1,
                          "--max-new-tokens", 4),
            "outputs": ("eval.py", "outputs", *policy, "--prompts", data, "--out", out,
                        "--max-new-tokens", 4),
            "reward-model": ("eval.py", "reward-model", *reward, "--data", data),
            "checks": ("fgrlhf.checks", *policy, *reward, "--prompts", data, "--max-new-tokens", 4)
            }[script]


def record(**changes) -> bytes:
    fields = {"id": "a", "prompt": "name the river", "original": "it is", "edited": "it is red"}
    kept = {name: value for name, value in (fields | changes).items() if value is not None}
    return json.dumps(kept).encode()


GOOD = record()
FAULTS = {                              # name: (the second line of the file, the refusal)
    "invalid UTF-8": (record(id="b").replace(b"river", b"\xff"), r":2: expected UTF-8, got 0xff"),
    "broken JSON": (record(id="b")[:-9], r":2: expected one JSON object per line"),
    "no object": (b"[1]", r":2: record: expected an object, got \[1\]"),
    "missing field": (record(id="b", edited=None), r":2: edited: expected this field"),
    "missing prompt": (record(id="b", prompt=None), r":2: prompt: expected this field"),
    "wrong type": (record(id="b", prompt=3), r":2: prompt: expected a string that is not blank"),
    "unknown field": (record(id="b", span=[]), r":2: 'span': unknown field, expected one of id"),
    "empty response": (record(id="b", edited=""), r":2: edited: expected a string that is not"),
    "span out of range": (record(id="b", spans=[{"start": 0, "end": 99, "type": "x"}]),
                          r":2: spans\[0\]: expected 0 <= start < end <= 5"),
    "span reversed": (record(id="b", spans=[{"start": 3, "end": 1, "type": "x"}]),
                      r":2: spans\[0\]: expected 0 <= start < end"),
    "duplicate id": (GOOD, r":2: id: expected a new id, got 'a' as in .*:1; rename or delete"),
    "prompt over the context": (record(id="b", prompt=LONG),
                                r": record 'b': prompt: expected at most \d+ tokens, got \d+")}


def refused(tmp_path: Path, arguments: tuple, pattern: str) -> None:
    """One line that matches, status 2, nothing on stdout, no output of any kind."""
    files = lambda: sorted(path for path in tmp_path.rglob("*") if "process-" not in path.name)
    before = files()
    done = processes.run(tmp_path, *arguments)
    assert done.status == 2 and done.out == "", done
    lines = [line for line in done.err.splitlines() if not line.startswith("pass  ")]  # the checks
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    assert re.search(pattern, lines[0]), done.err
    assert files() == before


@pytest.mark.parametrize("script", ["sft", "train_rm", "train_ppo", "outputs", "reward-model"])
def test_every_fault_of_a_record_is_refused_with_its_place(script, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    for name, (line, pattern) in FAULTS.items():
        data.write_bytes(GOOD + b"\n" + line + b"\n")
        refused(tmp_path, command(script, folder, data, tmp_path / "out"),
                re.escape(str(data)) + pattern)


@pytest.mark.parametrize("script", ["sft", "train_rm", "train_ppo", "outputs", "reward-model"])
def test_on_bad_record_skip_counts_and_lists_what_it_left_out(script, folder, tmp_path):
    """A file has all faults and two good records: the good ones are used, the others are named."""
    data = tmp_path / "data.jsonl"
    faults = [line for line, _ in FAULTS.values()]
    data.write_bytes(b"\n".join([GOOD, *faults, record(id="z")]) + b"\n")
    done = processes.run(tmp_path, *command(script, folder, data, tmp_path / "out"),
                         "--on-bad-record", "skip")
    assert done.status == 0, done
    for number in range(2, len(faults) + 1):                       # all but the long prompt
        assert f"\n  {data}:{number}: " in done.err, done.err
    assert f"\n  {data}: record 'b': prompt: expected at most" in done.err
    assert f"{data}: left out 11 bad records of 14:" in done.err
    assert f"{data}: left out 1 bad records of 3:" in done.err
    count = {"sft": "records", "train_rm": "records", "outputs": "outputs",
             "reward-model": "pairs"}.get(script)
    if count:
        text = done.out if script in ("outputs", "reward-model") else (
            tmp_path / "out/done.json").read_text()
        assert json.loads(text)[count] == 2


@pytest.mark.parametrize("script", ["sft", "train_rm", "train_ppo", "outputs", "reward-model",
                                    "checks"])
def test_a_file_without_records_a_folder_and_no_file_are_refused(script, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    for content in (b"", b"\n \n", b"[]"):
        data.write_bytes(content)
        refused(tmp_path, command(script, folder, data, tmp_path / "out"),
                f"{data}: .*got none in 0")
    refused(tmp_path, command(script, folder, tmp_path, tmp_path / "out"),
            f"{tmp_path}: expected a file, got a folder; name a file in it")
    refused(tmp_path, command(script, folder, tmp_path / "none", tmp_path / "out"),
            f"{tmp_path / 'none'}: expected a file, got nothing; check the path")


@pytest.mark.parametrize("script", ["sft", "train_rm", "train_ppo", "outputs"])
def test_an_out_that_cannot_be_written_is_refused(script, folder, tmp_path):
    """A file is in the place of a folder (root could write anywhere else)."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(GOOD)
    refused(tmp_path, command(script, folder, data, data / "out"),
            "not writable|cannot be written")


def test_an_edit_that_changes_nothing_teaches_nothing(folder, tmp_path):
    """It is left out where preferences are wanted; SFT imitates it like any other edit."""
    data = tmp_path / "data.jsonl"
    data.write_bytes(record(edited="it is"))
    refused(tmp_path, command("train_rm", folder, data, tmp_path / "out"),
            "got none in 1, the edit changes nothing")
    done = processes.run(tmp_path, *command("sft", folder, data, tmp_path / "out"))
    assert done.status == 0, done


@pytest.mark.parametrize("script", ["sft", "train_rm"])
def test_a_response_that_fills_the_context_is_refused_or_cut_on_request(script, folder, tmp_path):
    """A response that was cut ends without EOS, like a truncated rollout."""
    data = tmp_path / "d.jsonl"
    write_jsonl(data, [Edit("a", "name the river", "it is " + LONG, LONG)])
    asked = command(script, folder, data, tmp_path / "out")
    refused(tmp_path, asked, "record 'a': .*--cut-responses")
    done = processes.run(tmp_path, *asked, "--cut-responses")
    assert done.status == 0 and "Traceback" not in done.err, done


FLAGS = [                               # (script, more flags, the refusal)
    ("sft", ("--init", "tiny"), "expected exactly one of --model DIR and --init PRESET"),
    ("sft", ("--batch", 0), "argument --batch: expected a number of at least 1"),
    ("sft", ("--batch", "many"), "argument --batch: invalid int value"),
    ("sft", ("--learning-rate", 1), "unrecognized arguments: --learning-rate"),
    ("sft", ("--keep", 0), "argument --keep: expected a number of at least 1"),
    ("sft", ("--on-bad-record", "mend"), "argument --on-bad-record: invalid choice: 'mend'"),
    ("sft", ("--device", "gpu"), "--device gpu: not usable here"),
    ("train_rm", ("--folds", 1), "--folds 1: expected 0, or 2 to 1"),
    ("train_rm", ("--batch", -3), "argument --batch: expected a number of at least 1"),
    ("train_rm", ("--lr", "nan"), "argument --lr: expected a number of at least 0"),
    ("train_rm", ("--seed", "9" * 30), r"argument --seed: expected a number below 2\^63"),
    ("train_ppo", ("--minibatches", 3), r"--minibatches 3: expected 1..2 \(--rollouts\)"),
    ("train_ppo", ("--microbatch", -1), "argument --microbatch: expected a number of at least 0"),
    ("train_ppo", ("--max-new-tokens", 47), "--max-new-tokens 47: expected at most 46, because"),
    ("checks", ("--max-new-tokens", 999), "--max-new-tokens 999: expected at most 46, because"),
    ("train_ppo", ("--temperature", 0), "--temperature 0.0: expected a number above 0"),
    ("train_ppo", ("--temperature", "nan"), "--temperature"),
    ("train_ppo", ("--world", 1), "--dev-prompts, --dev-reference and --world: expected all three"),
    ("train_ppo", ("--method", "dpo"), "argument --method: invalid choice: 'dpo'"),
    ("checks", ("--replay", "x"), "or only --replay FILE"),
    ("outputs", ("--max-new-tokens", 0), "argument --max-new-tokens: expected a number of at lea"),
    ("outputs", ("--batch", 0), "argument --batch: expected a number of at least 1")]


def test_a_context_that_no_model_can_have_is_refused(folder, tmp_path):
    refused(tmp_path, ("fgrlhf.sft", "--data", folder / "prompts.jsonl", "--init", "tiny",
                       "--tokenizer", folder / "t.model", "--context", 10 ** 11, "--out",
                       tmp_path / "out"), r"--context 100000000000: expected at most 2147483648$")


@pytest.mark.parametrize("given", [(), ("nope",), ("nope", "float32"), (".", "float16")])
def test_the_port_refuses_a_folder_without_fixtures_and_another_dtype(given, tmp_path):
    refused(tmp_path, ("tests/numpy_port.py", *given), "expected DIR, or DIR float32, with the fix"
            f"tures in DIR, got {' '.join(given) or 'nothing'}; write them by ")


@pytest.mark.parametrize("script, flags, pattern", FLAGS)
def test_flags_that_make_no_sense_are_refused(script, flags, pattern, folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_bytes(GOOD)
    refused(tmp_path, (*command(script, folder, data, tmp_path / "out"), *flags), pattern)
