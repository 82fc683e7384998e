"""Train a reward model: token-level from minimal edits (the paper's) or sequence-level from pairs.

    python train_rm.py --kind token --data edits.jsonl --model runs/sft/policy --out runs/rm-token
    python train_rm.py --kind sequence --data pairs.jsonl --model runs/sft/policy \
        --out runs/rm-sequence

What the token-level kind deletes from the usual recipe: the one number for a whole response. The
edit is aligned with the original token by token; tokens put in should earn, tokens taken out should
cost, and tokens left alone are worth the same on both sides (equation (4)).

--folds K trains K models, each on all records but one fold, and reports accuracy and token AUC on
the records held out; no model is kept. Leaves OUT/reward (without --folds), config.json,
metrics.jsonl, timing.jsonl, and the evaluation in done.json.
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from fgrlhf import distributed
from fgrlhf.checkpoint import load_adapted, load_model, load_tokenizer
from fgrlhf.config import UserError, arg, parse, run
from fgrlhf.edits import TEMPLATES
from fgrlhf.encode import UNITS, PreferenceIds, encode_preferences, read_encoded
from fgrlhf.evaluate import Judged, reward_table
from fgrlhf.judge import judge_preferences
from fgrlhf.lora import Own
from fgrlhf.model import DTYPES
from fgrlhf.optimizer import Optimizer, check_in_backward
from fgrlhf.reward import KINDS, RewardModel, save_reward, sequence_loss, token_loss
from fgrlhf.rollout import pack
from fgrlhf.run import Run, bucketed_batches, generator, pick_device
from kernels import token_preference


@dataclass(frozen=True)
class Config:
    data: str = arg(help="edits or pairs to train on; either serves both kinds")
    model: str = arg(help="folder of the SFT model to start from")
    out: str = arg(help="folder for the reward model and the logs")
    kind: str = arg("token", choices=KINDS, help="one reward a token, or one a response")
    eval_edits: str | None = arg(None, help="held-out edits for the final evaluation")
    eval_pairs: str | None = arg(None, help="held-out ordinary pairs for the final evaluation")
    folds: int = arg(0, least=0, help="K-fold cross-validation over --data; 0 trains one model")
    template: str = arg("plain", choices=tuple(TEMPLATES), help="how a record becomes a prompt")
    prompt_tokens: int | None = arg(None, least=2,
                                    help="keep a longer prompt's last N tokens (default: refuse)")
    normalise: bool = arg(False, help="collapse runs of whitespace in edits first")
    limit: int | None = arg(None, least=1, help="use the first N records only")
    on_bad_record: str = arg("stop", choices=("stop", "skip"), help="a record that cannot be used: "
                             "stop, or leave it out, count and list it")
    unit: str = arg("token", choices=UNITS, help="unit of the alignment")
    credit_gap: bool = arg(True,
                           help="a pure insertion or deletion credits the token behind the gap")
    reduce: str = arg("sum", choices=("sum", "mean"), help="rewards over U1 in equation (4)")
    u0: str = arg("anchor", choices=token_preference.U0_TERMS,
                  help="unchanged tokens: squared difference of the paper, drawn to 0, or kept, "
                       "which earns")
    u0_weight: float = arg(0.02, least=0, help="lambda of equation (4)")
    token_weight: float = arg(1.0, least=0,
                              help="weight of the per-token logistic term; 0 is the paper's loss")
    logp_feature: bool = arg(False, help="add a * logp_t to the head (not in the paper)")
    likelihood: bool = arg(False, help="control: the model's own log-likelihood, no training")
    epochs: int = arg(6, least=0, help="passes over the data")
    batch: int = arg(16, least=1, help="pairs a step")
    microbatch: int = arg(0, least=0, help="pairs a forward pass, gradients added up; changes "
                          "memory alone; 0 takes the whole batch")
    lr: float = arg(3e-3, least=0, help="Adam's peak learning rate: warm-up, then linear to 0")
    muon_lr: float = arg(5e-3, least=0,
                         help="Muon's learning rate for the trunk's matrices; 0 gives them to Adam")
    warmup: int = arg(10, least=0, help="warm-up steps")
    seed: int = arg(0, help="seed of head, data order and folds")
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


def loss_of(model: RewardModel, batch: list[PreferenceIds], config: Config,
            whole: list[PreferenceIds]) -> tuple[torch.Tensor, dict]:
    """The loss of a microbatch of the batch `whole`, and what to log of it: over microbatches both
    add. An empty `whole` gives 0: a rank without work takes part with that (distributed.py)."""
    pairs = len(whole) or math.inf
    if config.kind == "sequence":
        loss, margins = sequence_loss(model, batch, pairs)
        return loss, {"rm/accuracy": (margins > 0).sum() / pairs}
    options = token_preference.Options(config.reduce, config.u0, config.u0_weight,
                                       config.token_weight)
    out = token_loss(model, batch, options, divisors(whole))
    return out.loss, {"rm/bt": out.bt, "rm/u0": out.u0, "rm/token": out.token,
                      "rm/accuracy": (out.margin > 0).sum() / pairs}


def divisors(batch: list[PreferenceIds]) -> token_preference.Totals:
    """What equation (4) divides by: pairs with a change, changed tokens, unchanged pairings."""
    if not batch:
        return token_preference.Totals(math.inf, math.inf, math.inf)
    return token_preference.Totals(max(1, sum(bool(p.plus or p.minus) for p in batch)),
                                   max(1, sum(len(p.plus) + len(p.minus) for p in batch)),
                                   max(1, sum(len(p.unchanged) for p in batch)))


def fit(model: RewardModel, examples: list[PreferenceIds], config: Config, log: Run,
        name: str) -> None:
    """The training loop; `name` tells folds apart in the progress bar."""
    lengths = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in examples]
    per_epoch = -(-len(examples) // config.batch)
    steps = config.epochs * per_epoch
    check_in_backward(config.step_in_backward, config.microbatch)
    model.trunk.activation_checkpointing = config.checkpoint_activations
    distributed.shard(model)
    optimizer = Optimizer(model, config.lr, config.warmup, steps, config.muon_lr,
                          in_backward=config.step_in_backward)
    resumable = config.folds == 0
    if resumable:
        log.restore(model=Own(model), optimizer=optimizer)
    for step in log.steps(steps, name) if resumable else tqdm(range(1, steps + 1), desc=name,
                                                                  disable=not log.first):
        epoch, cursor = divmod(step - 1, per_epoch)
        rows = bucketed_batches(lengths, config.batch, config.seed, epoch)[cursor]
        whole, logged = [examples[i] for i in rows], {}
        for part, counts in distributed.shares(rows, config.microbatch, distributed.in_order):
            batch = [examples[i] for i in part]
            loss, terms = loss_of(model, batch, config, whole if counts else [])
            both_sides = lambda: pack([p.prompt for p in batch] * 2, [p.chosen for p in batch]
                                      + [p.rejected for p in batch])._asdict()
            with log.guard(step, {"model": model}, both_sides, loss=loss,
                           records=torch.tensor(part)):
                loss.backward()
            for term, value in (terms | {"rm/loss": loss}).items():
                logged[term] = logged.get(term, 0.0) + value.item()
        logged = distributed.totals(logged)
        with log.guard(step, {"model": model}, both_sides, records=torch.tensor(rows)):
            logged["rm/gradient_norm"] = optimizer.step()
        if resumable:
            log.end_step(step, logged, model=Own(model), optimizer=optimizer)


def new_model(config: Config, device) -> RewardModel:
    torch.manual_seed(config.seed)                                  # the head's initialisation
    dtype = getattr(torch, config.dtype)
    trunk = (load_adapted(config.model, device, dtype, config.lora_rank, config.seed)
             if config.lora_rank else load_model(config.model, device, dtype))
    model = RewardModel(trunk, config.kind, config.logp_feature or config.likelihood)
    if config.likelihood:
        torch.nn.init.zeros_(model.head.weight)
        torch.nn.init.ones_(model.logp_weight)
    return model


def training_part(judged: list[Judged]) -> dict[str, float]:
    """The table's main entries, on records trained on."""
    table = reward_table(judged)
    names = ("pair_accuracy", "pair_accuracy_per_token", "token_auc", "token_auc_within")
    return {"train_" + name: table[name] for name in names if name in table}


