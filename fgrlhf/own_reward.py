"""Your own reward: a Python function in the place of a reward model, for train_ppo.py.

    --reward my_rewards:brevity         the function `brevity` of my_rewards.py

    def brevity(responses: list[str]) -> list[float]:
        return [-len(text.split()) / 10 for text in responses]

The function names the arguments that it wants. Each is a list with one item per response:

    prompts     list[str]               what the policy has read, the template included
    responses   list[str]               the text of the response
    ids         list[list[int]]         its tokens; EOS is the last, or missing if it was truncated
    tokens      list[list[str]]         the text of each token, "" for EOS; joined, the response

It returns a list with one item per response:

    --method rlhf, rloo, grpo           a number, R of the response
    --method fine-grained               a list of numbers, r_t of each of its tokens, EOS included

Rewards are used as they are returned, without calibration. The startup check "reward and KL scale"
prints their deviation, and with it the --beta at which a nat of KL costs that much. The function
gets some responses at a time (--microbatch). The reward of a response may depend on this response
and its prompt only, and must be the same in every call: the startup checks compare.
"""

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fgrlhf.data.fields import UserError, show
from fgrlhf.engine.draws import generator
from fgrlhf.model import LLaMA
from fgrlhf.reward import RewardModel
from fgrlhf.sequences import Sequences
from fgrlhf.tokenizer import Tokenizer

ARGUMENTS = ("prompts", "responses", "ids", "tokens")
LARGEST = torch.finfo(torch.float32).max


# ----- finding the function -----------------------------------------------------------------------

class Found(NamedTuple):
    """The function behind --reward module:function."""

    name: str                           # as it was given
    function: Callable
    file: Path                          # of the module
    wanted: list[str]                   # its parameters, some of ARGUMENTS


def is_own(reward: str) -> bool:
    """Tells whether --reward names a function, module:function, and no path that exists."""
    return reward.rpartition(":")[2].isidentifier() and ":" in reward and not Path(reward).exists()


def find(reward: str) -> Found:
    """Imports the module of module:function and returns the function.

    The current directory comes first among the places where Python looks for the module. Raises
    UserError when there is no such module or function, and when the module cannot be imported.
    """
    module_name, _, name = reward.rpartition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"--reward {reward}: expected module:function with a module as in `import "
                        f"my_rewards`, got {module_name!r}; give its name without folder and .py")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise UserError(f"--reward {reward}: expected {module_name.replace('.', '/')}.py in "
                            f"{os.getcwd()} or on Python's path, got no such file; start the "
                            "command where the file is") from None
        raise UserError(f"--reward {reward}: {module_name} cannot be imported: {_said(error)}; "
                        "correct the file") from None
    function, file = getattr(module, name, None), getattr(module, "__file__", None)
    if not callable(function) or file is None:
        there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ ==
                 module.__name__]
        raise UserError(f"--reward {reward}: expected a function {name} in {file or module_name}, "
                        f"got only {show(there)}; correct the name")
    return Found(reward, function, Path(file), _parameters(reward, function))


