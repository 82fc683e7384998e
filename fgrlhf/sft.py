r"""Supervised fine-tuning: where every policy starts, and the rival "SFT on the edits".

    L = -mean over response tokens of log pi(y_t | x, y_<t)

The records may be demonstrations, minimal edits (the edited side is imitated), preference pairs
(the chosen side) or AlpacaEval outputs. The model is that of --model, or a new one of a preset.

    python -m fgrlhf.sft --data demonstrations.jsonl --init tiny --tokenizer tokenizer.model \
        --out runs/sft
    python -m fgrlhf.sft --data edits.jsonl --model runs/sft/policy --out runs/imitation

OUT/policy is the model folder.

All training loops of the project share this machinery (fgrlhf/engine). `Run` is the output folder:
metrics, states for --resume, and `guard`, which stops at NaN before the step is taken.
`TrainableState` is what a state keeps of a model. `rows_of_step` draws the batch of a step from the
seed. `microbatches` cuts the batch for memory and for several ranks; its weight is 1, or 0 on a
rank that has no rows left. `Sums` adds up what is logged. `Optimizer` has Muon for the matrices of
the trunk (Jordan et al. 2024) and Adam for everything else.
"""

from dataclasses import dataclass

import torch

from fgrlhf.checkpoint import (
    AnyTokenizer, load_to_train, load_tokenizer, open_tokenizer, save_model)
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import each
from fgrlhf.data.readers import read_demonstrations
from fgrlhf.encode import Encoder, ReadingResponses
from fgrlhf.engine import distributed
from fgrlhf.engine.config import Machinery, arg, parse, run
from fgrlhf.engine.distributed import Sums, microbatches
from fgrlhf.engine.draws import rows_of_step
from fgrlhf.engine.encoding import Encoding
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.run import Run
from fgrlhf.engine.states import TrainableState
from fgrlhf.engine.summary import Ending, command
from fgrlhf.model import MOST, LLaMA, build
from fgrlhf.presets import PRESETS
from fgrlhf.sequences import Sequences, hidden_before, locate, pack
from fgrlhf.templates import check_template, say_hidden_passages
from kernels import linear_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Config(ReadingResponses, Machinery):
    data: str = arg(help="demonstrations, edits, pairs or AlpacaEval outputs")
    out: str = arg(help="folder for the policy and the logs")
    model: str | None = arg(None, help="folder of the model to start from")
    init: str | None = arg(None, help=f"or a preset to initialise: {', '.join(PRESETS)}")
    tokenizer: str | None = arg(None, help="with --init: tokenizer.model, tokenizer.json, "
                                "a GGUF file, or a model folder")
    context: int | None = arg(None, least=8, help="with --init: context (default: the preset's)")
    epochs: int = arg(1, least=0, help="passes over the data; 0 saves the model as it starts")
    batch: int = arg(32, least=1, help="sequences per step")
    lr: float = arg(5e-3, least=0, help="Adam's peak learning rate: warm-up, then linear to 0")
    muon_lr: float = arg(1e-2, least=0, help="Muon's learning rate for the matrices of the trunk; "
                         "0: Adam trains them too")
    warmup: int = arg(20, least=0, help="warm-up steps")
    limit: int | None = arg(None, least=1, help="use only the first N records")
    microbatch: int = arg(0, least=0, help="sequences per forward pass; changes memory, not "
                          "results; 0: the whole batch")


def start_tokenizer(config: Config) -> AnyTokenizer:
    """Returns the tokenizer of --model or --tokenizer. Refuses flags that do not fit together."""
    if (config.model is None) == (config.init is None):
        raise UserError("expected exactly one of --model DIR and --init PRESET")
    if config.model is not None:
        if config.tokenizer is not None or config.context is not None:
            raise UserError("--tokenizer and --context: expected with --init; --model has its own")
        return load_tokenizer(config.model)
    if config.lora_rank:
        raise UserError("--lora-rank: expected --model DIR; adapters need trained weights")
    if config.init not in PRESETS:
        raise UserError(f"--init {config.init}: expected one of {', '.join(PRESETS)}")
    if config.tokenizer is None:
        raise UserError("--init: expected --tokenizer FILE too")
    if (config.context or 0) > MOST["max_seq_len"]:
        raise UserError(f"--context {config.context}: expected at most {MOST['max_seq_len']}")
    return open_tokenizer(config.tokenizer)


def start_model(config: Config, vocab_size: int, device: torch.device) -> LLaMA:
    """Returns the model of --model, or a new model of the --init preset."""
    dtype = getattr(torch, config.dtype)
    if config.model is None:
        context = config.context or PRESETS[config.init].max_seq_len
        return build(PRESETS[config.init], config.seed, vocab_size=vocab_size,
                     max_seq_len=context).to(device, dtype)
    return load_to_train(config.model, device, dtype, config.lora_rank, config.seed)


def loss_of(model: LLaMA, sequences: Sequences, tokens: int | None = None) -> torch.Tensor:
    """Returns the negative log-likelihood of the response tokens, in nats.

    It is a sum over the batch divided by `tokens`, by default the number of its response tokens.
    """
    at = locate(sequences)
    hidden = hidden_before(model, sequences, at)                                 # [N, D]
    return linear_cross_entropy.fused(hidden, model.head, at.target, denominator=tokens).loss


def train(config: Config) -> None:
    """Trains the model on the responses and saves it in OUT/policy."""
    device = distributed.start(distributed.pick_device(config.device))
    tokenizer = start_tokenizer(config)
    check_template(tokenizer, config.template, trains=True, model=config.model)
    log = Run(config, tokenizer.sha256, ("data", "model"))      # refuses an --out that is in use
    model = start_model(config, tokenizer.vocab_size, device)
    encoder = Encoder(tokenizer, model.config.max_seq_len, config.template, config.prompt_tokens,
                      config.cut_responses)
    records = read_demonstrations(config.data, config.on_bad_record)[:config.limit]
    prompts, responses = zip(*each(records, encoder.demonstration, config.on_bad_record,
                                   config.data))
    say_hidden_passages(records, config.template, config.data)
    counts = encoder.counted(config.data) if log.writes else {}
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    steps = config.epochs * -(-len(prompts) // config.batch)
    model.activation_checkpointing = config.checkpoint_activations
    distributed.shard(model)
    optimizer = Optimizer(model, config.lr, config.warmup, steps, config.muon_lr)
    state = {"model": TrainableState(model), "optimizer": optimizer}
    log.restore(**state)
    for step in log.steps(steps, "sft"):
        rows = rows_of_step(lengths, config.batch, config.seed, step)
        batch = pack([prompts[i] for i in rows], [responses[i] for i in rows], device=device)
        tokens, sums = int(batch.response_lengths.sum()), Sums()
        with log.guard(step, {"model": model}, **batch._asdict()):
            for part, weight in microbatches(range(len(rows)), config.microbatch):
                loss = loss_of(model, batch.rows(part), tokens)
                sums.add(weight, {"sft/loss": loss})
                (weight * loss).backward()
            norm = optimizer.step()
        log.end_step(step, sums.over_ranks() | {"sft/gradient_norm": norm, "sft/tokens": tokens},
                     **state)
    with distributed.gathered(model):
        if log.writes:
            save_model(model, log.folder / "policy", tokenizer=tokenizer,
                       encoding=Encoding(config.template, config.prompt_tokens))
    after = command("train_rm.py --kind token --data EDITS --model {policy} --out OUT",
                    config.template, policy=log.folder / "policy")
    log.finish({"steps": steps, "records": len(prompts), **counts}, Ending("policy by SFT", after))


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
