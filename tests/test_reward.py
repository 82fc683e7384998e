"""Reward models: where a reward is read, equations (1)-(4) against loops, calibration, folders."""

import json
import math

import pytest
import torch

from fgrlhf.baseline import Critic
from fgrlhf.checkpoint import save_model
from fgrlhf.controls import LikelihoodReward, LogpReward
from fgrlhf.data.fields import UserError
from fgrlhf.encode import PreferenceIds
from fgrlhf.frozen import FrozenStates
from fgrlhf.reward import (
    PreferenceBatch, RewardModel, load_reward, save_reward, sequence_loss, token_loss)
from fgrlhf.sequences import pack
from fgrlhf.tokenizer import train
from kernels.token_preference import Options
from tests.small import gradients, ids, llama, ragged, slow_logp

#                            prompt      chosen             rejected              U1+     U1-     U0
PAIRS = [PreferenceIds(ids(3, 1), [5, 6, 7, 8, 2], [5, 9, 10, 8, 2], [1, 2], [1, 2],
                       [(0, 0), (3, 3), (4, 4)]),
         PreferenceIds(ids(1, 2), [5, 2], [5, 6, 7, 2], [], [1, 2], [(0, 0), (1, 3)]),  # a deletion
         PreferenceIds(ids(6, 3), [9, 4, 2], [9, 2], [1], [], [(0, 0), (2, 1)])]      # an insertion


BATCH = PreferenceBatch.of(PAIRS)


def reward_model(kind: str = "token", dtype=torch.float32) -> RewardModel:
    torch.manual_seed(0)
    model = LogpReward(llama(dtype=dtype)) if kind == "logp" else RewardModel(llama(dtype=dtype),
                                                                              kind)
    with torch.no_grad():
        model.head.bias.fill_(0.3)
        if kind == "logp":
            model.logp_weight.fill_(0.5)
    return model


def changed(batch, row: int, t: int):
    """The batch with another id as response token t of a row."""
    tokens = batch.tokens.clone()
    at = int(batch.prompt_lengths[row]) + t
    tokens[row, at] = 3 + (tokens[row, at] - 2) % 21
    assert tokens[row, at] != batch.tokens[row, at]
    return batch._replace(tokens=tokens)


def test_a_confidence_model_gives_ppo_2p_minus_1_over_its_deviation(tmp_path):
    """TLCR's form: 0 stays 0, so that a token that is neither right nor wrong earns nothing."""
    model, batch = reward_model(), ragged()
    model.confidence = True
    model.calibrate([batch])
    r = model.token_rewards(batch)
    expected = [[2 / (1 + math.exp(-x)) - 1 for x in row] for row in r.tolist()]
    inside = [x for row, n in zip(expected, batch.response_lengths) for x in row[:n]]
    mean = sum(inside) / len(inside)
    deviation = (sum((x - mean) ** 2 for x in inside) / len(inside)) ** 0.5
    assert model.mean.item() == 0
    tokenizer = train(["name the river"] * 5, 270, tmp_path / "t.model")
    model.trunk = llama(vocab_size=270)
    save_reward(model, tmp_path / "reward", tokenizer)
    assert load_reward(tmp_path / "reward").confidence
    model = reward_model()
    model.confidence = True
    model.calibrate([batch])
    given = model.ppo_rewards(batch)
    for b, n in enumerate(batch.response_lengths.tolist()):
        assert given[b, :n].tolist() == pytest.approx([x / deviation for x in expected[b][:n]],
                                                      rel=1e-4)
        assert given[b, n:].count_nonzero() == 0


# ----- what a reward is ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind, a", [("token", 0.0), ("logp", 0.5)])
def test_token_rewards_read_the_hidden_state_at_the_tokens_own_position(kind, a):
    """r_t = v . h_t + b + a logp_t by one unpadded pass per row."""
    model, batch = reward_model(kind), ragged()
    rewards = model.token_rewards(batch)
    for b in range(4):
        p, n = int(batch.prompt_lengths[b]), int(batch.response_lengths[b])
        row = batch.tokens[b, :p + n].tolist()
        hidden = model.trunk.hidden(torch.tensor([row]))[0]
        logp = slow_logp(model.trunk, row[:p], row[p:])
        expected = [(model.head.weight[0] @ hidden[p + t]).item() + 0.3
                    + a * logp[t] for t in range(n)]
        assert rewards[b, :n].tolist() == pytest.approx(expected, abs=1e-4)
        assert not rewards[b, n:].any()


