"""encoding.json: models are used with the flags of their training."""

import json

import pytest

import eval as evaluation
import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.checks import __main__ as checks
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Output, Prompt, write_jsonl, write_outputs
from fgrlhf.engine.config import parse
from fgrlhf.engine.encoding import FILE, Encoding, check_encoding, read_encoding, write_encoding
from fgrlhf.explain import __main__ as explain
from fgrlhf.templates import read_template
from tests.small import ppo_folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders sft/policy (plain) and rm/reward (plain, --prompt-tokens 6, --normalise)."""
    root = ppo_folder(tmp_path_factory.mktemp("encoding"))
    write_jsonl(root / "edits.jsonl", [Edit("1", "name", "it is", "it is red"),
                                       Edit("2", "name the", "it river", "it is")])
    sft.train(parse(sft.Config, "", ["--data", f"{root}/edits.jsonl", "--model", f"{root}/policy",
                                     "--out", f"{root}/sft", "--epochs", "0"]))
    train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/sft/policy", "--out", f"{root}/rm",
        "--epochs", "0", "--prompt-tokens", "6", "--normalise"]))
    return root


def test_trainers_write_how_records_became_ids(trained):
    assert read_encoding(trained / "sft/policy") == Encoding("plain")
    assert read_encoding(trained / "rm/reward") == Encoding("plain", 6, True)
    assert read_encoding(trained / "policy") is None            # from elsewhere


def ppo(root, *more: str) -> list[str]:
    write_jsonl(root / "short.jsonl", [Prompt("s", "it"), Prompt("t", "is")])
    return ["--policy", f"{root}/sft/policy", "--reward", f"{root}/rm/reward", "--rollouts", "4",
            "--prompts", f"{root}/short.jsonl", "--max-new-tokens", "4", *more]


TEMPLATE = "expected --template plain, with which this model was trained .* got --template alpaca"


@pytest.mark.parametrize("command", ["train_rm", "train_ppo", "checks", "outputs", "reward-model",
                                     "win-rate", "explain"])
def test_every_command_refuses_another_template(command, trained, tmp_path):
    other, root = ["--template", "alpaca"], trained
    write_outputs(root / "a.json", [Output("it", "red", "a")])
    actions = {
        "train_rm": lambda: train_rm.train(parse(train_rm.Config, "", [
            "--data", f"{root}/edits.jsonl", "--model", f"{root}/sft/policy", "--out",
            f"{tmp_path}/out", *other])),
        "train_ppo": lambda: train_ppo.train(parse(train_ppo.Config, "", ppo(
            root, "--method", "fine-grained", "--out", f"{tmp_path}/out", *other))),
        "checks": lambda: checks.main(parse(checks.Config, "", ppo(root, *other))),
        "outputs": lambda: evaluation.outputs(parse(evaluation.OutputsConfig, "", [
            "--policy", f"{root}/sft/policy", "--prompts", f"{root}/short.jsonl",
            "--max-new-tokens", "4", "--out", f"{tmp_path}/o.json", *other])),
        "reward-model": lambda: evaluation.reward_model(parse(evaluation.RewardModelConfig, "", [
            "--reward", f"{root}/rm/reward", "--data", f"{root}/edits.jsonl", *other])),
        "win-rate": lambda: evaluation.win_rate(parse(evaluation.WinRateConfig, "", [
            "--judge", "reward", "--reward", f"{root}/rm/reward", "--outputs", f"{root}/a.json",
            "--reference", f"{root}/a.json", *other])),
        "explain": lambda: explain.explain(parse(explain.Config, "", [
            "--reward", f"{root}/rm/reward", "--record", f"{root}/edits.jsonl", *other])),
    }
    with pytest.raises(UserError, match=TEMPLATE):
        actions[command]()
    assert not list(tmp_path.iterdir())


def test_eval_refuses_another_prompt_length_or_whitespace(trained):
    common = ["--reward", f"{trained}/rm/reward", "--data", f"{trained}/edits.jsonl"]
    for more, message in ((["--normalise"], "expected --prompt-tokens 6.*got no --prompt-tokens"),
                          (["--prompt-tokens", "6"], "expected --normalise.*got no --normalise")):
        with pytest.raises(UserError, match=message):
            evaluation.reward_model(parse(evaluation.RewardModelConfig, "", common + more))
    table = evaluation.reward_model(parse(evaluation.RewardModelConfig, "", [
        *common, "--normalise", "--prompt-tokens", "6"]))
    assert table["pairs"] == 2


def test_ppo_refuses_prompts_longer_than_the_reward_model_was_trained_on(trained, tmp_path):
    arguments = ppo(trained, "--method", "fine-grained", "--out", f"{tmp_path}/out")
    write_jsonl(trained / "short.jsonl", [Prompt("s", "it"), Prompt("t", "the river is red " * 2)])
    with pytest.raises(UserError, match="'t': prompt: expected at most 6 tokens, as .*reward was "
                                        "trained with --prompt-tokens 6"):
        train_ppo.train(parse(train_ppo.Config, "", arguments))


def test_win_rate_encodes_answers_like_the_reward_models_training(trained, tmp_path):
    """Blanks are collapsed and the prompt is cut, as for the records it was trained on."""
    write_outputs(tmp_path / "a.json", [Output("name the river is", "it  is \n red", "a")])
    write_outputs(tmp_path / "b.json", [Output("name the river is", "it is red", "b")])
    found = evaluation.win_rate(parse(evaluation.WinRateConfig, "", [
        "--judge", "reward", "--reward", f"{trained}/rm/reward", "--outputs", f"{tmp_path}/a.json",
        "--reference", f"{tmp_path}/b.json"]))
    assert (found["win_rate"], found["ties"]) == (0.5, 1)


def test_explain_takes_the_encoding_from_the_reward_folder(trained, tmp_path):
    """config.json of the run may be missing, as in a folder that was copied on its own."""
    (tmp_path / "reward").symlink_to(trained / "rm/reward")
    settings = explain.settings_of(explain.LossSettings, trained / "rm/reward")
    assert (settings.prompt_tokens, settings.normalise) == (6, True)
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in (trained / "rm/reward").iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    settings = explain.settings_of(explain.LossSettings, copied)
    assert (settings.prompt_tokens, settings.normalise) == (6, True)


def test_check_encoding_says_when_a_reward_model_does_not_tell(trained, capsys):
    assert check_encoding(trained / "token", template="plain") is None
    assert "there is no encoding.json" in capsys.readouterr().err
    assert check_encoding(trained / "policy", template="plain") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"template": 3}',
                                     '{"template": "plain", "prompt_tokens": "6"}'])
def test_a_damaged_encoding_is_named(content, tmp_path):
    write_encoding(tmp_path, Encoding("plain", 6, True))
    assert json.loads((tmp_path / FILE).read_text()) == {
        "template": "plain", "prompt_tokens": 6, "normalise": True}
    (tmp_path / FILE).write_text(content)
    with pytest.raises(UserError, match=FILE):
        read_encoding(tmp_path)


def test_a_control_is_refused_by_whoever_hides_nothing(trained, tmp_path):
    """Its rewards mean nothing for whole prompts and responses."""
    root = trained
    train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/sft/policy", "--out", f"{tmp_path}/rm",
        "--epochs", "0", "--hide", "both"]))
    folder = tmp_path / "rm/reward"
    assert read_encoding(folder).hide == "both"
    with pytest.raises(UserError, match="expected --hide both, .* got --hide nothing"):
        check_encoding(folder, template="plain")
    with pytest.raises(UserError, match="got a control"):
        explain.explain(parse(explain.Config, "", ["--reward", f"{folder}", "--record",
                                                   f"{root}/edits.jsonl"]))
    table = evaluation.reward_model(parse(evaluation.RewardModelConfig, "", [
        "--reward", f"{folder}", "--data", f"{root}/edits.jsonl", "--hide", "both"]))
    assert table["pairs"] == 2


# ----- one's own template -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Folders sft/policy and rm/reward, trained with a template file that is then removed."""
    root = ppo_folder(tmp_path_factory.mktemp("own"))
    (root / "mine.txt").write_text("Q {prompt}\nA\n")
    write_jsonl(root / "edits.jsonl", [Edit("1", "name", "it is", "it is red"),
                                       Edit("2", "it", "it river", "it is")])
    data = ["--data", f"{root}/edits.jsonl", "--epochs", "0", "--template", f"{root}/mine.txt"]
    sft.train(parse(sft.Config, "", [*data, "--model", f"{root}/policy", "--out", f"{root}/sft"]))
    train_rm.train(parse(train_rm.Config, "", [*data, "--model", f"{root}/sft/policy",
                                               "--out", f"{root}/rm"]))
    (root / "mine.txt").unlink()
    return root


