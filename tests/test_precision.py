"""--dtype bfloat16: float32 masters, float32 losses, and rule 2 as strict as in float32."""

import copy
import json

import pytest
import torch
from torch import nn

import train_ppo
from fgrlhf.checkpoint import load_model, save_model
from fgrlhf.engine import players
from fgrlhf.engine.optimizer import Muon, Optimizer, orthogonalise
from fgrlhf.ppo import policy_loss
from fgrlhf.reward import RewardModel, load_reward, save_reward
from fgrlhf.rollout import sample
from fgrlhf.sequences import Scorer, score
from fgrlhf.tokenizer import train as train_tokenizer
from tests.small import ids, llama, ppo_folder, ragged

BF16 = torch.bfloat16


def push(model: nn.Module, gradients: list[torch.Tensor]) -> None:
    """One backward pass that gives each parameter the gradient named."""
    sum((p.float() * g).sum() for p, g in zip(model.parameters(), gradients)).backward()


# ----- the optimizer ------------------------------------------------------------------------------

def test_optimizer_steps_a_bf16_weight_by_less_than_its_last_bit():
    """100 steps of 1e-4 from 1, gradient 1: 0.99, though 1 - 1e-4 rounds back to 1 in bf16."""
    model = nn.Linear(1, 1, bias=False).to(BF16)
    model.weight.data.fill_(1.0)
    optimizer = Optimizer(model, lr=1e-4)
    for _ in range(100):
        push(model, [torch.ones(1, 1)])
        optimizer.step()
    assert optimizer.masters[0].item() == pytest.approx(0.99, abs=1e-5)
    assert model.weight.item() == torch.tensor(0.99).to(BF16).item()
    assert model.weight.dtype == BF16 and optimizer.masters[0].dtype == torch.float32


def test_optimizer_adds_microbatch_gradients_in_float32():
    """1 + 255 times 2^-8: in bf16 each addition would be lost, or round."""
    model = nn.Linear(1, 1, bias=False).to(BF16)
    optimizer = Optimizer(model, lr=0.0, clip_norm=1e9)
    push(model, [torch.ones(1, 1)])
    for _ in range(255):
        push(model, [torch.full((1, 1), 2.0 ** -8)])
    assert model.weight.grad is None
    assert optimizer.step() == 1 + 255 * 2.0 ** -8


def test_optimizer_state_keeps_the_masters_bits():
    model, other = llama(dtype=BF16), llama(seed=1, dtype=BF16)
    one, two = Optimizer(model, lr=1e-3), Optimizer(other, lr=1e-3)
    for number, (m, o) in enumerate(((model, one), (model, one), (other, two))):
        score(m, ragged()).sum().backward()
        o.step()
        if number == 1:
            other.load_state_dict(model.state_dict())
            two.load_state_dict(copy.deepcopy(one.state_dict()))
            score(model, ragged()).sum().backward()
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(one.masters, two.masters))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (7, 7)])
def test_orthogonalise_keeps_the_singular_vectors_and_maps_the_values_near_1(shape):
    """Against the singular value decomposition; Jordan's coefficients leave 0.68 to 1.14."""
    u = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    inside = left.T @ orthogonalise(u) @ right.T                    # diagonal: the new values
    assert (inside - torch.diag(inside.diagonal())).abs().max() < 1e-6
    assert 0.6 < inside.diagonal().min() and inside.diagonal().max() < 1.2


def test_muon_steps_as_torchs_own_does_in_bfloat16():
    ours, theirs = (nn.Parameter(torch.ones(16, 24)) for _ in range(2))
    steppers = [(ours, Muon([ours], 1e-2)),
                (theirs, torch.optim.Muon([theirs], 1e-2, weight_decay=0.0,
                                          adjust_lr_fn="match_rms_adamw"))]
    for step in range(5):
        gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        for parameter, optimizer in steppers:
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - 1).norm()
    assert (ours - theirs).norm() < 2e-2 * moved                    # bfloat16 has 8 bits


# ----- models -------------------------------------------------------------------------------------

def test_rewards_and_log_probabilities_of_a_bf16_model_are_float32():
    policy, model = llama(dtype=BF16), RewardModel(llama(seed=1, dtype=BF16), "token")
    assert score(policy, ragged()).dtype == torch.float32
    assert model.head.weight.dtype == torch.float32
    assert model.token_rewards(ragged()).dtype == torch.float32
    assert model.sequence_rewards(ragged()).dtype == torch.float32
    assert policy.hidden(ragged().tokens).dtype == BF16


