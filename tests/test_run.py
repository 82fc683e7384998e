"""What training scripts share: draws, batches, the optimizer's schedule, the run's folder."""

import json
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fgrlhf.data.fields import UserError
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.draws import (
    batches, bucketed_batches, generator, random_ids, rows_of_step)
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.run import Run
from fgrlhf.engine.states import load_state


@dataclass(frozen=True)
class Config:
    out: str
    lr: float = 0.1
    data: str | None = None
    save_every: int = 2
    keep: int = 2
    resume: bool = False
    device: str = "cpu"


# ----- random draws -------------------------------------------------------------------------------

def test_generator_depends_on_its_arguments_alone():
    draw = lambda *arguments: torch.rand(4, generator=generator(*arguments)).tolist()
    torch.manual_seed(1)
    first = draw(0, "rollout", 3)
    torch.manual_seed(2)
    assert draw(0, "rollout", 3) == first
    others = [draw(1, "rollout", 3), draw(0, "answers", 3), draw(0, "rollout", 4),
              draw(0, "rollout")]
    assert first not in others and len({tuple(x) for x in others}) == 4


def test_generator_seed_is_the_first_seven_bytes_of_a_sha256():
    """`printf 5/x/0 | sha256sum` begins bbd2d101afe911, on every machine, in every process."""
    assert generator(5, "x").initial_seed() == 0xbbd2d101afe911


# ----- batches ------------------------------------------------------------------------------------

@pytest.mark.parametrize("count, size", [(10, 3), (9, 3), (1, 5), (100, 7)])
def test_batches_hold_every_index_once_in_an_order_of_their_epoch(count, size):
    found = batches(count, size, seed=0, epoch=0)
    assert sorted(sum(found, [])) == list(range(count))
    assert [len(b) for b in found] == [size] * (count // size) + [count % size] * (count % size > 0)
    assert found == batches(count, size, 0, 0)
    if count > 5:
        assert found != batches(count, size, 0, 1) and found != batches(count, size, 1, 0)


def test_random_ids_have_the_lengths_no_control_token_and_are_always_the_same():
    found = random_ids([3, 0, 500], 8)
    assert list(map(len, found)) == [3, 0, 500] and set(found[2]) == {3, 4, 5, 6, 7}
    assert found == random_ids([3, 0, 500], 8) and random_ids([3], 8) == found[:1]


def test_bucketed_batches_hold_every_index_once_and_hardly_any_padding():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    padding = lambda found: sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b)
                                for b in found)
    found = bucketed_batches(lengths, 8, 0, 0)
    assert sorted(sum(found, [])) == list(range(500)) and len(found) == 63
    assert padding(found) < 0.2 * padding(batches(500, 8, 0, 0))
    means = [sum(lengths[i] for i in b) / len(b) for b in found[:16]]
    assert means != sorted(means)                                         # not the short ones first


def test_rows_of_step_goes_through_one_pass_after_another():
    lengths = [5, 1, 3, 2, 4]
    passes = [bucketed_batches(lengths, 2, 7, epoch) for epoch in (0, 1)]
    assert [rows_of_step(lengths, 2, 7, step) for step in range(1, 7)] == passes[0] + passes[1]


# ----- the optimizer ------------------------------------------------------------------------------

def layers() -> nn.Module:
    """A matrix inside `layers.`, one outside, a vector."""
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(4, 4)]), "head": nn.Linear(4, 1)})


def push(model: nn.Module, size: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, size)


def test_optimizer_steps_as_adam_by_hand():
    """First step of Adam: m / (sqrt(v) + eps) = g / (|g| + eps), times lr; eps 1e-5."""
    model = layers()
    before = model["head"].weight.detach().clone()
    optimizer = Optimizer(model, lr=0.01)
    push(model, 1e-4)
    norm = optimizer.step()
    assert norm == pytest.approx(1e-4 * 25 ** 0.5)
    moved = (before - model["head"].weight).tolist()[0]
    assert moved == pytest.approx([0.01 * 1e-4 / (1e-4 + 1e-5)] * 4, rel=1e-3)
    assert model["head"].weight.grad is None


def test_optimizer_clips_the_norm_and_returns_it_unclipped():
    model, seen = layers(), []
    optimizer = Optimizer(model, lr=0.0, clip_norm=0.5)
    push(model, 3.0)
    optimizer.parts[0].register_step_pre_hook(lambda *_: seen.append(
        sum(p.grad.square().sum().item() for p in model.parameters()) ** 0.5))
    assert optimizer.step() == pytest.approx(15.0)
    assert seen == [pytest.approx(0.5, rel=1e-4)]