def test_a_model_folder_keeps_the_text_of_ones_own_template(own):
    for folder in ("sft/policy", "rm/reward"):
        assert read_encoding(own / folder) == Encoding("Q {prompt}\nA")
    assert json.loads((own / "sft/config.json").read_text())["template"] == "Q {prompt}\nA"
    settings = explain.settings_of(explain.LossSettings, own / "rm/reward")
    assert settings.template == "Q {prompt}\nA"


def test_later_commands_take_the_template_from_the_model_folder(own, tmp_path):
    template, root = ["--template", f"{own}/sft/policy"], own
    train_ppo.train(parse(train_ppo.Config, "", ppo(
        root, "--method", "fine-grained", "--iterations", "1", "--minibatches", "1",
        "--skip-checks", "--out", f"{tmp_path}/ppo", *template)))
    assert read_encoding(tmp_path / "ppo/policy") == Encoding("Q {prompt}\nA")
    for policy, out in ((root / "sft/policy", "a"), (tmp_path / "ppo/policy", "b")):
        evaluation.outputs(parse(evaluation.OutputsConfig, "", [
            "--policy", str(policy), "--prompts", f"{root}/short.jsonl", "--max-new-tokens", "4",
            "--out", f"{tmp_path}/{out}.json", *template]))
    found = evaluation.win_rate(parse(evaluation.WinRateConfig, "", [
        "--judge", "reward", "--reward", f"{root}/rm/reward", "--outputs", f"{tmp_path}/a.json",
        "--reference", f"{tmp_path}/b.json", *template]))
    assert 0 <= found["win_rate"] <= 1
    explained, _ = explain.explain(parse(explain.Config, "", [
        "--reward", f"{root}/rm/reward", "--record", f"{root}/edits.jsonl", *template]))
    assert explained.prompt == "Q name\nA"


