r"""Train a reward model (paper, section 2.2): token-level from minimal edits, or sequence-level.

    python train_rm.py --kind token --data edits.jsonl --model runs/sft/policy --out runs/rm-token
    python train_rm.py --kind sequence --data pairs.jsonl --model runs/sft/policy \
        --out runs/rm-sequence

The token-level kind replaces the one number per response by one number per token. --loss chooses
how it is trained; equation numbers are those of fgrlhf/reward.py:

    paper       Bradley-Terry on R, the mean of the rewards of all tokens: (1), (2)
    paper-u1    the same with the changed tokens only, divided by the length of the response
    ours        (3), (4): the sum over the changed tokens. Each of them also has a logistic loss of
                its own, and the rewards of unchanged tokens are held near 0
    sum         (3) and the squared difference over U0: our first reading of the paper
    tlcr        a rival's (TLCR, Yoon et al. 2024): ours without the margin. Each changed token is
                classified separately, q = sigmoid(r_t), and PPO gets the reward (2 q - 1) / scale

--reduce, --u0, --u0-weight, --token-weight and --pair-weight change one part of the loss.

--layer N lets the head read the hidden states behind the first N blocks. --freeze trains only the
head, a linear probe: the hidden states of all records are computed once and kept in memory, so that
epochs and folds take seconds. --hidden-states FILE keeps them for the next run too.

--folds K trains K models, each on all records but one fold, and reports accuracy and token AUC on
the records held out; no model is kept. Records with the same prompt are in one fold. Without
--folds the reward model is in OUT/reward. The evaluation is in OUT/done.json.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import fgrlhf                               # before torch: it sets how OpenMP's threads wait
import torch
from torch import Tensor

from fgrlhf import controls
from fgrlhf.checkpoint import load_model, load_to_train, load_tokenizer
from fgrlhf.checks import accuracy
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Edit, Pair
from fgrlhf.encode import (
    HIDDEN, UNITS, Encoder, PreferenceIds, ReadingResponses, read_encoded, two_sides)
from fgrlhf.engine import distributed
from fgrlhf.engine.config import Machinery, arg, parse, run
from fgrlhf.engine.distributed import Sums, microbatches
from fgrlhf.engine.draws import generator, rows_of_step
from fgrlhf.engine.encoding import Encoding, check_encoding
from fgrlhf.engine.optimizer import Optimizer
from fgrlhf.engine.run import FoldRun, Run
from fgrlhf.engine.states import TrainableState
from fgrlhf.engine.summary import Ending, command
from fgrlhf.evaluate import Judged, reward_intervals, reward_table
from fgrlhf.frozen import FrozenStates
from fgrlhf.reward import (
    KINDS, PreferenceBatch, RewardModel, judge_preferences, save_reward, sequence_loss, token_loss)
from fgrlhf.sequences import pack
from fgrlhf.templates import check_template
from kernels.token_preference import MARGINS, U0_TERMS, Options

OURS = Options(reduce="sum", u0="anchor", u0_weight=0.02, token_weight=1.0)
LOSSES = {"ours": OURS, "paper": Options(reduce="response"), "paper-u1": Options(reduce="share"),
          "sum": Options(reduce="sum", u0="difference", u0_weight=1.0),
          "tlcr": OURS._replace(pair_weight=0.0)}
CALIBRATION_RECORDS = 512       # the rewards of their rejected responses become mean 0, deviation 1


@dataclass(frozen=True, kw_only=True)
class Config(ReadingResponses, Machinery):
    data: str = arg(help="edits or pairs to train on; both kinds of model take either")
    model: str = arg(help="folder of the SFT model to start from")
    out: str = arg(help="folder for the reward model and the logs")
    kind: str = arg("token", choices=KINDS, help="one reward per token, or one per response")
    unit: str = arg("token", choices=UNITS, help="unit of the alignment")
    credit_gap: bool = arg(True, help="a pure insertion or deletion credits the token behind the "
                           "gap")
    loss: str = arg("ours", choices=tuple(LOSSES), help="token: how the rewards are trained")
    reduce: str | None = arg(None, choices=MARGINS, help="margin: sum or mean over U1, sum over U1 "
                             "by the response's length (share), or mean over all tokens (response)")
    u0: str | None = arg(None, choices=U0_TERMS, help="loss on unchanged tokens: 'difference' "
                         "pulls the two rewards of a pair together, 'anchor' pulls both to 0, "
                         "'kept' rewards both like edited-in tokens")
    u0_weight: float | None = arg(None, least=0, help="lambda, the weight of the loss on unchanged "
                                  "tokens")
    token_weight: float | None = arg(None, least=0, help="w, the weight of the logistic loss per "
                                     "changed token")
    pair_weight: float | None = arg(None, least=0, help="p, the weight of Bradley-Terry on pairs")
    logp_feature: bool = arg(False, help="ablation: add a * logp_t to the head of a token model")
    likelihood: bool = arg(False, help="control: the untrained model's log-likelihood as reward")
    layer: int | None = arg(None, least=1, help="the head reads the hidden states behind the first "
                            "N blocks (default: behind all of them and the last norm)")
    freeze: bool = arg(False, help="train only the head, a linear probe")
    hidden_states: str | None = arg(None, help="with --freeze: a file that keeps the hidden states "
                                    "for the next run with this model and --layer")
    epochs: int = arg(6, least=0, help="passes over the data; 0 trains nothing")
    batch: int = arg(16, least=1, help="pairs per step")
    lr: float = arg(3e-3, least=0, help="Adam's peak learning rate: warm-up, then linear to 0")
    head_lr: float | None = arg(None, least=0, help="Adam's peak learning rate for the head when "
                                "the trunk is trained too (default: --lr)")
    muon_lr: float = arg(5e-3, least=0, help="Muon's learning rate for the matrices of the trunk; "
                         "0: Adam trains them too")
    warmup: int = arg(10, least=0, help="warm-up steps")
    eval_edits: str | None = arg(None, help="held-out edits for the final evaluation")
    eval_pairs: str | None = arg(None, help="held-out ordinary pairs for the final evaluation")
    hide: str = arg("nothing", choices=HIDDEN, help="control: judge responses without the text of "
                    "their prompt, without their final full stop and EOS, or without both")
    shuffle_labels: int | None = arg(None, least=0, help="control: swap the two sides of a record "
                                     "at random in training; the number is the seed")
    intervals: int = arg(0, least=0, help="draws of the bootstrap for the 95% intervals of the "
                         "held-out figures; 0: no intervals")
    folds: int = arg(0, least=0, help="K-fold cross-validation over --data; 0 trains one model")
    normalise: bool = arg(False, help="first collapse runs of whitespace in edits")
    limit: int | None = arg(None, least=1, help="use only the first N records of --data")
    microbatch: int = arg(0, least=0, help="pairs per forward pass; changes memory, not results; "
                          "0: the whole batch")

    def __post_init__(self):
        for name, value in LOSSES[self.loss]._asdict().items():     # config.json shows all values
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)               # the dataclass is frozen


def loss_of(config: Config, model: RewardModel, part: PreferenceBatch,
            whole: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss of one microbatch, `part`, and the values to log.

    Both are sums over `part` divided by the numbers of the minibatch `whole`, so microbatches add
    up.
    """
    pairs = len(whole.plus)
    if config.kind == "sequence":
        loss, margins = sequence_loss(model, part, pairs)                       # (2)
        return loss, {"rm/accuracy": (margins > 0).sum() / pairs}
    options = Options(config.reduce, config.u0, config.u0_weight, config.token_weight,
                      config.pair_weight)
    out = token_loss(model, part, options, whole.totals())                      # (3), (4)
    return out.loss, {"rm/bt": out.bt, "rm/u0": out.u0, "rm/token": out.token,
                      "rm/accuracy": (out.margin > 0).sum() / pairs}


