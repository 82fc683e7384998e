"""The folder of a run: one writer, copies, other machines; and how a program ends."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine import config as configuration, lora
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.encoding import Encoding
from fgrlhf.engine.places import relocated
from fgrlhf.engine.run import Run
from fgrlhf.explain.__main__ import start_of
from fgrlhf.explain.explained import LossSettings, settings_of
from tests import processes
from tests.small import ppo_folder
from tests.test_layout import ROOT


@dataclass(frozen=True)
class Config:
    out: str
    lr: float = 0.1
    data: str | None = None
    save_every: int = 2
    keep: int = 2
    microbatch: int = 4
    resume: bool = False
    device: str = "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = ppo_folder(tmp_path_factory.mktemp("ppo"))
    (path / "edits.jsonl").write_text("".join(json.dumps(
        {"id": str(i), "prompt": "name", "original": "it is", "edited": "it is red"}) + "\n"
        for i in range(8)))
    return path


# ----- one writer ---------------------------------------------------------------------------------

def hold(out: str, pipe) -> None:
    Run(Config(out)).open()
    pipe.send("open")
    pipe.recv()


def test_a_folder_that_another_process_writes_to_is_refused_with_its_id(tmp_path):
    out, link = tmp_path / "run", tmp_path / "link"
    here, there = processes.multiprocessing.Pipe()
    other = processes.server.Process(target=hold, args=(str(out), there))
    other.start()
    assert here.poll(60) and here.recv() == "open"
    link.symlink_to(out)
    before = (out / "config.json").read_bytes()
    for path in (out, link):
        for resume in (False, True):
            with pytest.raises(UserError, match=f"{path}: expected no other writer, but process "
                                                f"{other.pid} on .*; wait for that process"):
                Run(Config(str(path), lr=0.5, resume=resume))
    assert (out / "config.json").read_bytes() == before
    os.kill(other.pid, signal.SIGKILL)                      # the system frees the lock
    other.join()
    run = Run(Config(str(link), resume=True))
    run.restore()
    run.finish({})
    assert (out / "done.json").exists()


def test_of_two_trainers_that_start_together_one_trains_and_one_is_refused(folder, tmp_path):
    command = ("fgrlhf.sft", "--data", folder / "edits.jsonl", "--model", folder / "policy",
               "--epochs", 4, "--batch", 2, "--out", tmp_path / "out")
    both = [processes.start(tmp_path, *command) for _ in range(2)]
    for process, _ in both:
        process.join(120)
    ended = sorted((process.exitcode, Path(stem + ".err").read_text()) for process, stem in both)
    assert [status for status, _ in ended] == [0, 2], ended
    assert ended[1][1].count("\n") == 1 and ended[1][1].startswith("error: "), ended
    steps = [json.loads(x)["step"] for x in (tmp_path / "out/metrics.jsonl").open()]
    assert steps == list(range(1, 17))


def test_a_folder_with_an_unfinished_run_is_refused_before_models_are_read(
        folder, tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    for module, name in ((sft, "load_to_train"), (train_rm, "load_to_train"), (train_ppo, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("a model was read"))
    common = {"out": str(tmp_path)}
    model = {"data": str(folder / "edits.jsonl"), "model": str(folder / "policy")}
    for train, config in (
            (sft.train, sft.Config(**common, **model)),
            (train_rm.train, train_rm.Config(**common, **model, kind="token")),
            (train_ppo.train, train_ppo.Config(
                **common, method="fine-grained", policy=str(folder / "policy"),
                reward=str(folder / "token"), prompts=str(folder / "prompts.jsonl")))):
        with pytest.raises(UserError, match="holds an unfinished run; continue it with --resume"):
            train(config)


def test_a_run_does_not_write_over_its_inputs(tmp_path):
    (tmp_path / "policy").mkdir()
    for out, data in ((tmp_path, tmp_path), (tmp_path, tmp_path / "policy")):
        with pytest.raises(UserError, match=f"--out {out}: .* write over --data {data}; choose"):
            Run(Config(str(out), data=str(data)), inputs=("data",))
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


# ----- copies, and other machines -----------------------------------------------------------------

def test_a_folder_with_somebody_elses_files_is_refused_and_nothing_in_it_changes(folder, tmp_path):
    """A model of another program, a model without its run, and a model folder itself."""
    hf, only, model = tmp_path / "hf", tmp_path / "only", tmp_path / "model"
    hf.mkdir()
    (hf / "config.json").write_text('{"model_type": "llama"}')
    shutil.copytree(folder / "policy", only / "policy")
    shutil.copytree(folder / "policy", model)
    for out, said in ((hf, "hf/config.json: expected the settings of a run, got a file of another"),
                      (only, "holds policy, but no run that wrote it"),
                      (model, "holds params.json, but no run that wrote it")):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for resume in (False, True):
            with pytest.raises(UserError, match=said):
                Run(Config(str(out), resume=resume))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_adapters_are_not_written_over_another_model(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    adapted = load_adapted(folder / "policy", rank=2)
    with pytest.raises(UserError, match="already holds consolidated.00.pth; choose an empty"):
        save_model(adapted, tmp_path / "model", tokenizer=load_tokenizer(folder / "policy"),
                   encoding=Encoding("alpaca"))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names


def test_temporary_files_of_a_killed_process_go_when_its_run_goes_on(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.open()
    (tmp_path / "policy").mkdir()
    left = [tmp_path / ".state-000002.pt.123.tmp", tmp_path / "policy/.params.json.123.tmp"]
    for path in left:
        path.write_bytes(b"half")
    for name in ("notes.tmp", ".notes.tmp"):
        (tmp_path / name).write_text("mine")
    run.unlock()
    Run(Config(str(tmp_path), resume=True)).restore()
    assert not any(path.exists() for path in left)
    assert (tmp_path / "notes.tmp").exists() and (tmp_path / ".notes.tmp").exists()


def test_a_pipe_cannot_be_resumed_from(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="--data .*pipe: expected a file, got a pipe, which"):
        Run(Config(str(tmp_path / "out"), data=str(tmp_path / "pipe"), resume=True), "",
            ("data",))
    Run(Config(str(tmp_path / "out"), data=str(tmp_path / "pipe")), "", ("data",))


def test_relocated_finds_the_neighbour_of_a_folder_that_was_copied(tmp_path, monkeypatch):
    for name in ("old/sft", "old/rm", "new/sft", "new/rm", "lonely/rm"):
        (tmp_path / name).mkdir(parents=True)
    place = lambda new: relocated(str(tmp_path / "old/sft"), str(tmp_path / "old/rm"),
                                  tmp_path / new)
    assert place("new/rm") == str(tmp_path / "new/sft")
    assert place("old/rm") == place("lonely/rm") == str(tmp_path / "old/sft")
    monkeypatch.chdir(tmp_path / "new")                     # relative names of another folder
    assert relocated("old/sft", "old/rm", tmp_path / "new/rm") == str(tmp_path / "new/sft")


def test_adapters_that_were_moved_with_their_trunk_use_the_trunk_at_the_new_place(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "old/sft/policy")
    model = load_adapted(tmp_path / "old/sft/policy", rank=2)
    save_model(model, tmp_path / "old/ppo/policy")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert lora.describe(tmp_path / "new/ppo/policy")["base"] == str(tmp_path / "new/sft/policy")
    shutil.rmtree(tmp_path / "old")
    again = load_adapted(tmp_path / "new/ppo/policy")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    shutil.rmtree(tmp_path / "new/sft")
    with pytest.raises(UserError, match="adapters.json: base: .*old/sft/policy, which does not ex"):
        load_model(tmp_path / "new/ppo/policy")


def test_explain_finds_the_start_of_a_run_that_was_moved_and_refuses_a_changed_one(
        folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "old/sft/policy")
    run = Run(Config(str(tmp_path / "old/rm"), data=str(tmp_path / "old/sft/policy")),
              inputs=("data",))
    run.finish({})
    config = {"u0": "kept", "model": "old/sft/policy", "out": "old/rm"}
    (tmp_path / "old/rm/config.json").write_text(json.dumps(config))
    shutil.move(tmp_path / "old", tmp_path / "new")
    (tmp_path / "new/rm/config.json").write_text(json.dumps(config | {"u0_weight": "much"}))
    with pytest.raises(UserError, match="rm/config.json: u0_weight: expected a number, got 'much'"):
        settings_of(LossSettings, tmp_path / "new/rm/reward")
    (tmp_path / "new/rm/config.json").write_text(json.dumps(config))
    found = settings_of(LossSettings, tmp_path / "new/rm/reward")
    start = str(tmp_path / "new/sft/policy")
    assert found.u0 == "kept" and found.model == start
    assert start_of(str(tmp_path / "new/rm/reward"), "data", start) == start
    (Path(start) / "params.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: the run started from .* has changed since"):
        start_of(str(tmp_path / "new/rm/reward"), "data", start)


def stopped(out: Path, data: Path) -> None:
    run = Run(Config(str(out), data=str(data)), inputs=("data",))
    run.log(1, {"loss": 1.0})
    run.save(1, {"best": 0.5})
    run.unlock()


def test_a_run_that_was_moved_with_its_data_resumes(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/data").write_text("x")
    stopped(tmp_path / "old/run", tmp_path / "old/data")
    shutil.move(tmp_path / "old", tmp_path / "new")
    config = Config(str(tmp_path / "new/run"), data=str(tmp_path / "new/data"), resume=True)
    run = Run(config, inputs=("data",))
    assert run.restore() == {"best": 0.5} and run.step == 1


def test_a_run_resumed_on_another_number_of_threads_says_that_its_bytes_will_differ(
        tmp_path, capsys, monkeypatch):
    (tmp_path / "data").write_text("x")
    stopped(tmp_path / "run", tmp_path / "data")
    again = Config(str(tmp_path / "run"), data=str(tmp_path / "data"), resume=True)
    assert Run(again, inputs=("data",)).step == 1 and capsys.readouterr().err == ""
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    other = Config(str(tmp_path / "run"), data=str(tmp_path / "data"), resume=True, microbatch=2)
    assert Run(other, inputs=("data",)).step == 1
    said = capsys.readouterr().err
    assert f"microbatch 4 (now 2), threads {threads} (now {threads + 3}): the run goes" in said
    assert said.count("\n") == 1 and "its bytes will differ" in said


def test_the_folder_of_a_run_is_no_model_and_the_model_in_it_is_named(folder, tmp_path):
    shutil.copytree(folder / "policy", tmp_path / "runs/sft/policy")
    (tmp_path / "runs/sft/done.json").write_text("{}")
    model = tmp_path / "runs/sft/policy"
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=f"got the folder of a run; give {model}$"):
            load(tmp_path / "runs/sft")


# ----- numbers that are not finite ----------------------------------------------------------------

def strict(text: str) -> dict:
    """Reads JSON as other programs do: NaN and infinities are errors."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(name))


