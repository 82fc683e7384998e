"""Stages as small commands: which of them run, in which order, and how a failure is reported."""

import ast
import io
import json
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from fgrlhf.data.fields import UserError
from fgrlhf.reproduce import __main__ as reproduce, pipeline, results
from fgrlhf.reproduce.pipeline import Stage, finished, locked, run_stages
from tests.test_layout import ROOT

SCRIPT = """
import sys, time
from pathlib import Path
folder, name, action = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
note = lambda text: print(text, file=open(folder / "notes", "a"))

def wait_for(mark):
    for _ in range(1000):
        if mark in (folder / "notes").read_text().split():
            return
        time.sleep(0.01)
    sys.exit(f"{name}: {mark} never came")

note("+" + name)
if action == "fail":
    print("loading")
    sys.exit("no such thing as " + name)
if action.startswith("wait "):
    wait_for(action[5:])
if action == "slow":
    time.sleep(0.2)
note("-" + name)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def stage(folder, name: str, *needs: str, action: str = "") -> Stage:
    command = (str(folder / "script.py"), str(folder), name, action)
    return Stage(name, command, needs)


def ran(folder, stages: list[Stage], workers: int = 1) -> list[str]:
    """The names of the stages that this call runs, in the order of their starts."""
    return [note[1:] for note in notes(folder, stages, workers) if note[0] == "+"]


def notes(folder, stages: list[Stage], workers: int = 1) -> list[str]:
    """What the stages of this call wrote: +name at the start and -name at the end of each."""
    (folder / "notes").write_text("")
    run_stages(stages, folder / "out", workers)
    return (folder / "notes").read_text().split()


def test_run_stages_starts_a_stage_only_when_its_needs_have_ended(folder):
    """A diamond of four stages, with enough workers for all of them at once."""
    stages = [stage(folder, "top", action="slow"), stage(folder, "left", "top", action="slow"),
              stage(folder, "right", "top", action="slow"), stage(folder, "end", "left", "right")]
    seen = notes(folder, stages, workers=4)
    assert seen[:2] == ["+top", "-top"] and seen[-2:] == ["+end", "-end"] and len(seen) == 8


def test_run_stages_runs_as_many_at_a_time_as_there_are_workers(folder):
    """Each of the two waits for the other to start, which only two workers can satisfy."""
    stages = [stage(folder, "a", action="wait +b"), stage(folder, "b", action="wait +a")]
    assert sorted(ran(folder, stages, workers=2)) == ["a", "b"]


def test_run_stages_with_one_worker_runs_one_at_a_time_as_listed(folder):
    stages = [stage(folder, name, action="slow") for name in "cab"]
    assert notes(folder, stages) == ["+c", "-c", "+a", "-a", "+b", "-b"]


def test_run_stages_skips_what_is_done(folder):
    stages = [stage(folder, "a"), stage(folder, "b", "a")]
    assert ran(folder, stages) == ["a", "b"]
    assert all(finished(s, folder / "out") for s in stages)
    assert ran(folder, stages) == []
    record = json.loads((folder / "out/stages/b.json").read_text())
    assert record["command"] == stages[1].text and record["seconds"] > 0


def test_run_stages_reruns_a_stage_whose_command_changed_and_the_stages_that_need_it(folder):
    """d needs a through b; c does not need a."""
    rest = [stage(folder, "b", "a"), stage(folder, "c"), stage(folder, "d", "b")]
    assert ran(folder, [stage(folder, "a"), *rest]) == ["a", "b", "c", "d"]
    changed = [stage(folder, "a", action="slow"), *rest]
    assert ran(folder, changed) == ["a", "b", "d"]
    assert ran(folder, changed) == []


def test_run_stages_remembers_what_is_stale_when_a_call_stops_half_way(folder):
    """a ran again, then c failed before b had its turn. The next call still runs b."""
    a, b, c = stage(folder, "a"), stage(folder, "b", "a"), stage(folder, "c")
    assert ran(folder, [a, c, b]) == ["a", "c", "b"]
    changed = stage(folder, "a", action="slow")
    with pytest.raises(UserError, match="stage c failed"):
        ran(folder, [changed, stage(folder, "c", action="fail"), b])
    assert ran(folder, [changed, c, b]) == ["c", "b"]


def test_run_stages_runs_a_stage_again_when_its_need_is_new(folder):
    assert ran(folder, [stage(folder, "b")]) == ["b"]
    assert ran(folder, [stage(folder, "a"), stage(folder, "b", "a")]) == ["a", "b"]


def test_run_stages_names_the_log_and_its_last_line_when_a_stage_fails(folder):
    """The error is one line. No stage that needs the failed one starts; the next call runs it."""
    stages = [stage(folder, "a"), stage(folder, "b", "a", action="fail"), stage(folder, "c", "b")]
    with pytest.raises(UserError) as caught:
        ran(folder, stages)
    log = folder / "out/logs/b.log"
    assert str(caught.value) == (
        f"stage b failed with exit status 1: no such thing as b (see {log})")
    assert log.read_text() == f"$ {stages[1].text}\nloading\nno such thing as b\n"
    assert [finished(s, folder / "out") for s in stages] == [True, False, False]
    corrected = [stages[0], stage(folder, "b", "a"), stages[2]]
    assert ran(folder, corrected) == ["b", "c"]


def test_run_stages_names_the_command_when_a_stage_fails_without_a_word(folder):
    silent = Stage("silent", ("-c", "raise SystemExit(3)"))
    with pytest.raises(UserError, match=r"stage silent failed with exit status 3: \$ python -c "):
        run_stages([silent], folder / "out", 1)


def test_run_stages_keeps_the_success_of_a_stage_that_ran_during_a_failure(folder):
    good = stage(folder, "good", action="wait +bad")
    with pytest.raises(UserError, match="stage bad failed"):
        ran(folder, [good, stage(folder, "bad", action="fail")], workers=2)
    assert ran(folder, [good, stage(folder, "bad")]) == ["bad"]


def test_a_stage_that_fails_is_not_finished_though_it_was_before(folder):
    """A stage that it needs has changed, so it runs again, and this time it fails."""
    flag = folder / "broken"
    code = f"import os; assert not os.path.exists({str(flag)!r})"
    fragile = Stage("b", ("-c", code), ("a",))
    run_stages([stage(folder, "a"), fragile], folder / "out", 1)
    flag.touch()
    with pytest.raises(UserError, match="stage b failed with exit status 1: AssertionError"):
        run_stages([stage(folder, "a", action="slow"), fragile], folder / "out", 1)
    assert not finished(fragile, folder / "out")


@pytest.mark.parametrize("damaged", [b"", b"{", b"\xff", b"[1]", b"{}", b'{"command": NaN}'])
def test_a_stage_whose_record_is_damaged_runs_again(damaged, folder):
    assert ran(folder, [stage(folder, "a")]) == ["a"]
    (folder / "out/stages/a.json").write_bytes(damaged)
    assert not finished(stage(folder, "a"), folder / "out")
    assert ran(folder, [stage(folder, "a")]) == ["a"]
    assert finished(stage(folder, "a"), folder / "out")


def test_a_stage_that_the_system_ends_is_said_to_be_ended_by_a_signal(folder):
    killed = Stage("killed", ("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    with pytest.raises(UserError, match=r"killed was ended by signal 9 \(by the system, when mem"):
        run_stages([killed], folder / "out", 1)


def test_a_call_that_waits_for_another_names_its_process(folder, capsys):
    order = []

    def second():
        with locked(folder):
            order.append("second")

    with locked(folder):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
    assert f"waiting for the stages of another call to end (it was process {os.getpid()})" in (
        capsys.readouterr().err)


# ----- damaged files in a finished reproduce ------------------------------------------------------

def test_a_damaged_result_is_named_with_what_to_remove(folder):
    config = reproduce.Config(out=str(folder))
    seeds = [SimpleNamespace(folder=folder / "seed0")]
    (folder / "seed0/outputs").mkdir(parents=True)
    for name in ("sft-test", "sft-test-greedy", "sft-reference"):
        (folder / f"seed0/outputs/{name}.json").write_text('[{"instruction": "x", "outp')
    with pytest.raises(UserError, match=r"sft-test\.json.*; to make a file again, remove the "
                                        "folder of its run and its record in .*stages"):
        reproduce.collected(config, seeds)
    (folder / "seconds.json").write_text("1.5")
    assert pipeline.wall_seconds(folder, 2.0) == 3.5
    (folder / "seconds.json").write_text("{")
    with pytest.raises(UserError, match="seconds.json: expected a number, got a damaged file"):
        pipeline.wall_seconds(folder, 2.0)


def test_a_figure_that_a_run_does_not_have_is_null_in_the_results(folder):
    for seed, auc in ((0, 0.75), (1, None)):
        (folder / f"seed{seed}/rm-token").mkdir(parents=True)
        (folder / f"seed{seed}/rm-token/done.json").write_text(
            json.dumps({"edits/token_auc": auc, "pairs/pair_accuracy": 0.5}))
    metrics = results.reward_models([folder / "seed0", folder / "seed1"])["rm-token"]["metrics"]
    assert metrics["token_auc"]["mean"] is None
    assert metrics["token_auc"]["per_seed"] == [0.75, None]
    assert metrics["pair_accuracy"]["mean"] == 0.5
    json.dumps(metrics, allow_nan=False)


def test_a_stage_runs_on_one_thread_and_its_text_can_be_typed(folder):
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    one = Stage("one", ("-c", code))
    run_stages([one], folder / "out", 1)
    assert one.text == "python -c 'import os; print(os.environ['\"'\"'OMP_NUM_THREADS'\"'\"'])'"
    assert (folder / "out/logs/one.log").read_text() == f"$ {one.text}\n1\n"


@pytest.mark.parametrize("given, found", [({}, "passive"), ({"OMP_WAIT_POLICY": "active"},
                                                             "active")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, found):
    kept = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    code = "import sys, fgrlhf, os; print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], env=kept | given, cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.split() == ["False", found]


@pytest.mark.parametrize("script", ["train_rm.py", "train_ppo.py", "eval.py"])
def test_scripts_import_fgrlhf_before_torch(script):
    """The waiting policy is read when torch loads its OpenMP."""
    names = [name for node in ast.parse((ROOT / script).read_text()).body
             for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else
                          [node.module] if isinstance(node, ast.ImportFrom) else [])]
    assert names.index("fgrlhf") < min(i for i, name in enumerate(names)
                                       if name.split(".")[0] in ("torch", "kernels"))


def test_run_stages_finds_scripts_and_modules_of_the_project_from_any_folder(folder, monkeypatch):
    """A relative --out is in the folder of the caller. PYTHONPATH keeps its other entries."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", "mine")
    (folder / "mine").mkdir()
    (folder / "mine" / "own.py").write_text("print('own module')")
    run_stages([Stage("script", ("eval.py", "--help")), Stage("own", ("-m", "own")),
                Stage("module", ("-m", "fgrlhf.simulate", "world", "--out", "world", "--train", "2",
                                 "--dev", "2", "--test", "2", "--demonstrations", "40",
                                 "--vocab-size", "340"))], folder / "out", 1)
    log = (folder / "out/logs/script.log").read_text()
    assert log.startswith("$ python eval.py --help\n") and "eval.py win-rate" in log
    assert (folder / "out/logs/own.log").read_text() == "$ python -m own\nown module\n"
    assert (folder / "world" / "train.jsonl").is_file()


