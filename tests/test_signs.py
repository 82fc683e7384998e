"""Signs of trouble in a PPO run: each is named on its own, and a healthy run is silent."""

import json

import pytest

import train_ppo
from fgrlhf.checks.signs import signs, signs_of_run
from fgrlhf.reproduce.report import page, text_table
from tests.small import ppo_folder

HEALTHY = {"rollout/kl_k1": 0.2, "rollout/reward": 1.0, "ppo/entropy": 0.2,
           "ppo/clip_fraction": 0.02}


def run(win_rates: dict[int, float] | None = None, count: int = 12, **series) -> list[dict]:
    """The lines of a run. series: {name of a metric: {step: value}}; other steps are healthy."""
    lines = [{"step": step} | HEALTHY | {"rollout/reward": 0.1 * step} for step in
             range(1, count + 1)]
    for name, values in ({"eval/win_rate": win_rates or {}} | series).items():
        for step, value in values.items():
            lines[step - 1][name] = value
    return lines


def test_a_healthy_run_is_silent_and_so_is_a_short_one():
    assert signs(run({2: 0.6, 12: 0.8})) == [] and signs(run()) == []
    assert signs(run(count=9, **{"rollout/kl_k1": {9: 5.0}})) == []
    assert signs([{"step": n, "sft/loss": 1.0} for n in range(1, 20)]) == []


@pytest.mark.parametrize("lines, said", [
    (run(**{"rollout/kl_k1": {7: 1.2}}), "1.2 nats per token at iteration 7; raise --beta"),
    (run(**{"ppo/entropy": {12: 0.04}}), "fell from 0.2 to 0.04 nats per token at iteration 12"),
    (run(**{"ppo/clip_fraction": dict.fromkeys(range(5, 9), 0.3)}),
     "over 14% of the tokens were clipped in 4 of 12 iterations"),
    (run({2: 0.6, 4: 0.8, 12: 0.6}),
     "from iteration 4 to 12 the reward rose from 0.4 to 1.2 while the dev win rate fell from 80% "
     "to 60%"),
    (run({2: 0.5, 12: 0.55}), "stayed at or below 55%"),
    (run(**{"rollout/truncated": dict.fromkeys(range(3, 9), 0.9)}),
     "54% of the responses in the last 10 iterations were cut at --max-new-tokens")])
def test_each_sign_is_named_by_itself(lines, said):
    found = signs(lines)
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("lines", [
    run(**{"rollout/kl_k1": {7: 0.8}}), run(**{"ppo/entropy": {12: 0.05}}),
    run(**{"ppo/clip_fraction": dict.fromkeys(range(5, 8), 0.9)}),
    run({4: 0.8, 12: 0.7}), run({2: 0.5, 12: 0.6}),
    run({4: 0.8, 12: 0.6}, **{"rollout/reward": {12: 0.2}}),
    run(**{"rollout/truncated": dict.fromkeys(range(1, 8), 1.0)})],
    ids=["kl", "entropy", "clipped", "win rate", "flat", "reward fell too", "cut"])
def test_a_run_below_a_threshold_is_silent(lines):
    assert signs(lines) == []


def test_iterations_without_an_update_are_left_out():
    """With --mask-truncated the log of an iteration without any EOS has no ppo/ figures."""
    lines = run({2: 0.6, 12: 0.8}, **{"rollout/kl_k1": {7: 1.2}})
    for step in (1, 5):
        lines[step - 1] = {"step": step, "rollout/kl_k1": 0.2, "rollout/reward": 0.1,
                           "ppo/masked": 64}
    [said] = signs(lines)
    assert "1.2 nats per token at iteration 7" in said
    lines[9] = {"step": 10, "rollout/kl_k1": 0.2, "rollout/reward": 0.1, "ppo/masked": 64}
    assert signs(lines) == []                       # nine updates show nothing yet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ppo_folder(tmp_path_factory.mktemp("ppo"))


@pytest.mark.parametrize("lr, beta, named", [(1e-4, 0.5, False), (0.1, 0.0, True)])
def test_train_ppo_names_the_signs_of_a_run_that_is_broken_on_purpose(lr, beta, named, folder,
                                                                      tmp_path, capsys):
    """The same run, with a small learning rate, and with a huge one and nothing that holds it.

    The policy has random weights, so both runs are named for their cut responses.
    """
    train_ppo.train(train_ppo.Config(
        method="fine-grained", policy=str(folder / "policy"), reward=str(folder / "token"),
        prompts=str(folder / "prompts.jsonl"), out=str(tmp_path / "out"), iterations=10,
        rollouts=4, max_new_tokens=5, lr=lr, beta=beta, warmup=0, skip_checks=True))
    told = [line for line in capsys.readouterr().err.splitlines() if "sign of trouble" in line]
    assert told == [f"sign of trouble: {sign}" for sign in signs_of_run(tmp_path / "out")]
    assert "were cut at --max-new-tokens" in told[0] and (len(told) > 1) == named
    if named:
        assert any("far from the SFT policy" in line for line in told)
    assert len((tmp_path / "out/metrics.jsonl").read_text().splitlines()) == 10
    assert json.loads((tmp_path / "out/done.json").read_text())["iterations"] == 10


def test_a_run_that_updated_nothing_is_named_however_short(folder, tmp_path, capsys):
    train_ppo.train(train_ppo.Config(
        method="fine-grained", policy=str(folder / "policy"), reward=str(folder / "token"),
        prompts=str(folder / "prompts.jsonl"), out=str(tmp_path / "out"), iterations=2, rollouts=4,
        max_new_tokens=1, mask_truncated=True, skip_checks=True))
    assert capsys.readouterr().err.endswith(
        "sign of trouble: no response ended within --max-new-tokens 1 in any iteration, so the "
        "policy was not changed; raise it\n")


def test_signs_are_in_the_table_and_on_the_report():
    results = {"signs": ["PPO-RLHF, seed 3: the policy is far from the SFT policy"]}
    assert "Sign of trouble: PPO-RLHF, seed 3: the policy is far" in text_table(results)
    assert "Signs of trouble" in page(results) and "PPO-RLHF, seed 3" in page(results)
    assert "trouble" not in page({"signs": []}) + text_table({"signs": []})
