"""The project's own code against the golden fixtures, in float64 and in float32.

The fixtures come from loops and autograd that import none of the project's code, so the project is
checked like any port. Rewards are float32 even when the weights are float64, and are compared as
float32. The tokenizer is left out, because it made the expected ids; the numpy port checks them.
"""

import json

import numpy
import pytest
import torch

from fgrlhf import advantage, align, align_words, baseline, ppo
from fgrlhf.encode import PreferenceIds
from fgrlhf.engine.optimizer import Muon, Optimizer
from fgrlhf.golden import __main__ as golden
from fgrlhf.golden.compare import check
from fgrlhf.model import LLaMA, LLaMAConfig, RMSNorm, rotary_table, rotate as rotated
from fgrlhf.reward import PreferenceBatch, RewardModel, sequence_loss as pair_loss
from fgrlhf.rollout import inverse_cdf as drawn
from fgrlhf.sequences import Sequences, score
from kernels import (
    clipped_surrogate, exact_kl as divergence, linear_cross_entropy, linear_logp as likelihood,
    linear_ppo as surrogate, token_preference)
from tests.numpy_port import function_of
from train_rm import LOSSES

SIZES = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20, "ffn_dim": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    golden.write(folder)
    return folder


def with_gradients(loss, **leaves) -> dict:
    """{"grad_NAME": ...}: the gradients of the project's own backward pass."""
    loss.backward()
    return {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


# ----- alignment ----------------------------------------------------------------------------------

def flags_and_pairs(rows) -> dict:
    return {"original": torch.tensor([flag for minus, _, _ in rows for flag in minus]),
            "edited": torch.tensor([flag for _, plus, _ in rows for flag in plus]),
            "pairs": torch.tensor([(n, *pair) for n, (_, _, pairs) in enumerate(rows)
                                   for pair in pairs])}


def with_distances(made: list[align.Alignment]) -> dict:
    return flags_and_pairs([row[:3] for row in made]) \
        | {"distance": torch.tensor([row.distance for row in made])}


def align_token(original, edited):
    return with_distances([align.align(a, b) for a, b in zip(original, edited)])


def align_word(original, edited, original_spans, edited_spans):
    return with_distances([align_words.align_words(*row) for row in
                           zip(original, edited, original_spans, edited_spans)])


def gap_credit(original, edited):
    rows = []
    for a, b in zip(original, edited):
        credit = align.gap_credit(align.align(a, b))
        rows.append(([i in credit.original for i in range(len(a))],
                     [j in credit.edited for j in range(len(b))], credit.pairs))
    return flags_and_pairs(rows)


# ----- model --------------------------------------------------------------------------------------

def rope(x, positions, theta):
    config = LLaMAConfig(**SIZES | {"dim": 32}, rope_theta=theta)       # K = 8, as the case's
    return {"y": rotated(x[None], rotary_table(positions[None], config, x.dtype))[0]}


def rmsnorm(x, weight, eps):
    norm = RMSNorm(x.shape[-1], eps).to(x.dtype)
    norm.weight.data = weight
    return {"y": norm(x)}


def attention(x, key_mask, wq, wk, wv, wo, n_heads, n_kv_heads, theta):
    """Runs a forward pass in which the first layer's attention gets x, and reads its output."""
    model = LLaMA(LLaMAConfig(**SIZES, rope_theta=theta)).to(x.dtype)
    layer, seen = model.layers[0].attention, []
    for module, weight in ((layer.wq, wq), (layer.wk, wk), (layer.wv, wv), (layer.wo, wo)):
        module.weight.data = weight
    layer.register_forward_pre_hook(lambda _, arguments: (x, *arguments[1:]))
    layer.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    positions = (key_mask.cumsum(-1) - 1).clamp(min=0)
    model.hidden(torch.zeros(x.shape[:2], dtype=torch.long), positions, key_mask)
    return {"y": torch.where(key_mask[..., None], seen[0], 0.0)}


def logits(model, tokens, lengths):
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    return {"logits": torch.where(real[..., None], model(tokens), 0.0)}


def response_logp(model, tokens, prompt_lengths, response_lengths, temperature):
    return {"logp": score(model, Sequences(tokens, prompt_lengths, response_lengths), temperature)}


def token_rewards(model, tokens, prompt_lengths, response_lengths, v, bias, mean, scale):
    sequences = Sequences(tokens, prompt_lengths, response_lengths)
    made = {kind: RewardModel(model, kind) for kind in ("token", "sequence")}
    for reward in made.values():
        reward.head.weight.data, reward.head.bias.data = v[None], v.new_tensor([bias])
        reward.mean.fill_(mean)
        reward.scale.fill_(scale)
    return {"r": made["token"].token_rewards(sequences),
            "R": made["token"].sequence_rewards(sequences),
            "calibrated": made["token"].ppo_rewards(sequences),
            "last": made["sequence"].sequence_rewards(sequences)}


# ----- likelihoods --------------------------------------------------------------------------------

def linear_logp(hidden, head, targets, weights, temperature):
    out = likelihood.fused(hidden, head, targets, temperature, entropy=True)
    return out._asdict() | with_gradients((weights * out.logp).sum(), hidden=hidden, head=head)


def cross_entropy(hidden, head, targets, mask):
    loss = linear_cross_entropy.fused(hidden, head, targets, mask).loss
    return {"loss": loss} | with_gradients(loss, hidden=hidden, head=head)


def inverse_cdf(logits, uniform):
    return {"token": drawn(logits, uniform.double())[0]}


def kl_estimates(logp, logp_ref, mask):
    dtype = {"dtype": logp.dtype}
    return {name: torch.tensor(value, **dtype)
            for name, value in ppo.kl_estimates(logp, logp_ref, mask).items()}


def exact_kl(hidden, head, hidden_ref, head_ref, weights, temperature):
    kl = divergence.fused(hidden, head, hidden_ref, head_ref, temperature)
    return {"kl": kl} | with_gradients((weights * kl).sum(), hidden=hidden, head=head)


# ----- losses and advantages ----------------------------------------------------------------------

def token_loss(rewards_chosen, rewards_rejected, plus_mask, minus_mask, unchanged, lengths,
               **options):
    out = token_preference.fused(rewards_chosen, rewards_rejected, plus_mask, minus_mask,
                                 token_preference.Unchanged(*unchanged.T),
                                 token_preference.Lengths(*lengths.T),
                                 token_preference.Options(**options))
    return out._asdict() | with_gradients(out.loss, rewards_chosen=rewards_chosen,
                                          rewards_rejected=rewards_rejected)


class Given(torch.nn.Module):
    """Stands in for a reward model whose rewards R(x, y) are known."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards = rewards

    def sequence_rewards(self, sequences):
        return self.rewards


def sequence_loss(chosen, rejected):
    batch = PreferenceBatch.of([PreferenceIds([1], [2], [2], [], [], [])] * len(chosen))
    loss, margin = pair_loss(Given(torch.cat([chosen, rejected])), batch)
    return {"loss": loss, "margin": margin} | with_gradients(loss, chosen=chosen,
                                                             rejected=rejected)


def standardise(x, mask, how, eps):
    return {"y": advantage.standardise(x, mask, how, eps)}


def advantages(rewards, logp_old, logp_ref, mask, beta, eps):
    penalised = advantage.penalise_kl(rewards, logp_old, logp_ref, mask, beta)
    return {"penalised": penalised,
            "advantages": advantage.standardise(penalised, mask, "rms", eps)}


def reward_to_go(rewards, mask, gamma):
    return {"G": advantage.reward_to_go(rewards, mask, gamma)}


def gae(rewards, values, mask, gamma, lam):
    made = baseline.generalised_advantage(rewards, values, mask, gamma, lam)
    return dict(zip(("advantages", "returns"), made))


def clipped_loss(logp, logp_old, advantages, mask, clip_eps):
    out = clipped_surrogate.fused(logp, logp_old, advantages, clip_eps, mask)
    return out._asdict() | with_gradients(out.loss, logp=logp)


def linear_ppo(hidden, head, targets, logp_old, advantages, clip_eps, temperature):
    out = surrogate.fused(hidden, head, targets, logp_old, advantages, clip_eps, temperature)
    return out._asdict() | with_gradients(out.loss, hidden=hidden, head=head)


def value_loss(values, values_old, returns, mask, clip_eps):
    loss = baseline.value_loss(values, values_old, returns, mask, clip_eps, int(mask.sum()))
    return {"loss": loss} | with_gradients(loss, values=values)


def clip_gradients(g, max_norm):
    """torch's clipping, which the project uses. Each row is given as two parameters."""
    norms, clipped = [], []
    for row in g.detach():
        both = [torch.nn.Parameter(torch.zeros_like(part)) for part in row.split(4)]
        for parameter, part in zip(both, row.split(4)):
            parameter.grad = part.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(both, max_norm))
        clipped.append(torch.cat([parameter.grad for parameter in both]))
    return {"norm": torch.stack(norms), "clipped": torch.stack(clipped)}


