"""The ten rules that keep the method correct, each from a bug found in a published codebase.

The modules' own tests go deeper; here each rule is held where the parts meet. Rule 10 has its other
half, a killed and resumed run, in test_scripts.py.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import train_ppo
import train_rm
from fgrlhf import sft
from fgrlhf.advantage import penalise_kl, reward_to_go, standardise
from fgrlhf.baseline import Critic, value_loss
from fgrlhf.checkpoint import save_model
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Demonstration, Edit, write_jsonl
from fgrlhf.encode import Encoder, PreferenceIds
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.players import Players
from fgrlhf.engine.states import load_state, save_state
from fgrlhf.ppo import check_first_ratio, kl_estimates, policy_loss
from fgrlhf.reward import PreferenceBatch, RewardModel, sequence_loss, token_loss
from fgrlhf.rollout import sample
from fgrlhf.sequences import pack, score
from fgrlhf.templates import render_prompt
from fgrlhf.tokenizer import train
from kernels import linear_cross_entropy, linear_ppo, token_preference
from tests.small import gradients, ids, llama, ragged, with_garbage

EOS = 2


def numbers(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def config(**changes) -> train_ppo.Config:
    required = dict(method="fine-grained", policy="", reward="", prompts="", out="")
    return train_ppo.Config(**required | dict(standardise="none", beta=0.0) | changes)


def update(policy, rollout, advantages, values=None, returns=None, critic=None, optimizers=None,
           **changes) -> dict[str, float]:
    """train_ppo.update on given advantages; all prompts are one minibatch's or two."""
    settings = config(rollouts=len(advantages), **changes)
    batch = train_ppo.Batch(rollout.sequences, rollout.sequences.response_mask, rollout.logp_old,
                            rollout.logp_old, advantages, advantages, values, returns)
    players = Players(None, policy, None, None, critic, [],
                      optimizers or {"policy": Optimizer(policy, 1e-3)})
    return train_ppo.update(settings, players, batch, 1)


def rollout_of(policy, temperature: float = 1.0, count: int = 6):
    prompts = [ids(1 + 2 * i % 5, i) for i in range(count)]
    return sample(policy, prompts, EOS, 12, temperature, torch.Generator().manual_seed(1))


def reward_model(kind: str = "token") -> RewardModel:
    torch.manual_seed(0)
    return RewardModel(llama(seed=1), kind)


# ----- 1. logp[:, t] and reward[:, t] both belong to token t --------------------------------------

@pytest.mark.parametrize("k", [0, 2, 4])
def test_rule_1_a_reward_on_token_k_reaches_the_logits_that_produced_token_k_alone(k):
    """The head is the identity: hidden states are logits, with gradient A / N (p - onehot(k))."""
    batch = ragged((3, 2), (5, 3))
    logits = torch.randn(2, batch.tokens.shape[1], 24).double().requires_grad_()
    policy = SimpleNamespace(hidden=lambda tokens, **_: logits, head=torch.eye(24).double())
    logp = score(policy, batch).detach()
    rewards = torch.zeros_like(logp)
    rewards[0, k] = 3.0
    penalised = penalise_kl(rewards, logp, numbers(logp, 1), batch.response_mask, 0.0)
    advantages = standardise(reward_to_go(penalised, batch.response_mask, 0.0),
                             batch.response_mask, "none")
    policy_loss(policy, batch, logp, advantages, 0.2, 1.0, 8).loss.backward()
    assert logits.grad.abs().sum(-1).nonzero().tolist() == [[0, 3 + k - 1]]
    expected = 3 / 8 * logits[0, 3 + k - 1].detach().softmax(0)
    expected[batch.tokens[0, 3 + k]] -= 3 / 8
    torch.testing.assert_close(logits.grad[0, 3 + k - 1], expected)