@pytest.mark.parametrize("kind", ["token", "logp"])
@pytest.mark.parametrize("t", [0, 2, 4])
def test_token_reward_depends_on_its_token_and_on_none_behind_it(t, kind):
    model, batch = reward_model(kind), ragged((3,), (5,))
    before, after = (model.token_rewards(x)[0] for x in (batch, changed(batch, 0, t)))
    assert torch.equal(before[:t], after[:t])
    assert (before[t:] != after[t:]).all()


def test_sequence_rewards_of_a_token_model_sum_its_token_rewards():
    """Equation (1)."""
    model, batch = reward_model(), ragged()
    summed = [sum(row) for row in model.token_rewards(batch).tolist()]
    assert model.sequence_rewards(batch).tolist() == pytest.approx(summed, abs=1e-5)


def test_sequence_rewards_of_a_sequence_model_are_read_at_the_last_token():
    model, batch = reward_model("sequence"), ragged()
    for b, found in enumerate(model.sequence_rewards(batch).tolist()):
        row = batch.tokens[b, :int(batch.lengths[b])].tolist()
        hidden = model.trunk.hidden(torch.tensor([row]))[0, -1]
        assert found == pytest.approx((model.head.weight[0] @ hidden).item() + 0.3, abs=2e-4)


def test_the_likelihood_control_is_the_log_likelihood():
    model, batch = LikelihoodReward(llama()), ragged((2,), (4,))
    row = batch.tokens[0].tolist()
    expected = slow_logp(model.trunk, row[:2], row[2:])
    assert model.token_rewards(batch)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert model.sequence_rewards(batch).item() == pytest.approx(sum(expected), abs=1e-4)


def test_token_rewards_refuses_a_sequence_model():
    with pytest.raises(ValueError, match="sequence-level"):
        reward_model("sequence").token_rewards(ragged())
    with pytest.raises(ValueError, match="token, sequence and one of .* got 'word'"):
        reward_model("word")


def test_a_layer_is_read_behind_so_many_blocks_and_before_the_last_norm():
    """r_t by a loop over the blocks; the other blocks are not computed."""
    model, batch = RewardModel(llama(n_layers=3), "token", layer=2), ragged((3,), (5,))
    trunk = model.trunk
    states = []
    for block in trunk.layers:
        block.register_forward_hook(lambda module, given, h: states.append(h))
    trunk.hidden(batch.tokens)
    v, b = model.head.weight[0], model.head.bias
    expected = (states[1][0, 3:] @ v + b).tolist()
    states.clear()
    assert model.token_rewards(batch)[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert len(states) == 2
    model.kind = "sequence"
    assert model.sequence_rewards(batch).tolist() == pytest.approx(expected[-1:], abs=1e-5)
    critic = Critic(model)
    assert critic(batch)[0, 1:].tolist() == pytest.approx(expected[:-1], abs=1e-5)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match="layer: expected 1 to 3"):
            RewardModel(trunk, "token", layer=wrong)


@pytest.mark.parametrize("layer", [None, 1])
def test_frozen_states_are_those_of_the_trunk_and_are_computed_once(layer, tmp_path):
    model = RewardModel(llama(), "token", layer=layer)
    expected = model.token_rewards(BATCH.sequences)
    states = FrozenStates(model.trunk, layer)
    states.add(PAIRS)
    assert states.bytes == 4 * 16 * sum(len(p.chosen) + len(p.rejected) for p in PAIRS)
    states.write(tmp_path / "states.pt")
    again = FrozenStates(model.trunk, layer)
    again.read(tmp_path / "states.pt")
    other = pack([ids(2)], [ids(3)])                    # is not kept, so it is computed
    unkept = model.token_rewards(other)
    for frozen in (states, again):
        model.frozen = frozen
        torch.testing.assert_close(model.token_rewards(other), unkept)
        hidden, model.trunk.hidden = model.trunk.hidden, None
        frozen.add(PAIRS)
        torch.testing.assert_close(model.token_rewards(BATCH.sequences), expected)
        model.kind = "sequence"
        last = BATCH.sequences.response_lengths - 1
        torch.testing.assert_close(model.sequence_rewards(BATCH.sequences),
                                   expected[torch.arange(6), last])
        model.kind, model.trunk.hidden = "token", hidden
    for elsewhere in (FrozenStates(llama(seed=1), layer), FrozenStates(model.trunk, 2)):
        with pytest.raises(UserError, match="expected hidden states of this model"):
            elsewhere.read(tmp_path / "states.pt")


# ----- calibration --------------------------------------------------------------------------------

