"""States on a disk that fills up, and states that somebody else wrote or changed.

The last good state stays, and the run goes on once there is room. The disk is a small tmpfs where
mounting is permitted, otherwise RLIMIT_FSIZE, which refuses the same write with another errno. One
of the two always runs.
"""

import copy
import hashlib
import io
import os
import resource
import signal
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Demonstration, write_jsonl
from fgrlhf.engine import states
from fgrlhf.engine.optimizer import Optimizer
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


def fields(step: int) -> dict:
    """The fields of a state next to its parts."""
    return {"step": step, "seconds": 0.0, "inputs": {}, "config": "{}", "extra": {}}


def sized(kibibytes: int, seed: int = 0) -> dict:
    return {"x": torch.rand(kibibytes * 256, generator=torch.Generator().manual_seed(seed))}


def test_a_full_disk_leaves_the_last_good_state_and_nothing_else(small_disk):
    states.save(small_disk, 1, sized(500), fields(1), keep=2)
    with pytest.raises(UserError, match="state-000002.pt: cannot be written .No space left"):
        states.save(small_disk, 2, sized(700), fields(2), keep=2)
    assert [path.name for path in small_disk.iterdir()] == ["state-000001.pt"]
    path, state = states.newest(small_disk)
    assert path.name == "state-000001.pt" and torch.equal(
        state["parts"]["x"], sized(500)["x"])
    states.save(small_disk, 2, sized(300), fields(2), keep=1)           # there is room for that
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
        ".lock", "config.json", "metrics.jsonl", "timing.jsonl"]
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


# ----- states that somebody else wrote ------------------------------------------------------------

def with_checksum(path: Path, value: object, change=lambda name, data: data, **options) -> None:
    """Writes a state as `states.save_state` does, without its checks, and changes its members."""
    source, made = io.BytesIO(), io.BytesIO()
    torch.save(value, source)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(made, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    data = made.getvalue()
    path.write_bytes(data + hashlib.sha256(data).digest())


def huge(name: str, data: bytes) -> bytes:
    """A pickle in which the first storage has 10^12 numbers in place of 4."""
    big = b"\x8a\x06" + (10 ** 12).to_bytes(6, "little")
    return data.replace(b"K\x04", big, 1) if name.endswith("data.pkl") else data


def stated(x: object) -> dict:
    return fields(1) | {"parts": {"x": x}, "shards": None}


HOSTILE = {                             # name: what `with_checksum` writes
    "compressed": (stated(torch.zeros(2 ** 22)), {"compression": zipfile.ZIP_DEFLATED}),
    "storage of 10^12": (stated(torch.zeros(4)), {"change": huge}),
    "one number shown 10^12 times": (stated(torch.zeros(1).expand(10 ** 12)), {}),
    "sparse of 10^12": (stated(torch.sparse_coo_tensor([[3]], [1.0], (10 ** 12,),
                                                      check_invariants=True)), {}),
    "code": (stated(os.system), {}),
    "no dict": ([1, 2], {}),
    "step as text": (stated(1) | {"step": "1"}, {}),
    "step below 0": (stated(1) | {"step": -1}, {}),
    "no parts": (fields(1), {}),
    "config that is no JSON": (stated(1) | {"config": "{"}, {}),
    "machine as text": (stated(1) | {"machine": "x"}, {})}


@pytest.mark.parametrize("value, options", HOSTILE.values(), ids=HOSTILE)
def test_a_state_with_a_right_checksum_and_wrong_contents_is_passed_over(value, options, tmp_path,
                                                                         capsys):
    states.save(tmp_path, 1, {"x": torch.ones(3)}, fields(1), keep=5)
    with_checksum(tmp_path / "state-000002.pt", value, **options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path, state = states.newest(tmp_path)
    assert path.name == "state-000001.pt" and torch.equal(state["parts"]["x"], torch.ones(3))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "state-000002.pt: " in said and "continuing from" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024      # KiB


def test_a_state_of_an_earlier_version_is_read(tmp_path):
    """It does not name its machine."""
    with_checksum(tmp_path / "state-000001.pt", stated(torch.ones(2)))
    path, state = states.newest(tmp_path)
    assert state["machine"] == {} and torch.equal(state["parts"]["x"], torch.ones(2))


MISFITS = {"no optimizer": lambda parts: parts.pop("optimizer"),
           "a tensor of another shape": lambda parts: parts["model"].update(weight=torch.ones(9)),
           "no tensor": lambda parts: parts["model"].update(weight=3),
           "moments of another shape": lambda parts: parts["optimizer"]["parts"][0]["state"][0]
           .update(exp_avg=torch.ones(10 ** 6)),
           "more moments": lambda parts: parts["optimizer"]["parts"][0]["state"].update({9: {}}),
           "count as text": lambda parts: parts["optimizer"].update(count="x")}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_state_of_other_models_is_refused_in_one_line(change, tmp_path):
    def made():
        model = torch.nn.Linear(2, 1)
        return {"model": states.TrainableState(model), "optimizer": Optimizer(model, 0.1)}, model
    parts, model = made()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    parts["optimizer"].step()
    saved = {name: part.state_dict() for name, part in parts.items()}
    other, model = made()
    states.load(tmp_path, other, fields(1) | {"parts": copy.deepcopy(saved), "shards": None})
    assert torch.equal(model.weight, parts["model"].module.weight)
    change(saved)
    with pytest.raises(UserError, match="training state.*; choose another --out and start again"):
        states.load(tmp_path, made()[0], fields(1) | {"parts": saved, "shards": None})
