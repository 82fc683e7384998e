"""Each rule is broken on purpose, one function at a time, and something must notice it.

A row of MUTATIONS names a function of the project, gives a broken version of it, and names what
must then fail: a startup check, which every user runs before every PPO run, or a test. A startup
check must fail in float32 and in bfloat16, and with the sample of a large model too. A row is tried
in a forked process. With the unbroken functions the same checks and tests pass there.
"""

import contextlib
import importlib
import inspect
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from tests import processes
from tests.small import ppo_folder
from tests.test_layout import OWN


class Mutation(NamedTuple):
    rule: int                           # of the ten in fgrlhf/README.md
    what: str                           # the bug, as somebody published it or might write it
    function: str                       # its dotted name
    broken: Callable                    # the function -> its broken version
    caught_by: str                      # "check: NAME", or "test_module.test_function"
    with_: dict = {}                    # the parameters of the test; the method of the check


RLHF = {"method": "rlhf"}
CHECKED = [{"dtype": dtype, "as_large": as_large} for dtype in ("float32", "bfloat16")
           for as_large in (False, True)]


def reward_on_last_column(original):
    def broken(self, sequences):
        rewards = original(self, sequences)
        moved = torch.zeros_like(rewards)
        moved[:, -1] = rewards.sum(1)
        return moved
    return broken


def reward_read_in_padding(original):
    return lambda model, s, at, *layers: model.hidden(
        s.tokens, lengths=s.lengths - 1)[at.row, at.position]


def own_state(original):
    return lambda model, s, at, *layers: model.hidden(
        s.tokens, lengths=s.lengths)[at.row, at.position]


def stripped_too_far(original):
    return lambda model, s, at, *layers: model.hidden(
        s.tokens[:, :-1], lengths=s.lengths - 2)[at.row, at.position - 1]


def joint_ids(original):
    return lambda self, record, text, prompt: self.tokenizer.encode(
        self.tokenizer.decode(prompt) + text, bos=True, eos=True)[len(prompt):]


def response_mask(shift: int):
    """A mask that is `shift` tokens longer than the responses."""
    def of(original):
        def broken(self):
            steps = torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
            return steps < self.response_lengths[:, None] + shift
        return property(broken)
    return of


def without_eos(original):
    def broken(*args, **kwargs):
        rollout = original(*args, **kwargs)
        lengths = rollout.sequences.response_lengths
        shorter = torch.where(rollout.truncated, lengths, (lengths - 1).clamp(min=1))
        sequences = rollout.sequences._replace(response_lengths=shorter)
        return rollout._replace(sequences=sequences,
                                logp_old=rollout.logp_old[:, :int(shorter.max())])
    return broken


def unmasked_value_loss(original):
    def broken(values, values_old, returns, mask, clip_eps, denominator):
        clipped = values_old + (values - values_old).clamp(-clip_eps, clip_eps)
        worse = torch.maximum((values - returns).square(), (clipped - returns).square())
        return 0.5 * (worse * mask).sum() / max(denominator, 1)
    return broken


def attention_without_order(original):
    def attend(q, k, v, is_causal=False, **options):
        return original.scaled_dot_product_attention(q, k, v, is_causal=False, **options)
    return SimpleNamespace(**vars(original) | {"scaled_dot_product_attention": attend})


def own_count(original):
    """The loss of a microbatch divided by its own number of tokens."""
    return lambda policy, s, old, advantages, eps, temperature, denominator: original(
        policy, s, old, advantages, eps, temperature, int(s.response_lengths.sum()))


def unchecked_state(original):
    return lambda path: torch.load(io.BytesIO(Path(path).read_bytes()[:-32]), weights_only=True)


