"""The code broken on purpose, one rule after the other, and who notices.

Each row of MUTATIONS breaks one line of the project (`old` becomes `new`) and names what must then
fail: a startup check, which every user runs before every PPO run, or a test. A row is tried in a
forked process that imports the project anew with the broken line; the same catcher passes there
while the code is whole.
"""

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests import processes
from tests.small import ppo_folder
from tests.test_layout import OWN, ROOT


class Mutation(NamedTuple):
    rule: int                           # of DESIGN.md, section 3
    what: str                           # the bug, as somebody published it or might
    file: str
    old: str
    new: str
    caught_by: str                      # "check: NAME", or "test_module.test_function"
    with_: dict = {}                    # a test's parameters; a check's method


RLHF = {"method": "rlhf"}
MUTATIONS = [
    # 1. logp[:, t] and reward[:, t] both belong to token t
    Mutation(1, "token rewards read one position early", "fgrlhf/reward.py",
             "values = self._read(hidden[at.row, at.position])",
             "values = self._read(hidden[at.row, at.position - 1])", "check: rewards and values"),
    Mutation(1, "rewards shifted by one in the advantage", "fgrlhf/advantage.py",
             "return torch.where(mask, rewards - beta * (logp_old - logp_ref), 0.0)",
             "return torch.where(mask, rewards.roll(1, 1) - beta * (logp_old - logp_ref), 0.0)",
             "check: planted reward"),
    Mutation(1, "log-probabilities taken from the token's own state", "fgrlhf/rollout.py",
             "hidden = model.hidden(sequences.tokens[:, :-1], lengths=sequences.lengths - 1)\n"
             "    return hidden[at.row, at.position - 1]",
             "hidden = model.hidden(sequences.tokens, lengths=sequences.lengths)\n"
             "    return hidden[at.row, at.position]",
             "check: sampling = scoring"),
    Mutation(1, "the mean put back after whitening", "fgrlhf/advantage.py",
             "return x / ((x.square().sum() / count).sqrt() + eps)",
             "return x / ((x.square().sum() / count).sqrt() + eps) + x.sum() / count",
             "check: planted reward"),
    Mutation(1, "the critic reads the state after the token", "fgrlhf/players.py",
             "hidden = states_before(self.trunk, sequences, at)",
             "hidden = self.trunk.hidden(sequences.tokens)[at.row, at.position]",
             "check: rewards and values", RLHF),
    Mutation(1, "the last token's reward read in the padding", "fgrlhf/reward.py",
             "lengths=sequences.lengths)\n        values = self._read(hidden[at.row",
             "lengths=sequences.lengths - 1)\n        values = self._read(hidden[at.row",
             "check: rewards and values"),
    Mutation(1, "a response's reward on the last column, PAD or not", "fgrlhf/reward.py",
             "last = steps == sequences.response_lengths[:, None] - 1",
             "last = (steps == mask.shape[1] - 1).expand(mask.shape)", "check: rewards and values",
             RLHF),
    # 2. the first ratio is 1 and the KL to itself 0
    Mutation(2, "scored at another temperature than sampled", "fgrlhf/rollout.py",
             "logp = linear_logp.fused(hidden, model.head, at.target, temperature).logp",
             "logp = linear_logp.fused(hidden, model.head, at.target).logp",
             "check: sampling = scoring"),
    Mutation(2, "updated at another temperature than sampled", "fgrlhf/ppo.py",
             "advantages[at.row, at.step], clip_eps, temperature, denominator)",
             "advantages[at.row, at.step], clip_eps, 1.0, denominator)", "check: ratio 1, KL 0"),
    Mutation(2, "dropout in training", "fgrlhf/model.py",
             "return self.w2(F.silu(self.w1(x)) * self.w3(x))",
             "return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), 0.1)",
             "check: sampling = scoring"),
    Mutation(2, "log-probabilities of another distribution than the one sampled from",
             "fgrlhf/rollout.py",
             "return inverse_cdf(logits / temperature, uniform)",
             "return inverse_cdf(logits.clamp(min=-1) / temperature, uniform)",
             "check: sampling = scoring"),
    # 3. prompt and response are tokenised separately
    Mutation(3, "prompt and response tokenised jointly", "fgrlhf/encode.py",
             "return tokenizer.encode(text, eos=True)[:max(0, context - len(prompt))]",
             "return tokenizer.encode(tokenizer.decode(prompt) + text, bos=True, "
             "eos=True)[len(prompt):][:max(0, context - len(prompt))]",
             "test_rules.test_rule_3_the_prompts_ids_stay_a_prefix_where_joint_tokenisation_"
             "would_merge", {"tmp_path": ...}),
    # 4. masks come from lengths; EOS is an action
    Mutation(4, "padding counted by the mask", "fgrlhf/rollout.py",
             "return steps < self.response_lengths[:, None]",
             "return steps <= self.response_lengths[:, None]", "check: masks"),
    Mutation(4, "EOS left out of the mask", "fgrlhf/rollout.py",
             "return steps < self.response_lengths[:, None]",
             "return steps < self.response_lengths[:, None] - 1", "check: masks"),
    Mutation(4, "a truncated response not marked", "fgrlhf/rollout.py",
             "truncated = torch.ones(B, dtype=torch.bool, device=device)",
             "truncated = torch.zeros(B, dtype=torch.bool, device=device)", "check: masks"),
    Mutation(4, "EOS counted as padding by the length", "fgrlhf/rollout.py",
             "response_lengths[alive[ended]] = t + 1",
             "response_lengths[alive[ended]] = max(t, 1)",
             "test_rules.test_rule_4_eos_earns_a_reward_and_is_trained_on"),
    # 5. padding is inert
    Mutation(5, "the KL penalty not masked", "fgrlhf/advantage.py",
             "return torch.where(mask, rewards - beta * (logp_old - logp_ref), 0.0)",
             "return rewards - beta * (logp_old - logp_ref)", "check: padding is inert"),
    Mutation(5, "standardised over padding too", "fgrlhf/advantage.py",
             "x = torch.where(mask, x, 0.0)\n    count = mask.sum().clamp(min=1)",
             "count = mask.sum().clamp(min=1)", "check: padding is inert"),
    Mutation(5, "the critic's loss masked too late", "fgrlhf/ppo.py",
             "(torch.where(mask, x, 0.0) for x in (values, values_old, returns))",
             "(x * mask for x in (values, values_old, returns))",
             "test_rules.test_rule_5_garbage_in_the_padding_changes_no_loss_no_gradient_no_metric",
             {"padding": float("nan")}),
    Mutation(5, "the last real token stripped with the padding", "fgrlhf/rollout.py",
             "lengths=sequences.lengths - 1)", "lengths=sequences.lengths - 2)",
             "check: sampling = scoring"),
    Mutation(5, "attention sees what comes later", "fgrlhf/model.py",
             "is_causal=mask is None", "is_causal=False", "check: padding is inert"),
    # 6. means are over the whole minibatch
    Mutation(6, "a mean a microbatch", "fgrlhf/ppo.py",
             "advantages[at.row, at.step], clip_eps, temperature, denominator)",
             "advantages[at.row, at.step], clip_eps, temperature, len(at.row))",
             "check: microbatches"),
    Mutation(6, "the count of a microbatch as denominator", "train_ppo.py",
             "config.clip_eps, config.temperature, over)",
             "config.clip_eps, config.temperature, int(sequences.response_lengths.sum()))",
             "test_rules.test_rule_6_microbatches_give_gradient_and_metrics_of_the_whole_minibatch",
             {"microbatch": 2, "method": "fine-grained"}),
    # 7. one standardisation, masked, that survives one token
    Mutation(7, "divided by a sample's deviation, NaN for one token", "fgrlhf/advantage.py",
             "return x / ((x.square().sum() / count).sqrt() + eps)",
             "return x / x[mask].std()",
             "test_rules.test_rule_7_a_batch_with_one_token_gives_finite_advantages_and_gradients",
             {"how": "rms"}),
    # 8. reductions in float32 at least
    Mutation(8, "log-softmax in bfloat16", "kernels/three_matmuls.py",
             "return torch.promote_types(x.dtype, torch.float32)", "return x.dtype",
             "test_rules.test_rule_8_a_bfloat16_model_reduces_in_float32"),
    # 9. empty batches and numbers that are not finite
    Mutation(9, "an empty batch divides by zero", "kernels/linear_cross_entropy.py",
             "return torch.where(weight == 0, 1.0, weight)", "return weight",
             "test_rules.test_rule_9_an_all_masked_batch_gives_loss_0_and_gradient_0"),
    Mutation(9, "a gradient that is not finite is stepped on", "fgrlhf/optimizer.py",
             "if not math.isfinite(norm):", "if False:",
             "test_rules.test_rule_9_a_non_finite_gradient_stops_before_the_weights_change",
             {"bad": float("nan")}),
    Mutation(9, "a reward that is not finite goes unseen", "fgrlhf/run.py",
             "if tensor.is_floating_point() and not tensor.isfinite().all():", "if False:",
             "test_run.test_run_guard_names_the_tensor_and_leaves_the_batch",
             {"tmp_path": ..., "bad": float("nan")}),
    # 10. training states
    Mutation(10, "the checksum is not compared", "fgrlhf/checkpoint.py",
             "intact = file.read() == sha.digest()", "intact = len(file.read()) == 32",
             "test_rules.test_rule_10_a_state_with_one_flipped_bit_is_refused",
             {"tmp_path": ...}),
    Mutation(10, "the optimizer's moments are not restored", "fgrlhf/optimizer.py",
             'part.load_state_dict(saved | {"param_groups": groups})', "pass",
             "test_rules.test_rule_10_the_optimizers_state_continues_bit_for_bit"),
    Mutation(10, "the schedule's step is not restored", "fgrlhf/optimizer.py",
             'self.count = state["count"]', "pass",
             "test_rules.test_rule_10_the_optimizers_state_continues_bit_for_bit"),
    Mutation(10, "another data file goes unseen", "fgrlhf/run.py",
             'if before.get(name, "") != sha:', "if False:",
             "test_run.test_run_refuses_to_resume_with_another_data_file", {"tmp_path": ...}),
]