def test_calibrate_gives_token_rewards_mean_0_and_rms_1_over_all_tokens():
    model = reward_model()
    samples = [ragged(seed=s) for s in (0, 100, 200)]
    model.calibrate(samples)
    values = [v for s in samples for v in model.ppo_rewards(s)[s.response_mask].tolist()]
    mean = sum(values) / len(values)
    assert mean == pytest.approx(0, abs=1e-5)
    assert sum((v - mean) ** 2 for v in values) / len(values) == pytest.approx(1, abs=1e-4)


def test_calibrate_gives_sequence_rewards_mean_0_and_deviation_1_over_responses():
    model = reward_model("sequence")
    samples = [ragged(seed=s) for s in (0, 100, 200)]
    model.calibrate(samples), model.calibrate(samples)               # a second time changes nothing
    values = [v for s in samples for v in model.ppo_rewards(s).sum(-1).tolist()]
    mean = sum(values) / len(values)
    assert mean == pytest.approx(0, abs=1e-5)
    assert sum((v - mean) ** 2 for v in values) / len(values) == pytest.approx(1, abs=1e-4)


def test_calibrate_survives_a_constant_reward():
    model = reward_model()
    with torch.no_grad():
        model.head.weight.zero_()
    model.calibrate([ragged()])
    assert model.ppo_rewards(ragged()).isfinite().all()


def test_ppo_rewards_of_a_sequence_model_stand_on_the_last_token_alone():
    model, batch = reward_model("sequence"), ragged()
    model.calibrate([batch])
    rewards = model.ppo_rewards(batch)
    R = model.sequence_rewards(batch)
    for b, n in enumerate(batch.response_lengths.tolist()):
        assert rewards[b].nonzero().tolist() == [[n - 1]]
        assert rewards[b, n - 1].item() == pytest.approx(((R[b] - model.mean) / model.scale).item(),
                                                         abs=1e-5)


# ----- losses -------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [Options(), Options("share"), Options("sum", u0_weight=1.0),
                                     Options("mean", "anchor", 0.3, 0.7)])
