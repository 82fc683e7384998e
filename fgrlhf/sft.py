"""Supervised fine-tuning: the policy everything starts from, and the rival "SFT on the edits".

    L = -mean over response tokens of log pi(y_t | x, y_<t)

The records may be demonstrations, minimal edits (the edited side is imitated), preference pairs
(the chosen side) or AlpacaEval outputs. The model is that of --model, or a fresh one by a preset.

    python -m fgrlhf.sft --data demonstrations.jsonl --init tiny --tokenizer tokenizer.model \
        --out runs/sft
    python -m fgrlhf.sft --data edits.jsonl --model runs/sft/policy --out runs/imitation

Leaves OUT/policy (a model folder), config.json, metrics.jsonl, timing.jsonl.
"""

import math
from dataclasses import dataclass

import torch

from fgrlhf import distributed, edits, readers
from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer, save_model
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.encode import encode_prompt, encode_response
from fgrlhf.files import each
from fgrlhf.lora import Own
from fgrlhf.model import DTYPES, PRESETS, LLaMA, build
from fgrlhf.optimizer import Optimizer, check_in_backward
from fgrlhf.rollout import Sequences, locate, pack, states_before
from fgrlhf.run import Run, bucketed_batches, pick_device
from fgrlhf.tokenizer import Tokenizer
from kernels import linear_cross_entropy


@dataclass(frozen=True)
class Config:
    data: str = arg(help="demonstrations, edits, pairs or AlpacaEval outputs")
    out: str = arg(help="folder for the policy and the logs")
    model: str | None = arg(None, help="folder of the model to start from")
    init: str | None = arg(None, help=f"or a preset to initialise: {', '.join(PRESETS)}")
    tokenizer: str | None = arg(None, help="tokenizer.model, with --init (a folder has its own)")
    context: int | None = arg(None, least=8, help="context, with --init (default: the preset's)")
    template: str = arg("plain", choices=tuple(edits.TEMPLATES),
                        help="how a record becomes a prompt")
    prompt_tokens: int | None = arg(None, least=2,
                                    help="keep a longer prompt's last N tokens (default: refuse)")
    limit: int | None = arg(None, least=1, help="use the first N records only")
    on_bad_record: str = arg("stop", choices=("stop", "skip"), help="a record that cannot be used: "
                             "stop, or leave it out, count and list it")
    epochs: int = arg(1, least=0, help="passes over the data; 0 saves the model as it starts")
    batch: int = arg(32, least=1, help="sequences a step")
    microbatch: int = arg(0, least=0, help="sequences a forward pass, gradients added up; "
                          "changes memory alone; 0 takes the whole batch")
    lr: float = arg(5e-3, least=0, help="Adam's peak learning rate: warm-up, then linear to 0")
    muon_lr: float = arg(1e-2, least=0,
                         help="Muon's learning rate for the trunk's matrices; 0 gives them to Adam")
    warmup: int = arg(20, least=0, help="warm-up steps")
    seed: int = arg(0, help="seed of initialisation and data order")
    save_every: int = arg(200, least=1, help="steps between training states for --resume")
    keep: int = arg(2, least=1, help="training states kept: the newest, and those before it")
    resume: bool = arg(False, help="continue the unfinished run in --out")
    checkpoint_activations: bool = arg(False, help="keep one activation a block, make the rest "
                                       "again in backward")
    step_in_backward: bool = arg(False, help="step each weight as its gradient appears and hold no "
                                 "gradients; each is clipped alone; needs --microbatch 0")
    lora_rank: int = arg(0, least=0, help="train adapters of this rank over frozen weights; 0 "
                         "trains all weights")
    dtype: str = arg("float32", choices=DTYPES,
                     help="of weights and activations; bfloat16 keeps float32 master weights")
    device: str = arg("auto", help="auto, cpu, cuda, ...")


