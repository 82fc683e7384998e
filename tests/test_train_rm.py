"""Cross-validation, linear probes, shuffled labels and flags that do not go together."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train_rm
from fgrlhf import frozen
from fgrlhf.checkpoint import load_model
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Pair, write_jsonl
from fgrlhf.encode import PreferenceIds
from fgrlhf.engine.config import parse
from fgrlhf.reward import load_reward
from fgrlhf.sequences import hidden_at
from tests.small import ppo_folder

EDITS = [Edit(str(i), "name the river", f"it is {'red' * (i % 2)} name", "it is the river")
         for i in range(6)]


def test_cross_validate_judges_every_record_once_by_a_model_that_never_saw_it(monkeypatch):
    """Ten records in three folds; the second call a fold is on records trained on ("train_...")."""
    trained, judged = [], []
    monkeypatch.setattr(train_rm, "new_model", lambda config, device, frozen: torch.nn.Identity())
    monkeypatch.setattr(train_rm, "fit", lambda config, model, some, *rest: trained.append(some))
    monkeypatch.setattr(train_rm, "judge_preferences",
                        lambda model, records, examples, tokenizer: judged.append(records) or [])
    monkeypatch.setattr(train_rm, "reward_table", lambda judged: {})
    records = [Edit(str(i), f"name {i}", "red", "blue") for i in range(10)]
    everything = {record.id for record in records}
    config = train_rm.Config(data="", model="", out="", folds=3)
    log = SimpleNamespace(log=lambda *line: None, progress=None, guard=None)
    train_rm.cross_validate(config, records, records, None, log, "cpu")
    held_out, fitted = judged[0::2], judged[1::2]
    assert sorted(sum(held_out, []), key=records.index) == records and len(trained) == 3
    for inside, outside, again in zip(trained, held_out, fitted):
        assert {record.id for record in inside + outside} == everything
        assert len(inside) + len(outside) == 10
        assert all(record in inside for record in again) and len(again) == len(outside)


def test_records_with_the_same_prompt_are_in_the_same_fold():
    records = [Edit(str(i), f"name {i % 5}", "red", "blue") for i in range(20)]
    folds = train_rm.folds_of(records, 3, 0)
    assert sorted(sum(folds, [])) == list(range(20)) and all(folds)
    prompts = [{records[i].prompt for i in fold} for fold in folds]
    assert sum(map(len, prompts)) == 5


# ----- linear probes ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = ppo_folder(tmp_path_factory.mktemp("probe"))
    write_jsonl(root / "edits.jsonl", EDITS)
    return root


def trained(root, out, *more: str):
    """Runs train_rm.py. Returns the head's weights, the reward model and done.json."""
    train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/policy", "--out", str(out),
        "--epochs", "3", "--batch", "4", "--eval-edits", f"{root}/edits.jsonl", *more]))
    model = load_reward(out / "reward")
    return model.head.weight.detach(), model, json.loads((out / "done.json").read_text())


def test_limit_cuts_the_training_data_only_and_the_model_is_no_language_model(root, tmp_path,
                                                                              capsys):
    _, _, done = trained(root, tmp_path / "out", "--limit", "4")
    assert done["records"] == 4 < done["edits/pairs"]
    # the six are two different records, three times each
    assert ("6 of 6 records of --eval-edits are also in --data, so their figures are not of "
            "held-out records\n") in capsys.readouterr().err
    with pytest.raises(UserError, match="expected a language model, got a reward model"):
        load_model(tmp_path / "out/reward")


def test_shared_records_have_the_same_prompt_input_and_texts(capsys):
    pair = Pair("p", "name it", "red", "blue")
    same = Edit("e", "name it", "blue", "red")
    others = [replace(pair, **change) for change in (
        {"prompt": "name"}, {"input": "a river"}, {"chosen": "blue", "rejected": "red"})]
    train_rm.tell_shared([pair], [same, *others], "--eval-pairs")
    assert capsys.readouterr().err.startswith("1 of 4 records of --eval-pairs are also in --data")
    train_rm.tell_shared([pair], others, "--eval-pairs")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_freeze_trains_only_the_head_and_as_without_kept_states(kind, root, tmp_path, monkeypatch):
    flags = ("--freeze", "--layer", "1", "--kind", kind)
    states = ("--hidden-states", f"{tmp_path}/states.pt")
    head, model, done = trained(root, tmp_path / "a", *flags, *states)
    before = load_model(root / "policy").state_dict()
    assert all(torch.equal(x, before[name]) for name, x in model.trunk.state_dict().items())
    assert model.layer == 1 and done["edits/pairs"] == 6
    assert ("edits/edit_auc_within" in done) == (kind == "token")

    monkeypatch.setattr(frozen, "hidden_at", None)                  # all states are in the file
    again, _, _ = trained(root, tmp_path / "b", *flags, *states)
    assert torch.equal(head, again)
    monkeypatch.setattr(frozen.FrozenStates, "add", lambda self, examples: None)
    monkeypatch.setattr(frozen, "hidden_at", hidden_at)
    again, _, _ = trained(root, tmp_path / "c", *flags)             # nothing is kept
    torch.testing.assert_close(head, again, rtol=1e-4, atol=1e-5)
    start, _, _ = trained(root, tmp_path / "d", *flags, "--epochs", "0")
    assert (head - start).abs().max() > 1e-3