def test_token_loss_equals_equation_4_written_as_a_loop(options):
    """Loss and every gradient, each pair on its own and unpadded."""
    model = reward_model(dtype=torch.float64)
    U1 = sum(len(p.plus) + len(p.minus) for p in PAIRS)
    U0 = sum(len(p.unchanged) for p in PAIRS)
    softplus = torch.nn.functional.softplus
    bt, u0, token = 0.0, 0.0, 0.0
    for pair in PAIRS:
        plus, minus = (model.token_rewards(pack([pair.prompt], [side]))[0]
                       for side in (pair.chosen, pair.rejected))
        by = {"sum": lambda at, r: r[at].sum(), "mean": lambda at, r: r[at].sum() / max(len(at), 1),
              "share": lambda at, r: r[at].sum() / len(r), "response": lambda at, r: r.mean()}
        sides = [by[options.reduce](at, r) for r, at in ((plus, pair.plus), (minus, pair.minus))]
        bt = bt + softplus(sides[1] - sides[0]) / len(PAIRS)
        for i, j in pair.unchanged:
            term = (plus[i] - minus[j]) ** 2 if options.u0 == "difference" else (plus[i]**2
                                                                                 + minus[j]**2) / 2
            u0 = u0 + options.u0_weight * term / U0
        token = token + options.token_weight / U1 * (softplus(-plus[pair.plus]).sum()
                                                     + softplus(minus[pair.minus]).sum())
    (bt + u0 + token).backward()
    expected = gradients(model)
    out = token_loss(model, BATCH, options)
    out.loss.backward()
    assert out.loss.item() == pytest.approx((bt + u0 + token).item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_token_loss_moves_edited_in_tokens_up_and_edited_out_tokens_down():
    """Gradient with respect to each reward, by its place: sign on U1, nothing on U0 at lambda 0."""
    model = reward_model()
    seen = {}
    plain = model.token_rewards
    model.token_rewards = lambda s: seen.setdefault("r", plain(s).detach().requires_grad_())
    token_loss(model, BATCH, Options("sum")).loss.backward()
    signs = seen["r"].grad.sign().tolist()
    assert [row[:5] for row in signs] == [[0, -1, -1, 0, 0], [0, 0, 0, 0, 0], [0, -1, 0, 0, 0],
                                          [0, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]


def test_the_papers_loss_is_bradley_terry_on_the_mean_reward():
    """-mean log sigmoid(R(y+) - R(y-)) with R of (1), as `sequence_loss` has it for any model."""
    model = reward_model()
    model.response = "mean"
    for pair in PAIRS:
        side = pack([pair.prompt], [pair.chosen])
        assert model.sequence_rewards(side).item() == pytest.approx(
            model.token_rewards(side)[0].mean().item(), abs=1e-6)
    out, (loss, margins) = token_loss(model, BATCH, Options()), sequence_loss(model, BATCH)
    assert out.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(out.margin, margins)
    out.loss.backward()
    found = gradients(model)
    loss.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_sequence_loss_is_bradley_terry():
    """-mean log sigmoid(R(y+) - R(y-)), equation (2), each response scored alone."""
    model = reward_model("sequence")
    margins = [(model.sequence_rewards(pack([p.prompt], [p.chosen]))
                - model.sequence_rewards(pack([p.prompt], [p.rejected]))).item() for p in PAIRS]
    loss, found = sequence_loss(model, BATCH)
    assert found.tolist() == pytest.approx(margins, abs=1e-4)
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3,
                                        abs=1e-5)


def test_preference_batch_rows_are_the_batch_of_those_pairs():
    """Two of three pairs, in another order, are the batch that is made of them, cut as short."""
    some = BATCH.rows(torch.tensor([2, 1]))
    alone = PreferenceBatch.of([PAIRS[2], PAIRS[1]])
    for name, tensor in alone.tensors().items():
        if not name.startswith("unchanged"):
            assert torch.equal(some.tensors()[name], tensor), name
    assert sorted(zip(*(part.tolist() for part in some.unchanged))) == sorted(
        zip(*(part.tolist() for part in alone.unchanged)))
    assert some.totals() == alone.totals()


@pytest.mark.parametrize("options", [Options(), Options("share"), Options("sum", u0_weight=1.0),
                                     Options("mean", "kept", 0.3, 0.7)])
def test_losses_of_microbatches_add_up_to_the_loss_of_the_batch(options):
    model, sequence = reward_model(), reward_model("sequence")
    parts = [BATCH.rows(torch.tensor(rows)) for rows in ([0, 2], [1])]
    split = sum(token_loss(model, part, options, BATCH.totals()).loss for part in parts)
    assert split.item() == pytest.approx(token_loss(model, BATCH, options).loss.item(), abs=1e-5)
    split = sum(sequence_loss(sequence, part, 3)[0] for part in parts)
    assert split.item() == pytest.approx(sequence_loss(sequence, BATCH)[0].item(), abs=1e-5)


# ----- folders ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(["abc abd abe"] * 3, 268, tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.mark.parametrize("build", [
    lambda trunk: RewardModel(trunk, "token"), lambda trunk: RewardModel(trunk, "sequence"),
    lambda trunk: RewardModel(trunk, "token", "mean"),
    lambda trunk: RewardModel(trunk, "token", layer=1), LogpReward, LikelihoodReward])
def test_save_reward_and_load_reward_keep_every_bit(build, tokenizer, tmp_path):
    model = build(llama(vocab_size=268))
    model.calibrate([ragged()])
    save_reward(model, tmp_path, tokenizer)
    again = load_reward(tmp_path)
    assert again.kind == model.kind and type(again) is type(model)
    assert (again.response, again.layer) == (model.response, model.layer)
    assert torch.equal(model.ppo_rewards(ragged()), again.ppo_rewards(ragged()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_load_reward_names_a_head_that_is_not_finite(tokenizer, tmp_path):
    model = RewardModel(llama(vocab_size=268), "token")
    model.head.weight.data[0, 3] = math.nan
    save_reward(model, tmp_path, tokenizer)
    with pytest.raises(UserError, match=r"reward_head\.pt: tensor head\.weight: .* got 1 of 16"):
        load_reward(tmp_path)


def test_load_reward_refuses_a_plain_model_a_damaged_head_and_a_damaged_description(tokenizer,
                                                                                    tmp_path):
    save_model(llama(vocab_size=268), tmp_path / "plain", tokenizer=tokenizer)
    with pytest.raises(UserError, match="expected a reward model folder"):
        load_reward(tmp_path / "plain")
    for name, damage in (("reward_head.pt", b"PK nothing"), ("reward.json", b"{"),
                         ("reward.json", json.dumps({"kind": "word"}).encode()),
                         ("reward.json", json.dumps({"kind": "token", "layer": "1"}).encode())):
        folder = tmp_path / f"{name}-{len(damage)}"
        save_reward(RewardModel(llama(vocab_size=268), "token"), folder, tokenizer)
        (folder / name).write_bytes(damage)
        with pytest.raises(UserError, match=name):
            load_reward(folder)
