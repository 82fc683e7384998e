"""Prompts with their responses as one padded batch, and the function that scores them.

The index convention of the whole project: index t counts the tokens of the response.

    logp[:, t]      scores response token t, from the hidden state one position before it
    reward[:, t]    belongs to response token t, and is read at the position of the token itself

The ids of prompt and response are concatenated and never tokenised again. Padding is on the right,
so masks follow from lengths and no mask ever looks at an id.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fgrlhf.engine import distributed
from fgrlhf.model import LLaMA
from fgrlhf.prompts import SharedPrompts, same_prompts
from kernels import linear_logp

PADDING_BUDGET = 2**17      # attention scores of padding that cost less than one more forward pass


class Sequences(NamedTuple):
    """Prompts with their responses, right-padded. S is the longest row, T the longest response."""

    tokens: Tensor              # [B, S] int64, prompt ids, response ids (EOS included), padding
    prompt_lengths: Tensor      # [B] int64
    response_lengths: Tensor    # [B] int64, EOS counted

    @property
    def lengths(self) -> Tensor:
        """[B] int64: the length of prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool, True where response token t exists."""
        steps = torch.arange(int(self.response_lengths.max()), device=self.tokens.device)
        return steps < self.response_lengths[:, None]

    def rows(self, index: Tensor | slice) -> "Sequences":
        """The selected rows of the batch, with the padding cut to the longest of them."""
        chosen = Sequences(*(part[index] for part in self))
        return chosen._replace(tokens=chosen.tokens[:, :int(chosen.lengths.max())])

    def to(self, device) -> "Sequences":
        return Sequences(*(part.to(device) for part in self))


class Located(NamedTuple):
    """The places of the N real response tokens of a batch, row after row."""

    row: Tensor                 # [N] row of the batch
    t: Tensor                   # [N] the index within the response
    position: Tensor            # [N] the index within `tokens`
    target: Tensor              # [N] the id of the token


def pack(prompts: list[list[int]], responses: list[list[int]], device=None) -> Sequences:
    """Concatenates the ids of each row and pads on the right, with 0: no mask reads the id.

    Raises ValueError for a row without a prompt or without a response.
    """
    if empty := [i for i, (p, r) in enumerate(zip(prompts, responses)) if not p or not r]:
        raise ValueError("pack: expected a prompt and a response of at least one token, "
                         f"row {empty[0]} has none")
    rows = [torch.tensor(p + r) for p, r in zip(prompts, responses)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return Sequences(tokens.to(device), torch.tensor([len(p) for p in prompts], device=device),
                     torch.tensor([len(r) for r in responses], device=device))


def locate(sequences: Sequences) -> Located:
    """Finds the real response tokens: for x [B, S, ..], x[at.row, at.position] is [N, ..]."""
    row, t = sequences.response_mask.nonzero(as_tuple=True)
    position = sequences.prompt_lengths[row] + t
    return Located(row, t, position, sequences.tokens[row, position])


def locate_last(sequences: Sequences) -> Located:
    """Finds the last token of each response."""
    row = torch.arange(len(sequences.tokens), device=sequences.tokens.device)
    position = sequences.lengths - 1
    return Located(row, sequences.response_lengths - 1, position, sequences.tokens[row, position])


def unflatten(values: Tensor, at: Located, sequences: Sequences) -> Tensor:
    """Puts one value per token, [N], into a response-aligned [B, T] that is 0 in the padding."""
    shape = (len(sequences.tokens), int(sequences.response_lengths.max()))
    return values.new_zeros(shape).index_put((at.row, at.t), values)


def hidden_of(model: LLaMA, sequences: Sequences, layers: int | None = None,
              spare: int = 0) -> Tensor:
    """Returns the hidden states [B, S, D] of whole rows. Shared prompts are computed once.

    layers: of the first N blocks only, see `LLaMA.hidden`. spare: so many tokens at the end of each
    row need no hidden state; rows that share no prompt are computed without them.
    """
    tokens, lengths = sequences.tokens, sequences.lengths
    first = same_prompts(tokens, sequences.prompt_lengths, int(lengths.sum()))
    if first is None:
        return model.hidden(tokens[:, :tokens.shape[1] - spare], lengths=lengths - spare,
                            layers=layers)
    shared = SharedPrompts(sequences.prompt_lengths, sequences.response_lengths, first,
                           tokens.shape[1])
    return model.hidden(tokens, padding=shared, layers=layers)


def hidden_at(model: LLaMA, sequences: Sequences, at: Located,
              layers: int | None = None) -> Tensor:
    """Returns the hidden state at each located token [N, D], which has seen it. Rewards use it."""
    return hidden_of(model, sequences, layers)[at.row, at.position]


def hidden_before(model: LLaMA, sequences: Sequences, at: Located,
                  layers: int | None = None) -> Tensor:
    """Returns the hidden state one position before each token, [N, D], which predicts the token.

    The last token of a row predicts nothing, so it needs no hidden state.
    """
    return hidden_of(model, sequences, layers, spare=1)[at.row, at.position - 1]


def score(model: LLaMA, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Scores every response token: logp [B, T] in nats, 0 in the padding. Differentiable.

        logp[b, t] = log softmax(hidden[b, P + t - 1] head^T / temperature)[token t]

    P is the length of the prompt of row b: the position before token t predicts it. `temperature`
    is the temperature of sampling. The reference model is scored by this function; the update
    computes the same logp inside its loss kernel, and check_first_ratio compares the two. Logits
    exist for response positions only, one chunk at a time.
    """
    at = locate(sequences)
    hidden = hidden_before(model, sequences, at)                                 # [N, D]
    logp = linear_logp.fused(hidden, model.head, at.target, temperature).logp    # [N]
    return unflatten(logp, at, sequences)


