"""The benchmarks: the matmuls of the floor, the ratios, and that every row runs."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from fgrlhf.bench import __main__ as bench, peers, profiling, shared, work
from fgrlhf.bench.floor import Floor, iteration_floor
from fgrlhf.data.fields import UserError
from fgrlhf.engine.draws import random_ids
from fgrlhf.model import LLaMAConfig, build
from fgrlhf.rollout import sample
from fgrlhf.sequences import pack
from kernels import timing

TINY = LLaMAConfig(dim=8, n_layers=2, n_heads=2, n_kv_heads=2, vocab_size=20, ffn_dim=12)
SMALL = LLaMAConfig(dim=16, n_layers=2, n_heads=2, n_kv_heads=1, vocab_size=50, ffn_dim=24,
                    tie_embeddings=True)
LAYERS = 2 * (4 * 8 * 8 + 3 * 8 * 12)                            # numbers in the layers' matrices


def flops(floor: Floor) -> int:
    """The sum of 2 x rows x inner x columns over all products."""
    return sum(2 * a.numel() * b.shape[-1] for _, a, b, _ in floor.products)


def attention(T: int) -> int:
    """q k^T and P v of one row in two layers: 2 x T x T x D each."""
    return 2 * 2 * 2 * T * T * 8


def test_floor_counts_the_matmuls_of_a_pass_by_hand():
    floor = Floor(build(TINY))
    floor.trunk([3, 5, 3])
    assert flops(floor) == 2 * 11 * LAYERS + 2 * attention(3) + attention(5)
    floor = Floor(build(TINY))
    floor.trunk([3, 5], gradient=True)
    floor.head(6, gradient=True)
    assert flops(floor) == 3 * (2 * 8 * LAYERS + attention(3) + attention(5) + 2 * 6 * 8 * 20)


def test_floor_counts_generation_a_token_at_a_time():
    """Responses of 1 and 3 tokens to prompts of 4: only the second row uses slots 5 and 6."""
    floor = Floor(build(TINY))
    floor.generation(4, [1, 3])
    steps = sum(2 * LAYERS + 2 * 2 * 2 * 8 * slots + 2 * 8 * 20 for slots in (5, 6))
    assert flops(floor) == 2 * 8 * LAYERS + 2 * attention(4) + 2 * 2 * 8 * 20 + steps
    floor()


def test_floor_counts_generation_with_fewer_heads_of_keys():
    """Both heads of queries share one head of keys: one product has two rows."""
    floor = Floor(build(SMALL))
    floor.generation(4, [2])
    assert floor.shapes[(1, 2, 8), (1, 8, 5)] == floor.shapes[(1, 2, 5), (1, 5, 8)] == 2
    floor()


@pytest.mark.parametrize("critic", [False, True])
def test_iteration_floor_counts_each_pass_once(critic):
    sequences = pack([[1, 2], [1, 2]], [[3], [3, 4, 5]])
    rows = [torch.tensor([0, 1])]
    policy = build(TINY)
    sampling = Floor(policy)
    sampling.generation(2, [1, 3])
    less, whole = (2 * n * LAYERS + sum(map(attention, lengths))
                   for n, lengths in ((6, (2, 4)), (8, (3, 5))))
    head = 2 * 4 * 8 * 20
    expected = flops(sampling) + (less + head) + whole + critic * less + 3 * (
        less + head + critic * less)
    assert flops(iteration_floor(policy, sequences, rows, rows, critic)) == expected


def test_in_turn_takes_ratios_within_a_round():
    """A machine that is three times slower in one round changes no ratio."""
    now, order = [0.0], []

    def takes(name, *seconds):
        left = iter(seconds)
        return lambda: (order.append(name), now.__setitem__(0, now[0] + next(left)))

    def fails():
        raise RuntimeError("out of order\nat length")
    runs = {"floor": takes("floor", 9, 1, 3, 1), "ours": takes("ours", 9, 2, 6, 2), "peer": fails}
    rows = timing.in_turn(runs, dict.fromkeys(runs, "floor"), 3, lambda: now[0])
    assert order == ["floor", "ours"] * 4
    assert rows["ours"] == {"seconds": 2, "ratio": 2, "quartiles": [2, 2]}
    assert rows["peer"] == {"failed": "RuntimeError: out of order"}


def test_end_early_gives_eos_the_same_probability_everywhere():
    model = work.model_of(64, "cpu")
    work.end_early(model)
    p = model(torch.tensor(random_ids([50] * 4, work.V))).softmax(-1)[..., work.EOS]
    assert p.mean().item() == pytest.approx(work.END, rel=0.05) and p.std() < 0.1 * p.mean()
    rollout = sample(model, random_ids([2] * 64, work.V), work.EOS, 48, 1.0,
                     torch.Generator().manual_seed(0))
    assert 30 < rollout.sequences.response_lengths.float().mean() < 38


def test_edited_changes_one_token_in_ten():
    original, result = bench.edited(1024)
    found = bench.align(original, result)
    assert found.distance == bench.plain_table(original, result)
    assert 0.07 < found.distance / 1024 < 0.13


@pytest.mark.parametrize("name", work.ROWS)
def test_every_row_runs_its_work_and_its_floor(name):
    row = work.ROWS[name](64, "cpu")      # an iteration runs here once, for the lengths
    row.floor()
    if name in ("training step", "generation"):
        row.run()
    whole = {"training step": 2048, "generation": 6144}.get(name, 64 * (16 + 48))
    assert row.tokens < 0.85 * whole if name.endswith("early") else row.tokens == whole


def test_parts_of_finds_every_part_of_a_training_step():
    parts, faults = profiling.parts_of(work.training_step(64, "cpu"))
    assert parts.keys() == profiling.PARTS.keys() | {
        "views, autograd, other operations", "Python between operations"}
    assert all(parts[part] > 0 for part in profiling.PARTS) and faults >= 0


def test_parts_of_puts_time_where_it_was_spent():
    """A matmul counts as a matmul only, and a sleep as no operation."""
    a = torch.ones(900, 900)
    parts, _ = profiling.parts_of(work.Work(lambda: torch.mm(a, a), None, 0))
    assert {part for part in profiling.PARTS if parts[part] > 0} == {"matmuls"}
    parts, _ = profiling.parts_of(work.Work(lambda: time.sleep(0.05), None, 0))
    assert parts["Python between operations"] >= 50 and not any(parts[p] for p in profiling.PARTS)


def test_main_prints_a_profile(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--width", "64", "--work", "training step",
                                     "--profile"])
    bench.main()
    out = capsys.readouterr().out
    assert "D 64, 6 layers" in out and "training step: " in out and "  matmuls  " in out


def test_main_prints_and_writes_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench", "--width", "64", "--work", "training step",
                                     "--repeats", "1", "--json", str(path)])
    bench.main()
    out, written = capsys.readouterr().out, json.loads(path.read_text())
    row = written["tables"][0]["rows"]["training step"]
    assert row["ratio"] > 0 and row["peak_mib"] > 1 and "training step" in out
    assert written["machine"]["torch"] == torch.__version__
    assert {"256", "1024"} == written["tables"][1]["alignment"].keys()


def test_rows_that_share_a_prompt_compute_the_same_as_whole_rows():
    for name, run in shared.rows_of(SMALL, "cpu").items():
        once, whole = run(), shared.whole(run)()
        if name.endswith("rollout"):
            assert torch.equal(once.sequences.tokens, whole.sequences.tokens)
        elif name.endswith("scoring"):
            torch.testing.assert_close(once, whole, atol=1e-5, rtol=0)


def test_main_prints_the_table_of_shared_prompts(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "--shared-prompts", "--repeats", "1"])
    monkeypatch.setitem(bench.PRESETS, "SmolLM2-135M", SMALL)
    bench.main()
    out = capsys.readouterr().out
    assert "edit, training, whole rows" in out and "alignment" not in out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_of_the_peers_is_run_by_us_and_by_the_floor(dtype, monkeypatch):
    monkeypatch.setitem(peers.PRESETS, "SmolLM2-135M", SMALL)
    assert all(peers.seconds_of(side, name, dtype, time.perf_counter) > 0
               for side in ("ours", "matmuls") for name in peers.WORK)


@pytest.mark.parametrize("side, row", [("unknown", "scoring"), ("ours", "unknown")])
def test_peer_of_an_unknown_side_or_row_is_refused_in_one_line(side, row, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--peer-of", side, row])
    with pytest.raises(UserError, match="--peer-of: expected one of ours, transformers, .*got '"):
        bench.main()


def test_peer_table_takes_ratios_within_a_round(monkeypatch, capsys):
    """All sides are three times slower in the second round, and we take half of the time."""
    took = iter([2, 4, 4, 1, 6, 12, 12, 3] * (len(peers.WORK) + 1))
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: SimpleNamespace(
        returncode=0, stdout=f"a warning\n{next(took)}\n"))
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    options = SimpleNamespace(peers=[], repeats=2, threads=1, clock="cpu", dtype="float32")
    rows = peers.peer_table(options)["peers"]
    assert rows.keys() == set(peers.WORK)
    options.peers = ["scoring"]
    assert peers.peer_table(options)["peers"].keys() == {"scoring"}
    assert rows["scoring"]["ours : transformers"] == [0.5, 0.5, 0.5]
    assert rows["scoring"]["ours : matmuls"] == [2, 2, 2]
    assert rows["scoring"]["ours"] == 4 and "0.5" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["profile", "peers"])
def test_tables_of_a_cpus_time_are_refused_for_another_device(flag):
    options = SimpleNamespace(profile=False, peers=None, device="cuda:0", dtype="float32")
    bench.check_flags(options)
    setattr(options, flag, {"profile": True, "peers": []}[flag])
    with pytest.raises(UserError, match=f"--{flag}: expected --device cpu, got cuda:0; "):
        bench.check_flags(options)
    options.device = "cpu"
    bench.check_flags(options)


def test_dtype_is_refused_where_no_table_has_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--dtype", "bfloat16"])
    with pytest.raises(UserError, match="--dtype bfloat16: expected --peers; "):
        bench.main()


@pytest.mark.parametrize("flag, value, says", [
    ("--repeats", "0", "at least 1, got 0"), ("--repeats", "-1", "at least 1, got -1"),
    ("--threads", "0", "at least 1, got 0"), ("--threads", "-3", "at least 1, got -3"),
    ("--peak-of", "nope", "one of 'training step', .*got 'nope'")])
def test_a_flag_that_makes_no_sense_is_refused_in_one_line(flag, value, says, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", flag, value])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: argument {flag}: expected .*{says}; see .*\n", err)


def test_peer_table_says_what_is_missing_and_what_failed(monkeypatch):
    options = SimpleNamespace(peers=[], repeats=1, threads=1, clock="cpu", dtype="float32")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--peers: expected an environment with transformers"):
        peers.peer_table(options)
    monkeypatch.setattr(peers, "find_spec", lambda name: name)
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: SimpleNamespace(
        returncode=1, stderr="Traceback\nMemoryError\n"))
    with pytest.raises(UserError, match="ours, training step: MemoryError"):
        peers.peer_table(options)
