"""Blind comparisons of two answers, and what people decided.

    Comparison      two answers to one prompt, and which of the two a person sees first
    Judgement       what one person decided about them: one line of JUDGEMENTS.jsonl
    Judgements      the Store of JUDGEMENTS.jsonl, which also keeps a file of pairs for train_rm.py

A line of JUDGEMENTS.jsonl has the fields of AlpacaFarm's pairs and AlpacaEval's annotations:
`preference` is 1 for output_1, 2 for output_2 and 1.5 for a tie. So `eval.py win-rate --judge
annotations` and `train_rm.py` read the file too.

The order of the two answers is drawn per comparison from the seed and the id. Neither the names of
the systems nor the order of the files decide it, and the page never gets the names.
"""

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fgrlhf.collect.lines import Lines
from fgrlhf.collect.store import Skip, Store, read_kind
from fgrlhf.collect.tasks import Task, content_of, different, unnamed
from fgrlhf.data.fields import Id, Text, UserError
from fgrlhf.data.files import read_json
from fgrlhf.data.outputs import input_of, passages_of
from fgrlhf.data.records import Output, Pair, Passage, Provenance, plain, write_jsonl

CHOICES = ("left", "right", "tie")


@dataclass(frozen=True)
class Judgement:
    """One person's decision about one pair of answers."""

    id: Id                                        # of the comparison
    pair: Id                                      # the same for all judges of the two answers
    instruction: Text
    output_1: str
    output_2: str
    preference: Literal[1, 2, 1.5]                # 1: output_1 is better, 2: output_2, 1.5: a tie
    left: Literal[1, 2]                           # the answer on the left, or on top
    generator_1: str | None = None
    generator_2: str | None = None
    annotator: str | None = None
    input: str | None = None
    context: tuple[Passage, ...] = ()
    provenance: Provenance | None = None

    @property
    def chosen_left(self) -> bool | None:
        """True if the person chose the answer on the left; None for a tie."""
        return None if self.preference == 1.5 else self.preference == self.left

    @property
    def content(self) -> str:
        return content_of(self.instruction, self.input, self.context, self.output_1, self.output_2)

    def as_pair(self) -> Pair | None:
        """Returns the preference as a record for train_rm.py; None for a tie."""
        if self.preference == 1.5:
            return None
        better, worse = self.output_1, self.output_2
        if self.preference == 2:
            better, worse = worse, better
        return Pair(self.id, self.instruction, better, worse, self.input, self.context,
                    self.annotator)

    def as_task(self) -> Task | None:
        """Returns the worse answer as a task for the editor; None for a tie."""
        pair = self.as_pair()
        return pair and Task(pair.id, pair.prompt, pair.chosen, pair.rejected, pair.input,
                             pair.context)


@dataclass(frozen=True)
class Comparison:
    """Two answers to compare. `outputs` are those of the reference and of the system."""

    id: str
    pair: str                                     # the same for all judges of the two answers
    prompt: str
    outputs: tuple[str, str]
    left: int                                     # 1 or 2: the answer on the left
    input: str | None = None
    context: tuple[Passage, ...] = ()
    generators: tuple[str | None, str | None] = (None, None)

    @property
    def content(self) -> str:
        """The hash of what is compared, by which a resumed collection knows the comparison."""
        return content_of(self.prompt, self.input, self.context, *self.outputs)

    @property
    def shown(self) -> tuple[str, str]:
        """The two answers from left to right."""
        return self.outputs if self.left == 1 else self.outputs[::-1]

    def judge(self, choice: str, annotator: str | None, provenance: Provenance) -> Judgement:
        """Builds the record. choice: one of CHOICES."""
        preference = {"tie": 1.5, "left": float(self.left), "right": 3.0 - self.left}[choice]
        return Judgement(self.id, self.pair, self.prompt, *self.outputs, preference, self.left,
                         *self.generators, annotator, self.input, self.context, provenance)

    def skip(self, outcome: str, reason: str, annotator: str | None,
             provenance: Provenance) -> Skip:
        """Builds the record of this comparison without a judgement."""
        return Skip(self.id, outcome, reason, annotator, provenance, self.content)


def pair_ids(system: list[Output], reference: list[Output]) -> list[str]:
    """Returns one id per pair of answers: that of the outputs, or one made from the content.

    An id of the outputs is used if both files have it, no other pair has it, and it holds no "#",
    which numbers the judges of a pair.
    """
    named = Counter(output.id for output in reference)

    def id_of(ours: Output, theirs: Output) -> str:
        id = theirs.id
        if id is not None and ours.id == id and named[id] == 1 and "#" not in id:
            return id
        return unnamed(theirs.instruction, input_of(theirs), (), theirs.output, ours.output)
    return different(id_of(*pair) for pair in zip(system, reference, strict=True))


