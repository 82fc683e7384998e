"""1, 2 and 4 ranks give the same run, saved by some and resumed by others; a dead rank is told of.

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

from fgrlhf.data.records import Edit, write_jsonl
from fgrlhf.engine import distributed, shards
from fgrlhf.rollout import sample, sample_on_ranks
from tests import ranks
from tests.processes import ROOT
from tests.small import ids, llama, ppo_folder

ALL = tuple(ranks.runs(Path(), Path()))
NAMES = tuple(name for name in ALL if not name.startswith(ranks.BF16))
WEIGHTS = {"adapted": "policy/adapters.pt"} | dict.fromkeys(
    ("sft", "fine-grained", "rlhf", "bf16-ppo"), "policy/consolidated.00.pth")


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
    ranks.main(folder, folder / "1", "whole")
    return folder / "1-whole"


@pytest.fixture(scope="module")
def two(folder, single) -> Path:
    """All runs on 2 ranks, and those stopped on 1 resumed on 2."""
    shutil.copytree(folder / "1-part", folder / "2-resume1")
    launch(2, folder, folder / "2", "whole,resume1")
    return folder / "2-whole"


@pytest.fixture(scope="module")
def four(folder, two) -> Path:
    """All runs on 4 ranks, and those stopped on 2 resumed on 4."""
    shutil.copytree(folder / "2-part", folder / "4-resume2")
    launch(4, folder, folder / "4", "whole,resume2")
    return folder / "4-whole"


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    found = torch.load(out / name / WEIGHTS.get(name, "reward/consolidated.00.pth"))
    head = out / name / "reward/reward_head.pt"
    return found | (torch.load(head) if head.exists() else {})


def metrics(out: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]


def is_loose(name: str) -> bool:
    """Rounded to bfloat16 on the way: Muon's own iteration, or everything."""
    return name == "rm-sequence" or name.startswith(ranks.BF16)


def same_lines(one: list[dict], other: list[dict], name: str) -> None:
    rel, absolute = (1e-2, 2e-3) if is_loose(name) else (2e-4, 2e-5)
    assert len(one) == len(other)
    for x, y in zip(one, other):
        assert x == pytest.approx(y, rel=rel, abs=absolute)


def same(one: Path, other: Path, name: str) -> None:
    """Equal metrics of every step and final weights, to float32 rounding or bfloat16's."""
    start, a, b = metrics(one, name), weights(one, name), weights(other, name)
    half = 4e-3 if name.startswith(ranks.BF16) else 1e-3    # a last bit of a weight saved as one
    assert len(start) >= 3
    same_lines(start, metrics(other, name), name)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=half if is_loose(name) else 2e-5)


@pytest.mark.parametrize("name", [*NAMES, "bf16-rm"])
def test_two_ranks_train_as_one(name, single, two):
    """Losses, gradient norms, rollout statistics and final weights; part of a batch on each."""
    same(single, two, name)
    assert weights(single, name).keys() and (two / name / "done.json").exists()


