"""The training loop: what reaches the update is what the equations say, and prompts go round."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_prompts
from fgrlhf.data.records import Prompt, write_jsonl
from fgrlhf.engine import players
from fgrlhf.reward import load_reward
from fgrlhf.sequences import pack, score
from kernels import linear_logp, linear_ppo
from tests.small import ppo_folder, slow_logp


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ppo_folder(tmp_path_factory.mktemp("ppo"))


def config(folder, **changes) -> train_ppo.Config:
    fields = dict(method="fine-grained", policy=str(folder / "policy"),
                  reward=str(folder / "token"), prompts=str(folder / "prompts.jsonl"), out="",
                  iterations=2, rollouts=6, max_new_tokens=6, microbatch=2, temperature=0.9,
                  lr=1e-2, warmup=0)
    return train_ppo.Config(**fields | changes)


def updates(monkeypatch, config) -> list[train_ppo.Batch]:
    """Runs the loop and returns the batch of each update; the updates still happen."""
    seen, update = [], train_ppo.update

    def watched(config, players, batch, iteration):
        seen.append(batch)
        return update(config, players, batch, iteration)
    monkeypatch.setattr(train_ppo, "update", watched)
    train_ppo.train(config)
    return seen


def penalised(folder, kind: str, batch, beta: float) -> list[list[float]]:
    """r_t - beta (logp_old - logp_ref), row by row, the reference scored one token at a time."""
    ref, model = load_model(folder / "policy"), load_reward(folder / kind)
    rewards = model.ppo_rewards(batch.sequences)
    result = []
    for row, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:]))):
        tokens = batch.sequences.tokens[row].tolist()
        logp_ref = slow_logp(ref, tokens[:p], tokens[p:p + n], 0.9)
        kl = [batch.logp_old[row, t].item() - logp_ref[t] for t in range(n)]
        result.append([rewards[row, t].item() - beta * kl[t] for t in range(n)])
    return result


def test_train_hands_the_update_rewards_less_kl_over_their_rms(folder, tmp_path, monkeypatch):
    """Equations (5) and (6), also once the policy has left the reference."""
    seen = updates(monkeypatch, config(folder, out=str(tmp_path / "a"), beta=0.7))
    for batch in seen:
        expected = penalised(folder, "token", batch, 0.7)
        flat = [x for row in expected for x in row]
        rms = (sum(x * x for x in flat) / len(flat)) ** 0.5
        for row, numbers in enumerate(expected):
            assert batch.advantages[row, :len(numbers)].tolist() == pytest.approx(
                [x / rms for x in numbers], abs=1e-4)
        assert batch.values is None and batch.returns is None
    assert len(seen) == 2
    logp_ref = score(load_model(folder / "policy"), seen[1].sequences, 0.9)
    assert (seen[1].logp_old - logp_ref).abs().max() > 0.01                  # it has left it


def test_without_reward_for_eos_its_advantage_is_its_kl_alone(folder, tmp_path, monkeypatch):
    """Equation (5) with r = 0 at EOS; every other token keeps its reward."""
    eos = load_tokenizer(folder / "policy").eos_id
    found = 0
    for batch in updates(monkeypatch, config(folder, out=str(tmp_path / "a"), reward_eos=False,
                                             standardise="none", beta=0.0, rollouts=12)):
        rewards = load_reward(folder / "token").ppo_rewards(batch.sequences)
        for row, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:]))):
            for t, token in enumerate(batch.sequences.tokens[row, p:p + n].tolist()):
                expected = 0.0 if token == eos else rewards[row, t].item()
                assert batch.advantages[row, t].item() == pytest.approx(expected, abs=1e-5)
                found += token == eos
    assert found


@pytest.mark.parametrize("method, kind", [("rlhf", "sequence"), ("fine-grained", "token")])
def test_a_response_without_eos_loses_the_penalty_at_its_last_token(folder, tmp_path, monkeypatch,
                                                                    method, kind):
    reward, found = str(folder / kind), set()
    for batch in updates(monkeypatch, config(folder, out=str(tmp_path / "a"), method=method,
                                             reward=reward, missing_eos_penalty=3.0, rollouts=12)):
        rewards = load_reward(reward).ppo_rewards(batch.sequences)
        eos = load_tokenizer(folder / "policy").eos_id
        for row, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:]))):
            truncated = batch.sequences.tokens[row, p + n - 1].item() != eos
            expected = rewards[row, :n].tolist()
            expected[-1] -= 3.0 * truncated
            assert batch.rewards[row, :n].tolist() == pytest.approx(expected, abs=1e-5)
            found.add(truncated)
    assert found == {True, False}


# ----- masked responses ---------------------------------------------------------------------------

def ended(folder, batch) -> list[bool]:
    """Whether each response ends with EOS."""
    eos = load_tokenizer(folder / "policy").eos_id
    return [batch.sequences.tokens[row, p + n - 1].item() == eos
            for row, (p, n) in enumerate(zip(*(part.tolist() for part in batch.sequences[1:])))]


@pytest.mark.parametrize("method, kind", [("rlhf", "sequence"), ("fine-grained", "token")])
def test_masked_responses_are_in_no_mean_and_in_no_loss(folder, tmp_path, monkeypatch, method,
                                                        kind):
    """With learning rate 0 the ratio is 1, so (7) is -mean A, and L_V is mean (G - V)^2 / 2."""
    settings = config(folder, out=str(tmp_path / "a"), method=method, reward=str(folder / kind),
                      mask_truncated=True, rollouts=12, max_new_tokens=24, epochs=1,
                      minibatches=1, lr=0.0, beta=0.7,
                      **{"value_lr": 0.0, "gae_lambda": 0.8} if method == "rlhf" else {})
    seen = updates(monkeypatch, settings)
    lines = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").open()]
    for batch, line in zip(seen, lines, strict=True):
        kept = [row for row, ends in enumerate(ended(folder, batch)) if ends]
        lengths = batch.sequences.response_lengths.tolist()
        assert batch.updated_rows() == kept and 0 < len(kept) < 12
        assert line["ppo/masked"] == 12 - len(kept)
        assert line["rollout/truncated"] == pytest.approx((12 - len(kept)) / 12)
        rows = penalised(folder, kind, batch, 0.7)
        if method == "rlhf":
            errors = [batch.returns[row, t] - batch.values[row, t]          # lambda returns
                      for row in kept for t in range(lengths[row])]
            expected = sum(e * e for e in errors) / len(errors) / 2
            assert line["ppo/value_loss"] == pytest.approx(expected.item(), rel=1e-4)
            flat = [batch.advantages[row, t].item() for row in kept for t in range(lengths[row])]
            assert sum(flat) / len(flat) == pytest.approx(0, abs=1e-5)
            assert sum(a * a for a in flat) / len(flat) == pytest.approx(1, abs=1e-3)
        else:
            flat = [value for row in kept for value in rows[row]]
            rms = (sum(x * x for x in flat) / len(flat)) ** 0.5
            assert line["ppo/loss"] == pytest.approx(-sum(flat) / len(flat) / rms, abs=1e-4)


def test_masked_responses_change_the_policy_as_if_they_had_not_been_sampled(folder, tmp_path,
                                                                            monkeypatch):
    settings = config(folder, mask_truncated=True, rollouts=12, max_new_tokens=24,
                      out=str(tmp_path / "a"), iterations=1)
    batch, policies = updates(monkeypatch, settings)[0], []
    for part in (batch, batch.rows(torch.tensor(batch.updated_rows()))):
        found = players.prepare(settings, players.load(settings, torch.device("cpu")))
        metrics = train_ppo.update(settings, found, part, 1)
        assert metrics.pop("ppo/masked") == len(part.mask) - len(batch.updated_rows())
        policies.append((found.policy.state_dict(), metrics))
    assert policies[0][1] == policies[1][1]
    assert all(torch.equal(x, policies[1][0][name]) for name, x in policies[0][0].items())


def test_an_iteration_whose_responses_are_all_masked_leaves_the_policy_as_it_is(folder, tmp_path):
    train_ppo.train(config(folder, mask_truncated=True, out=str(tmp_path / "a"), iterations=1,
                           max_new_tokens=1, skip_checks=True))
    line = json.loads((tmp_path / "a/metrics.jsonl").read_text())
    assert line["ppo/masked"] == 6 and "ppo/loss" not in line
    before = load_model(folder / "policy").state_dict()
    after = load_model(tmp_path / "a/policy").state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_a_row_repeated_with_weight_0_is_not_checked_for_its_ratio(folder, tmp_path, monkeypatch):
    """In bfloat16 its logp_old was scored in a group of another shape, so its ratio is not 1."""
    checked, groups = [], train_ppo.microbatches

    def with_a_repeated_row(rows, *rest):
        yield from groups(rows, *rest)
        yield torch.tensor(rows[:1]), 0.0
    monkeypatch.setattr(train_ppo, "microbatches", with_a_repeated_row)
    monkeypatch.setattr(train_ppo, "check_first_ratio",
                        lambda logp, logp_old, **more: more or checked.append(len(logp)))
    seen = updates(monkeypatch, config(folder, out=str(tmp_path / "a"), iterations=1))
    rows = train_ppo.minibatches(config(folder), 1, 0, seen[0].updated_rows())[0]
    assert sum(checked) == seen[0].mask[rows].sum()


def test_in_bfloat16_masked_responses_are_scored_apart_from_those_of_an_update(folder):
    """The groups of the first epoch's updates, then the rest, each row once."""
    settings = config(folder, dtype="bfloat16", rollouts=5, minibatches=2, microbatch=0)
    sequences = pack([[5]] * 5, [[6, 7]] * 5)
    learns = torch.tensor([[True, True]] * 5) & torch.tensor([1, 0, 1, 0, 1]).bool()[:, None]
    groups = [rows.tolist() for rows in train_ppo.scored_together(settings, sequences, 1, learns)]
    assert groups[:-1] == train_ppo.minibatches(settings, 1, 0, [0, 2, 4])
    assert sorted(sum(groups[:-1], [])) == [0, 2, 4] and groups[-1] == [1, 3]