def comparisons(system: list[Output], reference: list[Output], seed: int = 0) -> list[Comparison]:
    """Returns the pairs of different answers to the same prompts, in the order of the prompts.

    system, reference: joined before (outputs.joined), so that they answer the same prompts.
    """
    return [Comparison(id, id, theirs.instruction, (theirs.output, ours.output),
                       drawn_left(seed, id), input_of(theirs),
                       passages_of(theirs) or passages_of(ours),
                       (theirs.generator, ours.generator))
            for id, ours, theirs in zip(pair_ids(system, reference), system, reference)
            if ours.output != theirs.output]


def for_judges(tasks: list[Comparison], judges: int, seed: int) -> list[Comparison]:
    """Returns each comparison once per judge: first all for a first judge, then for a second.

    The order of the two answers is drawn again for each judge.
    """
    more = [(f"{task.id}#{judge}", task) for judge in range(2, judges + 1) for task in tasks]
    return tasks + [replace(task, id=id, left=drawn_left(seed, id)) for id, task in more]


def drawn_left(seed: int, id: str) -> int:
    """Draws which answer is on the left, 1 or 2, from the seed and the comparison's id."""
    return random.Random(f"left-{seed}-{id}").choice((1, 2))


class Judgements(Store):
    """The judgements of JUDGEMENTS.jsonl and those skipped.

    With `pairs` the preferences are kept in that file too, one records.Pair per line. That file is
    made from the judgements. If a disk is full after the judgement and before the pair, `close`
    makes the file again; after a kill the next start does.
    """

    def __init__(self, path: str | Path, pairs: str | Path | None = None):
        """Reads what is there. Raises UserError if a file holds something else."""
        self.pairs_path, self._pairs, self._pairs_differ = pairs and Path(pairs), None, False
        if pairs:
            others = read_kind(self.pairs_path, Pair)
            if others and not Path(path).exists():
                raise UserError(f"{pairs}: expected only pairs that were judged in {path}, got "
                                f"the record {others[0].id!r}; choose another --out")
        super().__init__(path, Judgement)
        if pairs:
            self._new += [self.pairs_path] if not self.pairs_path.exists() else []
            try:
                self._write_pairs()
            except BaseException:
                self.close()
                raise

    def add(self, record: Judgement | Skip) -> bool:
        with self._mutex:
            added = super().add(record)
            if added and self._pairs and (pair := pair_of(record)):
                before, self._pairs_differ = self._pairs_differ, True
                self._pairs.append(plain(pair))             # raises if the disk is full
                self._pairs_differ = before
            return added

    def withdraw(self, id: str) -> Judgement | Skip | None:
        with self._mutex:
            record = super().withdraw(id)
            if self._pairs and record and pair_of(record):
                self._write_pairs()
            return record

    def judged(self) -> list[Judgement]:
        """Returns the judgements, without the skipped comparisons."""
        with self._mutex:
            return [record for record in self.records.values() if isinstance(record, Judgement)]

    def close(self) -> None:
        with self._mutex:
            try:
                if self._pairs and self._pairs_differ:
                    self._write_pairs()
            finally:
                if self._pairs:
                    self._pairs.close()
                    self._pairs = None
                super().close()

    def _write_pairs(self) -> None:
        self._pairs_differ = True
        write_jsonl(self.pairs_path, filter(None, map(pair_of, self.records.values())))
        if self._pairs:
            self._pairs.close()
        self._pairs = Lines(self.pairs_path)
        self._pairs_differ = False


def pair_of(record: Judgement | Skip) -> Pair | None:
    """Returns the preference of a record, or None for a tie and for a skipped comparison."""
    return record.as_pair() if isinstance(record, Judgement) else None


def check_resumed(tasks: Iterable[Comparison], store: Judgements) -> None:
    """Raises UserError if a record of the store is about other answers than its comparison.

    Records of comparisons that are not among `tasks` stay in the file and are not counted.
    """
    for task in tasks:
        record = store.records.get(task.id)
        if record and record.content not in (None, task.content):
            path = store.path if isinstance(record, Judgement) else store.skipped_path
            raise UserError(f"{path}: record {task.id!r}: expected the prompt and the two answers "
                            "of --outputs and --reference, got others; delete the line to judge "
                            "the new answers, or choose another file")


def refuse_judgements_of_people(path: str | Path) -> None:
    """Raises UserError if a file holds judgements of people, so that nobody writes over them."""
    try:
        lines = read_json(path) if Path(path).exists() else []
    except UserError:
        return                                    # something else
    # A model's judgement has no `left`. A person's may have been damaged by hand since.
    found = sum(isinstance(value, dict) and "left" in value for _, value in lines)
    if found:
        raise UserError(f"--judgements {path}: expected a file for a language model's judgements, "
                        f"got {found} judgements of people; choose another file")
