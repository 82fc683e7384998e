"""1, 2 and 4 ranks give the same run; 2 saved, resumed on 1 and 4; a dead rank is told of.

Two launches of torchrun (gloo, this machine) do all training scripts each; the tests compare what
they left with the runs of this very process.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgrlhf import distributed, shards
from fgrlhf.edits import Edit, write_jsonl
from fgrlhf.rollout import sample, sample_shared
from tests import ranks
from tests.processes import ROOT
from tests.small import ids, llama, ppo_folder

NAMES = tuple(ranks.runs(Path(), Path()))
WEIGHTS = {"sft": "policy/consolidated.00.pth", "adapted": "policy/adapters.pt",
           "fine-grained": "policy/consolidated.00.pth", "rlhf": "policy/consolidated.00.pth"}


def launch(count: int, *arguments, status: int = 0) -> str:
    """torchrun of tests.ranks to its end; its stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), "-m", "tests.ranks", *map(str, arguments)], cwd=ROOT, text=True,
        capture_output=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == (status == 0), done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Policy, reward models, prompts; 7 edits of unequal length, so no rank has an even share."""
    path = ppo_folder(tmp_path_factory.mktemp("ranks"))
    write_jsonl(path / "edits.jsonl", [Edit(str(i), "name the" + " river" * (i % 4),
                                            "it is red" + " river" * (i % 3),
                                            "it is the" + " river" * (i % 3)) for i in range(7)])
    return path


@pytest.fixture(scope="module")
def single(folder) -> Path:
    """All runs in this process."""
    ranks.main(folder, folder / "1-whole", "whole")
    return folder / "1-whole"


@pytest.fixture(scope="module")
def two(folder) -> Path:
    """All runs on 2 ranks, whole and stopped after two steps."""
    launch(2, folder, folder / "2", "whole,part")
    return folder / "2-whole"


@pytest.fixture(scope="module")
def four(folder, two) -> Path:
    """All runs on 4 ranks, and those stopped on 2 resumed on 4."""
    shutil.copytree(folder / "2-part", folder / "4-resume")
    launch(4, folder, folder / "4", "whole,resume")
    return folder / "4-whole"


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    found = torch.load(out / name / WEIGHTS.get(name, "reward/consolidated.00.pth"))
    head = out / name / "reward/reward_head.pt"
    return found | (torch.load(head) if head.exists() else {})


def metrics(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path, name: str) -> None:
    """Equal metrics of every step and final weights, to float32 rounding; Muon's to bfloat16's."""
    start, a, b = metrics(one, name), weights(one, name), weights(other, name)
    assert len(start) == len(metrics(other, name)) >= 3
    loose = name == "rm-sequence"                   # Muon: its iteration is made in bfloat16
    for x, y in zip(start, metrics(other, name)):
        assert x == pytest.approx(y, rel=1e-2 if loose else 2e-4, abs=2e-3 if loose else 2e-5)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-3 if loose else 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_train_as_one(name, single, two):
    """Losses, gradient norms, rollout statistics and final weights; part of a batch on each."""
    same(single, two, name)
    assert weights(single, name).keys() and (two / name / "done.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_train_as_one(name, single, four):
    """7 rows on 4 ranks: the last has one where the others have two."""
    same(single, four, name)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_saved_resume_on_four(name, single, folder, four):
    same(single, folder / "4-resume", name)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_saved_resume_on_one(name, single, two, folder):
    """Also once the shards' index is another than the state was written with: refused."""
    resumed = folder / "1-resume"
    if not resumed.exists():
        shutil.copytree(folder / "2-part", resumed)
    states = list((resumed / name).glob("state-*.pt"))
    assert states and not (resumed / name / "done.json").exists()
    assert all(path.with_suffix(".shards").is_dir() for path in states)
    train, config = ranks.runs(folder, resumed, resume=True)[name]
    train(config)
    same(single, resumed, name)
    assert not list((resumed / name).glob("state-*"))           # gone with the end of the run


def test_a_rank_that_dies_ends_the_run_with_a_clear_message_and_resumes(folder, single):
    said = launch(2, folder, folder / "dead", "die", status=1)
    assert "rank 0 lost the connection to another rank" in said and "--resume" in said
    assert "Signal 9 (SIGKILL)" in said                         # torchrun names the rank that died
    assert metrics(folder / "dead-die", "fine-grained")[-1]["step"] == ranks.STOP
    train, config = ranks.runs(folder, folder / "dead-die", resume=True)["fine-grained"]
    train(config)
    same(single, folder / "dead-die", "fine-grained")


# ----- one process: every function is the identity ------------------------------------------------

def test_shares_and_spans_cover_every_row_once_on_any_number_of_ranks(monkeypatch):
    """Every rank has as many groups; those that do not count repeat the first row."""
    for count in (1, 2, 3, 4, 8):
        seen, lengths, covered = [], [], []
        for rank in range(count):
            monkeypatch.setattr(distributed, "size", lambda: count)
            monkeypatch.setattr(distributed, "rank", lambda: rank)
            most = math.ceil(math.ceil(5 / count) / 2)                  # what the ranks agree on
            monkeypatch.setattr(distributed, "largest", lambda number: most)
            groups = list(distributed.shares([5, 1, 4, 2, 9], 2, distributed.in_order))
            seen += [row for rows, counts in groups if counts for row in rows]
            assert all(rows == [5] for rows, counts in groups if not counts)
            lengths.append(len(groups))
            covered += list(range(*distributed.span(5)))
        assert sorted(seen) == [1, 2, 4, 5, 9] and covered == list(range(5))
        assert set(lengths) == {most}


@pytest.mark.parametrize("at_once", [0, 1, 3, 100])
def test_sample_shared_draws_the_same_whatever_is_decoded_at_once(at_once):
    policy, prompts = llama(), [ids(1 + 2 * i % 5, i) for i in range(7)]
    draw = lambda function, *more: function(policy, prompts, 2, 12, 0.9,
                                            torch.Generator().manual_seed(1), *more)
    whole, parts = draw(sample), draw(sample_shared, at_once)
    assert all(torch.equal(a, b) for a, b in zip(whole.sequences, parts.sequences))
    torch.testing.assert_close(whole.logp_old, parts.logp_old, atol=1e-5, rtol=0)
    assert torch.equal(whole.truncated, parts.truncated)


def test_fill_is_the_inverse_of_strip():
    state = {"a": [torch.ones(2), {"b": (1, "x", None)}], 3: torch.zeros(())}
    tensors = {}
    stripped = shards.strip(state, "s", tensors)
    assert tensors.keys() == {"s/a/0", "s/3"} == shards.names(stripped)
    assert stripped["a"][1] == {"b": (1, "x", None)}
    assert shards.fill(stripped, tensors) == state
