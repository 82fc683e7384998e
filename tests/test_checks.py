"""The startup checks and the replay of a failed batch, on models of a few hundred weights.

That each check notices the fault it is there for is in test_mutations.py.
"""

import json
import math
import re

import pytest
import torch

import train_ppo
from fgrlhf.checkpoint import load_tokenizer
from fgrlhf.checks import __main__ as checks, replay, rounding, startup
from fgrlhf.checks.rules import Subject
from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora, players
from fgrlhf.engine.states import load_state, save_state
from fgrlhf.ppo import exact_kl_of, rollout_metrics
from fgrlhf.reward import RewardModel, save_reward
from fgrlhf.rollout import sample
from fgrlhf.sequences import score
from tests.small import ids, llama, ppo_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ppo_folder(tmp_path_factory.mktemp("ppo"))


def ppo(folder, **changes) -> train_ppo.Config:
    fields = dict(method="fine-grained", policy=str(folder / "policy"),
                  reward=str(folder / "token"), prompts=str(folder / "prompts.jsonl"), out="",
                  iterations=2, rollouts=6, max_new_tokens=6, microbatch=2, warmup=0)
    return train_ppo.Config(**fields | changes)


def subject(folder, method: str = "fine-grained", dtype: str = "float32", lora_rank: int = 0,
            **changes) -> Subject:
    kind = "token" if method == "fine-grained" else "sequence"
    config = ppo(folder, method=method, reward=str(folder / kind), dtype=dtype,
                 lora_rank=lora_rank)
    s = players.load(config, torch.device("cpu"))
    return Subject(s.policy, s.ref, s.reward_model, s.tokenizer, s.prompts, 12, 0.9, 0.5, 6, 2,
                   s.critic)._replace(**changes)


# ----- the checks ---------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["fine-grained", "rlhf"])
def test_every_check_passes_on_a_sound_run(method, dtype, folder):
    found = dict(startup.run_all(subject(folder, method, dtype)))
    assert list(found) == [*startup.BEFORE_SAMPLING, *startup.SAMPLED, *startup.RULES]
    assert len(found) == 11
    assert all(check.passed for check in found.values()), found
    assert all(re.search(r"\d", check.number) and check.advice for check in found.values())


def test_fewer_and_shorter_responses_are_sampled_of_a_large_model(folder, monkeypatch):
    assert startup.sample_size(llama()) == (8, 64)
    s = subject(folder, max_new_tokens=33)
    monkeypatch.setattr(startup, "LARGE", sum(p.numel() for p in s.policy.parameters()) - 1)
    assert startup.sample_size(s.policy) == (4, 32)
    found = dict(startup.run_all(s))
    counted = re.match(r"(\d+) tokens in 4 responses", found["masks"].number)
    assert int(counted[1]) <= 4 * 32


def test_the_checks_leave_no_gradient_and_no_draw_behind(folder):
    s = subject(folder, "rlhf")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    before = [p.clone() for p in s.policy.parameters()]
    assert all(check.passed for _, check in startup.run_all(s))
    assert torch.equal(torch.rand(2), expected)
    for model in (s.policy, s.ref, s.reward_model, s.critic):
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(before, s.policy.parameters()))


def spoil(s: Subject, how: str) -> Subject:
    """The subject with one thing of the user's wrong."""
    with torch.no_grad():
        if how == "reference":
            s.ref.norm.weight.mul_(1.2)
        elif how == "constant reward":
            s.reward_model.head.weight.zero_()
        elif how == "reward not finite":
            s.reward_model.head.bias.fill_(math.nan)
        elif how == "vocabulary":
            s = s._replace(prompts=[[1, 275]])
        elif how == "context":
            s = s._replace(max_new_tokens=40)
        elif how == "prompt as long as the context":
            s = s._replace(prompts=[[1] * 48])
        elif how == "memory":
            s = s._replace(rollouts=10**12)
    return s


@pytest.mark.parametrize("how, name", [
    ("reference", "ratio 1, KL 0"), ("constant reward", "rewards and values"),
    ("reward not finite", "rewards and values"), ("vocabulary", "tokenizer and vocabulary"),
    ("context", "lengths"), ("prompt as long as the context", "lengths"), ("memory", "memory")])
def test_require_stops_at_what_is_wrong_with_the_users_own_things(how, name, folder, capsys):
    spoiled = spoil(subject(folder), how)
    capsys.readouterr()                                     # what loading said
    with pytest.raises(UserError, match=f"startup check failed: {name}: .*; .*--skip-checks"):
        startup.require(spoiled)
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"FAIL  {name}") and all(x.startswith("pass") for x in err[:-1])