def test_rule_1_holds_for_rollouts_of_a_real_policy():
    policy = llama()
    rollout = rollout_of(policy)
    hidden = policy.hidden(rollout.sequences.tokens).detach().requires_grad_()
    stub = SimpleNamespace(hidden=lambda tokens, **_: hidden, head=policy.head.detach())
    mask = rollout.sequences.response_mask
    for row, k in mask.nonzero().tolist()[::5]:
        rewards = torch.zeros_like(rollout.logp_old)
        rewards[row, k] = 1.0
        advantages = standardise(reward_to_go(rewards, mask, 0.0), mask, "none")
        policy_loss(stub, rollout.sequences, rollout.logp_old, advantages, 0.2, 1.0,
                    int(mask.sum())).loss.backward()
        produced_by = int(rollout.sequences.prompt_lengths[row]) + k - 1
        assert hidden.grad.abs().sum(-1).nonzero().tolist() == [[row, produced_by]]
        hidden.grad = None


def test_rule_1_the_critic_judges_the_state_before_the_token_the_reward_model_the_token():
    model = reward_model()
    critic, batch = Critic(model), ragged((3,), (5,))
    other = batch._replace(tokens=batch.tokens.clone())
    other.tokens[0, 3 + 2] = 3 + (other.tokens[0, 3 + 2] - 2) % 21                # response token 2
    same_values = (critic(batch) == critic(other))[0].tolist()
    same_rewards = (model.ppo_rewards(batch) == model.ppo_rewards(other))[0].tolist()
    assert same_values == [True, True, True, False, False]
    assert same_rewards == [True, True, False, False, False]


# ----- 2. the first ratio is 1 --------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.4])
def test_rule_2_ratio_is_one_and_kl_zero_before_the_first_update(temperature):
    policy = llama()
    rollout = rollout_of(policy, temperature, 16)
    mask = rollout.sequences.response_mask
    again = score(policy, rollout.sequences, temperature)
    assert check_first_ratio(again[mask], rollout.logp_old[mask]) < 1e-5
    kl = kl_estimates(rollout.logp_old, again, mask)
    assert abs(kl["kl_k1"]) < 1e-5 and 0 <= kl["kl_k3"] + 1e-9 < 1e-8


@pytest.mark.parametrize("spoil", ["temperature", "weights", "rows"])
def test_rule_2_update_stops_when_sampling_and_scoring_disagree(spoil):
    policy = llama()
    rollout = rollout_of(policy, 1.1 if spoil == "temperature" else 1.0)
    if spoil == "weights":
        policy.norm.weight.data.mul_(1.01)
    if spoil == "rows":
        rollout = rollout._replace(logp_old=rollout.logp_old.roll(1, 0))
    with pytest.raises(FloatingPointError, match="ratio on the first minibatch"):
        update(policy, rollout, torch.ones_like(rollout.logp_old))


def test_rule_2_no_module_behaves_differently_in_training():
    policy, batch = llama(), ragged()
    assert torch.equal(score(policy.train(), batch), score(policy.eval(), batch))


# ----- 3. prompt and response are tokenised separately --------------------------------------------

def test_rule_3_the_prompts_ids_stay_a_prefix_where_joint_tokenisation_would_merge(tmp_path):
    """The tokenizer has the piece "->>"; a prompt ends in "->", a response may begin with ">"."""
    tokenizer = train(["say ->> end", "no ->> end"] * 20, 280, tmp_path / "t.model")
    record = Demonstration("d", "say", "> end")
    text = render_prompt(record, "plain")
    prompt, response = Encoder(tokenizer, 64, "plain").demonstration(record)
    joint = tokenizer.encode(text + record.output, bos=True, eos=True)
    assert joint[:len(prompt)] != prompt                                         # the trap is there
    batch = pack([prompt], [response])
    separate = tokenizer.encode(text, bos=True) + tokenizer.encode("> end", eos=True)
    assert batch.tokens[0].tolist() == separate