class Loader(importlib.machinery.SourceFileLoader):
    """Compiles a broken source in place of the file's."""

    broken = ""

    def get_code(self, fullname):
        return compile(self.broken, self.path, "exec")


def break_it(mutation: Mutation) -> None:
    """Have the project imported anew, with one line of it broken."""
    name = mutation.file.removesuffix(".py").replace("/", ".")
    loader = Loader(name, str(ROOT / mutation.file))
    loader.broken = (ROOT / mutation.file).read_text().replace(mutation.old, mutation.new)
    finder = SimpleNamespace(find_spec=lambda wanted, path=None, target=None: (
        importlib.util.spec_from_file_location(name, loader.path, loader=loader)
        if wanted == name else None))
    sys.meta_path.insert(0, finder)


def forget() -> None:
    """Drop every module of the project and its tests, so that an import reads it again."""
    for module in [m for m in sys.modules if m.split(".")[0] in (*OWN, "tests")]:
        del sys.modules[module]


def catch(caught_by: str, arguments: dict, folder: Path) -> None:
    """Run one startup check or one test; raises where it fails."""
    if not caught_by.startswith("check: "):
        module, function = caught_by.split(".")
        given = {name: Path(tempfile.mkdtemp(dir=folder)) if value is ... else value
                 for name, value in arguments.items()}
        getattr(importlib.import_module("tests." + module), function)(**given)
        return
    checks, test = (importlib.import_module(n) for n in ("fgrlhf.checks", "tests.test_checks"))
    found = dict(checks.run_all(test.subject(folder, **arguments)))
    name = caught_by.removeprefix("check: ")
    assert found[name].passed, found[name]


