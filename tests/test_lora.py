"""Adapters over one frozen trunk: no change at the start, merging, sharing, folders, scripts."""

import json
from dataclasses import replace

import pytest
import torch

import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.checkpoint import load_adapted, load_model, save_model
from fgrlhf.data.fields import UserError
from fgrlhf.engine import lora, players
from fgrlhf.engine.states import TrainableState
from fgrlhf.reward import RewardModel, load_reward, save_reward
from fgrlhf.sequences import score
from fgrlhf.tokenizer import train as train_tokenizer
from tests.small import llama, ragged

RANK = 3


def adapted(seed: int = 0, dtype=torch.float32, spread: float = 0.0) -> lora.LLaMA:
    """A small model with adapters. spread: the standard deviation of B."""
    model = lora.adapt(llama(dtype=dtype), RANK, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora.adapters(model).items():
            if name.endswith("lora_b"):
                p.copy_(torch.randn(p.shape, generator=generator) * spread)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapt_changes_no_bit_at_the_start(dtype):
    assert torch.equal(score(adapted(dtype=dtype), ragged()), score(llama(dtype=dtype), ragged()))


def test_adapt_adds_two_matrices_to_each_of_the_seven_projections():
    found = lora.adapters(adapted())
    assert len(found) == 2 * 2 * 7                               # A and B, 2 layers, 7 projections
    assert found["layers.1.feed_forward.w2.lora_a"].shape == (RANK, 24)
    assert found["layers.1.feed_forward.w2.lora_b"].shape == (16, RANK)


def test_a_rank_beyond_the_width_of_the_model_is_refused_before_it_is_allocated():
    assert lora.adapt(llama(), 16).layers[0].attention.wq.lora_a.shape == (16, 16)
    for rank in (17, 10 ** 12):
        with pytest.raises(UserError, match=f"--lora-rank {rank}: expected at most 16, the width"):
            lora.adapt(llama(), rank)


def test_adapted_forward_is_the_formula_written_in_float64():
    model = adapted(dtype=torch.float64, spread=0.3)
    part = model.layers[0].attention.wk
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    w, a, b = (p.detach() for p in (part.weight, part.lora_a, part.lora_b))
    slow = [[sum(x[n, i] * w[o, i] for i in range(16))
             + 2 * sum(b[o, r] * sum(a[r, i] * x[n, i] for i in range(16))
                       for r in range(RANK)) for o in range(8)] for n in range(5)]
    torch.testing.assert_close(part(x).detach(), torch.tensor(slow, dtype=torch.float64))


def test_merge_gives_the_same_function_as_a_plain_llama():
    model = adapted(dtype=torch.float64, spread=0.3)
    plain = lora.merge(model)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in llama().named_parameters()]
    torch.testing.assert_close(score(plain, ragged()), score(model, ragged()))
    assert (score(plain, ragged()) - score(llama(dtype=torch.float64), ragged())).abs().max() > 0.1
    assert torch.equal(model.layers[0].attention.wq.weight,           # the trunk is left as it was
                       llama(dtype=torch.float64).layers[0].attention.wq.weight)


def test_adapt_and_merge_a_model_of_another_head_width(tmp_path):
    """6 heads of width 20 over a model of width 96: wq is [120, 96] and wo [96, 120]."""
    sizes = dict(dim=96, n_heads=6, n_kv_heads=2, head_width=20)
    model = lora.adapt(llama(dtype=torch.float64, **sizes), RANK)
    wo = model.layers[1].attention.wo
    assert wo.lora_a.shape == (RANK, 120) and wo.lora_b.shape == (96, RANK)
    with torch.no_grad():
        for parameter in lora.adapters(model).values():
            parameter.add_(0.1)
    torch.testing.assert_close(score(lora.merge(model), ragged()), score(model, ragged()))
    save_model(lora.merge(model), tmp_path)
    assert torch.equal(score(load_model(tmp_path), ragged()), score(lora.merge(model), ragged()))


def test_only_adapters_and_the_head_receive_gradients():
    reward = RewardModel(adapted(spread=0.1), "token")
    reward.token_rewards(ragged()).sum().backward()
    with_gradient = {n for n, p in reward.named_parameters() if p.grad is not None}
    assert with_gradient == {"trunk." + n for n in lora.adapters(reward.trunk)} | {
        "head.weight", "head.bias"}
    policy = adapted(spread=0.1)
    score(policy, ragged()).sum().backward()
    assert {n for n, p in policy.named_parameters()
            if p.grad is not None} == lora.adapters(policy).keys()


def test_clone_copies_adapters_and_shares_the_trunk():
    model = adapted(spread=0.1)
    other = lora.clone(model)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(a, b) and (a is b) == (".lora_" not in name), name
    plain = llama()
    assert all(a is not b for a, b in zip(plain.parameters(), lora.clone(plain).parameters()))


def test_train_leaves_a_shared_trunk_frozen():
    reward = RewardModel(adapted(), "token").requires_grad_(False)
    lora.train(reward)
    moving = {n for n, p in reward.named_parameters() if p.requires_grad}
    assert {n for n in moving if n.startswith("trunk.")} == {
        "trunk." + n for n in lora.adapters(reward.trunk)}
    assert "head.weight" in moving
    assert all(p.requires_grad for p in lora.train(llama().requires_grad_(False)).parameters())


def test_trainable_state_is_only_the_adapters_and_the_head():
    reward = RewardModel(adapted(spread=0.1), "token")
    state = TrainableState(reward).state_dict()
    assert {n for n in state if n.startswith("trunk.")} == {
        "trunk." + n for n in lora.adapters(reward.trunk)}
    other = RewardModel(adapted(seed=1), "token")
    TrainableState(other).load_state_dict(state)
    assert torch.equal(other.token_rewards(ragged()), reward.token_rewards(ragged()))
    assert TrainableState(llama()).state_dict().keys() == llama().state_dict().keys()
    with pytest.raises(UserError, match="--lora-rank"):
        TrainableState(llama()).load_state_dict(state)


