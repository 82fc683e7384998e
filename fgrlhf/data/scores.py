"""Token scores that another program computed, one JSON line per preference.

    {"id": "edit-1", "chosen": [0.1, -0.3, 0.8], "rejected": [0.2, -1.5, 0.7]}

`chosen` has one number for each token of the better response, such as an edit, and `rejected` one
for each token of the worse. EOS counts as a token. The record with the same `id` has the texts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import Id, UserError, check
from fgrlhf.data.files import read_records


@dataclass(frozen=True)
class _Line:
    id: Id
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]


class TokenScores(NamedTuple):
    """The scores of both sides of one preference, and their place in the file."""

    id: str
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    place: str                          # such as "scores.jsonl:3"

    def check_lengths(self, chosen: int, rejected: int) -> None:
        """Raises UserError unless there is one score for each token of both sides."""
        for side, given, tokens in (("chosen", self.chosen, chosen),
                                    ("rejected", self.rejected, rejected)):
            if len(given) != tokens:
                raise UserError(f"{self.place}: {side}: expected {tokens} numbers, one for each "
                                f"token of the response, EOS included, got {len(given)}; score the "
                                "tokens of the tokenizer that you give")


def read_scores(path: str | Path) -> dict[str, TokenScores]:
    """Reads a file of token scores, by the ids of the records."""
    def build(value, place: str) -> TokenScores:
        line = check(_Line, value, place)
        return TokenScores(line.id, line.chosen, line.rejected, place)
    return {scores.id: scores for scores in read_records(path, build)}