def cross_validate(config: Config, records: list, examples: list[PreferenceIds], tokenizer,
                   log: Run, device) -> dict:
    """K models, each judged on its own fold: the table over all records, the spread over folds.

    Each is also judged on as many of the records it was trained on ("train_..."): whether it fits
    them at all is the first question about a poor figure.
    """
    order = torch.randperm(len(records), generator=generator(config.seed, "folds")).tolist()
    folds, judged, fitted = [order[k::config.folds] for k in range(config.folds)], [], []
    judge = lambda model, rows: judge_preferences(model, [records[i] for i in rows],
                                                  [examples[i] for i in rows], tokenizer)
    for k, held_out in enumerate(folds):
        inside = [i for i in range(len(records)) if i not in set(held_out)]
        model = new_model(config, device)
        if not config.likelihood:
            fit(model, [examples[i] for i in inside], config, log, f"fold {k + 1}/{config.folds}")
        with distributed.gathered(model):
            judged.append(judge(model, held_out))
            fitted.append(judge(model, inside[:len(held_out)]))
        log.log(k + 1, {f"rm/{name}": value for name, value in
                        (reward_table(judged[-1]) | training_part(fitted[-1])).items()})
    tables = [reward_table(fold) | training_part(own) for fold, own in zip(judged, fitted)]
    whole = reward_table(sum(judged, [])) | training_part(sum(fitted, []))
    values = {name: torch.tensor([float(t[name]) for t in tables if name in t])
              for name in whole if not name.endswith("pairs")}
    spread = {name + "_sd": fold.std().item() for name, fold in values.items() if len(fold) > 1}
    return {"folds": config.folds, **whole, **spread}