# ----- the progress bar ---------------------------------------------------------------------------

BAR = """
import sys, time
from tqdm import tqdm
for step in tqdm(range(3, 10), initial=2, total=9, desc="fine-grained", mininterval=0):
    if step == 7:
        time.sleep(float(sys.argv[1]))
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_the_bar_shows_how_far_a_running_stage_is_on_a_terminal(stream, folder, monkeypatch):
    """The stage stops for a while in its seventh step, when six of nine are done."""
    monkeypatch.setattr(sys, "stderr", said := stream())
    monkeypatch.setattr(pipeline, "REFRESH", 0.05)
    (folder / "bar.py").write_text(BAR)
    run_stages([Stage("a", (str(folder / "bar.py"), "1"))], folder / "out", 1)
    assert f"logs in {folder}/out/logs:" in said.getvalue() and "a.log" in said.getvalue()
    assert ("a.log 6/9]" in said.getvalue()) == (stream is Terminal)
    assert said.getvalue().count("\r") <= 4 or stream is Terminal
    assert pipeline.progress_of(folder / "out/logs/a.log") == "9/9"


@pytest.mark.parametrize("text, expected", [
    ("", ""), ("$ python x.py 3/4\n", ""), ("\rsft: 0%|   | 0/30 [00:00<?, ?it/s]", "0/30"),
    ("fold 1/2: 100%|##| 8/8 [00:01<00:00, 7it/s]\nfold 2/2:  25%|# | 2/8 [00:01<00:05]", "2/8"),
    ("\r| 7/9 [" + "x" * 3000, "")])
def test_progress_of_a_log_is_the_last_state_of_its_bar(text, expected, tmp_path):
    (tmp_path / "a.log").write_text(text)
    assert pipeline.progress_of(tmp_path / "a.log") == expected
    assert pipeline.progress_of(tmp_path / "none.log") == ""


def test_run_stages_names_a_missing_script_before_any_stage_runs(folder):
    stages = [stage(folder, "a"), Stage("b", ("gone.py", "--fast"), ("a",))]
    with pytest.raises(UserError, match="stage b: expected the script .*/gone.py, found no such"):
        run_stages(stages, folder / "out", 1)
    assert not (folder / "notes").exists() and not (folder / "out").exists()
