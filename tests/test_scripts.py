"""The scripts as a user runs them: the whole pipeline at its smallest, bad input, killed runs."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgrlhf.checkpoint import load_model, load_tokenizer, save_model
from fgrlhf.data import readers, records
from fgrlhf.engine.encoding import Encoding
from fgrlhf.reward import RewardModel, load_reward, save_reward
from fgrlhf.simulate.world import World
from fgrlhf.tokenizer import train
from tests import processes
from tests.processes import ROOT
from tests.small import llama

SCRIPTS = ("train_rm.py", "train_ppo.py", "eval.py", "fgrlhf.sft", "fgrlhf.simulate",
           "fgrlhf.generate", "fgrlhf.explain")
VOCABULARY = 400


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def run(folder):
    """Run a script to its end; it must succeed unless told otherwise."""
    def call(*command, status: int = 0, **options) -> processes.Done:
        done = processes.run(folder, *command, **options)
        assert done.status == status, done
        return done
    return call


@pytest.fixture(scope="module")
def world(folder, run) -> Path:
    run("fgrlhf.simulate", "world", "--world", 1, "--out", folder / "world", "--demonstrations", 60,
        "--train", 16, "--dev", 6, "--test", 6, "--vocab-size", VOCABULARY)
    return folder / "world"


@pytest.fixture(scope="module")
def policy(folder, world) -> Path:
    """A model folder smaller than any preset."""
    save_model(llama(vocab_size=VOCABULARY, max_seq_len=128, tie_embeddings=True), folder / "small",
               tokenizer=load_tokenizer(world))
    return folder / "small"


@pytest.fixture(scope="module")
def reward(folder, policy) -> Path:
    torch.manual_seed(0)
    save_reward(RewardModel(load_model(policy), "token"), folder / "small-reward",
                load_tokenizer(policy), Encoding("plain"))
    return folder / "small-reward"


@pytest.fixture(scope="module")
def annotated(folder, world, policy, run) -> Path:
    """Pairs and edits of answers sampled from the untrained policy, and both files of answers."""
    for name, seed in (("first", 1), ("second", 2)):
        run("eval.py", "outputs", "--policy", policy, "--prompts", world / "train.jsonl",
            "--max-new-tokens", 12, "--seed", seed, "--out", folder / f"{name}.json")
    run("fgrlhf.simulate", "annotate", "--world", 1, "--outputs", folder / "first.json",
        "--others", folder / "second.json", "--out", folder / "annotated", "--spans")
    return folder / "annotated"


# ----- help ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", [(name,) for name in SCRIPTS] + [
    ("eval.py", "outputs"), ("eval.py", "win-rate"), ("eval.py", "reward-model"),
    ("eval.py", "answers"),
    ("fgrlhf.simulate", "world"), ("fgrlhf.simulate", "annotate")], ids=" ".join)
def test_help_shows_an_example_and_ends_with_status_0(command, run):
    done = run(*command, "--help")
    assert "python" in done.out and done.err == ""
    lists_commands = command in (("eval.py",), ("fgrlhf.simulate",))
    assert lists_commands or "(default:" in done.out


@pytest.mark.parametrize("command", [(name,) for name in SCRIPTS[:2] + SCRIPTS[3:4]] + [
    ("eval.py", "outputs"), ("fgrlhf.simulate", "world")], ids=" ".join)
def test_an_unknown_flag_ends_with_status_2(command, run, folder):
    done = run(*command, "--out", folder / "never", "--learning-rat", 3, status=2)
    assert "error:" in done.err and "Traceback" not in done.err and not (folder / "never").exists()


def test_an_unknown_command_ends_with_status_2(run):
    for script in ("eval.py", "fgrlhf.simulate"):
        for command in ((script, "nonsense"), (script,)):
            done = run(*command, status=2)
            assert re.fullmatch(r"error: expected one of .*\n", done.err) and done.out == ""


def test_a_script_runs_from_a_bare_interpreter():
    """Without the tests' server of processes: what a user types."""
    done = subprocess.run([sys.executable, "train_rm.py", "--help"], cwd=ROOT, capture_output=True,
                          text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "--kind {token,sequence}" in done.stdout


# ----- the pipeline -------------------------------------------------------------------------------

def test_sft_initialises_a_preset_and_learns(folder, world, run):
    run("fgrlhf.sft", "--data", world / "demonstrations.jsonl", "--init", "tiny",
        "--tokenizer", world / "tokenizer.model", "--out", folder / "sft", "--batch", 8,
        "--epochs", 3, "--warmup", 2, "--lr", 5e-3)
    logged = lines(folder / "sft/metrics.jsonl")
    assert [line["step"] for line in logged] == list(range(1, 25))
    assert abs(logged[0]["sft/loss"] - math.log(VOCABULARY)) < 0.1                # uniform at first
    assert logged[-1]["sft/loss"] < 0.75 * logged[0]["sft/loss"]
    assert json.loads((folder / "sft/config.json").read_text())["epochs"] == 3
    assert (folder / "sft/done.json").exists() and not list((folder / "sft").glob("state-*.pt"))
    assert load_model(folder / "sft/policy").config.vocab_size == VOCABULARY


def test_sft_imitates_the_edited_side_of_edits(folder, policy, annotated, run):
    run("fgrlhf.sft", "--data", annotated / "edits.jsonl", "--model", policy,
        "--out", folder / "imitation")
    assert json.loads((folder / "imitation/done.json").read_text())["records"] == len(
        readers.read_edits(annotated / "edits.jsonl"))


@pytest.mark.parametrize("kind, data",
                         [("token", "edits"), ("sequence", "pairs"), ("sequence", "edits")])
def test_train_rm_trains_either_kind_and_eval_measures_it(kind, data, folder, policy, annotated,
                                                          run):
    out = folder / f"rm-{kind}-{data}"
    run("train_rm.py", "--kind", kind, "--data", annotated / f"{data}.jsonl", "--model", policy,
        "--out", out, "--epochs", 6, "--batch", 8, "--lr", 3e-3)
    logged = lines(out / "metrics.jsonl")
    assert logged[-1]["rm/loss"] < logged[0]["rm/loss"]
    assert load_reward(out / "reward").kind == kind
    done = run("eval.py", "reward-model", "--reward", out / "reward",
               "--data", annotated / "edits.jsonl")
    table = json.loads(done.out)
    assert table["pairs"] == len(readers.read_edits(annotated / "edits.jsonl"))
    assert 0 <= table["pair_accuracy"] <= 1
    assert ("token_auc" in table) == (kind == "token")


def test_train_rm_cross_validates_without_keeping_a_model(folder, policy, annotated, run):
    run("train_rm.py", "--data", annotated / "edits.jsonl", "--model", policy,
        "--out", folder / "folds", "--folds", 3, "--epochs", 1, "--unit", "word")
    done = json.loads((folder / "folds/done.json").read_text())
    assert done["folds"] == 3
    assert done["pairs"] == len(readers.read_edits(annotated / "edits.jsonl"))
    assert "pair_accuracy_sd" in done and "minimal/pairs_sd" not in done
    assert {"train_pair_accuracy", "train_token_auc_within", "pair_accuracy_per_token"} <= set(done)
    assert not (folder / "folds/reward").exists()
    assert len(lines(folder / "folds/metrics.jsonl")) == 3


@pytest.mark.parametrize("method, kind", [("fine-grained", "token"), ("rlhf", "sequence")])
def test_train_ppo_trains_by_either_method(method, kind, folder, world, policy, run):
    out, rewards = folder / f"ppo-{method}-{kind}", folder / f"reward-{kind}"
    torch.manual_seed(0)
    save_reward(RewardModel(load_model(policy), kind), rewards, load_tokenizer(policy))
    run("eval.py", "outputs", "--policy", policy, "--prompts", world / "dev.jsonl",
        "--max-new-tokens", 12, "--out", folder / "dev.json")
    run("train_ppo.py", "--method", method, "--policy", policy, "--reward", rewards,
        "--prompts", world / "train.jsonl", "--out", out, "--iterations", 3, "--rollouts", 8,
        "--max-new-tokens", 12, "--dev-prompts", world / "dev.jsonl",
        "--dev-reference", folder / "dev.json", "--world", 1, "--eval-every", 2)
    logged = lines(out / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3]
    assert [("eval/win_rate" in line) for line in logged] == [False, True, True]
    assert [("ppo/value_loss" in line) for line in logged] == [method == "rlhf"] * 3
    assert logged[0]["rollout/kl_k3"] == pytest.approx(0, abs=1e-6)    # the policy is the reference
    assert logged[-1]["rollout/episodes"] == 24 and logged[-1]["rollout/kl_k3"] > 0
    assert all(math.isfinite(value) for line in logged for value in line.values())
    before, last = load_model(policy), load_model(out / "policy")
    assert not all(torch.equal(p, q) for p, q in zip(before.parameters(), last.parameters()))
    best = json.loads((out / "done.json").read_text())
    assert best["best_iteration"] in (2, 3) and load_model(out / "best").config == before.config
    assert best["best_dev_win_rate"] == max(line.get("eval/win_rate", 0) for line in logged)


@pytest.mark.parametrize("judge", ["oracle", "reward", "annotations"])
def test_eval_win_rate_by_every_judge(judge, folder, annotated, reward, run):
    answers = ("--outputs", folder / "first.json", "--reference", folder / "second.json")
    flags = {"oracle": (*answers, "--world", 1), "reward": (*answers, "--reward", reward),
             "annotations": ("--annotations", folder / "annotations.json")}[judge]
    (folder / "annotations.json").write_text(json.dumps(
        [{"instruction": str(i), "output_1": "a", "output_2": "b", "preference": p}
         for i, p in enumerate((1, 2, 2, 1.5))]))
    found = json.loads(run("eval.py", "win-rate", "--judge", judge, *flags).out)
    assert found["judge"] == judge
    assert found["interval_95"][0] <= found["win_rate"] <= found["interval_95"][1]
    if judge == "annotations":
        assert [found[k] for k in ("win_rate", "wins", "ties", "losses")] == [2.5 / 4, 2, 1, 1]
    else:
        assert found["wins"] + found["ties"] + found["losses"] == 16
    if judge == "oracle":
        count = lambda name: [len(World(1).errors(o.instruction, o.output)) for o in
                              readers.read_outputs(folder / f"{name}.json")]
        wins = [(a < b) + (a == b) / 2 for a, b in zip(count("first"), count("second"))]
        assert found["win_rate"] == sum(wins) / 16


def test_eval_outputs_writes_alpacaevals_format(folder, world, policy, run):
    done = run("eval.py", "outputs", "--policy", policy, "--prompts", world / "test.jsonl",
               "--max-new-tokens", 12, "--temperature", 0, "--limit", 4,
               "--out", folder / "outputs.json")
    records = json.loads((folder / "outputs.json").read_text())
    assert json.loads(done.out)["outputs"] == 4 == len(records)
    assert [set(r) for r in records] == [{"instruction", "output", "generator"}] * 4
    prompts = [p.prompt for p in readers.read_prompts(world / "test.jsonl")]
    assert [r["instruction"] for r in records] == prompts[:4]


# ----- bad input ----------------------------------------------------------------------------------

def commands(world: Path, policy: Path, reward: Path, data: Path, out: Path) -> dict[str, list]:
    """Each trainer with everything in order; a test spoils one of the folders."""
    return {"sft": ["fgrlhf.sft", "--data", data, "--model", policy, "--out", out],
            "train_rm": ["train_rm.py", "--data", data, "--model", policy, "--out", out],
            "train_ppo": ["train_ppo.py", "--method", "fine-grained", "--policy", policy,
                          "--reward", reward,
                          "--prompts", data, "--out", out, "--rollouts", 2, "--iterations", 1,
                          "--max-new-tokens", 4],
            "outputs": ["eval.py", "outputs", "--policy", policy, "--prompts", data, "--out", out],
            "reward-model": ["eval.py", "reward-model", "--reward", reward, "--data", data]}


@pytest.mark.parametrize("script", ["sft", "train_rm", "train_ppo", "outputs", "reward-model"])
@pytest.mark.parametrize("fault",
                         ["no model", "empty file", "broken record", "no data", "wrong tokenizer"])
def test_bad_input_is_one_line_on_stderr_and_status_2(script, fault, world, policy, reward, run,
                                                      tmp_path):
    """... and nothing half-written: the output folder does not come into being."""
    data = tmp_path / "data.jsonl"
    records.write_jsonl(data, [records.Edit("a", "Name the river.", "It is red.", "It is blue.")])
    if fault == "no model":
        policy = reward = tmp_path / "absent"
    elif fault == "empty file":
        data.write_text("")
    elif fault == "broken record":
        data.write_text(data.read_text() + '{"id": "b", "prompt": 3}\n')
    elif fault == "no data":
        data.unlink()
    else:
        policy, reward = (copy_with_another_tokenizer(folder, tmp_path)
                          for folder in (policy, reward))
    out = tmp_path / "out"
    done = run(*commands(world, policy, reward, data, out)[script], status=2)
    assert re.fullmatch(r"error: [^\n]+\n", done.err), done.err
    assert done.out == "" and not out.exists()
    place = {"no model": "absent", "empty file": "data.jsonl", "broken record": "data.jsonl:2",
             "no data": "data.jsonl",
             "wrong tokenizer": "tokenizer.model"}[fault]
    assert place in done.err


def copy_with_another_tokenizer(folder: Path, to: Path) -> Path:
    copy = to / folder.name
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    train(["another text altogether"], 280, copy / "tokenizer.model")
    return copy


def test_train_ppo_refuses_a_sequence_level_reward_for_the_fine_grained_method(
        world, policy, run, tmp_path):
    save_reward(RewardModel(load_model(policy), "sequence"), tmp_path / "r", load_tokenizer(policy),
                Encoding("plain"))
    done = run("train_ppo.py", "--method", "fine-grained", "--policy", policy, "--reward",
               tmp_path / "r", "--prompts", world / "train.jsonl", "--out", tmp_path / "o",
               status=2)
    assert "expected a token-level reward model" in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_train_ppo_refuses_policy_and_reward_of_two_tokenizers(world, policy, run, tmp_path):
    texts = [d.output[::-1] for d in readers.read_demonstrations(world / "demonstrations.jsonl")]
    other = train(texts, VOCABULARY, tmp_path / "t.model")
    save_reward(RewardModel(llama(vocab_size=VOCABULARY), "token"), tmp_path / "reward", other,
                Encoding("plain"))
    done = run("train_ppo.py", "--method", "fine-grained", "--policy", policy,
               "--reward", tmp_path / "reward", "--prompts", world / "train.jsonl",
               "--out", tmp_path / "out", status=2)
    assert "tokenizer is not the one of --policy" in done.err and not (tmp_path / "out").exists()


def test_a_plain_model_is_no_reward_model(world, policy, run, tmp_path):
    done = run(*commands(world, policy, policy, world / "train.jsonl",
                         tmp_path / "out")["train_ppo"], status=2)
    assert "expected a reward model folder" in done.err and not (tmp_path / "out").exists()


def test_edits_that_change_nothing_are_no_training_data(world, policy, reward, run, tmp_path):
    records.write_jsonl(tmp_path / "same.jsonl", [records.Edit("a", "Name it.", "Red.", "Red.")])
    done = run(*commands(world, policy, reward, tmp_path / "same.jsonl",
                         tmp_path / "out")["train_rm"], status=2)
    assert "same.jsonl" in done.err and not (tmp_path / "out").exists()


def test_a_broken_pair_is_named_by_its_own_line(world, policy, reward, run, tmp_path):
    """The file is tried as edits first: what is reported is not that pairs are no edits."""
    path = tmp_path / "pairs.jsonl"
    records.write_jsonl(path, [records.Pair("a", "Name it.", "Red.", "Blue.")])
    path.write_text(path.read_text() + '{"id": "b", "prompt": "x", "chosen": "Red."}\n')
    done = run(*commands(world, policy, reward, path, tmp_path / "out")["train_rm"], status=2)
    assert f"{path}:2: rejected: expected" in done.err


# ----- killed and resumed -------------------------------------------------------------------------

def weights(folder: Path) -> dict[str, bytes]:
    parameters = load_model(folder, reward=True).named_parameters()
    return {name: p.detach().numpy().tobytes() for name, p in parameters}


@pytest.mark.parametrize("script, kill", [("sft", 6), ("sft", 1), ("train_rm", 8),
                                          ("fine-grained", 5), ("rlhf", 5)])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(script, kill, world, policy, reward,
                                                              annotated, run,
                                                              tmp_path):
    """Rule 10: final weights bit for bit, metrics.jsonl byte for byte; also before any state.

    A step is logged before its state is saved: at a multiple of 3 the newest state is 3 steps old.
    """
    common = ("--save-every", 3, "--seed", 5)
    ppo = ("train_ppo.py", "--policy", policy, "--reward", reward,
           "--prompts", world / "train.jsonl", "--iterations", 8, "--rollouts", 6,
           "--max-new-tokens", 10, *common, "--method")
    command = {"sft": ("fgrlhf.sft", "--data", world / "demonstrations.jsonl", "--model", policy,
                       "--batch", 4,
                       "--epochs", 3, *common),
               "train_rm": ("train_rm.py", "--data", annotated / "edits.jsonl", "--model", policy,
                            "--batch", 2,
                            "--epochs", 5, *common),
               "fine-grained": (*ppo, "fine-grained"), "rlhf": (*ppo, "rlhf")}[script]
    model = "reward" if script == "train_rm" else "policy"
    run(*command, "--out", tmp_path / "whole")
    run(*command, "--out", tmp_path / "killed", die_after=kill, status=-signal.SIGKILL)
    assert len(lines(tmp_path / "killed/metrics.jsonl")) == kill
    assert not (tmp_path / "killed/done.json").exists()
    assert bool(list((tmp_path / "killed").glob("state-*.pt"))) == (kill > 3)
    run(*command, "--out", tmp_path / "killed", "--resume")
    assert weights(tmp_path / "whole" / model) == weights(tmp_path / "killed" / model)
    whole, resumed = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "killed"))
    assert whole == resumed
    steps = [line["step"] for line in lines(tmp_path / "killed/timing.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 4
    path.write_bytes(whole)


def test_resume_passes_over_a_state_with_a_flipped_byte_and_refuses_when_all_have_one(
        world, policy, run, tmp_path):
    """Refused by name; the one before it gives the same run, and without one nothing is touched."""
    command = ("fgrlhf.sft", "--data", world / "demonstrations.jsonl", "--model", policy,
               "--batch", 4, "--epochs", 3, "--save-every", 2)
    run(*command, "--out", tmp_path / "whole")
    for name in ("one", "all"):
        run(*command, "--out", tmp_path / name, die_after=6, status=-signal.SIGKILL)
    flip(tmp_path / "one/state-000004.pt")
    done = run(*command, "--out", tmp_path / "one", "--resume")
    assert re.search(r"state-000004\.pt: damaged[^\n]* continuing from [^\n]*state-000002.pt\n",
                     done.err)
    assert weights(tmp_path / "one/policy") == weights(tmp_path / "whole/policy")
    for path in (tmp_path / "all").glob("state-*.pt"):
        flip(path)
    files = lambda: {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()
                     if path.name != ".lock"}                       # it names the last process
    before = files()
    done = run(*command, "--out", tmp_path / "all", "--resume", status=2)
    assert re.fullmatch(r"error: [^\n]*state-000004\.pt: damaged[^\n]*\n", done.err)
    assert before == files()
