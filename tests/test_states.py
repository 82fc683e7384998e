"""States on a disk that fills up: the last good one stays, and the run goes on once there is room.

A small tmpfs where mounting is permitted; else RLIMIT_FSIZE, which refuses the same write with
another errno. One of the two always runs.
"""

import os
import resource
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Demonstration, write_jsonl
from fgrlhf.engine import states
from fgrlhf.engine.states import load_state
from tests import processes
from tests.small import ppo_folder


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB; skips where mounting one is not permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
                           capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs permission to mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def sized(kibibytes: int, seed: int = 0) -> dict:
    return {"x": torch.rand(kibibytes * 256, generator=torch.Generator().manual_seed(seed))}


def test_a_full_disk_leaves_the_last_good_state_and_nothing_else(small_disk):
    states.save(small_disk, 1, sized(500), {}, keep=2)
    with pytest.raises(UserError, match="state-000002.pt: cannot be written .No space left"):
        states.save(small_disk, 2, sized(700), {}, keep=2)
    assert [path.name for path in small_disk.iterdir()] == ["state-000001.pt"]
    path, state = states.newest(small_disk)
    assert path.name == "state-000001.pt" and torch.equal(
        state["parts"]["x"], sized(500)["x"])
    states.save(small_disk, 2, sized(300), {}, keep=1)                  # there is room for that
    assert [path.name for path in small_disk.iterdir()] == ["state-000002.pt"]


def limit_files(command: list[str]) -> None:
    """No file may grow beyond what config.json and the metrics need: a state is larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def train(folder: Path, out: Path, instead=None) -> tuple[int, str]:
    """(status, last line of stderr) of a short SFT run."""
    process, stem = processes.start(
        folder, "fgrlhf.sft", "--data", folder / "demonstrations.jsonl", "--model",
        folder / "policy", "--batch", 1, "--epochs", 2, "--save-every", 2, "--out", out, "--resume",
        instead=instead)
    process.join(60)
    return process.exitcode, Path(f"{stem}.err").read_text().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A policy, four demonstrations, and in whole/ the run that nothing disturbed."""
    path = ppo_folder(tmp_path_factory.mktemp("states"))
    write_jsonl(path / "demonstrations.jsonl",
                [Demonstration(str(i), "name", "it is red") for i in range(4)])
    status, last = train(path, path / "whole")
    assert status == 0, last
    return path


def finishes_as_undisturbed(folder: Path, out: Path) -> None:
    status, last = train(folder, out)
    assert status == 0, last
    for name in ("policy/consolidated.00.pth", "metrics.jsonl"):
        assert (out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_a_run_whose_state_cannot_be_written_ends_in_one_line_and_goes_on_later(folder, tmp_path):
    status, last = train(folder, tmp_path / "out", limit_files)
    assert status == 2 and "state-000002.pt: cannot be written (File too large)" in last
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "metrics.jsonl", "timing.jsonl"]
    finishes_as_undisturbed(folder, tmp_path / "out")


def test_a_run_on_a_full_disk_keeps_its_last_state_and_goes_on_once_there_is_room(
        folder, small_disk):
    """A signal leaves a state of step 1; then the disk fills up but for half a state."""
    status, _ = train(folder, small_disk / "out", stop_at_once)
    first, = states.paths(small_disk / "out")
    assert status == 143 and first.name == "state-000001.pt"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    (small_disk / "ballast").write_bytes(b"\0" * (free - first.stat().st_size // 2))
    status, last = train(folder, small_disk / "out")
    assert status == 2 and "state-000002.pt: cannot be written (No space left on device)" in last
    assert states.paths(small_disk / "out") == [first] and load_state(first)["step"] == 1
    (small_disk / "ballast").unlink()
    finishes_as_undisturbed(folder, small_disk / "out")


def stop_at_once(command: list[str]) -> None:
    """Send SIGTERM in the first step."""
    from fgrlhf.engine.run import Run
    log = Run.log

    def log_and_stop(self, step, metrics):
        log(self, step, metrics)
        os.kill(os.getpid(), signal.SIGTERM)
    Run.log = log_and_stop