def test_bf16_log_probabilities_are_those_of_float32_to_bf16_rounding():
    """Logits of size 8 have a last bit of 2^-5 in bf16."""
    policy = llama()
    exact = score(policy, ragged())
    policy.to(BF16)
    assert 0 < (score(policy, ragged()) - exact).abs().max() < 0.25


def test_a_bf16_model_is_saved_in_bf16_and_loads_either_way(tmp_path):
    policy = llama(dtype=BF16)
    save_model(policy, tmp_path / "m")
    assert load_model(tmp_path / "m").head.dtype == BF16
    wide = load_model(tmp_path / "m", dtype=torch.float32)
    assert torch.equal(wide.head, policy.head.float())


# ----- rule 2 -------------------------------------------------------------------------------------

def setup_of(policy, eos: int = 2) -> players.Players:
    torch.manual_seed(0)
    model = RewardModel(llama(seed=1, dtype=policy.head.dtype), "token").requires_grad_(False)

    class Tokenizer:
        eos_id = eos
    prompts = [ids(1 + 2 * i % 5, i) for i in range(24)]
    return players.Players(Tokenizer(), policy, policy, model, None, prompts, {})


@pytest.mark.parametrize("microbatch", [0, 3])
def test_rule_2_holds_in_bf16_to_the_tolerance_of_float32(microbatch):
    """Every update of the first epoch scores its rows in the same groups; KL to itself is 0."""
    policy = llama(dtype=BF16, max_seq_len=40)
    config = train_ppo.Config(method="fine-grained", policy="", reward="", prompts="", out="",
                              rollouts=24, max_new_tokens=12, microbatch=microbatch,
                              dtype="bfloat16")
    _, batch = train_ppo.make_experience(config, setup_of(policy), 1)
    assert (batch.logp_ref - batch.logp_old).abs().max() < 1e-5
    worst = 0.0
    for part in train_ppo.scored_together(config, batch.sequences, 1, batch.mask):
        b = batch.rows(part)
        out = policy_loss(policy, b.sequences, b.logp_old, b.advantages, 0.2, 1.0,
                          int(batch.mask.sum()))
        worst = max(worst, (out.logp - b.logp_old[b.mask]).abs().max())
    assert worst < 1e-5
    drawn = sample(policy, setup_of(policy).prompts, 2, 12,
                   generator=torch.Generator().manual_seed(0))
    one_by_one = Scorer(drawn.sequences, [torch.arange(24)], 1.0).logp(policy)
    assert (drawn.logp_old - one_by_one).abs().max() > 1e-3      # why decoding's are not taken


# ----- the scripts --------------------------------------------------------------------------------

@pytest.mark.parametrize("method, kind", [("fine-grained", "token"), ("rlhf", "sequence")])
def test_train_ppo_runs_in_bf16_with_every_check(method, kind, tmp_path):
    tokenizer = train_tokenizer(["say one two three"] * 20, 280, tmp_path / "t.model")
    save_model(llama(vocab_size=280), tmp_path / "policy", tokenizer=tokenizer)
    torch.manual_seed(0)
    save_reward(RewardModel(llama(1, vocab_size=280), kind), tmp_path / "reward", tokenizer)
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps({"id": str(i), "prompt": "say one" + " two" * i}) + "\n" for i in range(4)))
    train_ppo.train(train_ppo.Config(
        method=method, policy=str(tmp_path / "policy"), reward=str(tmp_path / "reward"),
        prompts=str(tmp_path / "prompts.jsonl"), out=str(tmp_path / "out"), iterations=2,
        rollouts=6, max_new_tokens=6, microbatch=2, dtype="bfloat16"))
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert abs(lines[0]["rollout/kl_k1"]) < 1e-6 and abs(lines[1]["rollout/kl_k3"]) > 0
    saved, start = load_model(tmp_path / "out/policy"), load_model(tmp_path / "policy")
    assert saved.head.dtype == BF16 and (saved.head != start.head.to(BF16)).any()
    assert load_reward(tmp_path / "reward").head.weight.dtype == torch.float32


@pytest.mark.parametrize("options", [
    {"checkpoint_activations": True}, {"offload": True}])
def test_memory_options_change_no_result(options, tmp_path):
    folder = ppo_folder(tmp_path)
    whole = dict(method="rlhf", policy=str(folder / "policy"), reward=str(folder / "sequence"),
                 prompts=str(folder / "prompts.jsonl"), iterations=2, rollouts=6, max_new_tokens=6,
                 microbatch=2, skip_checks=True)
    lines = []
    for name, changes in (("plain", {}), ("option", options)):
        train_ppo.train(train_ppo.Config(**whole | changes, out=str(tmp_path / name)))
        lines.append((tmp_path / name / "metrics.jsonl").read_text().splitlines())
    assert lines[0] == lines[1]