def fit(config: Config, model: RewardModel, examples: list[PreferenceIds], log: Run | FoldRun,
        name: str) -> None:
    """Trains the model. `name` tells folds apart in the progress bar."""
    if config.shuffle_labels is not None:
        coins = torch.rand(len(examples), generator=generator(config.shuffle_labels, "labels"))
        examples = [p.swapped() if coin < 0.5 else p for p, coin in zip(examples, coins)]
    lengths = [len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in examples]
    steps = config.epochs * -(-len(examples) // config.batch)
    model.trunk.activation_checkpointing = config.checkpoint_activations
    distributed.shard(model)
    optimizer = Optimizer(model, config.lr, config.warmup, steps, config.muon_lr,
                          head_lr=config.head_lr)
    state = {"model": TrainableState(model), "optimizer": optimizer}
    log.restore(**state)
    for step in log.steps(steps, name):
        rows = rows_of_step(lengths, config.batch, config.seed, step)
        batch, sums = PreferenceBatch.of([examples[i] for i in rows], model.device), Sums()
        with log.guard(step, {"model": model}, records=torch.tensor(rows), **batch.tensors()):
            for part, weight in microbatches(range(len(rows)), config.microbatch):
                loss, terms = loss_of(config, model, batch.rows(part), batch)
                sums.add(weight, terms | {"rm/loss": loss})
                (weight * loss).backward()
            norm = optimizer.step()
        log.end_step(step, sums.over_ranks() | {"rm/gradient_norm": norm}, **state)


def new_model(config: Config, device: torch.device,
              frozen: FrozenStates | None = None) -> RewardModel:
    """Builds the reward model to train, or the control that is not trained."""
    torch.manual_seed(config.seed)                                  # the head's initialisation
    trunk = frozen.trunk if frozen else load_to_train(
        config.model, device, getattr(torch, config.dtype), config.lora_rank, config.seed)
    # equation (1): R is a mean only when the margin is divided by the length of the response
    response = "mean" if config.reduce in ("share", "response") else "sum"
    if config.likelihood:
        return controls.LikelihoodReward(trunk, response)
    if config.logp_feature:
        return controls.LogpReward(trunk, response)
    model = RewardModel(trunk, config.kind, response, config.loss == "tlcr", config.layer)
    model.frozen = frozen
    if frozen is not None:
        trunk.requires_grad_(False)                                 # only the head learns
    elif config.layer is not None:
        for part in (*trunk.layers[config.layer:], trunk.norm):     # the head never reads these
            part.requires_grad_(False)
    return model


def keep_states(config: Config, device: torch.device,
                examples: list[PreferenceIds]) -> FrozenStates:
    """Computes the hidden states for --freeze, except those in the file of --hidden-states."""
    trunk = load_model(config.model, device, getattr(torch, config.dtype))
    states = FrozenStates(trunk, config.layer)
    states.add_with_file(examples, config.hidden_states)
    print(f"hidden states of {len(states.kept)} responses: {states.bytes} bytes", file=sys.stderr)
    return states


def cross_validate(config: Config, records: list, examples: list[PreferenceIds], tokenizer,
                   log: Run, device: torch.device,
                   frozen: FrozenStates | None = None) -> dict[str, float]:
    """Trains K models and judges each on its own fold. Returns the table, and spreads over folds.

    Each model is also judged on as many of the records that it was trained on ("train_..."). When
    those figures are low too, the model underfits.
    """
    folds = folds_of(records, config.folds, config.seed)
    judged, fitted, tables = [], [], []
    judge = lambda model, rows: judge_preferences(model, [records[i] for i in rows],
                                                  [examples[i] for i in rows], tokenizer)
    for k, held_out in enumerate(folds):
        outside = set(held_out)
        inside = [i for i in range(len(records)) if i not in outside]
        model = new_model(config, device, frozen)
        if not config.likelihood:
            fit(config, model, [examples[i] for i in inside], FoldRun(log),
                f"fold {k + 1}/{config.folds}")
        with distributed.gathered(model):
            judged.append(judge(model, held_out))
            fitted.append(judge(model, inside[:len(held_out)]))
        tables.append(reward_table(judged[-1]) | training_part(fitted[-1]))
        log.log(k + 1, {f"rm/{name}": value for name, value in tables[-1].items()})
    whole = reward_table(sum(judged, [])) | training_part(sum(fitted, []))
    values = {name: torch.tensor([float(t[name]) for t in tables if name in t])
              for name in whole if not name.endswith("pairs")}
    spread = {name + "_sd": fold.std().item() for name, fold in values.items() if len(fold) > 1}
    intervals = reward_intervals(sum(judged, []), config.intervals)
    return {"folds": config.folds, **whole, **intervals, **spread}


def prompt_of(record: Edit | Pair) -> tuple:
    """Returns all of a record that its two responses share."""
    return record.prompt, record.input, record.context


def folds_of(records: list[Edit | Pair], count: int, seed: int) -> list[list[int]]:
    """Draws the rows of each fold. Records with the same prompt are in the same fold."""
    rows: dict[tuple, list[int]] = {}
    for i, record in enumerate(records):
        rows.setdefault(prompt_of(record), []).append(i)
    groups = list(rows.values())
    order = torch.randperm(len(groups), generator=generator(seed, "folds")).tolist()
    return [[i for k in order[fold::count] for i in groups[k]] for fold in range(count)]


def training_part(judged: list[Judged]) -> dict[str, float]:
    """Returns the main entries of the table, for records that were trained on."""
    table = reward_table(judged)
    names = ("pair_accuracy", "pair_accuracy_per_token", "pair_accuracy_sum", "token_auc",
             "token_auc_within", "edit_auc_within")
    return {"train_" + name: table[name] for name in names if name in table}


def check_flags(config: Config) -> None:
    """Refuses flags that do not go together, before anything is read."""
    if config.kind != "token" and (config.logp_feature or config.likelihood):
        raise UserError("--logp-feature and --likelihood: expected --kind token")
    if config.logp_feature and config.likelihood:
        raise UserError("--logp-feature and --likelihood: expected one of them")
    for name, value in {"loss": "ours", **OURS._asdict()}.items():
        if config.kind == "sequence" and getattr(config, name) != value:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected --kind "
                            "token; the sequence-level model is trained by Bradley-Terry, equation "
                            "(2)")
    if config.folds and (config.eval_edits or config.eval_pairs):
        raise UserError("--folds: expected without --eval-edits and --eval-pairs, because each "
                        "fold is judged on the records that it leaves out")
    if config.intervals and not (config.folds or config.eval_edits or config.eval_pairs):
        raise UserError("--intervals: expected with --folds, --eval-edits or --eval-pairs, because "
                        "there are no held-out figures without them")
    if (config.layer or config.freeze) and (config.logp_feature or config.likelihood):
        raise UserError("--layer and --freeze: expected without --logp-feature and --likelihood")
    if config.freeze and config.lora_rank:
        raise UserError("--freeze: expected without --lora-rank, because it trains only the head")
    if config.freeze and config.head_lr is not None:
        raise UserError("--head-lr: expected without --freeze, which trains only the head; its "
                        "rate is then --lr")
    for flag, unused in (("likelihood", ("loss", "epochs", "batch", "lr", "head_lr", "muon_lr",
                                         "warmup", "lora_rank", "shuffle_labels")),
                         ("freeze", ("muon_lr", "checkpoint_activations"))):
        for name in unused:
            if getattr(config, flag) and getattr(config, name) != getattr(Config, name):
                raise UserError(f"--{name.replace('_', '-')}: expected without --{flag}, which "
                                f"trains {'nothing' if flag == 'likelihood' else 'only the head'}; "
                                "leave it out")
    if config.hidden_states and not config.freeze:
        raise UserError("--hidden-states: expected with --freeze, because hidden states change "
                        "when the trunk is trained")