def test_samples_are_kept_by_step_with_prompt_text_and_kl(folder, tmp_path, monkeypatch):
    seen = updates(monkeypatch, config(folder, out=str(tmp_path / "a"), save_samples=True))
    lines = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(folder / "policy")
    assert [line["step"] for line in lines] == [1, 2]
    for line, batch in zip(lines, seen):
        assert len(line["responses"]) == 6
        for b, sample in enumerate(line["responses"]):
            p, n = (int(part[b]) for part in batch.sequences[1:])
            ids = batch.sequences.tokens[b, p:p + n].tolist()
            assert sample["tokens"] == n and sample["output"] == tokenizer.decode(ids).strip()
            assert sample["reward"] == pytest.approx(batch.rewards[b, :n].sum().item(), abs=1e-3)
            kl = (batch.logp_old[b, :n] - batch.logp_ref[b, :n]).sum().item()
            assert sample["kl"] == pytest.approx(kl, abs=1e-3)
    firsts = [sample["prompt"] for sample in lines[0]["responses"]]
    assert firsts == train_ppo.prompts_of(config(folder), 5, 1)


def test_samples_name_the_record_of_their_prompt_when_records_are_left_out(folder, tmp_path):
    records = [Prompt("long", "word " * 200), *read_prompts(folder / "prompts.jsonl")]
    write_jsonl(tmp_path / "prompts.jsonl", records)
    train_ppo.train(config(folder, out=str(tmp_path / "a"), save_samples=True,
                           prompts=str(tmp_path / "prompts.jsonl"), on_bad_record="skip"))
    lines = [json.loads(line) for line in (tmp_path / "a/samples.jsonl").read_text().splitlines()]
    for sample in sum((line["responses"] for line in lines), []):
        assert sample["id"] == records[sample["prompt"] + 1].id


