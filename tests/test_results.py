"""The cells, curves and speed of results.json, from run folders made by hand."""

import json
import math

import pytest

from fgrlhf.data import records
from fgrlhf.reproduce import __main__ as reproduce
from fgrlhf.reproduce import results
from fgrlhf.reproduce.examples import before_after
from fgrlhf.simulate.world import World

T_1 = 12.706                                    # 97.5% quantile of Student's t, 1 degree of freedom


def write_run(folder, evaluations: dict[int, float], seconds: float, steps: int = 4):
    """Writes a PPO run: `steps` iterations of 10 episodes and `seconds` each.

    evaluations: {step: dev win rate}.
    """
    folder.mkdir(parents=True)
    lines = [{"step": step, "rollout/episodes": 10.0 * step, "rollout/reward": 0.5 * step,
              "rollout/kl_k1": 0.25, "rollout/length": 8.0}
             | ({"eval/win_rate": evaluations[step], "eval/errors": 2.0}
                if step in evaluations else {}) for step in range(1, steps + 1)]
    timing = [{"step": step, "seconds": seconds * step} for step in range(1, steps + 1)]
    for name, written in (("metrics", lines), ("timing", timing)):
        text = "".join(json.dumps(line) + "\n" for line in written)
        (folder / f"{name}.jsonl").write_text(text)


def write_done(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(values))


# ----- figures ------------------------------------------------------------------------------------

def test_cell_gives_mean_t_interval_and_every_seed():
    """The deviation of 0.5 and 0.7 is 0.2 / sqrt(2); divided by sqrt(2) for two seeds it is 0.1."""
    found = results.cell([0.5, 0.7])
    assert found["mean"] == pytest.approx(0.6) and found["per_seed"] == [0.5, 0.7]
    assert found["interval"] == pytest.approx([0.6 - 0.1 * T_1, 0.6 + 0.1 * T_1], abs=1e-4)
    half = 0.1 * 2 ** 0.5 * T_1 * 1.5 ** 0.5                            # t s sqrt(1/2 + 1)
    assert found["one_more"] == pytest.approx([0.6 - half, 0.6 + half], abs=1e-4)


def test_cell_of_one_seed_has_no_interval():
    assert results.cell([0.25]) == {"mean": 0.25, "interval": None, "one_more": None,
                                    "per_seed": [0.25]}