def train(config: Config) -> None:
    device = distributed.start(pick_device(config.device))
    tokenizer = load_tokenizer(config.model)
    context = load_model(config.model, "meta").config.max_seq_len
    encode = lambda records: encode_preferences(
        records, tokenizer, context, config.template, config.prompt_tokens, config.unit,
        config.credit_gap)
    read = lambda path: read_encoded(path, encode, config.normalise, config.limit,
                                     config.on_bad_record)
    records, examples = read(config.data)
    if config.folds == 1 or config.folds > len(records):
        raise UserError(f"--folds {config.folds}: expected 0, or 2 to {len(records)} (the records)")
    held_out = {}
    for name, path in (("edits", config.eval_edits), ("pairs", config.eval_pairs)):
        if path:
            held_out[name] = read(path)
    log = Run(config, tokenizer.sha256, ("data", "model", "eval_edits", "eval_pairs"))
    if config.folds:
        log.finish(cross_validate(config, records, examples, tokenizer, log, device))
        return
    model = new_model(config, device)
    if not config.likelihood:
        fit(model, examples, config, log, f"reward model, {config.kind}")
    with distributed.gathered(model):
        sides = [pack([p.prompt], [p.rejected], device=device) for p in examples[:512]]
        model.calibrate(sides)
        if log.first:
            save_reward(model, log.folder / "reward", tokenizer)
        summary = {"records": len(records), "mean": model.mean.item(), "scale": model.scale.item()}
        for name, (kept, encoded) in held_out.items():
            table = reward_table(judge_preferences(model, kept, encoded, tokenizer))
            summary |= {f"{name}/{key}": value for key, value in table.items()}
    log.finish(summary)


if __name__ == "__main__":
    run(lambda: train(parse(Config, prog="train_rm.py", description=__doc__)))