def test_memory_is_that_of_what_is_decoded_at_once(folder):
    s = subject(folder)._replace(rollouts=10**12)
    assert not startup.memory_suffices(s).passed
    assert startup.memory_suffices(s._replace(decode_batch=16)).passed


def test_memory_that_ranks_give_back_counts_as_free(folder, monkeypatch):
    """Whole models are there when the checks run; with two ranks each keeps half of them."""
    s = subject(folder, "rlhf")
    assert startup.freed(s, 1) == 0
    size = sum(p.numel() * p.itemsize for model in (s.policy, s.ref, s.reward_model, s.critic)
               for p in model.parameters())
    assert startup.freed(s, 2) == size // 2


@pytest.mark.parametrize("kind, unit", [("token", "token"), ("sequence", "response")])
def test_a_constant_reward_model_is_called_constant(kind, unit, folder):
    """Calibration divides its rounding errors by a scale of nearly 0; they are still no reward."""
    s = subject(folder, "fine-grained" if kind == "token" else "rlhf")
    with torch.no_grad():
        s.reward_model.head.weight.mul_(1e-9)
        s.reward_model.head.bias.fill_(0.375)
        s.reward_model.calibrate([sample(s.policy, s.prompts, 12, 6).sequences])
    check = dict(startup.run_all(s))["rewards and values"]
    assert not check.passed and check.advice == "train it longer or on other data"
    assert check.number == (f"the reward model is constant: it gives every {unit} the reward 0.375 "
                            "and cannot judge; train it first")


def test_a_dropout_is_noticed(folder):
    """Sampling and scoring both run, each with a mask of its own."""
    s = subject(folder)
    for block in s.policy.layers:
        block.feed_forward.register_forward_hook(
            lambda m, i, out: torch.nn.functional.dropout(out, 0.1))
    failed = [name for name, check in startup.run_all(s) if not check.passed]
    assert "sampling = scoring" in failed and "ratio 1, KL 0" in failed


def test_the_rounding_of_bfloat16_is_measured_and_a_shared_trunk_stays_as_it_is(folder):
    """The root mean square against a float32 pass, computed here over the same responses."""
    s = subject(folder, dtype="bfloat16", lora_rank=2)
    prompts = s.prompts[:3]
    rollout = sample(s.policy, prompts, 2, 12, 0.9, torch.Generator().manual_seed(0))
    measure = lambda free: rounding.measure(s.policy, prompts, rollout, 2, 0.9,
                                            torch.Generator().manual_seed(1), free)
    found, unmeasured = measure(None), measure(1000)
    assert {p.dtype for p in s.policy.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        low = score(s.policy, rollout.sequences, 0.9)
        high = score(lora.merge(s.policy.float()), rollout.sequences, 0.9)
    count = int(rollout.sequences.response_lengths.sum())
    assert found.nats == pytest.approx(((low - high).square().sum() / count).sqrt().item(), 1e-3)
    assert found.nats > 1e-4 and found.exact < 1e-4 and found.tokens == count
    assert found.bound == pytest.approx(3 * (1 + 4 / count ** 0.5) * found.nats)
    assert unmeasured == rounding.Rounding(False) and unmeasured.bound == 0.1
    assert measure(None) == rounding.Rounding(True)         # the policy is in float32 by now


def test_scales_give_the_beta_that_balances(folder):
    """The rewards' standard deviation over 8 responses, by hand from one more pass."""
    s = subject(folder)
    number = dict(startup.run_all(s))["reward and KL scale"].number
    beta = float(re.search(r"beta ([\d.]+) makes", number)[1])
    spread = float(re.search(r"\+- ([\d.]+)", number)[1])
    assert beta == pytest.approx(spread, rel=0.05) and "beta = 0.5" in number


def test_free_bytes_are_those_of_the_machine():
    there = startup.free_bytes(torch.device("cpu"))
    assert there is None or 2**20 < there < 2**50


def test_the_command_prints_every_check(folder, capsys):
    checks.main(checks.Config(policy=str(folder / "policy"), reward=str(folder / "token"),
                              prompts=str(folder / "prompts.jsonl"), max_new_tokens=8))
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 11 and all(line.startswith("pass  ") for line in out)


@pytest.mark.parametrize("flags", [{}, {"policy": "p"}, {"policy": "p", "replay": "f"}])
def test_the_command_refuses_flags_that_do_not_go_together(flags):
    with pytest.raises(UserError, match="expected --policy DIR --reward DIR --prompts FILE, or"):
        checks.main(checks.Config(**flags))


def test_train_ppo_checks_first_and_records_it(folder, tmp_path, capsys):
    train_ppo.train(ppo(folder, out=str(tmp_path / "a"), iterations=1))
    assert capsys.readouterr().err.count("pass  ") == 11
    done = json.loads((tmp_path / "a/done.json").read_text())
    assert done["startup_checks"] == "passed"
    train_ppo.train(ppo(folder, out=str(tmp_path / "b"), iterations=1, skip_checks=True))
    assert "pass  " not in capsys.readouterr().err
    done, config = (json.loads((tmp_path / "b" / f"{n}.json").read_text())
                    for n in ("done", "config"))
    assert done["startup_checks"] == "skipped" and config["skip_checks"] is True
    a, b = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in "ab")
    assert a == b                                              # the checks change nothing