def test_rule_3_rollouts_are_scored_by_their_ids_not_by_their_text(tmp_path):
    """An untrained policy spells words in pieces no tokenizer would choose; they are kept."""
    tokenizer = train(["say ->The end"] * 20, 280, tmp_path / "t.model")
    policy = llama(vocab_size=280)
    prompt = tokenizer.encode("say ->", bos=True)
    rollout = sample(policy, [prompt], -1, 20, generator=torch.Generator().manual_seed(0))
    drawn = rollout.sequences.tokens[0, len(prompt):].tolist()
    assert tokenizer.encode(tokenizer.decode(drawn)) != drawn
    assert (score(policy, rollout.sequences) - rollout.logp_old).abs().max() < 1e-5


# ----- 4. masks come from lengths; EOS is an action; truncation is marked -------------------------

def test_rule_4_pad_and_eos_ids_inside_a_response_are_tokens_like_any_other():
    prompts, responses = [[1, 0, 5], [1]], [[0, EOS, 0, EOS], [0]]
    batch = pack(prompts, responses)
    for batch in (batch, with_garbage(batch)):
        assert batch.response_mask.tolist() == [[True] * 4, [True, False, False, False]]
    model, policy = reward_model(), llama()
    assert model.token_rewards(batch)[0].count_nonzero() == 4
    assert score(policy, batch)[0].count_nonzero() == 4


def test_rule_4_eos_earns_a_reward_and_is_trained_on():
    policy, model = llama(), reward_model()
    rollout = rollout_of(policy, count=16)
    mask, rows = rollout.sequences.response_mask, (~rollout.truncated).nonzero()[:, 0]
    assert 0 < len(rows) < 16
    last = rollout.sequences.response_lengths - 1
    tokens = rollout.sequences.tokens[rows, (rollout.sequences.prompt_lengths + last)[rows]]
    assert (tokens == EOS).all() and mask[rows, last[rows]].all()
    assert (model.ppo_rewards(rollout.sequences)[rows, last[rows]] != 0).all()
    assert (rollout.logp_old[rows, last[rows]] < 0).all()


def test_rule_4_a_truncated_response_has_the_sequence_reward_on_its_last_token():
    policy, model = llama(), reward_model("sequence")
    rollout = sample(policy, [ids(3, 1)], -1, 6, generator=torch.Generator().manual_seed(0))
    assert rollout.truncated.tolist() == [True]
    assert model.ppo_rewards(rollout.sequences).nonzero().tolist() == [[0, 5]]


# ----- 5. padding is inert ------------------------------------------------------------------------

def pairs() -> list[PreferenceIds]:
    return [PreferenceIds(ids(3, 1), [5, 6, 7, 8, 2], [5, 9, 2], [1, 2, 3], [1], [(0, 0), (4, 2)]),
            PreferenceIds(ids(6, 2), [5, 2], [5, 4, 4, 2], [], [1, 2], [(0, 0), (1, 3)])]


def losses(policy, model, critic, batch, logp_old, advantages, values_old,
           returns) -> dict[str, torch.Tensor]:
    """Every quantity that reads a padded batch."""
    mask = batch.response_mask
    out = policy_loss(policy, batch, logp_old, advantages, 0.2, 1.0, int(mask.sum()))
    logp_ref = score(policy, batch).detach()
    penalised = penalise_kl(model.ppo_rewards(batch), logp_old, logp_ref, mask, 0.1)
    return {"ppo": out.loss, "sft": sft.loss_of(policy, batch), "logp": score(policy, batch).sum(),
            "clip": out.clip_fraction, "k3": out.kl_k3, "entropy": out.entropy,
            "tokens": model.token_rewards(batch).sum(),
            "sequence": model.sequence_rewards(batch).sum(),
            "critic": value_loss(critic(batch), values_old, returns, mask, 0.2, int(mask.sum())),
            "penalised": standardise(penalised, mask, "rms").sum()}