def by_length(sequences: Sequences, rows: list[int], size: int) -> list[Tensor]:
    """Sorts `rows` by length and cuts them into groups of at most `size` rows (0: no limit).

    Rows that share their prompts stay together, so that a group computes a prompt once. Only
    attention computes padding: n rows in S columns have n S^2 attention scores. A group ends early
    when more than PADDING_BUDGET of its scores would be padding.
    """
    lengths = sequences.lengths.tolist()
    shared = same_prompts(sequences.tokens, sequences.prompt_lengths, sum(lengths))
    rows = sorted(rows, key=lambda row: lengths[row])
    if shared is not None:                      # neighbours have the same prompt, the first row's
        first = shared.tolist()
        rows.sort(key=lambda row: (lengths[first[row]], first[row]))
    groups, real, longest = [], 0, 0
    for row in rows:
        scores, longest = lengths[row] ** 2, max(longest, lengths[row])
        full = not groups or len(groups[-1]) == (size or len(rows))
        if full or (len(groups[-1]) + 1) * longest ** 2 > real + scores + PADDING_BUDGET:
            groups.append([])
            real, longest = 0, lengths[row]
        groups[-1].append(row)
        real += scores
    return [torch.tensor(group) for group in groups]


class Scorer:
    """Scores one batch of responses without gradient. Each method returns [B, T], 0 in the padding.

    groups: the rows of this rank, cut into the groups that share a forward pass (`by_length`). The
    results of all ranks are added up. A model that is kept on another device is moved to the batch
    for the time of scoring.
    """

    def __init__(self, sequences: Sequences, groups: list[Tensor], temperature: float):
        self.sequences, self.groups, self.temperature = sequences, groups, temperature

    def logp(self, model: LLaMA) -> Tensor:
        """logp of every response token in nats, by `score`."""
        return self._in_groups(model, lambda part: score(model, part, self.temperature))

    def rewards(self, reward_model: nn.Module) -> Tensor:
        """The calibrated reward of every response token."""
        return self._in_groups(reward_model, reward_model.ppo_rewards)

    def values(self, critic: nn.Module) -> Tensor:
        """The critic's estimate before every response token."""
        return self._in_groups(critic, critic)

    def _in_groups(self, model: nn.Module, function: Callable[[Sequences], Tensor]) -> Tensor:
        tokens, lengths = self.sequences.tokens, self.sequences.response_lengths
        with distributed.gathered(model, device=tokens.device), torch.inference_mode():
            parts = [function(self.sequences.rows(rows)) for rows in self.groups]
        dtype = parts[0].dtype if parts else torch.float32
        result = torch.zeros(len(tokens), int(lengths.max()), device=tokens.device, dtype=dtype)
        for rows, part in zip(self.groups, parts):
            result[rows, :part.shape[1]] = part
        return distributed.total(result)