def test_layer_leaves_the_blocks_behind_it_as_they_were(root, tmp_path):
    _, model, _ = trained(root, tmp_path / "a", "--layer", "1")
    before = load_model(root / "policy").state_dict()
    same = {name: torch.equal(x, before[name]) for name, x in model.trunk.state_dict().items()}
    assert not same["layers.0.attention.wq.weight"] and not same["tok_embeddings.weight"]
    assert all(value for name, value in same.items() if name.startswith(("layers.1.", "norm")))


def test_head_lr_is_the_rate_of_the_head_and_lr_that_of_the_trunk(root, tmp_path):
    """A rate of 0 keeps the head where the seed put it, and the trunk moves all the same."""
    start, before, _ = trained(root, tmp_path / "a", "--epochs", "0")
    head, model, _ = trained(root, tmp_path / "b", "--muon-lr", "0", "--head-lr", "0")
    other, _, _ = trained(root, tmp_path / "c", "--lr", "0", "--muon-lr", "0", "--head-lr", "1e-3")
    assert torch.equal(head, start) and not torch.equal(other, start)
    assert not torch.equal(model.trunk.norm.weight, before.trunk.norm.weight)


def test_shuffle_labels_swaps_about_half_the_records_and_only_in_training(monkeypatch):
    pairs = [PreferenceIds([1], [5, i + 6], [5, 2], [1], [1], [(0, 0)]) for i in range(100)]
    seen = []
    monkeypatch.setattr(train_rm, "rows_of_step", lambda *sizes: list(range(100)))
    monkeypatch.setattr(train_rm.PreferenceBatch, "of",
                        lambda examples, device: seen.extend(examples) or 1 / 0)
    log = SimpleNamespace(restore=lambda **state: {}, steps=lambda total, name: [1])
    config = train_rm.Config(data="", model="", out="", folds=2, shuffle_labels=0, epochs=1)
    model = SimpleNamespace(trunk=SimpleNamespace(), device="cpu", named_parameters=lambda: [
        ("head", torch.nn.Parameter(torch.ones(2)))])
    with pytest.raises(ZeroDivisionError):
        train_rm.fit(config, model, pairs, log, "shuffled")
    swapped = [p.rejected == pair.chosen for p, pair in zip(seen, pairs)]
    assert 35 <= sum(swapped) <= 65
    assert all(p == (pair.swapped() if s else pair) for p, pair, s in zip(seen, pairs, swapped))


def test_an_interrupted_run_without_training_resumes(root, tmp_path, monkeypatch):
    """The log-likelihood as reward has no steps, so only `open` makes the folder a run's."""
    run = lambda *more: train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/policy", "--likelihood",
        "--eval-edits", f"{root}/edits.jsonl", "--out", str(tmp_path / "out"), *more]))
    def interrupted(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_rm, "judge_preferences", interrupted)
        run()
    assert (tmp_path / "out/reward").exists()
    run("--resume")
    assert (tmp_path / "out/done.json").exists()


@pytest.mark.parametrize("flags, expected", [
    (("--likelihood",), "--epochs: expected without --likelihood, which trains nothing"),
    (("--freeze", "--muon-lr", "1"), "--muon-lr: expected without --freeze, which trains only the"),
    (("--layer", "3"), "--layer 3: expected 1 to 2, the blocks"),
    (("--freeze", "--lora-rank", "2"), "--freeze: expected without --lora-rank"),
    (("--freeze", "--head-lr", "1e-3"), "--head-lr: expected without --freeze"),
    (("--hidden-states", "x.pt"), "--hidden-states: expected with --freeze"),
    (("--logp-feature", "--likelihood"), "--logp-feature and --likelihood: expected one of them"),
    (("--kind", "sequence", "--loss", "tlcr"), "--loss tlcr: expected --kind token"),
    (("--kind", "sequence", "--u0-weight", "1"), "--u0-weight 1.0: expected --kind token"),
    (("--folds", "3"), "--folds: expected without --eval-edits"),
    (("--layer", "1", "--likelihood"), "--layer and --freeze: expected without")])
def test_flags_that_do_not_go_together_are_refused(flags, expected, root, tmp_path):
    with pytest.raises(UserError, match=expected):
        trained(root, tmp_path / "out", *flags)