def train(config: Config) -> None:
    """Trains and evaluates one reward model, or one per fold."""
    check_flags(config)
    device = distributed.start(distributed.pick_device(config.device))
    if config.freeze and distributed.size() > 1:
        raise UserError("--freeze: expected one process, because its training takes seconds")
    tokenizer = load_tokenizer(config.model)
    check_encoding(config.model, template=config.template)
    check_template(tokenizer, config.template, trains=True, model=config.model)
    log = Run(config, tokenizer.sha256, ("data", "model", "eval_edits", "eval_pairs"))
    sizes = load_model(config.model, device="meta").config                   # reads no weights
    if config.layer and config.layer > sizes.n_layers:
        raise UserError(f"--layer {config.layer}: expected 1 to {sizes.n_layers}, the blocks of "
                        f"{config.model}")
    def read(path: str, limit: int | None = None) -> tuple[list, list[PreferenceIds], dict]:
        encoder = Encoder(tokenizer, sizes.max_seq_len, config.template, config.prompt_tokens,
                          config.cut_responses, config.unit, config.credit_gap, config.hide)
        records, examples = read_encoded(path, encoder, config.normalise, limit,
                                         config.on_bad_record)
        return records, examples, encoder.counted(path) if log.writes else {}
    records, examples, counts = read(config.data, config.limit)
    most = len(set(map(prompt_of, records)))
    if config.folds == 1 or config.folds > most:
        raise UserError(f"--folds {config.folds}: expected 0, or 2 to {most}, the number of "
                        "different prompts")
    held_out = {name: read(path) for name, path in
                (("edits", config.eval_edits), ("pairs", config.eval_pairs)) if path}
    if log.writes:
        for name, (kept, *_) in held_out.items():
            tell_shared(records, kept, f"--eval-{name}")
    every = examples + [ids for _, encoded, _ in held_out.values() for ids in encoded]
    frozen = keep_states(config, device, every) if config.freeze else None
    if config.folds:
        log.finish(cross_validate(config, records, examples, tokenizer, log, device, frozen)
                   | counts, ending(config))
        return
    model = new_model(config, device, frozen)
    if not config.likelihood:
        fit(config, model, examples, log, f"reward model, {config.kind}")
    log.open()                                  # for a run without steps; --resume then knows it
    with distributed.gathered(model):
        model.calibrate([pack([p.prompt], [p.rejected], device=device)
                         for p in examples[:CALIBRATION_RECORDS]])
        if log.writes:
            save_reward(model, log.folder / "reward", tokenizer,
                        Encoding(config.template, config.prompt_tokens, config.normalise,
                                 config.hide))
        summary = {"records": len(records), "mean": model.mean.item(), "scale": model.scale.item()}
        summary |= counts
        for name, (kept, encoded, found) in held_out.items():
            judged = judge_preferences(model, kept, encoded, tokenizer)
            table = reward_table(judged) | reward_intervals(judged, config.intervals) | found
            summary |= {f"{name}/{key}": value for key, value in table.items()}
    log.finish(summary, ending(config))
    if log.writes:
        accuracy.warn(log.folder / "reward", summary.get("pairs/pair_accuracy"))