@pytest.mark.parametrize("value", [math.nan, -math.inf, torch.tensor(math.inf)])
def test_a_step_whose_metric_is_not_finite_stops_the_run_and_is_not_logged(value, tmp_path):
    run = Run(Config(str(tmp_path)))
    run.log(1, {"rm/loss": 1.0})
    with pytest.raises(FloatingPointError, match="step 2: rm/loss: expected a finite number, got"):
        run.end_step(2, {"rm/accuracy": 1.0, "rm/loss": value})
    assert [strict(x)["step"] for x in (tmp_path / "metrics.jsonl").open()] == [1]


def test_a_figure_that_does_not_exist_is_null(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.log(1, {"rm/token_auc": math.nan, "rm/accuracy": 0.25})
    run.finish({"pairs/token_auc": math.nan, "ratio": math.inf, "name": "NaN"})
    assert strict((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "rm/token_auc": None, "rm/accuracy": 0.25}
    done = strict((tmp_path / "done.json").read_text())
    assert done["pairs/token_auc"] is done["ratio"] is None and done["name"] == "NaN"


# ----- the end of a program -----------------------------------------------------------------------

OUT_OF_MEMORY = {
    "python": (MemoryError(), "error: out of memory; lower --microbatch"),
    "cpu": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                         "4096 bytes. Error code 12"), "out of memory, 4096 bytes more were wan"),
    "cuda": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
             "out of memory, 2.00 GiB more were wanted; lower --microbatch")}