def everything(batch, padding: float) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """All losses, and the gradient of their sum for policy, reward model and critic."""
    policy, model = llama(), reward_model()
    critic = Critic(model)
    mask = batch.response_mask
    given = [torch.where(mask, numbers(torch.zeros(mask.shape), i), padding) for i in range(1, 5)]
    found = losses(policy, model, critic, batch, *given)
    sum(value for name, value in found.items() if value.requires_grad).backward()
    grads = {f"{i}.{n}": g for i, m in enumerate((policy, model, critic))
             for n, g in gradients(m).items()}
    return {name: value.item() for name, value in found.items()}, grads


@pytest.mark.parametrize("padding", [1e30, math.inf, math.nan])
def test_rule_5_garbage_in_the_padding_changes_no_loss_no_gradient_no_metric(padding):
    """Bit for bit: random ids behind the tokens, the worst floats behind each per-token input."""
    clean_values, clean = everything(ragged(), 0.0)
    spoiled_values, spoiled = everything(with_garbage(ragged()), padding)
    assert clean_values == spoiled_values
    assert clean.keys() == spoiled.keys() and len(clean) > 50
    for name in clean:
        assert torch.equal(clean[name], spoiled[name]), name


def test_rule_5_padded_equals_unpadded():
    """The sum over rows scored alone, without any padding; four columns more of garbage."""
    policy, model, batch = llama(), reward_model(), ragged()
    mask, rows = batch.response_mask, [batch.rows(torch.tensor([b])) for b in range(4)]
    for function in (lambda s: score(policy, s), model.token_rewards, model.sequence_rewards,
                     model.ppo_rewards):
        alone = [function(row)[0] for row in rows]
        for padded in (function(batch), function(with_garbage(batch, more=4))):
            for b, single in enumerate(alone):
                expected = padded[b][mask[b]] if padded.dim() == 2 else padded[b]
                torch.testing.assert_close(single, expected, atol=2e-5, rtol=1e-5)


def test_rule_5_the_preference_losses_do_not_depend_on_who_shares_the_batch():
    """Rows of unequal length pad one another: the losses are those of the rows alone."""
    model = reward_model()
    both, single = PreferenceBatch.of(pairs()), [PreferenceBatch.of([pair]) for pair in pairs()]
    alone = [sequence_loss(model, one)[0].item() for one in single]
    assert sequence_loss(model, both)[0].item() == pytest.approx(sum(alone) / 2, abs=1e-5)
    for options in (token_preference.Options("sum"), token_preference.Options("response")):
        alone = [token_loss(model, one, options).loss.item() for one in single]
        together = token_loss(model, both, options).loss.item()
        assert together == pytest.approx(sum(alone) / 2, abs=1e-5)


# ----- 6. means are over the whole minibatch ------------------------------------------------------