MUTATIONS = [
    # 1. logp[:, t] and reward[:, t] both belong to token t
    Mutation(1, "token rewards read one position early", "fgrlhf.sequences.hidden_at",
             lambda f: importlib.import_module("fgrlhf.sequences").hidden_before,
             "check: rewards and values"),
    Mutation(1, "rewards shifted by one in the advantage", "fgrlhf.advantage.penalise_kl",
             lambda f: lambda rewards, *rest: f(rewards.roll(1, 1), *rest),
             "check: planted reward"),
    Mutation(1, "log-probabilities taken from the token's own state",
             "fgrlhf.sequences.hidden_before", own_state, "check: sampling = scoring"),
    Mutation(1, "the mean put back after whitening", "fgrlhf.advantage.standardise",
             lambda f: lambda x, mask, *how: f(x, mask, *how) + x[mask].mean(),
             "check: planted reward"),
    Mutation(1, "the critic reads the state after the token", "fgrlhf.baseline.hidden_before",
             own_state, "check: rewards and values", RLHF),
    Mutation(1, "the last token's reward read in the padding", "fgrlhf.sequences.hidden_at",
             reward_read_in_padding, "check: rewards and values"),
    Mutation(1, "a response's reward on the last column, PAD or not",
             "fgrlhf.reward.RewardModel.ppo_rewards", reward_on_last_column,
             "check: rewards and values", RLHF),
    # 2. the first ratio is 1 and the KL of the policy to itself is 0
    Mutation(2, "scored at another temperature than sampled", "fgrlhf.sequences.score",
             lambda f: lambda model, sequences, temperature=1.0: f(model, sequences),
             "check: sampling = scoring"),
    Mutation(2, "updated at another temperature than sampled", "fgrlhf.ppo.policy_loss",
             lambda f: lambda policy, s, old, advantages, eps, temperature, denominator: f(
                 policy, s, old, advantages, eps, 1.0, denominator), "check: ratio 1, KL 0"),
    Mutation(2, "dropout in training", "fgrlhf.model.FeedForward.forward",
             lambda f: lambda self, x: torch.nn.functional.dropout(f(self, x), 0.1),
             "check: sampling = scoring"),
    Mutation(2, "sampled from another distribution than the one scored", "fgrlhf.rollout.choose",
             lambda f: lambda logits, *rest: f(logits.clamp(min=-1), *rest),
             "check: sampling = scoring"),
    # 3. prompt and response are tokenised separately
    Mutation(3, "prompt and response tokenised jointly", "fgrlhf.encode.Encoder.response",
             joint_ids, "test_rules.test_rule_3_the_prompts_ids_stay_a_prefix_where_joint_"
             "tokenisation_would_merge", {"tmp_path": ...}),
    # 4. masks come from lengths; EOS is an action
    Mutation(4, "padding counted by the mask", "fgrlhf.sequences.Sequences.response_mask",
             response_mask(+1), "check: masks"),
    Mutation(4, "EOS left out of the mask", "fgrlhf.sequences.Sequences.response_mask",
             response_mask(-1), "check: masks"),
    Mutation(4, "a truncated response not marked", "fgrlhf.rollout.sample",
             lambda f: lambda *a, **k: (r := f(*a, **k))._replace(
                 truncated=torch.zeros_like(r.truncated)), "check: masks"),
    Mutation(4, "EOS counted as padding by the length", "fgrlhf.rollout.sample", without_eos,
             "test_rules.test_rule_4_eos_earns_a_reward_and_is_trained_on"),
    # 5. padding is inert
    Mutation(5, "the KL penalty not masked", "fgrlhf.advantage.penalise_kl",
             lambda f: lambda rewards, old, ref, mask, beta: rewards - beta * (old - ref),
             "check: padding is inert"),
    Mutation(5, "standardised over padding too", "fgrlhf.advantage.standardise",
             lambda f: lambda x, mask, *how: f(x, torch.ones_like(mask), *how),
             "check: padding is inert"),
    Mutation(5, "the critic's loss masked too late", "fgrlhf.baseline.value_loss",
             unmasked_value_loss,
             "test_rules.test_rule_5_garbage_in_the_padding_changes_no_loss_no_gradient_no_metric",
             {"padding": float("nan")}),
    Mutation(5, "the last real token stripped with the padding", "fgrlhf.sequences.hidden_before",
             stripped_too_far, "check: sampling = scoring"),
    Mutation(5, "attention sees what comes later", "fgrlhf.model.F", attention_without_order,
             "check: padding is inert"),
    # 6. means are over the whole minibatch
    Mutation(6, "a mean per microbatch, in the loss", "fgrlhf.ppo.policy_loss", own_count,
             "check: microbatches"),
    Mutation(6, "a mean per microbatch, in the loop", "train_ppo.policy_loss", own_count,
             "test_rules.test_rule_6_microbatches_give_gradient_and_metrics_of_the_whole_minibatch",
             {"microbatch": 2, "method": "fine-grained"}),
    # 7. one standardisation, masked, that survives one token
    Mutation(7, "divided by the deviation of a sample, NaN for one token",
             "fgrlhf.advantage.standardise",
             lambda f: lambda x, mask, *how: torch.where(mask, x, 0.0) / x[mask].std(),
             "test_rules.test_rule_7_a_batch_with_one_token_gives_finite_advantages_and_gradients",
             {"how": "rms"}),
    # 8. reductions in float32 at least
    Mutation(8, "log-softmax in bfloat16", "kernels.three_matmuls.wide",
             lambda f: lambda x: x.dtype,
             "test_rules.test_rule_8_a_bfloat16_model_reduces_in_float32"),
    # 9. empty batches and numbers that are not finite
    Mutation(9, "an empty batch divides by zero", "kernels.linear_cross_entropy.total",
             lambda f: lambda weights: weights.sum(),
             "test_rules.test_rule_9_an_all_masked_batch_gives_loss_0_and_gradient_0"),
    Mutation(9, "a gradient that is not finite is stepped on",
             "fgrlhf.engine.distributed.clip_gradients",
             lambda f: lambda *a: (f(*a), 1.0)[1],
             "test_rules.test_rule_9_a_non_finite_gradient_stops_before_the_weights_change",
             {"bad": float("nan")}),
    Mutation(9, "a reward that is not finite is not noticed", "fgrlhf.engine.run.Run.guard",
             lambda f: lambda *a, **k: contextlib.nullcontext(),
             "test_run.test_run_guard_names_the_tensor_and_leaves_the_batch",
             {"tmp_path": ..., "bad": float("nan")}),
    # 10. training states
    Mutation(10, "the checksum is not compared", "fgrlhf.engine.states.load_state", unchecked_state,
             "test_rules.test_rule_10_a_state_with_one_flipped_bit_is_refused",
             {"tmp_path": ...}),
    Mutation(10, "the optimizer's moments are not restored",
             "fgrlhf.engine.optimizer.Optimizer.load_state_dict",
             lambda f: lambda self, state: setattr(self, "count", state["count"]),
             "test_rules.test_rule_10_the_optimizers_state_continues_bit_for_bit"),
    Mutation(10, "the step of the schedule is not restored",
             "fgrlhf.engine.optimizer.Optimizer.load_state_dict",
             lambda f: lambda self, state: f(self, state | {"count": 0}),
             "test_rules.test_rule_10_the_optimizers_state_continues_bit_for_bit"),
    Mutation(10, "another data file is not noticed", "fgrlhf.engine.run.Run._check_inputs",
             lambda f: lambda *a: None,
             "test_run.test_run_refuses_to_resume_with_another_data_file", {"tmp_path": ...}),
]