def start_model(config: Config, device) -> tuple[LLaMA, Tokenizer]:
    """The model and tokenizer of --model, or a fresh model of the --init preset."""
    dtype = getattr(torch, config.dtype)
    if (config.model is None) == (config.init is None):
        raise UserError("expected exactly one of --model DIR and --init PRESET")
    if config.model is not None:
        model = (load_adapted(config.model, device, dtype, config.lora_rank, config.seed)
                 if config.lora_rank else load_model(config.model, device, dtype))
        return model, load_tokenizer(config.model)
    if config.lora_rank:
        raise UserError("--lora-rank: expected --model DIR; adapters need trained weights")
    if config.init not in PRESETS:
        raise UserError(f"--init {config.init}: expected one of {', '.join(PRESETS)}")
    if config.tokenizer is None:
        raise UserError("--init: expected --tokenizer FILE beside it")
    tokenizer = Tokenizer(config.tokenizer)
    context = config.context or PRESETS[config.init].max_seq_len
    model = build(PRESETS[config.init], config.seed, vocab_size=tokenizer.vocab_size,
                  max_seq_len=context)
    return model.to(device, dtype), tokenizer


def loss_of(model: LLaMA, sequences: Sequences, tokens: float | None = None) -> torch.Tensor:
    """Negative log-likelihood of the response tokens in nats, over `tokens` or their number."""
    at = locate(sequences)
    hidden = states_before(model, sequences, at)                                 # [N, D]
    return linear_cross_entropy.fused(hidden, model.head, at.target, denominator=tokens).loss


def train(config: Config) -> None:
    device = distributed.start(pick_device(config.device))
    model, tokenizer = start_model(config, device)
    context = model.config.max_seq_len
    limit = min(config.prompt_tokens or context, context - 1)

    def encode(record: edits.Demonstration) -> tuple[list[int], list[int]]:
        prompt = encode_prompt(tokenizer, record, config.template, limit,
                               keep_end=config.prompt_tokens is not None)
        return prompt, encode_response(tokenizer, record.output, prompt, context)

    records = readers.read_demonstrations(config.data, config.on_bad_record)[:config.limit]
    prompts, responses = zip(*each(records, encode, config.on_bad_record, config.data))
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    per_epoch = -(-len(prompts) // config.batch)
    steps = config.epochs * per_epoch
    check_in_backward(config.step_in_backward, config.microbatch)
    model.activation_checkpointing = config.checkpoint_activations
    distributed.shard(model)
    optimizer = Optimizer(model, config.lr, config.warmup, steps, config.muon_lr,
                          in_backward=config.step_in_backward)
    log = Run(config, tokenizer.sha256, ("data", "model"))
    log.restore(model=Own(model), optimizer=optimizer)
    for step in log.steps(steps, "sft"):
        epoch, cursor = divmod(step - 1, per_epoch)
        rows = bucketed_batches(lengths, config.batch, config.seed, epoch)[cursor]
        tokens, total = sum(len(responses[i]) for i in rows), 0.0
        for part, counts in distributed.shares(rows, config.microbatch, distributed.in_order):
            sequences = pack([prompts[i] for i in part], [responses[i] for i in part],
                             device=device)
            loss = loss_of(model, sequences, tokens if counts else math.inf)
            with log.guard(step, {"model": model}, loss=loss, **sequences._asdict()):
                loss.backward()
            total += loss.item()
        with log.guard(step, {"model": model}, **sequences._asdict()):
            norm = optimizer.step()
        log.end_step(step, distributed.totals({"sft/loss": total}) | {
            "sft/gradient_norm": norm, "sft/tokens": tokens}, model=Own(model), optimizer=optimizer)
    with distributed.gathered(model):
        if log.first:
            save_model(model, log.folder / "policy", tokenizer=tokenizer)
    log.finish({"steps": steps, "records": len(prompts)})


if __name__ == "__main__":
    run(lambda: train(parse(Config, prog="python -m fgrlhf.sft", description=__doc__)))