def tell_shared(records: list, held_out: list, flag: str) -> None:
    """Says on stderr how many of the held-out records are also among the training records.

    Records are the same when prompt, input and both texts are. flag: the one of the held-out file.
    """
    content = lambda record: (record.prompt, record.input, *two_sides(record))
    seen = set(map(content, records))
    if shared := sum(content(record) in seen for record in held_out):
        print(f"{shared} of {len(held_out)} records of {flag} are also in --data, so their figures "
              "are not of held-out records", file=sys.stderr)


def ending(config: Config) -> Ending:
    """Names what was trained and the next command.

    It is PPO, or a comparison of runs when --folds kept no model or --hide hid a part of the texts.
    """
    trained = "sequence-level reward model" if config.kind == "sequence" else (
        "nothing, the reward is the model's log-likelihood" if config.likelihood else
        f"token-level reward model by the loss {config.loss}")
    if not config.epochs:
        trained = f"nothing with --epochs 0, the {config.kind}-level reward model is as it started"
    if config.folds or config.hide != "nothing":
        return Ending(trained, f"python -m fgrlhf.compare {shlex.quote(config.out)} OTHER_RUN")
    method = "rlhf" if config.kind == "sequence" else "fine-grained"
    return Ending(trained, command(
        f"train_ppo.py --method {method} --policy {{policy}} --reward {{reward}} --prompts PROMPTS "
        "--out OUT", config.template, reward=Path(config.out, "reward"), policy=config.model))


if __name__ == "__main__":
    run(lambda: train(parse(Config, __doc__)))
