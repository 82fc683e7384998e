"""Continue a text with a model.

    python -m fgrlhf.generate --model DIR --prompt "Once upon" --max-new-tokens 200 --temperature 0

The prompt and its continuation are printed on stdout token by token, everything else on stderr. A
text ends at EOS, at the end of the context, or at BOS, because models that were trained on a stream
of documents begin the next document with BOS.

    python -m fgrlhf.generate --model DIR --template chatml --prompt "Name a river of France."

With --template the prompt is a question, and only the answer is printed. It also ends at the
template's end of a turn. Without --template one line on stderr says which template fits the model.

Rollouts are not sampled here but by `rollout.sample`: with top-p, sampling and scoring would be two
different distributions.
"""

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fgrlhf.checkpoint import load_model, load_tokenizer
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_text
from fgrlhf.data.records import Prompt
from fgrlhf.engine.config import DTYPES, Computation, arg, parse, run
from fgrlhf.engine.distributed import pick_device
from fgrlhf.engine.encoding import is_text, read_encoding
from fgrlhf.layouts.chat_template import advise, recognise
from fgrlhf.model import KVCache, LLaMA
from fgrlhf.rollout import inverse_cdf, real_slots
from fgrlhf.templates import encode_filled, end_of_turn, read_template, template_arg
from fgrlhf.tokenizer import Tokenizer


def read_or_auto(given: str) -> str:
    return given if given == "auto" else read_template(given)


@dataclass(frozen=True, kw_only=True)
class Config(Computation):
    model: str = arg(help="model folder (any layout), GGUF file or llama2.c .bin file")
    prompt: str = arg("", help="text to continue")
    template: str | None = template_arg(None, "words around each prompt: auto (that of the model "
                                        "itself)", read_or_auto)
    prompts_file: str | None = arg(None, help="continue each line of this file instead")
    max_new_tokens: int = arg(256, least=0, help="largest number of tokens to add")
    temperature: float = arg(1.0, least=0, help="0 always takes the most probable token")
    top_p: float = arg(1.0, help="sample from the fewest most probable tokens whose probabilities "
                       "sum to this number or more")
    seed: int | None = arg(None, help="seed of the sampling (default: another one each time)")
    batch: int = arg(16, least=1, help="lines of the file that are continued together")
    dtype: str | None = arg(None, choices=DTYPES, help="of weights and activations (default: that "
                            "of the checkpoint)")