@pytest.mark.parametrize("error, expected", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_too_little_memory_is_one_line(error, expected, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit, match="2"):
        configuration.run(main)
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_an_allocation_that_no_machine_can_make_is_one_line_and_a_bug_keeps_its_traceback(capsys):
    with pytest.raises(SystemExit, match="2"):
        configuration.run(lambda: torch.empty(2 ** 60))
    assert "error: out of memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="must match"):
        configuration.run(lambda: torch.ones(2) + torch.ones(3))


def test_pick_device_refuses_a_device_that_holds_no_numbers():
    with pytest.raises(UserError, match="--device meta: not usable here .*; give auto, cpu or cu"):
        pick_device("meta")


PLAN = "-m fgrlhf.plan --preset tiny"
STREAMS = {                     # (command, status, a part of stderr)
    "closed stdout of figures": (f"{PLAN} >&-", 2, "error: stdout: expected a place for the resul"),
    "a full disk for figures": (f"{PLAN} >/dev/full", 2, "error: stdout, or a file: No space left"),
    "a reader that goes away": (f"{PLAN} | true; exit ${{PIPESTATUS[0]}}", 141, ""),
    "closed stdout of a trainer": ("SFT >&- <&-", 0, "sft"),
    "closed stderr of a trainer": ("SFT 2>&-", 0, ""),
    "a trainer's reader goes away": ("SFT 2> >(true)", 0, "")}


@pytest.mark.parametrize("command, status, said", STREAMS.values(), ids=STREAMS)
def test_a_closed_stream_costs_neither_result_nor_status(command, status, said, folder, tmp_path):
    out = tmp_path / "out"
    flags = (f"--data {folder / 'edits.jsonl'} --model {folder / 'policy'} --epochs 1 --batch 4")
    line = command.replace("SFT", f"-m fgrlhf.sft {flags} --out {out}")
    done = subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} {line}"], cwd=ROOT,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == status, done
    assert said in done.stderr and "Traceback" not in done.stderr, done
    if "error" in said:
        assert done.stderr.count("\n") == 1
    if "SFT" in command and not status:
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
        assert (out / "done.json").exists() and load_model(out / "policy")
