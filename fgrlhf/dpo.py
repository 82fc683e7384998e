r"""DPO, a rival without a reward model and without sampling (Rafailov et al. 2023).

    R_DPO(x, y) = beta (log pi(y | x) - log ref(y | x))             of a whole response
    L = -mean over pairs of log sigmoid(R_DPO(x, y+) - R_DPO(x, y-))
        - w * mean over tokens of y+ of log pi(y_t | x, y_<t)       w: --sft-weight, 0 is DPO

This beta is DPO's own, not the KL coefficient of equation (5). Policy and reference start from
--model. On minimal edits y+ is the edit and y- its original; w > 0
also imitates the edit, as the rival "DPO + SFT".

    python -m fgrlhf.dpo --data edits.jsonl --model runs/sft/policy --sft-weight 1 --out runs/dpo

OUT/policy is the model folder.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fgrlhf.checkpoint import load_to_train, load_tokenizer, save_model
from fgrlhf.encode import Encoder, ReadingResponses, read_encoded
from fgrlhf.engine import distributed
from fgrlhf.engine.config import Machinery, arg, parse, run
from fgrlhf.engine.distributed import Sums, microbatches
from fgrlhf.engine.draws import rows_of_step
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.run import Run
from fgrlhf.engine.states import TrainableState
from fgrlhf.engine.summary import Ending, command
from fgrlhf.model import LLaMA
from fgrlhf.sequences import Sequences, by_length, pack, score
from fgrlhf.templates import check_template


@dataclass(frozen=True, kw_only=True)
class Config(ReadingResponses, Machinery):
    data: str = arg(help="edits or pairs")
    model: str = arg(help="folder of the SFT model: start of the policy, and the reference")
    out: str = arg(help="folder for the policy and the logs")
    beta: float = arg(0.1, least=0, help="scale of the log-ratios")
    sft_weight: float = arg(0.0, least=0, help="w, the weight of imitating y+")
    epochs: int = arg(2, least=0, help="passes over the data")
    batch: int = arg(32, least=1, help="pairs per step")
    lr: float = arg(1e-3, least=0, help="Adam's peak learning rate: warm-up, then linear to 0")
    muon_lr: float = arg(0.0, least=0, help="Muon's learning rate for the matrices of the trunk; "
                         "0: Adam trains them too")
    warmup: int = arg(10, least=0, help="warm-up steps")
    normalise: bool = arg(False, help="first collapse runs of whitespace in edits")
    limit: int | None = arg(None, least=1, help="use only the first N records")
    microbatch: int = arg(0, least=0, help="pairs per forward pass; changes memory, not results; "
                          "0: the whole batch")


def loss_of(model: LLaMA, sequences: Sequences, reference: Tensor, beta: float, sft_weight: float,
            pairs: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns the loss and the margins R(x, y+) - R(x, y-) [B].

    sequences: 2B rows, the B chosen sides, then the B rejected ones. reference [2B]: log ref(y | x)
    of the rows. pairs, tokens: the numbers of the whole minibatch, tokens of the chosen sides.
    """
    logp = score(model, sequences)                                               # [2B, T]
    chosen, rejected = (beta * (logp.sum(-1) - reference)).chunk(2)              # R, [B] each
    margins = chosen - rejected
    loss = -F.logsigmoid(margins).sum() / pairs
    if sft_weight:
        loss = loss - sft_weight * logp.chunk(2)[0].sum() / tokens
    return loss, margins.detach()


@torch.no_grad()
def reference_logp(model: LLaMA, sequences: Sequences, group: int = 64) -> Tensor:
    """Returns log ref(y | x) of each row, [rows], on the CPU."""
    result = torch.zeros(len(sequences.tokens))
    for rows in by_length(sequences, list(range(len(result))), group):
        part = sequences.rows(rows).to(model.head.device)
        result[rows] = score(model, part).sum(-1).float().cpu()
    return result


def train(config: Config) -> None:
    device = distributed.start(distributed.pick_device(config.device))
    tokenizer, dtype = load_tokenizer(config.model), getattr(torch, config.dtype)
    check_encoding(config.model, template=config.template)
    check_template(tokenizer, config.template, trains=True, model=config.model)
    log = Run(config, tokenizer.sha256, ("data", "model"))      # refuses an --out that is in use
    model = load_to_train(config.model, device, dtype, config.lora_rank, config.seed)
    encoder = Encoder(tokenizer, model.config.max_seq_len, config.template, config.prompt_tokens,
                      config.cut_responses)
    _, pairs = read_encoded(config.data, encoder, config.normalise, config.limit,
                            config.on_bad_record)
    counts = encoder.counted(config.data) if log.writes else {}
    n = len(pairs)
    both = pack([p.prompt for p in pairs] * 2,
                [p.chosen for p in pairs] + [p.rejected for p in pairs])    # 2n rows, on the CPU
    reference = reference_logp(model, both)                 # before the first step
    lengths = torch.stack(both.lengths.chunk(2)).amax(0).tolist()
    steps = config.epochs * -(-n // config.batch)
    model.activation_checkpointing = config.checkpoint_activations
    distributed.shard(model)
    optimizer = Optimizer(model, config.lr, config.warmup, steps, config.muon_lr)
    state = {"model": TrainableState(model), "optimizer": optimizer}
    log.restore(**state)
    for step in log.steps(steps, "dpo"):
        chosen = torch.tensor(rows_of_step(lengths, config.batch, config.seed, step))
        B, rows = len(chosen), torch.cat([chosen, n + chosen])  # both sides of each pair
        batch, refs, sums = both.rows(rows).to(device), reference[rows].to(device), Sums()
        tokens = int(batch.response_lengths[:B].sum())          # of the chosen sides
        with log.guard(step, {"model": model}, reference=refs, **batch._asdict()):
            for part, weight in microbatches(range(B), config.microbatch):
                sides = torch.cat([part, B + part])
                loss, margins = loss_of(model, batch.rows(sides), refs[sides.to(device)],
                                        config.beta, config.sft_weight, B, tokens)
                sums.add(weight, {"dpo/loss": loss, "dpo/accuracy": (margins > 0).sum() / B})
                (weight * loss).backward()
            norm = optimizer.step()
        log.end_step(step, sums.over_ranks() | {"dpo/gradient_norm": norm}, **state)
    with distributed.gathered(model):
        if log.writes:
            save_model(model, log.folder / "policy", tokenizer=tokenizer, encoding=Encoding(
                config.template, config.prompt_tokens, config.normalise))
    after = command("eval.py outputs --policy {policy} --prompts PROMPTS --out ANSWERS.json",
                    config.template, policy=log.folder / "policy")
    log.finish({"steps": steps, "records": n, **counts}, Ending("policy by DPO", after))


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