class Recorder:
    """Stands in for an optimizer: keeps each step's gradients and leaves the weights alone."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def step(self) -> float:
        self.seen.append(gradients(self.model))
        return 0.0


def updated(microbatch: int, method: str = "rlhf"):
    """Gradients and statistics of train_ppo.update over rollouts of unequal length."""
    policy, model = llama(dtype=torch.float64), reward_model()
    critic = Critic(model) if method == "rlhf" else None
    rollout = rollout_of(policy, count=10)
    policy.norm.weight.data.mul_(1.0002)                     # ratios near 1, not at it
    like = rollout.logp_old.float()
    values, returns = numbers(like, 1), numbers(like, 2)
    recorders = {"policy": Recorder(policy)} | ({"critic": Recorder(critic)} if critic else {})
    logged = update(policy, rollout, numbers(like, 3), values, returns, critic, recorders,
                    method=method, microbatch=microbatch, clip_eps=1e-5, value_clip=1e-5)
    return recorders, logged


@pytest.mark.parametrize("method", ["fine-grained", "rlhf"])
@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_rule_6_microbatches_give_gradient_and_metrics_of_the_whole_minibatch(microbatch, method):
    whole, logged = updated(0, method)
    split, logged_split = updated(microbatch, method)
    for name, recorder in whole.items():
        assert len(recorder.seen) == 4 == len(split[name].seen)          # 2 epochs of 2 minibatches
        for one, other in zip(recorder.seen, split[name].seen):
            for parameter, gradient in one.items():
                torch.testing.assert_close(gradient, other[parameter], rtol=1e-4, atol=1e-6)
    assert logged == pytest.approx(logged_split, rel=1e-4, abs=1e-7)
    assert 0 < logged["ppo/clip_fraction"] < 1


# ----- 7. one standardisation, masked -------------------------------------------------------------

@pytest.mark.parametrize("how", ["rms", "mean-std", "none"])
def test_rule_7_a_batch_with_one_token_gives_finite_advantages_and_gradients(how):
    policy, batch = llama(), pack([ids(2)], [[EOS]])
    advantages = standardise(reward_to_go(torch.tensor([[0.7]]), batch.response_mask, 0.0),
                             batch.response_mask, how)
    assert advantages.isfinite().all()
    logp_old = score(policy, batch).detach()
    policy_loss(policy, batch, logp_old, advantages, 0.2, 1.0, 1).loss.backward()
    assert all(g.isfinite().all() for g in gradients(policy).values())


def test_rule_7_standardising_twice_changes_nothing():
    x, mask = numbers(torch.zeros(4, 9).double(), 1), ragged().response_mask
    for how in ("rms", "mean-std"):
        once = standardise(x, mask, how, eps=0.0)
        torch.testing.assert_close(standardise(once, mask, how, eps=0.0), once)


# ----- 8. reductions in float32 at least ----------------------------------------------------------

def test_rule_8_a_bfloat16_model_reduces_in_float32():
    policy, batch = llama(dtype=torch.bfloat16), ragged()
    torch.manual_seed(0)
    model = RewardModel(policy, "token")
    logp = score(policy, batch)
    found = {"score": logp, "sft": sft.loss_of(policy, batch), "token": model.token_rewards(batch),
             "sequence": RewardModel(policy, "sequence").sequence_rewards(batch),
             "critic": Critic(model)(batch), "token loss": token_loss(
                 model, PreferenceBatch.of(pairs()), token_preference.Options()).loss,
             "sampled": rollout_of(policy).logp_old,
             "ppo": policy_loss(policy, batch, logp.detach(), logp.detach(), 0.2, 1.0, 9).loss}
    assert {n: value.dtype for n, value in found.items()} == dict.fromkeys(found, torch.float32)


def test_rule_8_log_softmax_of_bfloat16_logits_is_exact_to_float32():
    """Against float64 from the same bfloat16 hidden states: the normaliser adds no rounding.

    Logits themselves may be rounded to bfloat16 (8 bits): at |z| <= 4 that is 2^-7 at most.
    """
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 16).bfloat16() / 4, torch.randn(4000, 16).bfloat16()
    targets = torch.randint(4000, (50,))
    exact = (hidden.double() @ head.double().T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = linear_cross_entropy.fused(hidden, head, targets).logp
    assert (found - exact).abs().max() < 2 ** -6
    rounded = (hidden @ head.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]  # all in bfloat16
    assert (rounded - exact).abs().max() > 2 ** -6


# ----- 9. empty batches and non-finite numbers ----------------------------------------------------

def test_rule_9_an_all_masked_batch_gives_loss_0_and_gradient_0():
    hidden, head = torch.randn(0, 16, requires_grad=True), torch.randn(24, 16, requires_grad=True)
    none, empty = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    rewards = torch.randn(2, 5, requires_grad=True)
    off = torch.zeros(2, 5, dtype=torch.bool)
    found = [linear_ppo.fused(hidden, head, empty, none, none, 0.2).loss,
             linear_cross_entropy.fused(hidden, head, empty).loss,
             linear_cross_entropy.fused(torch.randn(3, 16, requires_grad=True), head,
                                        torch.tensor([1, 2, 3]), torch.zeros(3)).loss,
             token_preference.fused(rewards, rewards, off, off,
                                    token_preference.Unchanged(*[empty] * 3),
                                    token_preference.Lengths(*torch.ones(2, 2).long()),
                                    token_preference.Options(token_weight=1.0)).loss,
             value_loss(rewards, rewards.detach() + 1, rewards.detach() - 1, off, 0.2, 1)]
    sum(found).backward()
    assert [loss.item() for loss in found] == [0.0] * 5
    assert not head.grad.any() and not rewards.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rule_9_a_non_finite_gradient_stops_before_the_weights_change(bad):
    policy = llama()
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    optimizer = Optimizer(policy, 1e-3)
    (sft.loss_of(policy, ragged()) * bad).backward()
    with pytest.raises(FloatingPointError, match="gradient norm is (nan|inf)"):
        optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in policy.named_parameters())


def test_rule_9_a_non_finite_reward_stops_the_update():
    policy = llama()
    rollout = rollout_of(policy)
    advantages = torch.ones_like(rollout.logp_old)
    advantages[0, 0] = math.nan
    with pytest.raises(FloatingPointError):
        update(policy, rollout, advantages)
    assert all(p.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("script", ["sft", "train_rm"])
def test_rule_9_a_failed_batch_holds_the_whole_minibatch(script, tmp_path, monkeypatch):
    """Five records in microbatches of two: the file has all of them, whichever one failed."""
    tokenizer = train(["name the river", "it is red"] * 5, 275, tmp_path / "t.model")
    model = llama(vocab_size=275, max_seq_len=48)
    model.norm.weight.data[:] = 3e38                        # finite; the logits are not
    save_model(model, tmp_path / "policy", tokenizer=tokenizer)
    write_jsonl(tmp_path / "edits.jsonl",
                [Edit(str(i), "name the river"[:4 + i], "it is the river"[:4 + 2 * i], "it is red")
                 for i in range(5)])
    module = {"sft": sft, "train_rm": train_rm}[script]
    with pytest.raises(FloatingPointError):
        module.train(module.Config(data=str(tmp_path / "edits.jsonl"), out=str(tmp_path / "out"),
                                   model=str(tmp_path / "policy"), batch=5, microbatch=2))
    dump = load_state(tmp_path / "out/failed-batch.pt")
    assert len(dump["tokens"]) == (5 if script == "sft" else 10)
    assert list(dump["models"]) == ["model"]


# ----- 10. training states ------------------------------------------------------------------------

def test_rule_10_a_state_with_one_flipped_bit_is_refused(tmp_path):
    policy = llama()
    optimizer = Optimizer(policy, 1e-3)
    sft.loss_of(policy, ragged()).backward()
    optimizer.step()
    path = tmp_path / "state.pt"
    save_state(path, {"step": 3,
                      "parts": {"model": policy.state_dict(), "optimizer": optimizer.state_dict()}})
    whole = path.read_bytes()
    assert load_state(path)["step"] == 3
    for tensor in (policy.tok_embeddings.weight,
                   optimizer.parts[0].state_dict()["state"][0]["exp_avg"]):
        at = whole.index(tensor.detach().numpy().tobytes()) + 41
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        with pytest.raises(UserError, match="state.pt: damaged"):
            load_state(path)


def test_rule_10_the_optimizers_state_continues_bit_for_bit():
    """Three steps at once, or two, a state and one more with a new optimizer: Adam and Muon."""
    def steps(policy, optimizer, numbers):
        for i in numbers:
            sft.loss_of(policy, ragged(seed=i)).backward()
            optimizer.step()

    straight, stopped = llama(), llama()
    make = lambda model: Optimizer(model, 1e-2, warmup=2, steps=5, muon_lr=1e-2)
    steps(straight, make(straight), range(3))
    first = make(stopped)
    steps(stopped, first, range(2))
    resumed = llama(seed=9)
    second = make(resumed)
    resumed.load_state_dict(stopped.state_dict())
    second.load_state_dict(first.state_dict())
    steps(resumed, second, [2])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))