def adamw(x, g, m, v, lr, beta1, beta2, eps, weight_decay, step):
    """torch's AdamW, which the project uses."""
    weight = torch.nn.Parameter(x)
    optimizer = torch.optim.AdamW([weight], lr, (beta1, beta2), eps, weight_decay)
    weight.grad = g
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[weight] = state
    optimizer.step()
    return {"x": weight, "m": state["exp_avg"], "v": state["exp_avg_sq"]}


def muon(lr, momentum, a, b, c, steps, **matrices):
    """The coefficients and the number of steps are fixed in the project."""
    assert (a, b, c, steps) == (3.4445, -4.775, 2.0315, 5)
    found = {}
    for name in ("tall", "wide"):
        weight = torch.nn.Parameter(matrices[f"x_{name}"].detach().clone())
        optimizer = Muon([weight], lr, momentum)
        weight.grad = matrices[f"g_{name}"].detach()
        state = {"momentum": matrices[f"m_{name}"].detach().clone()}
        optimizer.state[weight] = state
        optimizer.step()
        found |= {f"x_{name}": weight, f"m_{name}": state["momentum"]}
    return found


def ppo_step(model, tokens, prompt_lengths, response_lengths, logp_old, logp_ref, rewards, beta,
             standardise_eps, clip_eps, temperature, max_norm, lr, weight_decay, **adam):
    """The steps of train_ppo.py's `update` on one minibatch. The optimizer fixes betas and eps."""
    assert adam == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-5}
    sequences = Sequences(tokens, prompt_lengths, response_lengths)
    mask = sequences.response_mask
    made = advantages(rewards, logp_old, logp_ref, mask, beta, standardise_eps)["advantages"]
    out = ppo.policy_loss(model, sequences, logp_old, made, clip_eps, temperature, int(mask.sum()))
    optimizer = Optimizer(model, lr, weight_decay=weight_decay, clip_norm=max_norm)
    out.loss.backward()
    found = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters()}
    norm = optimizer.step()
    names = ("loss", "clip_fraction", "kl_k1", "kl_k3")
    return {name: getattr(out, name) for name in names} | found | {
        "logp": torch.zeros_like(made).masked_scatter(mask, out.logp), "advantages": made,
        "gradient_norm": torch.tensor(norm, dtype=out.logp.dtype),
        **{f"new.{name}": p for name, p in model.named_parameters()}}


