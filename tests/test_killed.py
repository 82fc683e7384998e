"""Processes killed at random moments, by real signals, and resumed: the same files, byte for byte.

A moment is a share of the time an undisturbed run takes; what the disk holds then may be nothing,
half a metrics line, a temporary file or a state. tests/test_scripts.py kills at chosen steps.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from fgrlhf.data import records
from tests import processes
from tests.small import ppo_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = ppo_folder(tmp_path_factory.mktemp("killed"))
    records.write_jsonl(path / "edits.jsonl", [
        records.Edit(str(i), "name the river"[:3 + i % 9], "it is the river"[:4 + i], "it is red")
        for i in range(12)])
    return path


def command(script: str, folder: Path, out: Path) -> tuple:
    """Each trainer over steps enough to be hit between any two lines of it."""
    common = ("--out", out, "--save-every", 3, "--resume")
    ppo = ("train_ppo.py", "--policy", folder / "policy", "--prompts", folder / "prompts.jsonl",
           "--iterations", 14, "--rollouts", 6, "--max-new-tokens", 8, *common, "--method")
    data = ("--data", folder / "edits.jsonl", "--model", folder / "policy")
    return {"sft": ("fgrlhf.sft", *data, "--batch", 2, "--epochs", 12, *common),
            "train_rm": ("train_rm.py", *data, "--batch", 2, "--epochs", 10, *common),
            "fine-grained": (*ppo, "fine-grained", "--reward", folder / "token"),
            "rlhf": (*ppo, "rlhf", "--reward", folder / "sequence")}[script]


def files(out: Path) -> dict[str, bytes]:
    """What a run leaves, without what tells the time or the place."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_file() and name not in (".lock", "timing.jsonl", "config.json"):
            found[name] = path.read_bytes()
        if name == "done.json":
            done = json.loads(path.read_text())
            found[name] = {k: v for k, v in done.items() if not k.endswith("seconds")}
    return found


@pytest.mark.parametrize("script", ["sft", "train_rm", "fine-grained", "rlhf"])
def test_a_trainer_killed_at_random_moments_leaves_the_same_files(script, folder, tmp_path):
    processes.run(tmp_path, "train_rm.py", "--help")                # so that the server is up
    started = time.perf_counter()
    done = processes.run(tmp_path, *command(script, folder, tmp_path / "whole"))
    whole_seconds, kills = time.perf_counter() - started, 0
    assert done.status == 0, done
    rng, metrics = random.Random(script), tmp_path / "killed/metrics.jsonl"
    steps = (tmp_path / "whole/metrics.jsonl").read_text().count("\n")
    for part in range(5):               # each time a sixth of the steps further, inside a step
        process, _ = processes.start(tmp_path, *command(script, folder, tmp_path / "killed"))
        wanted = steps * (part + rng.random()) / 6
        while process.is_alive() and (metrics.read_text().count("\n") if metrics.exists()
                                      else 0) < wanted:
            time.sleep(0.001)
        process.join(whole_seconds / steps * rng.random())
        process.kill()                                              # SIGKILL
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    done = processes.run(tmp_path, *command(script, folder, tmp_path / "killed"))
    assert done.status == 0 and kills, done
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    left_over = {name for name in killed if name.startswith(".") or "/." in name}  # .tmp of a kill
    assert killed.keys() - left_over == whole.keys()
    for name, content in whole.items():
        assert killed[name] == content, name
    steps = [json.loads(line)["step"] for line in
             (tmp_path / "killed/timing.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_prints_the_command_that_continues(number, status, folder,
                                                                           tmp_path):
    done = processes.run(tmp_path, *command("sft", folder, tmp_path / "whole"))
    assert done.status == 0, done
    process, stem = processes.start(tmp_path, *command("sft", folder, tmp_path / "stopped")[:-1])
    metrics = tmp_path / "stopped/metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.005)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == status, Path(f"{stem}.err").read_text()
    steps = metrics.read_text().count("\n")
    assert [path.name for path in (tmp_path / "stopped").glob("state-*")][-1:] or steps < 3
    said = Path(f"{stem}.err").read_text().splitlines()
    assert said[-2] == f"stopped after step {steps} of 72; continue with:"
    assert said[-1].startswith("python -m fgrlhf.sft --data ") and said[-1].endswith(" --resume")
    done = processes.run(tmp_path, *said[-1].split()[2:])
    assert done.status == 0, done
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
