"""Linear probes of several seeds: as train_rm.py trains them, read twice, and calibrated."""

import json
import math

import pytest
import torch

import train_rm
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.encode import Encoder, PreferenceIds
from fgrlhf.engine.config import parse
from fgrlhf.evaluate import Judged
from fgrlhf.frozen import FrozenStates
from fgrlhf.real import probes, tables
from fgrlhf.reward import load_reward
from fgrlhf.sequences import locate, pack
from tests.small import ids, llama, ppo_folder

EDITS = [Edit(str(i), f"name {i}", f"it is {word} now.", f"it is {word}.")
         for i, word in enumerate(("red", "a river", "the", "name", "in it", "is", "a", "river"))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = ppo_folder(tmp_path_factory.mktemp("probes"))
    write_jsonl(root / "edits.jsonl", EDITS)
    return root


@pytest.fixture(scope="module")
def encoded(root):
    encoder = Encoder(load_tokenizer(root / "policy"), 48, "plain")
    return [encoder.preference(edit) for edit in EDITS]


@pytest.mark.parametrize("loss, flags", [
    ("paper", ("--loss", "paper")), ("ours", ("--epochs", "20")),
    ("kept", ("--u0", "kept", "--u0-weight", "1", "--epochs", "20"))])
def test_a_probe_is_that_of_train_rm(loss, flags, root, encoded, tmp_path):
    states = FrozenStates(load_model(root / "policy"), 1)
    states.add(encoded)
    found = probes.train_probe(states, encoded, loss, seed=3)
    train_rm.train(parse(train_rm.Config, "", [
        "--data", f"{root}/edits.jsonl", "--model", f"{root}/policy", "--out", str(tmp_path / "rm"),
        "--freeze", "--layer", "1", "--seed", "3", *flags]))
    expected = load_reward(tmp_path / "rm/reward")
    assert found.response == expected.response
    assert torch.equal(found.head.weight, expected.head.weight)
    assert torch.equal(found.head.bias, expected.head.bias)


def test_the_second_of_two_copies_has_seen_what_follows():
    trunk, prompt, first, other, between, eos = llama(), ids(3), ids(5, 1), ids(5, 2), [7, 8], 2
    other[0] = first[0]                                     # they differ behind their first token
    pair = PreferenceIds(prompt, [*first, eos], [*other, eos], [], [], [])
    twice = probes.TwiceRead(trunk, 1, between, eos)
    twice.add([pair])
    both = pack([prompt] * 2, [pair.chosen, pair.rejected])
    found = twice(both, locate(both))                       # [12, 16]
    whole = torch.tensor([prompt + first + between + pair.chosen])
    torch.testing.assert_close(found[:6], trunk.hidden(whole, layers=1)[0, -6:])
    assert (found[0] - found[6]).abs().max() > 1e-3
    once = FrozenStates(trunk, 1)
    torch.testing.assert_close(*once(both, locate(both))[[0, 6]])
    unread = pack([prompt], [other])
    with pytest.raises(ValueError, match="expected responses that `add` has read"):
        twice(unread, locate(unread))


def test_a_file_of_responses_read_twice_is_not_taken_for_the_other(tmp_path):
    trunk, pair = llama(), PreferenceIds(ids(3), [5, 2], [6, 2], [], [], [])
    twice = probes.TwiceRead(trunk, 1, [7], 2)
    twice.add([pair])
    twice.write(tmp_path / "states.pt")
    with pytest.raises(UserError, match="expected hidden states of this model"):
        FrozenStates(trunk, 1).read(tmp_path / "states.pt")


def test_responses_without_ends_need_no_pass(root, encoded):
    cut = Encoder(load_tokenizer(root / "policy"), 48, "plain", hide="ends")
    blind = [cut.preference(edit) for edit in EDITS]
    trunk = load_model(root / "policy")
    expected, states = FrozenStates(trunk, 1), FrozenStates(trunk, 1)
    expected.add(blind), states.add(encoded)
    trunk.hidden = None
    probes.without_ends(states, blind)
    for key, piece in expected.kept.items():
        torch.testing.assert_close(states.kept[key], piece)


def test_reliability_by_hand():
    """Sure by 0.6, 0.6 and 0.9; the edit is preferred in the first and the last pair."""
    logit = lambda p: math.log(p / (1 - p))
    error, table = probes.reliability([logit(0.6), -logit(0.6), logit(0.9)], bins=2)
    assert error == pytest.approx(2 / 3 * 0.1 + 1 / 3 * 0.1)
    assert [row["pairs"] for row in table] == [2, 1]
    assert [row["P"] for row in table] == pytest.approx([0.6, 0.9])
    assert [row["right"] for row in table] == [0.5, 1.0]
    assert probes.reliability([0.0, 800.0]) == (pytest.approx(0), [
        {"pairs": 1, "P": 0.5, "right": 0.5}, {"pairs": 1, "P": 1.0, "right": 1.0}])


@pytest.mark.parametrize("response, expected", [("sum", (0.5, 1.0)), ("mean", (1.0, 0.5))])
def test_pairs_by_the_mean_and_by_the_sum(response, expected):
    """Means 2 against 1 and sums 4 against 3; means 1 against 2 and sums 3 against 2."""
    R = {"sum": [(4.0, 3.0), (3.0, 2.0)], "mean": [(2.0, 1.0), (1.0, 2.0)]}[response]
    judged = [Judged("a", *R[0], 0.1, lengths=(2, 3), response=response),
              Judged("b", *R[1], 0.1, lengths=(3, 1), response=response)]
    found = probes.figures_of(judged)
    assert (found["pairs_mean"], found["pairs_sum"]) == (0.5, 1.0)
    assert (found["equal_mean"], found["equal_sum"]) == (1.0, 1.0)
    assert found["auc_within"] is None


def test_probes_of_two_seeds_and_their_tables(root, tmp_path):
    flags = ["--data", f"{root}/edits.jsonl", "--model", f"{root}/policy", "--layer", "1",
             "--seeds", "2", "--device", "cpu", "--out", f"{tmp_path}/probes.json"]
    probes.probe(parse(probes.Config, "", [*flags, "--eval-edits", f"{root}/edits.jsonl",
                                           "--hidden-states", f"{tmp_path}/states.pt"]))
    found = json.loads((tmp_path / "probes.json").read_text())
    assert set(found) == {"paper", "ours"} and len(found["ours"]["auc_within"]) == 2
    assert sum(row["pairs"] for row in found["paper"]["reliability"]) == 2 * len(EDITS)
    for one in found.values():
        one.update(detects_lowest=[0.5, 0.7], detects_mean=[None, 0.5])
    (tmp_path / "probes.json").write_text(json.dumps(found))
    rows, bins = (table["rows"] for table in tables.probe_tables(tmp_path))
    assert rows[8][1:] == ["0.600 [-0.671, 1.871]"] * 2 and rows[9][1:] == ["-", "-"]
    assert all(len(row) == 4 for row in bins)
    line, curve, _ = tables.reliability_curves(tmp_path)
    assert curve["y"] == pytest.approx([1 - y for y in curve["y"][::-1]])
    probes.probe(parse(probes.Config, "", [*flags, "--folds", "4", "--twice", "--losses", "kept"]))
    assert set(json.loads((tmp_path / "probes.json").read_text())) == {"kept"}


@pytest.mark.parametrize("flags, expected", [
    ((), "--eval-edits and --folds: expected one of them"),
    (("--folds", "1"), "--eval-edits and --folds: expected one of them"),
    (("--folds", "3", "--published", "x"), "--published only with --eval-edits"),
    (("--folds", "3", "--losses", "ours,ous"), "--losses: expected some of paper, .* got ous")])
def test_flags_that_do_not_go_together(flags, expected):
    with pytest.raises(UserError, match=expected):
        probes.check_flags(parse(probes.Config, "", ["--data", "x", "--model", "x", "--out", "x",
                                                     *flags]))