def test_two_ranks_in_bf16_start_ppo_as_one(single, two):
    """The first iteration; behind it a last bit of a weight is another, and so is a token drawn.

    The run's own check of the first ratio and of the KL to itself has passed on both ranks.
    """
    same_lines(metrics(single, "bf16-ppo")[:1], metrics(two, "bf16-ppo")[:1], "bf16-ppo")
    assert abs(metrics(two, "bf16-ppo")[0]["rollout/kl_k1"]) < 1e-6
    assert (two / "bf16-ppo" / "done.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_train_as_one(name, single, four):
    """7 rows on 4 ranks: the last has one where the others have two."""
    same(single, four, name)


@pytest.mark.parametrize("name", ALL)
def test_one_process_saved_resumes_on_two_ranks(name, single, folder, two):
    assert not (folder / "1-part" / name / "done.json").exists()
    same(single, folder / "2-resume1", name)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_saved_resume_on_four(name, single, folder, four):
    same(single, folder / "4-resume2", name)


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_saved_resume_on_one(name, single, two, folder):
    """Its states are sharded, and gone with the end of the run."""
    resumed = folder / "1-resume"
    if not resumed.exists():
        shutil.copytree(folder / "2-part", resumed)
    states = list((resumed / name).glob("state-*.pt"))
    assert states and not (resumed / name / "done.json").exists()
    assert all(path.with_suffix(".shards").is_dir() for path in states)
    train, config = ranks.runs(folder, resumed, resume=True)[name]
    train(config)
    same(two if name == "bf16-ppo" else single, resumed, name)      # whose tokens it goes on with
    assert not list((resumed / name).glob("state-*"))


def test_a_rank_that_dies_ends_the_run_with_a_clear_message_and_resumes(folder, single):
    said = launch(2, folder, folder / "dead", "die", status=1)
    assert "rank 0 lost the connection to another rank" in said and "--resume" in said
    assert "Signal 9 (SIGKILL)" in said                         # torchrun names the rank that died
    assert metrics(folder / "dead-die", "fine-grained")[-1]["step"] == ranks.STOP
    train, config = ranks.runs(folder, folder / "dead-die", resume=True)["fine-grained"]
    train(config)
    same(single, folder / "dead-die", "fine-grained")


# ----- one process: every function is the identity ------------------------------------------------

def test_microbatches_and_ranges_cover_every_row_once_on_any_number_of_ranks(monkeypatch):
    """Every rank has as many microbatches; those of weight 0 repeat the first row."""
    for count in (1, 2, 3, 4, 8):
        seen, lengths, covered = [], [], []
        for rank in range(count):
            monkeypatch.setattr(distributed, "size", lambda: count)
            monkeypatch.setattr(distributed, "rank", lambda: rank)
            most = math.ceil(math.ceil(5 / count) / 2)                  # what the ranks agree on
            monkeypatch.setattr(distributed, "largest", lambda number: most)
            parts = list(distributed.microbatches([5, 1, 4, 2, 9], 2))
            seen += [row for rows, weight in parts if weight == 1 for row in rows.tolist()]
            assert all(rows.tolist() == [5] for rows, weight in parts if weight == 0)
            lengths.append(len(parts))
            covered += list(range(*distributed.rank_range(5)))
        assert sorted(seen) == [1, 2, 4, 5, 9] and covered == list(range(5))
        assert set(lengths) == {most}


def test_sums_add_up_with_their_weights_and_refuse_what_is_not_finite():
    sums = distributed.Sums()
    for weight, value in ((1.0, 2.0), (0.0, 7.0), (1.0, 3.0)):
        sums.add(weight, {"loss": torch.tensor(value)})
    assert sums.over_ranks() == {"loss": 5.0}
    with pytest.raises(FloatingPointError, match="loss is nan"):
        sums.add(1.0, {"loss": torch.tensor(math.nan)})


@pytest.mark.parametrize("at_once", [0, 1, 3, 100])
def test_sample_on_ranks_draws_the_same_whatever_is_decoded_at_once(at_once):
    policy, prompts = llama(), [ids(1 + 2 * i % 5, i) for i in range(7)]
    draw = lambda function, *more: function(policy, prompts, 2, 12, 0.9,
                                            torch.Generator().manual_seed(1), *more)
    whole, parts = draw(sample), draw(sample_on_ranks, at_once)
    assert all(torch.equal(a, b) for a, b in zip(whole.sequences, parts.sequences))
    torch.testing.assert_close(whole.logp_old, parts.logp_old, atol=1e-5, rtol=0)
    assert torch.equal(whole.truncated, parts.truncated)


def test_put_back_is_the_inverse_of_take_out():
    state = {"a": [torch.ones(2), {"b": (1, "x", None)}], 3: torch.zeros(())}
    tensors = {}
    named = shards.take_out(state, "s", tensors)
    assert tensors.keys() == {"s/a/0", "s/3"} == shards.names(named)
    assert named["a"][1] == {"b": (1, "x", None)}
    assert shards.put_back(named, tensors) == state