def next_token(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> Tensor:
    """Chooses a token for each row: logits [B, V] and uniform [B] in [0, 1) -> token [B].

    The distribution is softmax(logits / temperature), restricted to the fewest most probable tokens
    that sum to at least `top_p`. It is sampled by inverse CDF. Temperature 0 takes the argmax.
    Raises FloatingPointError for logits that are NaN or infinite.
    """
    scaled = logits.float() / (temperature or 1.0)
    if not scaled.isfinite().all():
        raise FloatingPointError(
            f"logits: expected finite numbers, got others in {logits.dtype} at temperature "
            f"{temperature:g}; try --dtype float32, temperature 0 or 1, or another checkpoint")
    if temperature == 0:
        return logits.argmax(-1)
    logp = torch.log_softmax(scaled, dim=-1)
    if top_p < 1:
        ordered, index = logp.sort(dim=-1, descending=True)
        beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p       # enough without them
        logp = logp.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    return inverse_cdf(logp, uniform)[0]


@torch.no_grad()
def continue_batch(model: LLaMA, prompts: list[list[int]], stop_ids: tuple[int, ...],
                   max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
                   generator: torch.Generator | None = None) -> Iterator[list[int | None]]:
    """Yields, for each step, the next id of each prompt, and None for those that have ended.

    A text ends before any of `stop_ids`, and at the end of the context.
    """
    device, context, B = model.head.device, model.config.max_seq_len, len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest, steps = int(lengths.max()), min(max_new_tokens, context - int(lengths.min()))
    tokens = torch.zeros(B, longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model.config, B, longest + steps, device, model.head.dtype)
    hidden = model.hidden(tokens, cache=cache)[torch.arange(B), lengths - 1]         # [B, D]
    going = torch.ones(B, dtype=torch.bool, device=device)
    stops = torch.tensor(stop_ids, device=device)
    for t in range(steps):
        uniform = torch.rand(B, dtype=torch.float64, generator=generator).to(device)
        token = next_token(hidden @ model.head.T, temperature, top_p, uniform)       # [B]
        going &= (lengths + t < context) & ~torch.isin(token, stops)
        if not going.any():
            return
        yield [id if on else None for id, on in zip(token.tolist(), going.tolist())]
        real = real_slots(lengths, longest, longest + t + 1)
        hidden = model.hidden(token[:, None], (lengths + t)[:, None], real, cache)[:, 0]


def template_of(config: Config, tokenizer: Tokenizer) -> str | None:
    """Returns the template to use, or None. stderr says what fits when none was given.

    stderr also says when the given template is another than in the model's training.
    A model that was trained here names its template in encoding.json; others may have a chat
    template. Raises UserError when --template auto finds neither.
    """
    encoding, chat = read_encoding(config.model), tokenizer.chat_template
    template = encoding.template if encoding else recognise(chat or "")
    known = config.model if is_text(template or "") else template
    if config.template not in (None, "auto"):
        if encoding and config.template != template:
            print(f"this model was trained with --template {known}, got another; --template auto "
                  "takes that of the training", file=sys.stderr)
        return config.template
    if config.template == "auto" and template is None:
        raise UserError(f"--template auto: expected a model with a known template, got "
                        f"{config.model} without one; give --template NAME or FILE")
    if encoding and config.template is None:
        print(f"this model was trained with --template {known}; the prompt is continued as it is",
              file=sys.stderr)
    elif chat and not encoding:
        print(advise(chat), file=sys.stderr)
    return config.template and template


def read_prompts(config: Config, tokenizer: Tokenizer, context: int,
                 template: str | None = None) -> list[list[int]]:
    """Returns the ids of each prompt, in `template` if there is one, BOS first where needed."""
    texts = [config.prompt]
    if config.prompts_file is not None:
        lines = read_text(config.prompts_file).split("\n")
        texts = [line for line in (line.rstrip("\r") for line in lines) if line]
        if config.prompt or not texts:
            raise UserError(f"--prompts-file {config.prompts_file}: expected one prompt per line "
                            f"and no --prompt, got {len(texts)} lines and --prompt "
                            f"{config.prompt!r}; give one of the two")
    prompts = [tokenizer.encode(text, bos=True) if template is None else
               encode_filled(tokenizer, Prompt(text, text), template) for text in texts]
    for text, prompt in zip(texts, prompts):
        if not prompt:
            raise UserError("--prompt: expected a text, because this model begins without BOS, got "
                            "none; give a prompt")
        if len(prompt) > context:
            raise UserError(f"prompt {text[:30]!r}...: expected at most {context} tokens, the "
                            f"model's context, got {len(prompt)}; shorten the prompt")
    return prompts


def ids_of(row: int, steps: Iterable[list[int | None]], made: list[int]) -> Iterator[int]:
    """Yields the new ids of a row as they come, and appends them to `made`."""
    for step in steps:
        if step[row] is not None:
            made.append(step[row])
            yield step[row]


def generate(config: Config) -> None:
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top-p {config.top_p}: expected a number above 0 and at most 1")
    model = load_model(config.model, pick_device(config.device),
                       config.dtype and getattr(torch, config.dtype))
    tokenizer = load_tokenizer(config.model)
    template = template_of(config, tokenizer)
    prompts = read_prompts(config, tokenizer, model.config.max_seq_len, template)
    stop_ids = (tokenizer.eos_id, tokenizer.bos_id)
    if template and (end := end_of_turn(tokenizer, template)) is not None:
        stop_ids += (end,)
    generator = torch.Generator()
    generator.manual_seed(config.seed) if config.seed is not None else generator.seed()
    start, cut = time.perf_counter(), 0
    for first in range(0, len(prompts), config.batch):
        batch = prompts[first:first + config.batch]
        steps = continue_batch(model, batch, stop_ids, config.max_new_tokens, config.temperature,
                               config.top_p, generator)
        if len(batch) > 1:                              # texts are printed one after the other
            steps = list(steps)
        for row, prompt in enumerate(batch):
            made: list[int] = []
            shown = prompt if template is None else []          # with a template only the answer
            for text in tokenizer.stream(itertools.chain(shown, ids_of(row, steps, made))):
                print(text, end="", flush=True)
            print(flush=True)
            cut += len(made) == min(config.max_new_tokens, model.config.max_seq_len - len(prompt))
    ending = f", {cut} cut at --max-new-tokens or at the end of the context" if cut else ""
    print(f"{len(prompts)} texts in {time.perf_counter() - start:.1f} s{ending}", file=sys.stderr)


if __name__ == "__main__":
    run(lambda: generate(parse(Config, __doc__)))