def test_another_template_is_refused_with_the_flag_that_is_right(own, tmp_path):
    (tmp_path / "other.txt").write_text("R {prompt}")
    for given, got in (("plain", "got --template plain"),
                       (f"{tmp_path}/other.txt", "got --template with the text of a file")):
        with pytest.raises(UserError, match=f"expected --template {own}/rm/reward, with which "
                                            f"this model was trained .*{got}") as refused:
            evaluation.reward_model(parse(evaluation.RewardModelConfig, "", [
                "--reward", f"{own}/rm/reward", "--data", f"{own}/edits.jsonl",
                "--template", given]))
        assert "\n" not in str(refused.value)
    (tmp_path / "same.txt").write_text("Q {prompt}\nA")
    assert evaluation.reward_model(parse(evaluation.RewardModelConfig, "", [
        "--reward", f"{own}/rm/reward", "--data", f"{own}/edits.jsonl",
        "--template", f"{tmp_path}/same.txt"]))["pairs"] == 2


def test_an_encoding_with_a_damaged_template_is_refused_in_one_line(own, tmp_path):
    for template in ("chat", "Q {promt}", "{prompt} {imput}"):
        write_encoding(tmp_path, Encoding(template))
        with pytest.raises(UserError, match="encoding.json: template: expected"):
            read_template(str(tmp_path))
