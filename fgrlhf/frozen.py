"""Hidden states that are computed once, for reward models whose trunk is not trained.

A linear probe (Alain and Bengio 2016, arXiv 1610.01644) trains v and b of r_t = v . h_t^(N) + b and
leaves the trunk as it is. The h_t^(N) of a record are then the same in every epoch, in every fold
and for every seed: one forward pass over the records gives all of them.
"""

import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import write_atomic
from fgrlhf.encode import PreferenceIds
from fgrlhf.engine import lora
from fgrlhf.layouts.pickles import open_pickle
from fgrlhf.model import LLaMA
from fgrlhf.sequences import Located, Sequences, by_length, hidden_at, locate, pack

ROWS = 32                                       # sequences per forward pass


class FrozenStates:
    """Keeps the hidden states [T, D] of the responses that `add` has seen, by their ids."""

    def __init__(self, trunk: LLaMA, layer: int | None):
        self.trunk, self.layer = trunk, layer
        self.kept: dict[tuple[int, ...], Tensor] = {}       # the length of the prompt, then the ids

    @torch.no_grad()
    def add(self, examples: list[PreferenceIds]) -> None:
        """Computes the hidden states of both sides of each preference that are not kept yet."""
        wanted = {(len(p.prompt), *p.prompt, *side): (self.before(p.prompt, side), side)
                  for p in examples for side in (p.chosen, p.rejected)}
        wanted = {key: row for key, row in wanted.items() if key not in self.kept}
        if not wanted:
            return
        rows, keys = pack(*zip(*wanted.values()), device=self.trunk.head.device), [*wanted]
        groups = by_length(rows, list(range(len(wanted))), ROWS)
        for group in tqdm(groups, desc="hidden states", leave=False):
            part = rows.rows(group.to(rows.tokens.device))
            hidden = hidden_at(self.trunk, part, locate(part), self.layer)           # [N, D]
            pieces = hidden.split(part.response_lengths.tolist())
            self.kept |= zip((keys[i] for i in group.tolist()), (p.clone() for p in pieces))

    def add_with_file(self, examples: list[PreferenceIds], file: str | None) -> None:
        """Calls `add`. The file is read before, and written when there is more to keep."""
        if file and Path(file).exists():
            self.read(file)
        found = len(self.kept)
        self.add(examples)
        if file and len(self.kept) > found:
            self.write(file)

    def before(self, prompt: list[int], response: list[int]) -> list[int]:
        """Returns the ids that the trunk reads in front of the response."""
        return prompt

    def __call__(self, sequences: Sequences, at: Located) -> Tensor:
        """Returns the hidden states [N, D] of the located tokens, computed where not kept."""
        try:
            rows = [self.kept[key] for key in _keys(sequences)]
        except KeyError:
            if self.reading:
                raise ValueError("hidden states: expected responses that `add` has read") from None
            return hidden_at(self.trunk, sequences, at, self.layer)
        start = torch.tensor([0, *map(len, rows)]).cumsum(0).to(at.row.device)
        return torch.cat(rows)[start[at.row] + at.t]

    @property
    def bytes(self) -> int:
        """Returns the size of the hidden states that are kept."""
        return sum(piece.nbytes for piece in self.kept.values())

    def write(self, path: str | Path) -> None:
        """Writes what is kept to a file, with the trunk and the layer that it belongs to."""
        prompts, ids = zip(*((key[0], key[1:]) for key in self.kept))
        tensors = {"trunk": self._trunk(), "layer": torch.tensor(self.layer or 0),
                   "prompts": torch.tensor(prompts), "lengths": torch.tensor([*map(len, ids)]),
                   "ids": torch.tensor([*itertools.chain(*ids)]),
                   "hidden": torch.cat([*self.kept.values()]).cpu()}
        write_atomic(path, lambda file: torch.save(tensors, file))

    def read(self, path: str | Path) -> None:
        """Reads what `write` wrote. Raises UserError for the file of another trunk or layer."""
        found = open_pickle(Path(path))
        if set(found) != {"trunk", "layer", "prompts", "lengths", "ids", "hidden"}:
            raise UserError(f"{path}: expected a file of --hidden-states; choose another path")
        if found["layer"] != (self.layer or 0) or not torch.equal(found["trunk"], self._trunk()):
            raise UserError(f"{path}: expected hidden states of this model, dtype and --layer, got "
                            "others; choose another path, or delete the file")
        prompts, lengths = found["prompts"].tolist(), found["lengths"].tolist()
        if (sum(lengths), sum(lengths) - sum(prompts)) != (len(found["ids"]), len(found["hidden"])):
            raise UserError(f"{path}: damaged; delete the file")
        ids = found["ids"].split(lengths)
        hidden = found["hidden"].split([n - p for n, p in zip(lengths, prompts)])
        for prompt, row, piece in zip(prompts, ids, hidden):
            self.kept[prompt, *row.tolist()] = piece.to(self.trunk.head.device)

    @property
    def reading(self) -> str:
        """Returns what tells files of other `before` apart."""
        return ""

    def _trunk(self) -> Tensor:
        """Returns what tells trunks apart: a fingerprint of the weights, dtype and reading."""
        text = lora.fingerprint(self.trunk) + str(self.trunk.head.dtype) + self.reading
        return torch.tensor([*text.encode()], dtype=torch.uint8)


def _keys(sequences: Sequences) -> list[tuple[int, ...]]:
    lengths = zip(sequences.prompt_lengths.tolist(), sequences.lengths.tolist())
    return [(prompt, *row[:length])
            for row, (prompt, length) in zip(sequences.tokens.tolist(), lengths)]