# ----- folders ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a policy, edits, prompts."""
    path = tmp_path_factory.mktemp("lora")
    tokenizer = train_tokenizer(["say one two three"] * 20, 280, path / "t.model")
    save_model(llama(vocab_size=280), path / "policy", tokenizer=tokenizer)
    write = lambda name, records: (path / name).write_text(
        "".join(json.dumps(r) + "\n" for r in records))
    write("prompts.jsonl", [{"id": str(i), "prompt": "say" + " one" * i} for i in range(1, 5)])
    write("edits.jsonl", [{"id": str(i), "prompt": "say" + " one" * i, "original": "one two three",
                           "edited": "one one three"} for i in range(1, 9)])
    return path


def test_only_adapters_are_saved_and_they_load_over_their_trunk(folder, tmp_path):
    model = load_adapted(folder / "policy", rank=RANK)
    with torch.no_grad():
        for p in lora.adapters(model).values():
            p.add_(0.05)
    save_model(model, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapters.json", "adapters.pt"]
    again = load_adapted(tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    batch = ragged()
    torch.testing.assert_close(score(load_model(tmp_path / "a"), batch), score(model, batch),
                               atol=2e-4, rtol=1e-4)
    assert load_model(tmp_path / "a", "meta").config == model.config


def test_load_adapted_shares_a_trunk_and_refuses_another_rank_or_another_trunk(folder, tmp_path):
    trunks = {}
    one, two = (load_adapted(folder / "policy", rank=2, trunks=trunks) for _ in range(2))
    assert one.tok_embeddings.weight is two.tok_embeddings.weight and len(trunks) == 1
    assert one.layers[0].attention.wq.lora_a is not two.layers[0].attention.wq.lora_a
    save_model(one, tmp_path / "a")
    with pytest.raises(UserError, match="give --lora-rank 2"):
        load_adapted(tmp_path / "a", rank=4)
    save_model(llama(5, vocab_size=280), tmp_path / "other")
    about = json.loads((tmp_path / "a/adapters.json").read_text())
    (tmp_path / "a/adapters.json").write_text(json.dumps(about | {"base": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="expected the weights that these adapters were trained"):
        load_model(tmp_path / "a")
    (tmp_path / "a/adapters.json").write_text("{}")
    with pytest.raises(UserError, match="adapters.json: base: expected str, got None: damaged"):
        load_model(tmp_path / "a")


# ----- the scripts --------------------------------------------------------------------------------

def test_the_scripts_train_adapters_over_one_trunk(folder, tmp_path):
    """SFT with adapters, reward models from them, and both kinds of PPO share one trunk."""
    base, before = folder / "policy", (folder / "policy/consolidated.00.pth").read_bytes()
    sft.train(sft.Config(data=str(folder / "edits.jsonl"), model=str(base), lora_rank=RANK,
                         out=str(tmp_path / "sft"), batch=4, warmup=0))
    for kind in ("token", "sequence"):
        train_rm.train(train_rm.Config(
            data=str(folder / "edits.jsonl"), model=str(tmp_path / "sft/policy"), kind=kind,
            lora_rank=RANK, epochs=2, batch=4, out=str(tmp_path / kind)))
        reward = load_reward(tmp_path / kind / "reward")
        assert not lora.adapters(reward) and reward.scale != 1
    config = train_ppo.Config(
        method="fine-grained", policy=str(tmp_path / "sft/policy"), lora_rank=RANK,
        reward=str(tmp_path / "token/reward"), prompts=str(folder / "prompts.jsonl"),
        out=str(tmp_path / "ppo"), iterations=2, rollouts=4, max_new_tokens=5, save_every=1)
    rlhf = replace(config, method="rlhf", gamma=1.0, reward=str(tmp_path / "sequence/reward"),
                   out=str(tmp_path / "rlhf"))
    setup = players.load(rlhf, torch.device("cpu"))
    models = (setup.policy, setup.ref, setup.reward_model.trunk, setup.critic.trunk)
    assert len({id(m.layers[1].feed_forward.w3.weight) for m in models}) == 1
    assert len({id(m.layers[1].feed_forward.w3.lora_b) for m in models}) == 4
    for one in (config, rlhf):
        train_ppo.train(one)
        policy = load_adapted(tmp_path / one.out / "policy")
        start = load_adapted(tmp_path / "sft/policy")
        for name, p in policy.named_parameters():
            moved = not torch.equal(p, dict(start.named_parameters())[name])
            assert moved == (".lora_" in name), name
    assert (base / "consolidated.00.pth").read_bytes() == before
    with pytest.raises(UserError, match="--lora-rank: expected --model"):
        sft.train(sft.Config(data=str(folder / "edits.jsonl"), init="tiny", lora_rank=RANK,
                             tokenizer=str(folder / "t.model"), out=str(tmp_path / "never")))


def test_a_reward_folder_of_adapters_is_a_reward_model(folder, tmp_path):
    torch.manual_seed(0)
    reward = RewardModel(load_adapted(folder / "policy", rank=RANK), "token")
    with torch.no_grad():
        for p in lora.adapters(reward).values():
            p.add_(0.05)
    save_reward(reward, tmp_path / "r", train_tokenizer(["say one two three"] * 20, 280,
                                                        tmp_path / "t.model"))
    for trunks in (None, {}):
        again = load_reward(tmp_path / "r", trunks=trunks)
        torch.testing.assert_close(again.token_rewards(ragged()), reward.token_rewards(ragged()),
                                   atol=1e-3, rtol=1e-3)