def test_rloo_samples_each_prompt_as_often_as_asked_and_compares(folder, tmp_path, monkeypatch):
    """Three responses to each of two prompts; their advantages sum to 0, equal along a response."""
    seen = updates(monkeypatch, config(folder, out=str(tmp_path / "a"), method="rloo", group=3,
                                       reward=str(folder / "sequence"), standardise="none"))
    for batch in seen:
        sequences, advantages = batch.sequences, batch.advantages
        for first in (0, 3):
            prompts = {tuple(sequences.tokens[b, :sequences.prompt_lengths[b]].tolist())
                       for b in range(first, first + 3)}
            assert len(prompts) == 1
            assert advantages[first:first + 3, 0].sum().item() == pytest.approx(0, abs=1e-5)
        for b, n in enumerate(sequences.response_lengths.tolist()):
            R = sum(penalised(folder, "sequence", batch, 0.5)[b])
            others = [sum(penalised(folder, "sequence", batch, 0.5)[k])
                      for k in range(b // 3 * 3, b // 3 * 3 + 3) if k != b]
            assert advantages[b, :n].tolist() == pytest.approx([R - sum(others) / 2] * n, abs=1e-4)
    assert batch.values is None


def test_train_hands_the_update_gae_of_the_terminal_reward(folder, tmp_path, monkeypatch):
    """The baseline: returns are A + V by the double sum, advantages have mean 0 and deviation 1."""
    settings = dict(method="rlhf", reward=str(folder / "sequence"), beta=0.3, gamma=1.0,
                    gae_lambda=0.8)
    for batch in updates(monkeypatch, config(folder, out=str(tmp_path / "a"), **settings)):
        rows = penalised(folder, "sequence", batch, 0.3)
        for row, r in enumerate(rows):
            v = batch.values[row, :len(r)].tolist() + [0.0]
            delta = [r[t] + v[t + 1] - v[t] for t in range(len(r))]
            expected = [sum(0.8 ** (k - t) * delta[k] for k in range(t, len(r))) + v[t]
                        for t in range(len(r))]
            assert batch.returns[row, :len(r)].tolist() == pytest.approx(expected, abs=1e-4)
        real = batch.advantages[batch.mask]
        assert real.mean().abs() < 1e-5 and real.std(correction=0) == pytest.approx(1, abs=1e-3)


def test_train_lets_learning_rates_fall_to_0_with_lr_decay(folder, tmp_path, monkeypatch):
    """12 steps, 4 an iteration: the last of each works at 9/12, 5/12 and 1/12 of the rate."""
    rates, update = [], train_ppo.update

    def watched(config, players, batch, iteration):
        result = update(config, players, batch, iteration)
        rates.append([players.optimizers[name].parts[0].param_groups[0]["lr"]
                      for name in ("policy", "critic")])
        return result
    monkeypatch.setattr(train_ppo, "update", watched)
    settings = dict(method="rlhf", reward=str(folder / "sequence"), iterations=3, lr=0.012,
                    value_lr=0.024)
    train_ppo.train(config(folder, out=str(tmp_path / "falls"), lr_decay=True, **settings))
    train_ppo.train(config(folder, out=str(tmp_path / "stays"), **settings))
    expected = [[0.009, 0.018], [0.005, 0.010], [0.001, 0.002]] + [[0.012, 0.024]] * 3
    assert sum(rates, []) == pytest.approx(sum(expected, []))


def test_a_finished_run_that_kept_its_last_state_goes_on_as_if_never_finished(folder, tmp_path):
    """With a critic; 2 + 3 iterations give the metrics and the policy of 5, bit by bit."""
    fields = dict(method="rlhf", reward=str(folder / "sequence"), skip_checks=True)
    a = dict(fields, out=str(tmp_path / "a"), keep_last=True)
    train_ppo.train(config(folder, **a))
    assert [path.name for path in (tmp_path / "a").glob("state-*")] == ["state-000002.pt"]
    for again in (a, a | {"keep_last": False}):                     # the state stays
        with pytest.raises(SystemExit, match="0"):
            train_ppo.train(config(folder, **again, resume=True))
    for refused in ({"iterations": 1}, {"iterations": 5, "lr": 0.1}, {"iterations": 5, "resume": 0},
                    {"iterations": 5, "lr_decay": True}):
        with pytest.raises(UserError, match="holds a finished run( with another --|; )"):
            train_ppo.train(config(folder, **{**a, "resume": True, **refused}))
    train_ppo.train(config(folder, **a | {"keep_last": False}, resume=True, iterations=5))
    train_ppo.train(config(folder, **fields, out=str(tmp_path / "b"), iterations=5))
    for name in ("metrics.jsonl", "policy/consolidated.00.pth"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    done = json.loads((tmp_path / "a/done.json").read_text())
    assert done["iterations"] == 5 and not list((tmp_path / "a").glob("state-*"))
    with pytest.raises(UserError, match="of 5 iterations, which .* no training state"):
        train_ppo.train(config(folder, **a, resume=True, iterations=6))
    assert (tmp_path / "a/done.json").exists()


@pytest.mark.parametrize("rollouts, parts, sizes", [(6, 2, [3, 3]), (5, 4, [1, 1, 1, 2])])
def test_minibatches_are_as_many_as_asked_for_and_hold_every_row_once(folder, rollouts, parts,
                                                                      sizes):
    settings = config(folder, rollouts=rollouts, minibatches=parts)
    cut = train_ppo.minibatches(settings, 3, 1, list(range(rollouts)))
    assert [len(rows) for rows in cut] == sizes and sorted(sum(cut, [])) == list(range(rollouts))


def test_train_leaves_reference_and_reward_model_as_they_were(folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.rglob("*.pt*")}
    train_ppo.train(config(folder, out=str(tmp_path / "a"), iterations=1))
    assert before == {path: path.read_bytes() for path in folder.rglob("*.pt*")}
    assert load_tokenizer(tmp_path / "a/policy").sha256 == load_tokenizer(folder / "policy").sha256


def test_dev_answers_are_sampled_at_the_temperature_of_training(folder, tmp_path, monkeypatch):
    """The judge is a stub; what counts is what the dev answers are sampled with."""
    seen = []
    judge = SimpleNamespace(prompts=[], compare=lambda outputs: {"eval/win_rate": 0.5})
    monkeypatch.setattr(train_ppo, "dev_judge", lambda *_: judge)
    monkeypatch.setattr(train_ppo, "answers", lambda *arguments, **_: seen.append(arguments[5]))
    train_ppo.train(config(folder, out=str(tmp_path / "a"), temperature=0.7, eval_every=1))
    assert seen == [0.7, 0.7]


def test_prompts_of_takes_every_prompt_once_before_any_twice(folder):
    """5 prompts, 6 episodes an iteration: passes run on across them, each in its own order."""
    rows = [row for i in range(1, 6) for row in train_ppo.prompts_of(config(folder), 5, i)]
    passes = [rows[i:i + 5] for i in range(0, 30, 5)]
    assert all(sorted(p) == list(range(5)) for p in passes) and len({tuple(p) for p in passes}) > 1


@pytest.mark.parametrize("changes, flag", [
    ({"reward_eos": False, "method": "rlhf"}, "--no-reward-eos"),
    ({"minibatches": 7}, "--minibatches"), ({"method": "grpo", "group": 4}, "--group"),
    ({"mask_truncated": True, "missing_eos_penalty": 1.0}, "--mask-truncated and --missing-eos"),
    ({"temperature": 0.0}, "--temperature"), ({"world": 1}, "--dev-prompts"),
    ({"gae_lambda": 7.0}, "--gae-lambda 7.0: expected 0 to 1"), ({"gamma": 1.5}, "--gamma"),
    ({"save_critic": True}, "--save-critic: expected --method rlhf"),
    ({"value_lr": 1e-3}, "--value-lr: expected --method rlhf"),
    ({"group": 2}, "--group: expected --method rloo or grpo"),
    ({"method": "rlhf", "standardise": "none"}, "--standardise: expected --method fine-grained or"),
    ({"method": "grpo", "group": 2, "gamma": 0.5}, "--gamma 0.5: expected --method fine-grained")])
def test_flags_that_contradict_one_another_are_refused(changes, flag, folder, tmp_path):
    with pytest.raises(UserError, match=flag):
        train_ppo.train(config(folder, out=str(tmp_path / "a"), **changes))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method, kind", [("fine-grained", "token"), ("rlhf", "sequence")])
def test_first_three_steps_are_the_same_through_fused_and_reference_kernels(
        method, kind, folder, tmp_path, monkeypatch):
    """In float64: policies agree to 1e-9, every logged number to the digits it is written in."""
    load, read_reward = players.load_to_train, players.load_reward
    monkeypatch.setattr(players, "load_to_train", lambda *a, **k: load(*a, **k).double())
    monkeypatch.setattr(players, "load_reward", lambda *a, **k: read_reward(*a, **k).double())
    logs, policies = [], []
    for form in ("fused", "reference"):
        for kernel in (linear_logp, linear_ppo):
            monkeypatch.setattr(kernel, "fused", getattr(kernel, form))
        out = tmp_path / form
        train_ppo.train(config(folder, out=str(out), method=method, reward=str(folder / kind),
                               iterations=3))
        logs.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        policies.append(load_model(out / "policy", "cpu", torch.float64).state_dict())
    assert len(logs[0]) == len(logs[1]) == 3
    for fused, reference in zip(*logs):
        assert fused == pytest.approx(reference, abs=1e-6)       # metrics are written to 7 digits
    moved = 0.0
    start = load_model(folder / "policy", "cpu", torch.float64).state_dict()
    for name, weight in policies[0].items():
        assert (weight - policies[1][name]).abs().max() < 1e-9
        moved = max(moved, (weight - start[name]).abs().max().item())
    assert moved > 1e-3