def test_train_ppo_writes_nothing_when_a_check_fails(folder, tmp_path):
    model = RewardModel(llama(seed=1, vocab_size=275, max_seq_len=48), "token")
    torch.nn.init.zeros_(model.head.weight)
    save_reward(model, tmp_path / "constant", load_tokenizer(folder / "policy"))
    with pytest.raises(UserError, match="startup check failed: rewards and values"):
        train_ppo.train(ppo(folder, out=str(tmp_path / "a"), reward=str(tmp_path / "constant")))
    assert not (tmp_path / "a").exists()


# ----- what is logged -----------------------------------------------------------------------------

def rollout_of(policy, count: int = 6):
    prompts = [ids(1 + 2 * i % 5, i) for i in range(count)]
    return sample(policy, prompts, 2, 12, 1.0, torch.Generator().manual_seed(1))


def test_exact_kl_is_the_sum_over_the_vocabulary():
    """By its definition, in float64, token by token of the first three responses."""
    policy, ref = llama(), llama()
    ref.norm.weight.data.mul_(0.9)
    sequences = rollout_of(policy).sequences
    total, count = 0.0, 0
    for row in range(3):
        p, n = int(sequences.prompt_lengths[row]), int(sequences.response_lengths[row])
        tokens = sequences.tokens[row:row + 1, :p + n]
        logp, logp_ref = (m.double()(tokens)[0, p - 1:p + n - 1].log_softmax(-1)
                          for m in (policy, ref))
        total, count = total + (logp.exp() * (logp - logp_ref)).sum().item(), count + n
    found = exact_kl_of(policy.float(), ref.float(), sequences, 1.0, 3, 2)
    assert found == pytest.approx(total / count, rel=1e-4) and found > 0.001
    assert exact_kl_of(policy, policy, sequences, 1.0, 99, 4) == 0


def test_rollout_metrics_count_by_hand():
    rollout = rollout_of(llama())
    mask = rollout.sequences.response_mask
    rewards = torch.where(mask, 2.0, 0.0)
    found = rollout_metrics(rollout, rollout.logp_old - 0.5 * mask, rewards)
    lengths = rollout.sequences.response_lengths.tolist()
    assert found["rollout/reward_per_token"] == 2
    assert found["rollout/length"] == pytest.approx(sum(lengths) / 6)
    assert found["rollout/reward"] == pytest.approx(2 * sum(lengths) / 6)
    assert found["rollout/truncated"] == pytest.approx(sum(rollout.truncated.tolist()) / 6)
    assert found["rollout/eos"] == pytest.approx(1 - found["rollout/truncated"])
    assert found["rollout/kl_k1"] == pytest.approx(0.5)
    assert found["rollout/kl_k3"] == pytest.approx(math.exp(-0.5) - 1 + 0.5)


# ----- numbers that are not finite ----------------------------------------------------------------

def fail(folder, out, monkeypatch, what: str) -> tuple[str, dict, list[str]]:
    """(message, dump, report) of a run in which `what` goes bad in its second iteration."""
    make_experience, update = train_ppo.make_experience, train_ppo.update

    def bad_experience(config, players, iteration):
        rollout, batch = make_experience(config, players, iteration)
        if iteration == 2 and what in ("logp_ref", "rewards", "logp_old"):
            getattr(batch, what)[1, 0] = -math.inf if what == "logp_old" else math.nan
        return rollout, batch

    def bad_update(config, players, batch, iteration):
        if iteration == 2 and what == "weight":
            players.policy.layers[1].attention.wo.weight.data[3, 5] = math.inf
        if iteration == 2 and what == "gradient":
            players.policy.layers[0].ffn_norm.weight.register_hook(lambda g: g * math.nan)
        return update(config, players, batch, iteration)

    monkeypatch.setattr(train_ppo, "make_experience", bad_experience)
    monkeypatch.setattr(train_ppo, "update", bad_update)
    with pytest.raises(FloatingPointError) as stopped:
        train_ppo.train(ppo(folder, out=str(out)))
    path = out / "failed-batch.pt"
    return str(stopped.value), load_state(path), list(replay.report(path))