def attempt(mutation: Mutation | None, folder: Path) -> None:
    """In a process of its own: leave in `folder`/verdict what the catcher raised, or "".

    Without a mutation all catchers are tried.
    """
    torch.set_num_threads(1)
    forget()
    if mutation is not None:
        break_it(mutation)
    try:
        for caught_by, with_ in ({(m.caught_by, repr(m.with_)): (m.caught_by, m.with_)
                                  for m in MUTATIONS}.values() if mutation is None
                                 else [(mutation.caught_by, mutation.with_)]):
            catch(caught_by, with_, folder)
        verdict = ""
    except BaseException as error:                          # pytest's failures are no Exceptions
        verdict = f"{type(error).__name__}: {error}"
    (folder / "verdict").write_text(verdict)


def verdict(folder: Path, mutation: Mutation | None) -> str:
    """What `attempt` left; a process that died leaves nothing and is an error."""
    (folder / "verdict").unlink(missing_ok=True)
    process = processes.server.Process(target=attempt, args=(mutation, folder))
    process.start()
    process.join(120)
    return (folder / "verdict").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ppo_folder(tmp_path_factory.mktemp("mutations"))


def test_every_catcher_passes_while_the_code_is_whole(folder):
    assert verdict(folder, None) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.rule}: {m.what}")
def test_broken_code_is_caught(mutation, folder):
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.old) == 1, "the line has changed: break the new one"
    found = verdict(folder, mutation)
    assert found != "" and "SyntaxError" not in found and "NameError" not in found, found


def test_every_rule_has_a_mutation():
    assert {mutation.rule for mutation in MUTATIONS} == set(range(1, 11))