# ----- all of them --------------------------------------------------------------------------------

def answer(folder, manifest, case, dtype) -> dict:
    """The project's outputs for one case."""
    def read(entry):
        if entry["dtype"] == "json":
            return json.loads((folder / entry["file"]).read_text())
        tensor = torch.from_numpy(numpy.load(folder / entry["file"]))
        return tensor.to(dtype).requires_grad_() if entry["dtype"] == "float32" else tensor

    inputs = {name: read(entry) for name, entry in case["inputs"].items()}
    if case["model"]:
        inputs["model"] = LLaMA(LLaMAConfig(**manifest["model"]["config"])).to(dtype)
        own = manifest["model"]["weights"]
        inputs["model"].load_state_dict({name: read(entry).detach() for name, entry in own.items()})
    function = globals()[function_of(case["name"]).__name__]
    return function(**inputs, **case["options"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_project_passes_every_fixture(folder, dtype):
    manifest = json.loads((folder / "manifest.json").read_text())
    cases = [case for case in manifest["cases"] if not case["name"].startswith("tokenizer")]
    for case in cases:
        (folder / "outputs" / case["name"]).mkdir(parents=True, exist_ok=True)
        for name in (made := answer(folder, manifest, case, dtype)):
            numpy.save(folder / "outputs" / case["name"] / f"{name}.npy",
                       made[name].detach().numpy())
    verdicts = [v for v in check(folder) if not v.case.startswith("tokenizer")]
    assert len(verdicts) == len(cases) > 25
    assert [v for v in verdicts if v.verdict != "pass"] == []
    if dtype == torch.float64:
        assert max(v.relative for v in verdicts) < 1e-12


def test_the_losses_of_the_cases_are_those_of_train_rm(folder):
    cases = {case["name"]: case["options"]
             for case in json.loads((folder / "manifest.json").read_text())["cases"]}
    for case, loss in (("token-loss-ours", "ours"), ("token-loss-paper", "paper"),
                       ("token-loss-share", "paper-u1")):
        assert token_preference.Options(**cases[case]) == LOSSES[loss]
