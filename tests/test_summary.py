"""What a trainer says: the figures of its progress bar, and the three lines that it ends with."""

import json
import re
import shlex

import pytest

import train_ppo
import train_rm
from fgrlhf import dpo, sft
from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.engine.config import parse, parser
from fgrlhf.engine.summary import command, figures
from tests.small import ppo_folder
from tests.test_readme import config_of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = ppo_folder(tmp_path_factory.mktemp("a run"))             # a blank in every path
    write_jsonl(root / "edits.jsonl", [
        Edit(str(i), ("name the river", "name it")[i % 2], f"it is {'red' * (i % 2)} name",
             "it is the river")
        for i in range(6)])
    return root


def flags(root, out, **more) -> list[str]:
    given = {"out": root / out, **more}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def on_edits(root, out: str, *more: str) -> list[str]:
    return [*flags(root, out, data=root / "edits.jsonl", model=root / "policy", batch=4), *more]


def by_ppo(root, out: str, *more: str) -> list[str]:
    return [*flags(root, out, method="fine-grained", policy=root / "policy", reward=root / "token",
                   prompts=root / "prompts.jsonl", iterations=2, rollouts=6),
            "--max-new-tokens", "6", *more]


# trainer, its flags, the words of its first line, what it leaves, the script of the next command
TRAINERS = {
    "sft": (sft, on_edits, (), "policy by SFT, 2 steps; last batch: loss ([.\\d]+)",
            "policy/", "train_rm.py"),
    "dpo": (dpo, on_edits, (), "policy by DPO, 4 steps; last batch: loss ([.\\d]+), accuracy "
            "([.\\d]+)", "policy/", "eval.py"),
    "rm": (train_rm, on_edits, ("--epochs", "1"), "token-level reward model by the loss ours, "
           "6 records; last batch: loss ([.\\d]+), accuracy ([.\\d]+)", "reward/", "train_ppo.py"),
    "folds": (train_rm, on_edits, ("--folds", "2", "--epochs", "1", "--kind", "sequence"),
              "sequence-level reward model, 2 folds; accuracy on held-out records ([.\\d]+)", None,
              "-m"),
    "ppo": (train_ppo, by_ppo, (), "policy by fine-grained PPO, 2 iterations, 5 prompts; "
            "reward (-?[.\\d]+), KL (-?[.e\\d-]+), length ([.\\d]+)", "policy/", "eval.py")}
LOGGED = {"sft": ("sft/loss",), "dpo": ("dpo/loss", "dpo/accuracy"),
          "rm": ("rm/loss", "rm/accuracy"), "ppo": ("rollout/reward", "rollout/kl_k1",
                                                    "rollout/length")}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_ends_with_what_it_trained_where_it_is_and_the_next_command(name, root, capsys):
    script, given, more, trained, left, following = TRAINERS[name]
    script.train(parse(script.Config, "", given(root, name, *more)))
    said = capsys.readouterr()
    first, second, third = said.err.splitlines()[-3:]
    shown = re.fullmatch("trained: " + trained, first)
    assert shown and said.out == "", first
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").open()]
    expected = [lines[-1][key] for key in LOGGED.get(name, ())] or [
        json.loads((root / name / "done.json").read_text())["pair_accuracy"]]
    assert list(map(float, shown.groups())) == pytest.approx(expected, rel=1e-3)
    assert second == f"results: {root / name}: " + ", ".join(
        filter(None, [left, "metrics.jsonl", "done.json"]))
    words = shlex.split(third.removeprefix("next:    "))
    assert words[:2] == ["python", following]
    given = {word for word in words if word.startswith("--")}
    assert given <= set(parser(config_of(words))._option_string_actions)
    assert any(word.startswith(str(root / name)) for word in words)


def test_a_progress_bar_shows_the_figures_of_the_last_step(root, capsys):
    """The bar's last state has those of the last step, for folds of each fold."""
    train_ppo.train(parse(train_ppo.Config, "", by_ppo(root, "bar", "--skip-checks")))
    last = json.loads((root / "bar/metrics.jsonl").read_text().splitlines()[-1])
    assert "| 2/2 [" in (bar := capsys.readouterr().err.split("\r")[-1])
    assert f"reward {last['rollout/reward']:.4g}, KL {last['rollout/kl_k1']:.4g}, length " in bar
    train_rm.train(parse(train_rm.Config, "", on_edits(root, "bars", "--folds", "2")))
    bars = re.findall(r"fold \d/2: 100%.*loss [.\d]+, accuracy [.\d]+\]", capsys.readouterr().err)
    assert len(bars) == 2


def test_ppo_says_on_how_many_prompts(root, capsys):
    first = (root / "prompts.jsonl").read_text().splitlines()[0]
    (root / "one.jsonl").write_text(first + "\n")
    train_ppo.train(parse(train_ppo.Config, "", by_ppo(
        root, "one", "--skip-checks", "--prompts", str(root / "one.jsonl"))))
    assert "fine-grained PPO, 2 iterations, 1 prompt; reward" in capsys.readouterr().err
    assert json.loads((root / "one/done.json").read_text())["prompts"] == 1


def test_figures_leave_out_what_is_not_there():
    assert figures({"rm/loss": 0.693147, "rm/bt": 1.0, "rm/accuracy": 1.0}) == (
        "loss 0.6931, accuracy 1")
    assert figures({"sft/loss": None}) == figures({}) == ""


def test_the_next_command_has_the_template_of_the_training(tmp_path):
    words = "eval.py outputs --policy {policy} --prompts PROMPTS --out ANSWERS.json"
    next_of = lambda template: command(words, template, policy="a b/policy")
    plain = "python eval.py outputs --policy 'a b/policy' --prompts PROMPTS --out ANSWERS.json"
    assert next_of("plain") == plain
    assert next_of("chatml") == plain + " --template chatml"
    assert next_of("Q: {prompt}") == plain + " --template 'a b/policy'"


def test_the_log_likelihood_is_not_called_trained():
    config = train_rm.Config(data="d", model="m", out="o", likelihood=True)
    assert train_rm.ending(config).trained == "nothing, the reward is the model's log-likelihood"


def test_no_epochs_are_not_called_training(root, capsys):
    train_rm.train(parse(train_rm.Config, "", on_edits(root, "start", "--epochs", "0")))
    assert ("trained: nothing with --epochs 0, the token-level reward model is as it started, "
            "6 records\n") in capsys.readouterr().err


def test_a_control_is_not_followed_by_ppo(root):
    config = train_rm.Config(data="d", model="m", out="a b", hide="both")
    assert train_rm.ending(config).after == "python -m fgrlhf.compare 'a b' OTHER_RUN"
