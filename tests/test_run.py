"""What training scripts share: draws, batches, the optimizer's schedule, the run's folder."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from fgrlhf.checkpoint import load_state
from fgrlhf.config import UserError
from fgrlhf.optimizer import Optimizer
from fgrlhf.run import Run, batches, bucketed_batches, generator, pick_device


@dataclass(frozen=True)
class Config:
    out: str
    lr: float = 0.1
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


def test_bucketed_batches_hold_every_index_once_and_hardly_any_padding():
    lengths = torch.randint(1, 100, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    padding = lambda found: sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b)
                                for b in found)
    found = bucketed_batches(lengths, 8, 0, 0)
    assert sorted(sum(found, [])) == list(range(500)) and len(found) == 63
    assert padding(found) < 0.2 * padding(batches(500, 8, 0, 0))
    means = [sum(lengths[i] for i in b) / len(b) for b in found[:16]]
    assert means != sorted(means)                                         # not the short ones first


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
    run_module = sys.modules["fgrlhf.run"]
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


def test_run_refuses_to_resume_with_other_settings_or_another_tokenizer(tmp_path):
    Run(Config(str(tmp_path)), "hash").save(1)
    with pytest.raises(UserError,
                       match="--resume needs the same --lr: the run was started with 0.1, got 0.2"):
        Run(Config(str(tmp_path), lr=0.2, resume=True), "hash")
    with pytest.raises(UserError, match="same tokenizer"):
        Run(Config(str(tmp_path), resume=True), "other")


def test_run_finish_removes_the_training_state(tmp_path):
    run = Run(Config(str(tmp_path)))
    run.save(1)
    run.finish({})
    assert not (tmp_path / "state.pt").exists()


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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_run_guard_names_the_tensor_and_leaves_the_batch(tmp_path, bad):
    run = Run(Config(str(tmp_path)))
    with pytest.raises(FloatingPointError, match="step 3: rewards: .* 1 others; the batch is in"):
        with run.guard(3, tokens=torch.tensor([[5, 6]]), rewards=torch.tensor([[1.0, bad]])):
            pytest.fail("the update must not run")
    dumped = load_state(tmp_path / "failed-batch.pt")
    assert dumped["step"] == 3
    assert dumped["tokens"].tolist() == [[5, 6]]
    assert dumped["rewards"].isfinite().tolist() == [[True, False]]


def test_run_guard_leaves_the_batch_when_the_step_inside_fails(tmp_path):
    run = Run(Config(str(tmp_path)))
    with pytest.raises(FloatingPointError, match="step 1: gradient norm is nan; the batch is in"):
        with run.guard(1, tokens=torch.tensor([7])):
            raise FloatingPointError("gradient norm is nan")
    assert load_state(tmp_path / "failed-batch.pt")["tokens"].tolist() == [7]