def break_it(mutation: Mutation) -> None:
    """Puts the broken function where the name says, and wherever another module imported it."""
    parts = mutation.function.split(".")
    length = next(n for n in range(len(parts) - 1, 0, -1) if is_module(".".join(parts[:n])))
    owner = importlib.import_module(".".join(parts[:length]))
    for name in parts[length:-1]:
        owner = getattr(owner, name)
    original = inspect.getattr_static(owner, parts[-1])
    broken = mutation.broken(original)
    setattr(owner, parts[-1], broken)
    if getattr(original, "__module__", None) == getattr(owner, "__name__", ""):
        for module in [m for n, m in sys.modules.items() if n.split(".")[0] in (*OWN, "tests")]:
            for name, value in list(vars(module).items()):
                if value is original:
                    setattr(module, name, broken)


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def catch(caught_by: str, arguments: dict, folder: Path) -> None:
    """Runs one startup check or one test, and raises when it fails.

    as_large: whether a startup check samples as little as it does from a large model.
    """
    if not caught_by.startswith("check: "):
        module, function = caught_by.split(".")
        given = {name: Path(tempfile.mkdtemp(dir=folder)) if value is ... else value
                 for name, value in arguments.items()}
        getattr(importlib.import_module("tests." + module), function)(**given)
        return
    from fgrlhf.checks import startup
    from tests.test_checks import subject
    startup.LARGE = 0 if arguments.pop("as_large") else 10**9
    found = dict(startup.run_all(subject(folder, **arguments)))
    name = caught_by.removeprefix("check: ")
    assert found[name].passed, found[name]


def attempt(number: int | None, folder: Path) -> None:
    """In a process of its own: writes what each catcher raised, or "", to `folder`/verdict.

    Without a mutation all catchers are tried.
    """
    torch.set_num_threads(1)
    rows, verdicts = MUTATIONS if number is None else [MUTATIONS[number]], []
    for module in {"tests." + row.caught_by.split(".")[0] for row in rows
                   if not row.caught_by.startswith("check")} | {"fgrlhf.checks.startup"}:
        importlib.import_module(module)                     # before the function is replaced
    if number is not None:
        break_it(MUTATIONS[number])
    for caught_by, with_ in {(m.caught_by, repr(m.with_)): (m.caught_by, m.with_)
                             for m in rows}.values():
        is_check = caught_by.startswith("check: ")
        for more in CHECKED if is_check else ({},):
            try:
                catch(caught_by, with_ | more, folder)
                verdicts.append("")
            except BaseException as error:                  # failures of pytest are no Exceptions
                verdicts.append(f"{type(error).__name__}: {error}")
    (folder / "verdict").write_text(json.dumps(verdicts))


def verdict(folder: Path, number: int | None) -> list[str]:
    """What `attempt` wrote; a process that died writes nothing, which is an error."""
    (folder / "verdict").unlink(missing_ok=True)
    process = processes.server.Process(target=attempt, args=(number, folder))
    process.start()
    process.join(300)                                       # seconds, on a loaded machine
    return json.loads((folder / "verdict").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return ppo_folder(tmp_path_factory.mktemp("mutations"))


def test_every_catcher_passes_while_nothing_is_broken(folder):
    assert not any(verdict(folder, None))


@pytest.mark.parametrize("number", range(len(MUTATIONS)),
                         ids=[f"{m.rule}: {m.what}" for m in MUTATIONS])
def test_broken_code_is_caught(number, folder):
    found = verdict(folder, number)
    errors = ("NameError", "ImportError", "AttributeError")
    assert found and all(error and not error.startswith(errors) for error in found), found


def test_every_rule_has_a_mutation():
    assert {mutation.rule for mutation in MUTATIONS} == set(range(1, 11))
