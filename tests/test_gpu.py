"""`python -m fgrlhf.checks gpu`: the runner with fake steps, its table, cheap steps on a CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fgrlhf.checks import (
    gpu, gpu_correct, gpu_kernels, gpu_ppo, gpu_runs, gpu_speed, gpu_steps)
from fgrlhf.checks.__main__ import GpuConfig
from fgrlhf.checks.gpu import Step
from fgrlhf.data.fields import UserError
from fgrlhf.model import LLaMAConfig
from tests import processes
from tests.processes import ROOT

SAY = "import json, os, sys, time; say = lambda **row: print(json.dumps(row), flush=True); "


def step(name: str, code: str, limit: float = 20, least: float = 0) -> Step:
    return Step(name, f"about {name}", limit, least, ("-c", SAY + code))


GOOD = step("good", "say(machine={'device': 'a GPU'}); say(name='a', result='1.0', passed=True); "
                    "say(name='copy', bytes_per_second=50.0, result='50 B/s')")
TIMED = step("timed", "say(name='read', result='4 s', seconds=4.0, bytes=100)")


def report(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text())


def run(out: Path, *steps: Step, seconds: float = 60) -> tuple[int, dict[str, dict], list[str]]:
    """Returns the exit status, the entries of the report by name, and the lines of gpu.md."""
    lines: list[str] = []
    status = gpu.run_steps(list(steps), out, seconds, "the command", lines.append)
    table = (out / "gpu.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        line for line in table if line.startswith("| ")][2:]        # without the head
    return status, {entry["name"]: entry for entry in report(out)["steps"]}, table


def test_a_crash_a_hang_and_too_little_memory_lose_nothing_else(tmp_path):
    started = time.monotonic()
    status, found, table = run(
        tmp_path, GOOD,
        step("crash", "say(name='before', result='kept'); os.kill(os.getpid(), 11)"),
        step("error", "say(name='first', result='kept'); print('noise'); 1 / 0"),
        step("hang", "say(name='second', result='kept'); time.sleep(600)", limit=2),
        step("memory", "print('out of memory: 9 GiB', file=sys.stderr); sys.exit(3)"),
        step("wrong", "say(name='b', result='2.0', passed=False, error=float('nan'))"), TIMED)
    assert time.monotonic() - started < 40 and status == 1
    assert {name: entry["status"] for name, entry in found.items()} == {
        "good": "done", "crash": "crashed", "error": "failed", "hang": "out of time",
        "memory": "out of memory", "wrong": "done", "timed": "done"}
    assert [found[name]["rows"][0]["result"] for name in ("crash", "error", "hang")] == ["kept"] * 3
    assert "ended by signal 11" in found["crash"]["why"]
    assert found["error"]["why"] == "ZeroDivisionError: division by zero"
    assert found["hang"]["why"] == "ended after its 2 s" and 2 <= found["hang"]["seconds"] < 9
    assert found["memory"]["why"] == "out of memory: 9 GiB"
    assert found["wrong"]["rows"][0]["error"] is None               # JSON has no NaN
    assert found["timed"]["rows"][0]["ratio"] == 2.0                # 4 s against 100 B / 50 B/s
    assert table[0] == "a GPU" and "1 passed, 1 failed (b)" in table[4]
    assert "|  | read | 4 s | 2.00 |  |" in table and "|  | b | 2.0 |  | FAIL |" in table
    assert "noise" not in (tmp_path / "gpu.md").read_text() and not (tmp_path / "work").exists()


def test_status_is_0_when_all_is_well_and_the_last_step_used_up_the_time(tmp_path):
    assert run(tmp_path / "a", GOOD, TIMED)[0] == 0
    status, found, _ = run(tmp_path / "b", GOOD, step("last", "time.sleep(600)", limit=1))
    assert status == 0 and found["last"]["status"] == "out of time"


def test_steps_that_do_not_fit_are_not_run(tmp_path):
    status, found, table = run(tmp_path, GOOD, step("large", "1 / 0", least=500), TIMED, seconds=60)
    assert found["large"]["status"] == "not run" and found["large"]["why"].endswith("it needs 500")
    assert found["timed"]["status"] == "done" and status == 0
    assert any("| large | about large | not run: 5" in line for line in table)


def test_a_limit_ends_the_processes_that_a_step_has_started(tmp_path):
    child = "import subprocess; p = subprocess.Popen(['sleep', '600']); say(name=str(p.pid)); "
    _, found, _ = run(tmp_path, step("parent", child + "time.sleep(600)", limit=2),
                      step("orphan", child))
    for name in ("parent", "orphan"):
        time.sleep(0.2)
        pid = int(found[name]["rows"][0]["name"])
        state = Path(f"/proc/{pid}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_keeps_what_was_measured(number, tmp_path):
    """The runner is a process of its own here; its second step never ends. Its row has its pid."""
    steps = [GOOD, step("long", "say(name='x', result=os.getpid()); time.sleep(600)"), GOOD]
    code = ("from pathlib import Path\nfrom fgrlhf.checks.gpu import Step, run_steps\n"
            f"run_steps({steps}, Path({str(tmp_path)!r}), 60, 'c', print)")
    process = subprocess.Popen(                     # under nohup, SIGHUP would be ignored
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, cwd=ROOT, preexec_fn=lambda: (
            None if number == signal.SIGKILL else signal.signal(number, signal.SIG_DFL)))
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            if report(tmp_path)["steps"][1]["rows"]:
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    process.send_signal(number)
    killed = number == signal.SIGKILL
    assert process.wait(20) == (-number if killed else 128 + number)
    good, long, never = report(tmp_path)["steps"]
    assert good["status"] == "done" and len(good["rows"]) == 2 and len(long["rows"]) == 1
    if killed:                      # real steps end by themselves, at their limit
        os.kill(long["rows"][0]["result"], signal.SIGKILL)
    status = "running" if killed else "stopped"
    assert long["status"] == status and never["status"] == "not run"
    assert f"| long | about long | {status}" in (tmp_path / "gpu.md").read_text()
    assert never["why"] == "its turn has not come"


def config(out: Path, **changes) -> GpuConfig:
    return GpuConfig(**dict(out=str(out), device="cpu") | changes)


def test_main_refuses_a_device_that_is_not_there_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="--device quantum: not usable here"):
        gpu.main(config(tmp_path / "a", device="quantum"))
    assert not (tmp_path / "a").exists()


def test_main_refuses_a_folder_with_results_and_nonsense(tmp_path):
    (tmp_path / "gpu.json").write_text("{}")
    with pytest.raises(UserError, match="already holds results"):
        gpu.main(config(tmp_path))
    with pytest.raises(UserError, match="--minutes -1: expected a number above 0"):
        gpu.main(config(tmp_path, minutes=-1))
    with pytest.raises(UserError, match="--step nothing: expected one of kernels, graph"):
        gpu.main(config(tmp_path, step="nothing"))


def test_every_step_of_the_command_has_a_function():
    assert [step.name for step in gpu.STEPS] == list(gpu_steps.FUNCTIONS)
    assert sum(step.least for step in gpu.STEPS) < 5 * 60


def test_one_step_prints_its_rows_and_nothing_else(tmp_path):
    done = processes.run(tmp_path, "fgrlhf.checks", "gpu", "--device", "cpu", "--out",
                         str(tmp_path / "out"), "--step", "ceilings")
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert rows[0]["machine"]["torch"] == torch.__version__ and len(rows) == 4
    assert rows[1]["bytes_per_second"] > 0 < rows[2]["flops_per_second"]


# ----- the steps ----------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path) -> gpu_steps.Place:
    return gpu_steps.Place(torch.device("cpu"), True, tmp_path)


def test_kernels_pass_and_a_wrong_kernel_does_not(place, monkeypatch):
    rows = list(gpu_correct.kernels(place))
    assert len(rows) == 2 * len(gpu_kernels.KERNELS) + 1 and all(row["passed"] for row in rows)
    assert max(row["error"] for row in rows if "float32" in row["name"]) < 2e-6
    ppo = gpu_kernels.KERNELS["PPO loss"]
    monkeypatch.setitem(gpu_kernels.KERNELS, "PPO loss", lambda form, given: [
        x * (1.001 if form == "fused" else 1) for x in ppo(form, given)])   # as TF32 would be
    assert [row["name"] for row in gpu_correct.kernels(place) if not row["passed"]] == [
        "PPO loss, float32"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chunks_gives_several_chunks(dtype):
    hidden, head = torch.ones(700, 4, dtype=dtype), torch.ones(500, 4, dtype=dtype)
    count = lambda: len(list(gpu_kernels.three_matmuls.chunks(hidden, head, 1.0)))
    with gpu_kernels.several_chunks():
        assert count() == 3
    hidden = hidden.to("meta")
    assert count() == 1


def test_same_notices_another_token_and_another_logp():
    plain, fixed = gpu_correct.both_ways(gpu_correct.lively(gpu_correct.SIZES), [[5, 6], [7]], 6,
                                         1.0)
    assert gpu_correct.same(plain, fixed, 1e-4)["passed"]
    tokens = fixed.sequences.tokens.clone()
    tokens[0, -1] += 1
    other = fixed._replace(sequences=fixed.sequences._replace(tokens=tokens))
    assert not gpu_correct.same(plain, other, 1e-4)["passed"]
    assert not gpu_correct.same(plain, fixed._replace(logp_old=fixed.logp_old + 1e-3),
                                1e-4)["passed"]


def test_difference_of_runs_sees_one_weight_and_the_metrics(place):
    first, second = (gpu_runs.ppo(place, name, max_new_tokens=4, rollouts=4) for name in "ab")
    assert gpu_runs.difference(first, second) == 0
    (second / "metrics.jsonl").write_text("")
    assert gpu_runs.difference(first, second) == float("inf")
    third = gpu_runs.ppo(place, "c", max_new_tokens=4, rollouts=4, lr=1e-2)
    assert 1e-4 < gpu_runs.difference(first, third) < 1


def test_model_on_draws_every_weight_on_the_device():
    sizes = LLaMAConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=50, ffn_dim=48)
    model, again = (gpu_speed.model_on(sizes, torch.device("cpu"), 3) for _ in range(2))
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
        assert torch.equal(weight, dict(again.named_parameters())[name])
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert 0.005 < weight.float().std() < 0.03 and weight.float().mean().abs() < 0.005


def test_training_flops_by_hand():
    """Per token and weight 6 operations, with adapters 4; attention 2 T D per product."""
    sizes = LLaMAConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=20, ffn_dim=12)
    weights = 2 * (4 * 8 * 8 + 3 * 8 * 12) + 8 * 20
    attention = 2 * 2 * 5 * 5 * 8                               # one product, both layers, T 5
    assert gpu_speed.training_flops(sizes, [5, 5, 5], False) == 15 * 6 * weights + 18 * attention
    assert gpu_speed.training_flops(sizes, [5, 5, 5], True) == 15 * 4 * weights + 18 * attention


def test_planned_takes_as_many_layers_as_fit(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    cuda = place._replace(device=torch.device("cuda"), small=False)
    free = int(141e9)
    assert gpu_ppo.planned(cuda, 0)[1].n_layers == 32         # 122.3 GB with --offload
    free = int(85e9)
    name, sizes, options = gpu_ppo.planned(cuda, 0)
    assert name == f"7B with {sizes.n_layers} of 32 layers, which fit" and options.offload
    peaks = gpu_ppo.plan.peaks(sizes, options)
    assert 0.85 * free < max(peaks.values()) < 0.92 * free
    assert gpu_ppo.planned(cuda, 8)[1].n_layers == 32         # adapters: 18.2 GB


def test_iteration_reports_both_phases_against_the_plan(place, monkeypatch):
    """On a CPU no memory is measured, so the measured peak is given here."""
    rows = list(gpu_ppo.iteration(place, 8))
    assert [row["name"] for row in rows] == ["tiny, rollout and scoring", "tiny, update"]
    assert all(row["phase_seconds"] > 0 and "passed" not in row for row in rows)
    found = {row["name"].split(", ")[1]: (1.0, row["planned_bytes"] // 2) for row in rows}
    monkeypatch.setattr(gpu_ppo, "phases", lambda *_: found)
    rows = list(gpu_ppo.iteration(place, 8))
    assert all("(0.50 of it)" in row["result"] for row in rows)