@pytest.mark.parametrize("what, name, place", [
    ("rewards", "rewards", "at row 1, token 0"), ("logp_ref", "logp_ref", "at row 1, token 0"),
    ("logp_old", "logp_old", "the first -inf at row 1, token 0")])
def test_a_bad_tensor_stops_the_step_and_replay_says_where(what, name, place, folder, tmp_path,
                                                          monkeypatch):
    message, dump, report = fail(folder, tmp_path / "a", monkeypatch, what)
    assert message.startswith(f"step 2: {name}: expected finite numbers, got 1 others")
    assert "--replay" in message and dump["step"] == 2
    line, = [line for line in report if line.startswith(name + " ")]
    assert "NOT FINITE: 1 of" in line and place in line
    assert report[-1].startswith(f"verdict: {name} not finite. Check the model or function that ")
    assert json.loads(dump["config"])["method"] == "fine-grained"
    assert len((tmp_path / "a/metrics.jsonl").read_text().splitlines()) == 1


def test_a_bad_weight_stops_before_the_optimizer_and_replay_names_it(folder, tmp_path, monkeypatch):
    message, _, report = fail(folder, tmp_path / "a", monkeypatch, "weight")
    assert re.match("step 2: (ratio on the first minibatch|ppo/loss is nan)", message)
    assert any(re.match(r"policy: weight layers.1.attention.wo.weight: NOT FINITE: 1 of .* "
                        r"the first inf at \[3, 5\]", line) for line in report)
    assert report[-1].startswith("verdict: policy: weight layers.1.attention.wo.weight")
    assert "not finite. Check the folder that the run started from, or lower --lr" in report[-1]


def test_a_bad_gradient_stops_before_the_optimizer(folder, tmp_path, monkeypatch):
    message, dump, report = fail(folder, tmp_path / "a", monkeypatch, "gradient")
    assert re.match(r"step 2: gradient norm is nan at optimizer step \d+; ", message)
    assert report[-2].endswith("weights, 0 of them not finite")
    assert report[-1].startswith("verdict: all tensors and weights are finite, so the loss or its ")
    assert "Try a lower --lr (it was " in report[-1] and "largest weight" not in report[-1]
    assert all(w.isfinite().all() for w in dump["models"]["policy"]["weights"].values())


def test_replay_names_the_largest_weight_of_a_loss_that_overflowed(tmp_path):
    """Every number in the file is finite, as after train_rm.py --lr 1e12 --muon-lr 1e12."""
    weights = {"small": torch.ones(2), "large": torch.tensor([1.0, -3e12])}
    dump = {"step": 2, "config": json.dumps({"out": "o", "lr": 1e12, "muon_lr": 0.0, "head_lr": 2}),
            "models": {"model": {"sizes": {}, "weights": weights}}, "tokens": torch.tensor([[1]])}
    save_state(tmp_path / "failed-batch.pt", dump)
    last = list(replay.report(tmp_path / "failed-batch.pt"))[-1]
    assert "all tensors and weights are finite" in last
    assert "The largest weight is 3e+12 (model: weight large), and trained weights stay far" in last
    assert last.endswith("Lower --lr (it was 1e+12) and --head-lr (it was 2), and start again")
    save_state(tmp_path / "failed-batch.pt", dump | {"models": {}})
    last = list(replay.report(tmp_path / "failed-batch.pt"))[-1]
    assert "finite (the file of a run on several ranks has no weights), so" in last


def test_replay_refuses_what_is_no_failed_batch(tmp_path):
    for other in ({"step": 1, "parts": {}}, [1, 2]):
        save_state(tmp_path / "state.pt", other)
        with pytest.raises(UserError, match="expected the failed-batch.pt of a stopped run"):
            list(replay.report(tmp_path / "state.pt"))
    with pytest.raises(UserError, match="no such training state"):
        checks.main(checks.Config(replay=str(tmp_path / "absent.pt")))