def test_optimizer_warms_up_then_falls_to_zero():
    """warmup 4, steps 10: 1/4, 2/4, 3/4, 1, then (10 - n) / 6."""
    model, rates = layers(), []
    optimizer = Optimizer(model, lr=2.0, warmup=4, steps=10)
    for _ in range(10):
        push(model)
        optimizer.step()
        rates.append(optimizer.parts[0].param_groups[0]["lr"] / 2.0)
    assert rates == pytest.approx([1/4, 2/4, 3/4, 1, 6/6, 5/6, 4/6, 3/6, 2/6, 1/6])
    constant = Optimizer(layers(), lr=2.0, warmup=2)
    assert constant.steps == 0


def test_optimizer_gives_the_trunks_matrices_to_muon_and_nothing_else():
    model = layers()
    optimizer = Optimizer(model, lr=0.1, muon_lr=0.2)
    adam, muon = ([p for group in part.param_groups for p in group["params"]]
                  for part in optimizer.parts)
    assert [p is model["layers"][0].weight for p in muon] == [True]
    assert len(adam) == 3 and not any(p is model["layers"][0].weight for p in adam)


def test_optimizer_gives_the_head_a_rate_of_its_own():
    """The first step of Adam moves a weight by lr g / (|g| + 1e-5); the warm-up halves both."""
    model = layers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, lr=0.01, warmup=2, head_lr=0.3, clip_norm=1e9)
    push(model)
    optimizer.step()
    for name, p in model.named_parameters():
        moved = before[name] - p
        wanted = torch.full_like(p, 0.15 if name.startswith("head.") else 0.005)
        torch.testing.assert_close(moved, wanted, rtol=1e-3, atol=0)


def test_optimizer_leaves_frozen_parameters_alone():
    model = layers()
    model["head"].requires_grad_(False)
    assert len(Optimizer(model, 0.1).parameters) == 2


# ----- the run's folder ---------------------------------------------------------------------------

def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_run_logs_one_json_object_a_step_and_time_apart(tmp_path):
    run = Run(Config(str(tmp_path / "a")))
    for step in (1, 2):
        run.log(step, {"sft/loss": torch.tensor(1 / 3), "sft/tokens": 7})
    run.finish({"steps": 2})
    assert lines(tmp_path / "a/metrics.jsonl") == [{"step": s, "sft/loss": 0.3333333,
                                                    "sft/tokens": 7.0} for s in (1, 2)]
    assert [set(t) for t in lines(tmp_path / "a/timing.jsonl")] == [{"step", "seconds"}] * 2
    done = json.loads((tmp_path / "a/done.json").read_text())
    assert done["steps"] == 2 and done["seconds"] >= 0
    assert json.loads((tmp_path / "a/config.json").read_text())["lr"] == 0.1


def test_run_seconds_leave_out_what_is_untimed(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 6.0])                     # start; enter and leave `untimed`; log
    run_module = sys.modules["fgrlhf.engine.run"]
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(clock))
    run = Run(Config(str(tmp_path / "a")))
    with run.untimed():
        pass
    run.log(1, {})
    assert lines(tmp_path / "a/timing.jsonl") == [{"step": 1, "seconds": 2.0}]


@pytest.mark.parametrize("resume", [False, True])
def test_run_refuses_a_folder_with_another_finished_run(tmp_path, resume):
    Run(Config(str(tmp_path), lr=0.5)).finish({})
    with pytest.raises(UserError, match="holds a finished run"):
        Run(Config(str(tmp_path), resume=resume))


def test_run_refuses_to_overwrite_an_unfinished_run_unless_told_to_resume(tmp_path):
    Run(Config(str(tmp_path))).log(1, {})
    with pytest.raises(UserError, match="unfinished run; continue it with --resume"):
        Run(Config(str(tmp_path)))