def test_cell_with_a_seed_without_data_has_no_mean_and_is_json():
    found = results.cell([0.5, math.nan])
    assert found == {"mean": None, "interval": None, "one_more": None, "per_seed": [0.5, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_difference_over_seeds_is_students_t_of_the_seeds_means():
    ours, theirs = [[1.0, 0.5], [1.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]
    found = results.difference("ours minus theirs", ours, theirs)
    assert found["label"] == "ours minus theirs" and found["per_seed"] == [0.25, 0.5]
    assert found["mean"] == 0.375
    assert found["interval"] == pytest.approx([0.375 - 0.125 * T_1, 0.375 + 0.125 * T_1], abs=1e-4)


def test_difference_of_one_seed_is_paired_by_prompt():
    """With the same gain on every prompt the interval is empty, even if the prompts differ."""
    found = results.difference("", [[1.0, 0.5, 1.0, 0.5]], [[0.5, 0.0, 0.5, 0.0]])
    assert found["mean"] == 0.5 and found["interval"] == [0.5, 0.5]
    unpaired = results.difference("", [[1.0, 0.5, 1.0, 0.5]], [[0.0, 0.5, 0.0, 0.5]])
    low, high = unpaired["interval"]
    assert unpaired["mean"] == 0.5 and 0 <= low < 0.5 < high <= 1


@pytest.mark.parametrize("win_rate, found", [
    (0.4, (10, 1.0)), (0.5, (20, 2.0)), (0.6, (20, 2.0)), (0.7, (math.inf, math.inf))])
def test_first_reaching_is_the_first_evaluation_that_is_as_good(win_rate, found):
    curve = [(10, 1.0, 0.4, 3.0), (20, 2.0, 0.6, 2.0), (30, 3.0, 0.5, 2.0), (40, 4.0, 0.6, 2.0)]
    assert results.first_reaching(curve, win_rate) == found


# ----- from folders -------------------------------------------------------------------------------

def test_dev_curve_joins_metrics_and_timing_of_each_evaluation(tmp_path):
    write_run(tmp_path / "rlhf", {2: 0.4, 4: 0.6}, seconds=1.5)
    assert results.dev_curve(tmp_path, "rlhf") == [(20, 3.0, 0.4, 2.0), (40, 6.0, 0.6, 2.0)]


def test_speed_compares_by_both_definitions_and_counts_the_reward_models_separately(tmp_path):
    """To the baseline's best: 40 against 20 episodes, 4 against 6 seconds; 30 and 10, 3 and 3."""
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    write_run(folders[0] / "rlhf", {2: 0.5, 4: 0.6}, 1.0)
    write_run(folders[0] / "fine-grained", {1: 0.3, 2: 0.6, 3: 0.9}, 3.0)
    write_run(folders[1] / "rlhf", {1: 0.2, 3: 0.7, 4: 0.7}, 1.0)
    write_run(folders[1] / "fine-grained", {1: 0.8, 2: 0.1}, 3.0)
    for folder in folders:
        write_done(folder / "rm-sequence", seconds=4.0)
        write_done(folder / "rm-token", seconds=8.0)
    episodes, seconds, own, own_seconds, trained = results.speed(folders, "fine-grained",
                                                                 "rm-token")["rows"]
    assert (episodes["label"], episodes["baseline"], episodes["method"]) == (
        "episodes to the best of PPO-RLHF", 35, 15)
    assert episodes["ratio"]["per_seed"] == [2.0, 3.0] and episodes["ratio"]["mean"] == 2.5
    assert (seconds["baseline"], seconds["method"]) == (3.5, 4.5)
    assert seconds["ratio"]["per_seed"] == pytest.approx([2 / 3, 1.0])
    assert (own["label"], own["baseline"], own["method"]) == ("episodes to its own best", 35, 20)
    assert (own_seconds["baseline"], own_seconds["method"]) == (3.5, 6.0)
    assert (trained["baseline"], trained["method"], trained["ratio"]["mean"]) == (4.0, 8.0, 0.5)


def test_speed_reports_a_method_that_does_not_get_there_in_every_run(tmp_path):
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for folder, reached in zip(folders, (0.9, 0.4)):
        write_run(folder / "rlhf", {2: 0.5}, 1.0)
        write_run(folder / "fine-grained", {1: reached}, 1.0)
        write_done(folder / "rm-sequence", seconds=4.0)
        write_done(folder / "rm-token", seconds=8.0)
    found = results.speed(folders, "fine-grained", "rm-token")
    for row in found["rows"][:2]:
        assert row["method"] == "not in every run" and row["ratio"] is None
    json.dumps(found, allow_nan=False)


def test_curves_have_win_rate_reward_and_kl_per_response_of_every_ppo_run(tmp_path):
    """kl_k1 is logged per token; the curve is per response, 0.25 nats times 8 tokens."""
    folder = tmp_path / "seed3"
    write_run(folder / "rlhf", {2: 0.4, 4: 0.6}, 1.5)
    write_run(folder / "imitation", {}, 1.0)
    found = {c["metric"]: c for c in results.curves([folder], ["sft", "rlhf", "imitation"])}
    assert {c["system"] for c in found.values()} == {"rlhf"} and len(found) == 3
    assert all(c["seed"] == 3 for c in found.values())
    win_rate = found["win_rate"]
    assert (win_rate["x_episodes"], win_rate["x_seconds"], win_rate["y"]) == (
        [20, 40], [3.0, 6.0], [0.4, 0.6])
    assert found["reward"]["y"] == [0.5, 1.0, 1.5, 2.0]
    assert found["kl_k1"]["y"] == [2.0] * 4 and found["kl_k1"]["x_episodes"] == [10, 20, 30, 40]


def test_tested_counts_the_errors_the_folders_own_world_finds(tmp_path):
    """Right: 0 errors. Empty: 1, the fact is missing. "No.": 2, missing and extra."""
    world, folder = World(3), tmp_path / "seed3"
    land = world.lands[0]
    prompt, right = f"Name the river of {land}.", f"Its river is {world.facts[land, 'river']}."
    for name, answers in (("rlhf-test", (right, "No.")), ("rlhf-test-greedy", (right, right)),
                          ("sft-reference", ("", ""))):
        (folder / "outputs").mkdir(parents=True, exist_ok=True)
        records.write_outputs(folder / "outputs" / f"{name}.json",
                              [records.Output(prompt, answer, "m") for answer in answers])
    found = results.tested(folder, "rlhf")
    assert found == results.Tested({"sampled": [0, 2], "greedy": [0, 0]}, [1, 1])
    assert found.preferences("sampled") == [1.0, 0.0]
    assert found.preferences("greedy") == [1.0, 1.0]
    assert found.decodings == ["sampled", "greedy"]
    for name in ("t", "t-0.5", "t-0.3"):
        records.write_outputs(folder / "outputs" / f"rlhf-test-{name}.json",
                              [records.Output(prompt, answer, "m") for answer in ("", right)])
    found = results.tested(folder, "rlhf")
    assert found.answers["0.7"] == found.answers["0.3"] == [1, 0]
    assert found.decodings == ["sampled", "greedy", "mean"]
    assert found.preferences("mean") == [(1 + 3 * 0.5 + 1) / 5, (0 + 3 * 1 + 1) / 5]


def test_reading_says_the_difference_its_interval_and_whether_it_may_be_chance():
    rate = lambda mean: {"metrics": {"win_rate": {"mean": mean}, "ceiling": {"mean": 0.934}}}
    systems = {"fine-grained-paper": rate(0.801), "fine-grained": rate(0.904), "rlhf": rate(0.705),
               "imitation": rate(0.916), "dpo-sft": rate(0.9), "sft": rate(0.5)}
    found = {(a, b): (0.0, 0.0, 0.0) for a, b in results.COMPARED}
    found["fine-grained", "rlhf"] = (0.199, 0.168, 0.231)
    found["fine-grained", "imitation"] = (-0.012, -0.025, 0.001)
    comparisons = [{"systems": [a, b], "decoding": decoding, "mean": mean, "interval": [low, high],
                    "per_seed": [mean]} for (a, b), (mean, low, high) in found.items()
                   for decoding in ("sampled", "greedy")]
    told = results.reading(systems, comparisons)
    assert told[1:3] == [
        "Fine-grained PPO, our loss wins 90.4% of the test prompts against a sample of the SFT "
        "policy, PPO-RLHF 70.5%: +19.9 points [+16.8, +23.1] sampled; +19.9 points [+16.8, +23.1] "
        "greedy.",
        "Fine-grained PPO, our loss wins 90.4% of the test prompts against a sample of the SFT "
        "policy, SFT on edits 91.6%: -1.2 points [-2.5, +0.1] sampled, which may be chance; -1.2 "
        "points [-2.5, +0.1] greedy, which may be chance."]
    assert told[0].startswith("Fine-grained PPO, paper's loss wins 80.1%")
    assert "the same sampled; the same greedy." in told[3] and "more than 93.4%" in told[4]
    assert "one seed" in told[-1]
    comparisons[0]["per_seed"] = [0.1] * 8
    assert "over 8 seeds" in results.reading(systems, comparisons)[-1]


def test_worth_interpolates_the_pairs_in_their_logarithm_and_says_where_it_cannot():
    """The method with 100 edits wins .5, between 100 pairs (.4) and 400 pairs (.6): 200 pairs."""
    names = [results.SYSTEMS[name][0] for name in ("rlhf", "fine-grained")]
    row = lambda count, theirs, ours: {"annotations": count, "systems": {
        name: results.cell([mean, mean]) for name, mean in zip(names, (theirs, ours))}}
    exact, beyond = results.worth([row(100, 0.4, 0.5), row(400, 0.6, 0.7)])
    assert exact.endswith("as PPO-RLHF with about 200 pairs, so an edit is worth about 2 pairs.")
    assert beyond.endswith("more than PPO-RLHF with up to 400 pairs (60.0%), so an edit is worth "
                           "more than 1 pairs.")
    below, _ = results.worth([row(100, 0.4, 0.3), row(400, 0.6, 0.7)])
    assert below.endswith("no more than PPO-RLHF with 100 pairs (40.0%).")


def test_wordings_are_counted_in_the_test_answers(tmp_path):
    folder = tmp_path / "seed3"
    for system, text in (("sft", "2 plus 3 is 5 kilos."), ("fine-grained-style",
                                                          "2 plus 3 makes 5 kilos.")):
        records.write_outputs(folder / "outputs" / f"{system}-test.json",
                              [records.Output("Add 2 and 3 in kilos.", text, "m")])
    found = results.editors_wording([folder], ["sft", "fine-grained-style"])
    assert {name: row["metrics"]["editors_wording"]["mean"] for name, row in found.items()} == {
        "sft": 0.0, "fine-grained-style": 1.0}
    assert results.editors_wording([folder], ["sft"]) == {}


def test_before_and_after_are_the_first_prompts_and_those_that_became_worse():
    """Prompts are not chosen by how they turned out, and answers that became worse are counted."""
    world = World(3)
    land = world.lands[0]
    prompt, right = f"Name the river of {land}.", f"Its river is {world.facts[land, 'river']}."
    outputs = lambda *texts: [records.Output(prompt, text, "m") for text in texts]
    first, worse = before_after(world, outputs(right, "", right, "No."),
                                outputs(right, right, "No.", ""), ["SFT", "Ours"], 2)
    errors = lambda group: [(r["before_errors"], r["after_errors"]) for r in group["rows"]]
    assert errors(first) == [(0, 0), (1, 0)] and "first 2 test prompts" in first["caption"]
    assert errors(worse) == [(0, 2)] and "1 of 4 test prompts" in worse["caption"]
    assert len(before_after(world, outputs(""), outputs(right), ["SFT", "Ours"], 2)) == 1


def test_reward_models_have_the_figures_of_the_trained_ones(tmp_path):
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    for folder, accuracy in zip(folders, (0.75, 0.25)):
        write_done(folder / "rm-token", **{"edits/pair_accuracy": accuracy, "seconds": 3.0})
    table = results.reward_models(folders)
    assert list(table) == ["rm-token"] and set(table["rm-token"]["metrics"]) == {
        "edit_accuracy", "seconds"}
    assert table["rm-token"]["metrics"]["edit_accuracy"]["mean"] == 0.5


def test_collect_of_a_sweep_is_the_best_dev_win_rate_of_every_point(tmp_path):
    folders = [tmp_path / "seed5", tmp_path / "seed6"]
    for folder, win_rate in zip(folders, (0.5, 0.75)):
        write_done(folder / "rlhf-0.2-6e-4", best_dev_win_rate=win_rate)
        write_done(folder / "fine-grained-0.5-6e-4", best_dev_win_rate=win_rate + 0.125)
        write_done(folder / "sft")
    found = results.collect("sweep", folders)
    assert found["seeds"] == [5, 6] and found["profile"] == "sweep"
    table = {name: (row["role"], row["metrics"]["best_dev_win_rate"]["mean"])
             for name, row in found["systems"].items()}
    assert table == {"rlhf-0.2-6e-4": ("baseline", 0.625),
                     "fine-grained-0.5-6e-4": ("method", 0.75)}


@pytest.mark.parametrize("files, expected", [
    ({}, None), ({"HEAD": "12ab\n"}, "12ab"),
    ({"HEAD": "ref: refs/heads/main\n", "refs/heads/main": "34cd\n"}, "34cd"),
    ({"HEAD": "ref: refs/heads/main\n",
      "packed-refs": "# pack-refs with: peeled\n56ef refs/heads/other\n78ab refs/heads/main\n"},
     "78ab"),
    ({"HEAD": "ref: refs/heads/new\n"}, None)],
    ids=["no clone", "no branch", "a branch", "a packed branch", "no commit yet"])
def test_commit_is_read_from_the_clone(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / ".git" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".git" / name).write_text(text)
    monkeypatch.setattr(reproduce, "HOME", tmp_path)
    assert reproduce.commit() == expected
