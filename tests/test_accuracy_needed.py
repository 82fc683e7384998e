"""The warning about a reward model that is too often wrong, by train_rm.py and by train_ppo.py."""

import json
from pathlib import Path

import pytest

import train_ppo
import train_rm
from fgrlhf.checks import accuracy
from fgrlhf.checks.accuracy import ACCURACY_NEEDED, recorded, warn
from fgrlhf.data.records import Pair, write_jsonl
from fgrlhf.engine.config import parse
from tests.small import ppo_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run: its reward model is in "sequence"."""
    folder = ppo_folder(tmp_path_factory.mktemp("run"))
    write_jsonl(folder / "pairs.jsonl", [Pair(str(i), "name the river", "it is red", "the river")
                                         for i in range(4)])
    write_jsonl(folder / "wrong.jsonl", [Pair("0", "name the river", "the river", "it is red")])
    return folder


def done(folder, value) -> str:
    (folder / "done.json").write_text(value if isinstance(value, str) else
                                      json.dumps({"pairs/pair_accuracy": value}))
    return str(folder / "sequence")


def warnings(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


@pytest.mark.parametrize("value", [ACCURACY_NEEDED, 0.9, None, float("nan")])
def test_a_reward_model_that_is_right_often_enough_or_not_judged_is_silent(value, capsys):
    warn("runs/rm/reward", value)
    assert capsys.readouterr().err == ""


def test_the_warning_is_one_line_with_both_numbers_and_the_section(capsys, monkeypatch):
    monkeypatch.setattr(accuracy, "ACCURACY_NEEDED", 0.65)
    warn("runs/rm/reward", 0.6249)
    [line] = warnings(capsys)
    assert line.startswith("warning: runs/rm/reward: this reward model is right on 62.5% of the")
    assert "below about 65% most PPO runs gained little" in line
    assert 'STUDY.md, "How right must a reward model be?")' in line


def test_the_section_that_the_warning_names_exists():
    study = (Path(accuracy.__file__).parents[1] / "reproduce/STUDY.md").read_text()
    assert f"\n## {accuracy.SECTION}\n" in study


def test_an_accuracy_is_found_in_the_run_of_the_reward_model_or_nowhere(folder, tmp_path):
    assert recorded(done(folder, 0.5)) == 0.5
    assert recorded(done(folder, None)) is None                 # train_rm.py writes NaN as null
    assert recorded(done(folder, "{dam")) is None
    (folder / "done.json").unlink()
    assert recorded(folder / "sequence") is None                # an older or unfinished run
    done(folder, 0.5)
    assert recorded(folder / "policy") is None and recorded("math:sqrt") is None


@pytest.mark.parametrize("held_out, warned", [("wrong", True), ("pairs", False)])
def test_train_rm_warns_when_its_held_out_pairs_go_wrong(held_out, warned, folder, tmp_path,
                                                         capsys):
    """Trained to prefer one answer to the other, and judged on the opposite or on the same."""
    train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{folder}/pairs.jsonl", "--model", f"{folder}/policy", "--kind", "sequence",
        "--out", f"{tmp_path}/rm", "--epochs", "10", "--eval-pairs", f"{folder}/{held_out}.jsonl"]))
    told = warnings(capsys)
    assert bool(told) == warned and len(told) <= 1
    if warned:
        assert told[0].startswith(f"warning: {tmp_path}/rm/reward: this reward model is right on "
                                  "0.0% of the held-out pairs")
    assert recorded(tmp_path / "rm/reward") == 1.0 - warned


@pytest.mark.parametrize("value, warned", [(0.55, True), (0.8, False), (None, False)])
def test_train_ppo_warns_about_a_reward_model_that_is_recorded_as_wrong(value, warned, folder,
                                                                        tmp_path, capsys):
    train_ppo.train(train_ppo.Config(
        method="rlhf", policy=str(folder / "policy"), reward=done(folder, value),
        prompts=str(folder / "prompts.jsonl"), out=str(tmp_path / "out"), iterations=1, rollouts=4,
        max_new_tokens=4, skip_checks=True))
    told = warnings(capsys)
    assert [line.split(": this")[0] for line in told] == [f"warning: {folder}/sequence"] * warned