def test_run_resumes_from_its_state_and_drops_later_and_torn_lines(tmp_path):
    model = layers()
    run = Run(Config(str(tmp_path)), "hash")
    for step in (1, 2):
        run.log(step, {"loss": step})
    run.save(2, {"best": 0.7}, model=model)
    run.log(3, {"loss": 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    again, other = Run(Config(str(tmp_path), resume=True, device="cuda"), "hash"), layers()
    push(other)
    Optimizer(other, 0.1).step()
    assert again.restore(model=other) == {"best": 0.7} and again.step == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [line["step"] for line in lines(tmp_path / "timing.jsonl")] == [1, 2]


def test_run_resumes_from_the_start_when_killed_before_the_first_state(tmp_path):
    Run(Config(str(tmp_path))).log(1, {})
    run = Run(Config(str(tmp_path), resume=True))
    assert run.step == 0 and run.restore(model=layers()) == {}
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_run_killed_before_its_first_state_is_not_resumed_with_other_settings(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.log(1, {"a": 1.0})
    run.unlock()
    with pytest.raises(UserError, match="config.json: --resume needs the same --lr: the run was "
                                        "started with 0.1, got 0.5; give it again, or choose ano"):
        Run(Config(str(tmp_path), lr=0.5, resume=True))


def test_run_has_a_state_after_its_last_step_until_it_is_finished(tmp_path):
    """A failure of what comes after the last step costs no training."""
    part = layers()
    run = Run(Config(str(tmp_path)))
    run.restore(model=part)
    for step in run.steps(3, "x"):                      # --save-every 2
        run.end_step(step, {"a": 1.0}, model=part)
    run.unlock()
    again = Run(Config(str(tmp_path), resume=True))
    again.restore(model=part)
    assert again.step == 3 and list(again.steps(3, "x")) == []
    again.finish({})
    assert not list(tmp_path.glob("state-*"))


def test_run_refuses_to_resume_with_other_settings_or_another_tokenizer(tmp_path):
    run = Run(Config(str(tmp_path)), "hash")
    run.log(1, {})
    run.save(1)
    with pytest.raises(UserError,
                       match="--resume needs the same --lr: the run was started with 0.1, got 0.2"):
        Run(Config(str(tmp_path), lr=0.2, resume=True), "hash")
    with pytest.raises(UserError, match="same tokenizer"):
        Run(Config(str(tmp_path), resume=True), "other")


def test_run_finish_removes_the_training_state(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.save(1)
    assert names(tmp_path) == ["state-000001.pt"]
    run.finish({})
    assert names(tmp_path) == []


def test_run_resumed_after_a_kill_between_its_end_and_the_removal_of_its_states(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.finish({})
    run.save(1)
    with pytest.raises(SystemExit, match="0"):
        Run(Config(str(tmp_path), resume=True))
    assert names(tmp_path) == []


def names(folder: Path) -> list[str]:
    """The training states in a folder."""
    return sorted(path.name for path in folder.glob("state*"))


def trained(folder: Path, steps: int, **changes) -> Run:
    """A run of `steps` steps on one weight that holds the number of its step."""
    run, model = Run(Config(str(folder), **changes), "hash", ("data",)), nn.Linear(1, 1)
    run.restore(model=model)
    for step in run.steps(steps + 1, "test"):
        nn.init.constant_(model.weight, step)
        run.end_step(step, {"loss": step}, {"best": step}, model=model)
        if step == steps:
            return run


def test_run_keeps_the_newest_states(tmp_path):
    trained(tmp_path / "a", 9)
    assert names(tmp_path / "a") == ["state-000006.pt", "state-000008.pt"]
    trained(tmp_path / "b", 9, keep=3, save_every=1)
    assert names(tmp_path / "b") == [f"state-00000{n}.pt" for n in (7, 8, 9)]


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def test_run_passes_over_a_damaged_state_and_says_so(tmp_path, capsys):
    trained(tmp_path, 9)
    flip(tmp_path / "state-000008.pt")
    run, model = Run(Config(str(tmp_path), resume=True), "hash", ("data",)), nn.Linear(1, 1)
    assert run.restore(model=model) == {"best": 6} and run.step == 6 and model.weight == 6
    err = capsys.readouterr().err
    assert "state-000008.pt: damaged" in err and "continuing from" in err
    assert "state-000006.pt" in err
    assert len(lines(tmp_path / "metrics.jsonl")) == 6
    trained(tmp_path, 7, resume=True, save_every=1)                 # what was passed over goes
    assert names(tmp_path) == ["state-000006.pt", "state-000007.pt"]


def test_run_refuses_to_resume_when_every_state_is_damaged(tmp_path):
    trained(tmp_path, 9)
    for path in tmp_path.glob("state-*"):
        flip(path)
    with pytest.raises(UserError, match="state-000008.pt: damaged.*there is none; remove"):
        Run(Config(str(tmp_path), resume=True), "hash", ("data",))


def test_run_refuses_to_resume_with_another_data_file(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("1")
    trained(tmp_path / "a", 3, data=str(data))
    data.write_text("2")
    with pytest.raises(UserError, match="state-000002.pt: --resume needs the same --data: its con"):
        trained(tmp_path / "a", 5, data=str(data), resume=True)
    data.write_text("1")
    other = tmp_path / "other.jsonl"
    other.write_text("3")
    with pytest.raises(UserError, match=f"same --data: the run was started with {data}, got {other}"
                                        f" with other contents; give {data} again or choose ano"):
        trained(tmp_path / "a", 5, data=str(other), resume=True)
    trained(tmp_path / "a", 5, data=str(data), resume=True)


def test_resume_says_when_there_is_no_run(tmp_path, capsys):
    """A mistyped --out starts from the beginning."""
    run = Run(Config(str(tmp_path / "a"), resume=True))
    assert run.step == 0
    assert capsys.readouterr().err == f"{tmp_path}/a: no run to resume; a new one begins\n"
    run.open()
    run.unlock()
    Run(Config(str(tmp_path / "a"), resume=True))
    Run(Config(str(tmp_path / "b")))
    assert capsys.readouterr().err == ""


def test_run_refuses_a_finished_run_on_another_data_file(tmp_path):
    """The pipeline makes a stage again when one it needs is new: it must not find the old one."""
    data, out = tmp_path / "data.jsonl", str(tmp_path / "a")
    data.write_text("1")
    Run(Config(out, data=str(data), resume=True), "", ("data",)).finish({})
    data.write_text("2")
    with pytest.raises(UserError, match="done.json: --resume needs the same --data"):
        Run(Config(out, data=str(data), resume=True), "", ("data",))


def test_run_refuses_to_resume_when_a_line_of_its_metrics_is_missing(tmp_path):
    trained(tmp_path, 4)
    whole = lines(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in whole[1:]))
    with pytest.raises(UserError, match="metrics.jsonl: expected a line for each of the 4 steps"):
        trained(tmp_path, 6, resume=True)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_ends_the_step_saves_and_says_how_to_resume(number, status, tmp_path, capsys,
                                                        monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "a b"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    before, ended = signal.getsignal(number), []
    run, model = Run(Config(str(tmp_path), save_every=50), "hash", ("data",)), nn.Linear(1, 1)
    with pytest.raises(SystemExit) as stopped:
        for step in run.steps(9, "test"):
            if step == 3:
                signal.raise_signal(number)
            ended.append(step)
            run.end_step(step, {}, model=model)
    assert stopped.value.code == status and ended == [1, 2, 3]
    assert names(tmp_path) == ["state-000003.pt"] and len(lines(tmp_path / "metrics.jsonl")) == 3
    err = capsys.readouterr().err
    assert "continue with:\npython train.py --out 'a b' --resume\n" in err
    del stopped                                                     # it holds the loop's frame
    assert signal.getsignal(number) == before


def test_run_refuses_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not writable|cannot be written"):
        Run(Config(str(tmp_path / "file" / "sub")))


def test_pick_device_takes_what_is_there_and_refuses_the_rest():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}: not usable here"):
            pick_device(name)


def test_run_resumes_a_run_that_was_finished_without_the_flag(tmp_path, capsys):
    Run(Config(str(tmp_path))).finish({})
    with pytest.raises(SystemExit, match="0"):
        Run(Config(str(tmp_path), resume=True))
    assert "already complete" in capsys.readouterr().out


def test_run_finished_by_an_older_version_is_the_run_with_the_defaults_of_new_flags(tmp_path):
    """config.json and the state lack `lr`, as if the flag had been added since."""
    @dataclass(frozen=True)
    class Older:
        out: str
        save_every: int = 2
        keep: int = 2
        resume: bool = False
        device: str = "cpu"
        data: str | None = None

    Run(Older(str(tmp_path / "a"))).finish({})
    Run(Older(str(tmp_path / "b"))).save(1)
    with pytest.raises(SystemExit, match="0"):
        Run(Config(str(tmp_path / "a"), resume=True))
    assert Run(Config(str(tmp_path / "b"), resume=True)).step == 1
    with pytest.raises(UserError, match="a: holds a finished run with another --lr: it had 0.1, g"
                                        "ot 0.5; choose another --out or remove it"):
        Run(Config(str(tmp_path / "a"), lr=0.5, resume=True))
    with pytest.raises(UserError, match="same --lr: the run was started with 0.1, got 0.5"):
        Run(Config(str(tmp_path / "b"), lr=0.5, resume=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_run_guard_names_the_tensor_and_leaves_the_batch(tmp_path, bad):
    run = Run(Config(str(tmp_path)))
    with pytest.raises(FloatingPointError, match="step 3: rewards: .* 1 others; the batch is in"):
        with run.guard(3, {}, tokens=torch.tensor([[5, 6]]), rewards=torch.tensor([[1.0, bad]])):
            pytest.fail("the update must not run")
    dumped = load_state(tmp_path / "failed-batch.pt")
    assert dumped["step"] == 3 and json.loads(dumped["config"])["out"] == str(tmp_path)
    assert dumped["tokens"].tolist() == [[5, 6]]
    assert dumped["rewards"].isfinite().tolist() == [[True, False]]


def test_run_guard_leaves_the_batch_when_the_step_inside_fails(tmp_path):
    run = Run(Config(str(tmp_path)))
    with pytest.raises(FloatingPointError, match="step 1: gradient norm is nan; the batch is in .*"
                                                 ", or lower --lr and choose another --out$"):
        with run.guard(1, {}, tokens=torch.tensor([7])):
            raise FloatingPointError("gradient norm is nan")
    assert load_state(tmp_path / "failed-batch.pt")["tokens"].tolist() == [7]