def _parameters(reward: str, function: Callable) -> list[str]:
    """Returns which of ARGUMENTS a function wants. Raises UserError when it needs another one."""
    try:
        there = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):                                     # written in C
        there = ()
    needed = {p.name for p in there if p.default is p.empty
              and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    wanted = [p.name for p in there if p.name in ARGUMENTS
              and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not wanted or needed - set(wanted):
        got = ", ".join(p.name for p in there) or "none"
        raise UserError(f"--reward {reward}: expected parameters with names among "
                        f"{', '.join(ARGUMENTS)}, got {got}; rename them, or give others a default")
    return wanted


def _said(error: BaseException, file: Path | None = None) -> str:
    """Returns the last line of the traceback of an error, and the line of code it comes from."""
    last = " ".join(traceback.format_exception_only(error)[-1].split())
    if isinstance(error, SyntaxError):
        return f"{last} ({error.filename}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if file is not None and frame.filename == str(file)]
    frame = (own or frames)[-1]
    return f"{last} ({frame.filename}, line {frame.lineno})"


# ----- rewards ------------------------------------------------------------------------------------

class OwnReward(nn.Module):
    """A function with what PPO needs of a RewardModel: `kind` and `ppo_rewards`. It has no weights.

    kind: "token" for --method fine-grained, otherwise "sequence".
    """

    def __init__(self, found: Found, method: str, tokenizer: Tokenizer):
        super().__init__()
        self.found, self.method, self.tokenizer = found, method, tokenizer
        self.kind = "token" if method == "fine-grained" else "sequence"

    def ppo_rewards(self, sequences: Sequences) -> Tensor:
        """The rewards [B, T] float32: one per token, or R on the last token, 0 in the padding.

        Raises UserError when the function fails or returns something else than the rewards.
        """
        tokens, starts, lengths = (part.tolist() for part in sequences)
        prompts = [row[:start] for row, start in zip(tokens, starts)]
        ids = [row[start:start + n] for row, start, n in zip(tokens, starts, lengths)]
        decode = self.tokenizer.decode
        given = {"prompts": [decode(x) for x in prompts], "responses": [decode(x) for x in ids],
                 "ids": ids, "tokens": [self.tokenizer.texts(x) for x in ids]}
        rewards = torch.zeros(len(lengths), max(lengths))
        found = self._checked(self._call(given), given["responses"], lengths)
        for b, (values, n) in enumerate(zip(found, lengths)):
            rewards[b, n - len(values):n] = torch.tensor(values)
        return rewards.to(sequences.tokens.device)

    def _call(self, given: dict[str, list]):
        """Calls the function. Where it fails, the first response that fails by itself is named."""
        call = lambda rows: self.found.function(
            **{name: given[name][rows] for name in self.found.wanted})
        try:
            return _plain(call(slice(None)))
        except (Exception, SystemExit) as error:
            said, at = _said(error, self.found.file), None
        for b, text in enumerate(given["responses"]):
            try:
                call(slice(b, b + 1))
            except (Exception, SystemExit) as error:
                said, at = _said(error, self.found.file), text
                break
        self._refuse(at, f"the function failed: {said}; correct it")

    def _checked(self, rewards, responses: list[str], lengths: list[int]) -> list[list[float]]:
        """Returns the numbers of each response: R, or as many as it has tokens."""
        if not isinstance(rewards, list) or len(rewards) != len(responses):
            got = f"{len(rewards)} of them" if isinstance(rewards, list) else show(rewards)
            self._refuse(None, f"expected a list of {len(responses)} rewards, one for each "
                         f"response, got {got}; correct what the function returns")
        per_token = self.kind == "token"
        wanted = "a list of numbers, one for each token," if per_token else "one number"
        for value, text, n in zip(rewards, responses, lengths):
            if isinstance(value, list) != per_token:
                self._refuse(text, f"expected {wanted} for --method {self.method}, got "
                             f"{show(value)}; correct what the function returns, or choose "
                             "another --method")
            if per_token and len(value) != n:
                self._refuse(text, f"expected {n} numbers, one for each token (EOS included), got "
                             f"{len(value)}; correct what the function returns")
            for t, x in enumerate(value if per_token else [value]):
                if not isinstance(x, Real) or not abs(x) <= LARGEST:
                    which = f"reward of token {t}" if per_token else "reward"
                    self._refuse(text, f"{which}: expected a finite number, got {show(x)}; correct "
                                 "what the function returns")
        return [[float(x) for x in (value if per_token else [value])] for value in rewards]

    def _refuse(self, response: str | None, why: str) -> NoReturn:
        where = "" if response is None else f" response {show(response)}:"
        raise UserError(f"--reward {self.found.name}:{where} {why}")


def _plain(value):
    """Returns arrays and tensors, also those in a list, as lists and numbers; tuples as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@torch.no_grad()
def start_of_critic(policy: LLaMA, seed: int) -> RewardModel:
    """Returns what a critic starts from without a reward model: the policy's trunk and a new head.

    The head is drawn as train_rm.py draws it, Normal(0, 1/sqrt(D+1)), by `seed`.
    """
    model, D = RewardModel(policy, "sequence"), policy.config.dim
    draws = torch.randn(1, D, generator=generator(seed, "critic"), dtype=torch.float64)
    model.head.weight.copy_(draws * (D + 1) ** -0.5)
    return model
