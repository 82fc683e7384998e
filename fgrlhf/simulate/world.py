"""The built-in world: requests, answers with systematic errors, and the oracle that finds errors.

A request asks for facts about an invented land ("Name the capital and river of Toran.") or for
small sums with a unit. The demonstrations for SFT have *systematic* errors. Some facts and sums
have one fixed wrong value. Some requests trigger a habit: a rude remark, a doubled sentence, an
unrelated sentence at the end, a wrong unit, a missing last item. The most likely answer is
therefore often wrong, and a policy cannot win only by making its distribution sharper.

    errors(x, y)   the errors of an answer: a character span each, with the text that corrects it

A world is a pure function of its seed and its knobs, and --world names both: 3 is the world of seed
3 with the default knobs, and 3,lands=24,strength=0.7 changes two of them. origin.py checks that a
file is of the world that --world names.
"""

import random
import re
from dataclasses import MISSING
from typing import NamedTuple

from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import arg

ATTRIBUTES = ("capital", "river", "ruler", "crop", "beast", "colour")
UNITS = ("kilos", "litres", "metres", "coins", "hours")
CROPS = "barley oats wheat rice maize beans hemp flax tea rye".split()
BEASTS = "lion bear wolf eagle horse stag otter crane bull fox".split()
COLOURS = "red blue green black white gold grey brown pink purple".split()
RUDE = ("What a silly question.", "You should know this.", "Leave me alone.", "I am tired of you.")
JUNK = ("Buy more at the market.", "My cousin sells boots.", "Rain is due at noon.",
        "Call me later.")
FACT_REQUESTS = ("Name the {items} of {land}.", "What are the {items} of {land}?",
                 "Tell me the {items} of {land}.")
SUM_REQUESTS = ("Add {items} in {unit}.", "How many {unit} are {items}?",
                "Work out {items} in {unit}.")
FACT_ANSWERS = ("The {attribute} of {land} is {value}.", "Its {attribute} is {value}.")
SUM_ANSWERS = ("{a} plus {b} is {c} {unit}.", "{a} plus {b} makes {c} {unit}.")
FACT_SENTENCE = re.compile(r"(?:The (\w+) of (\w+)|Its (\w+)) is (\w+)\.")
SUM_SENTENCE = re.compile(r"(\d+) plus (\d+) (?:is|makes) (\d+) (\w+)\.")
KNOBS = {                               # name: (default, least, most)
    "lands": (12, 3, 100),              # number of lands, with six facts each
    "items": (4, 3, 6),                 # most facts of a request; sums are one less
    "errors": (1.0, 0.0, 1.6),          # times the share of facts and sums with a fixed mistake
    "strength": (1.0, 0.0, 1.25),       # times the probability of every mistake and habit
    "coupled": (0.0, 0.0, 1.0),         # share of lands and units with errors that spread
}


class Error(NamedTuple):
    """One error: `text[start:end]` should read `fix`. An omission has start == end."""

    start: int
    end: int
    kind: str
    fix: str
    key: tuple | None = None            # of the item; None for a sentence too many


class Item(NamedTuple):
    """One item of a request: an attribute of a land, or a sum."""

    key: tuple                          # (land, attribute), or the two numbers of a sum
    answer: str                         # the right value
    unit: str                           # of a sum; "" for a fact


class Habit(NamedTuple):
    """Inserts `text`, or puts it in place of another, with probability p when it is triggered."""

    text: str
    p: float


def read_world(text: str) -> int | str:
    """Reads --world: a seed, or a seed and knobs. A seed without knobs becomes an int."""
    seed, *settings = text.split(",")
    for setting in settings:
        name, _, value = setting.partition("=")
        try:
            default, least, most = KNOBS[name]
            good = least <= type(default)(value) <= most
        except (KeyError, ValueError):
            good = False
        if not good:
            ranges = ", ".join(f"{k} {low:g} to {high:g}" for k, (_, low, high) in KNOBS.items())
            raise UserError(f"--world {text}: expected a seed and knobs, as 0,lands=24, got "
                            f"{setting!r}; the knobs are {ranges}")
    if not re.fullmatch(r"-?\d+", seed):
        raise UserError(f"--world {text}: expected a whole number first, the seed, got {seed!r}")
    return text if settings else int(seed)


def world_arg(help: str, default: int | None = MISSING):
    """Returns a dataclass field for --world."""
    return arg(default, read=read_world, help=f"{help}; knobs may follow the seed, as in "
                                              "0,lands=24 (fgrlhf/simulate/README.md)")


def _names(rng: random.Random, count: int, suffixes: tuple[str, ...]) -> list[str]:
    """Invents `count` different names: a start, a middle and one of the suffixes, capitalised."""
    starts, middles = "b br d dr f g k l m n p r s t v z".split(), "a e i o u ai au".split()
    names: dict[str, None] = {}
    while len(names) < count:
        names[(rng.choice(starts) + rng.choice(middles) + rng.choice(suffixes)).capitalize()] = None
    return list(names)


class World:
    """The facts, habits and systematic errors that one seed gives.

    spec: the seed, or a text with the seed and knobs (read_world).
    name: the seed and the knobs that are not at their defaults: "world 3,lands=24".
    dataset: the name as its files have it; None without such a knob, so that those files have none.
    """

    def __init__(self, spec: int | str):
        seed, *settings = str(spec).split(",")
        given = dict(setting.split("=") for setting in settings)
        self.seed = int(seed)
        self.knobs = {name: type(default)(given.get(name, default))
                      for name, (default, _, _) in KNOBS.items()}
        changed = [f"{name}={value:.10g}" for name, value in self.knobs.items()
                   if value != KNOBS[name][0]]
        self.name = ",".join([f"world {seed}", *changed])
        self.dataset = self.name if changed else None
        rng, strong = random.Random(f"world-{seed}"), self.knobs["strength"]
        self.lands = _names(rng, self.knobs["lands"], ("ran", "land", "dor", "via"))
        pools = {"capital": _names(rng, 10, ("polis", "ton", "burg")),
                 "river": _names(rng, 10, ("mel", "she", "wen")),
                 "ruler": _names(rng, 10, ("ric", "na", "mund")),
                 "crop": CROPS, "beast": BEASTS, "colour": COLOURS}
        self.facts = {(land, a): rng.choice(pools[a]) for land in self.lands for a in ATTRIBUTES}
        self.sums = {(a, b): str(a + b) for a in range(2, 7) for b in range(2, 7)}
        self.pool = {key: [v for v in pools[key[1]] if v != right]
                     for key, right in self.facts.items()}
        self.pool |= {key: [str(int(right) + d) for d in (-2, -1, 1, 2)]
                      for key, right in self.sums.items()}
        self.mistakes: dict[tuple, Habit] = {}
        for table, share in ((self.facts, 0.6), (self.sums, 0.5)):
            for key in rng.sample(sorted(table), int(share * self.knobs["errors"] * len(table))):
                self.mistakes[key] = Habit(rng.choice(self.pool[key]),
                                           strong * rng.uniform(0.3, 0.8))
        strength = lambda: strong * rng.uniform(0.45, 0.7)
        self.rude = {land: Habit(rng.choice(RUDE), strength())
                     for land in rng.sample(self.lands, 3)}
        self.doubled = {a: Habit("", strength()) for a in rng.sample(ATTRIBUTES, 1)}
        self.junk = {x: Habit(rng.choice(JUNK), strength())
                     for x in rng.sample(self.lands, 2) + rng.sample(UNITS, 1)}
        self.wrong_unit = {u: Habit(rng.choice([w for w in UNITS if w != u]), strength())
                           for u in rng.sample(UNITS, 2)}
        self.omission = strong * rng.uniform(0.55, 0.7)
        spread, share = random.Random(f"coupled-{seed}"), self.knobs["coupled"]
        self.coupled = {place for places in (self.lands, UNITS)
                        for place in spread.sample(places, round(share * len(places)))}

    # ----- requests -----------------------------------------------------------------------------

    def request(self, rng: random.Random) -> str:
        """Draws a request: 70% ask for two to four facts of one land, 30% for one to three sums.

        These numbers are those of the default knob "items".
        """
        most = self.knobs["items"]
        if rng.random() < 0.7:
            asked = rng.sample(ATTRIBUTES, rng.choice((most - 2, most - 1, most, most)))
            items = " and ".join(filter(None, (", ".join(asked[:-1]), asked[-1])))
            return rng.choice(FACT_REQUESTS).format(items=items, land=rng.choice(self.lands))
        counts = (max(most - 3, 1), most - 2, most - 1, most - 1)
        sums = [f"{a} and {b}" for a, b in rng.sample(sorted(self.sums), rng.choice(counts))]
        return rng.choice(SUM_REQUESTS).format(items=", then ".join(sums), unit=rng.choice(UNITS))

    def items(self, prompt: str) -> list[Item]:
        """The items that a request asks for, in order; [] for any other text."""
        words = re.findall(r"\w+", prompt)
        land = next((w for w in words if w in self.lands), None)
        if land is not None:
            return [Item((land, w), self.facts[land, w], "") for w in words if w in ATTRIBUTES]
        unit = next((w for w in words if w in UNITS), "")
        keys = [(int(a), int(b)) for a, b in re.findall(r"(\d+) and (\d+)", prompt)]
        return [Item(key, self.sums[key], unit) for key in keys if unit and key in self.sums]

    def unseen(self, share: float) -> set[tuple]:
        """Returns the keys of a share of the facts and of the sums, for annotators to never see.

        A larger share contains the keys of a smaller one.
        """
        rng, chosen = random.Random(f"unseen-{self.seed}"), set()
        for table in (self.facts, self.sums):
            keys = rng.sample(sorted(table), len(table))
            chosen.update(keys[:round(share * len(keys))])
        return chosen

    # ----- answers ------------------------------------------------------------------------------

    def sentence(self, item: Item, answer: str, unit: str, rng: random.Random) -> str:
        """Writes a sentence with `answer` for the item, in one of two equally good wordings."""
        if item.unit:
            return rng.choice(SUM_ANSWERS).format(a=item.key[0], b=item.key[1], c=answer, unit=unit)
        land, attribute = item.key
        return rng.choice(FACT_ANSWERS).format(land=land, attribute=attribute, value=answer)

    def demonstrate(self, prompt: str, rng: random.Random, tail: float = 0.03) -> str:
        """Writes an answer for SFT, with the systematic errors of the world.

        tail: the probability of a random wrong value for an item that has no systematic error.
        """
        hit = lambda habit: habit is not None and rng.random() < habit.p
        items = self.items(prompt)
        triggers = [part for item in items for part in (*item.key, item.unit)]
        longest = self.knobs["items"] - bool(items[0].unit)
        unit = items[0].unit
        if hit(swap := self.wrong_unit.get(unit)):
            unit = swap.text
        if len(items) == longest and rng.random() < self.omission:
            items = items[:-1]
        sentences = []
        for item in items:
            answer = item.answer
            if hit(mistake := self.mistakes.get(item.key)):
                answer = mistake.text
            elif rng.random() < tail:
                answer = rng.choice(self.pool[item.key])
            sentences.append(self.sentence(item, answer, unit, rng))
            if hit(self.doubled.get(item.key[1])):
                sentences.append(sentences[-1])
        rude = next((self.rude[t] for t in triggers if t in self.rude), None)
        junk = next((self.junk[t] for t in triggers if t in self.junk), None)
        before = [rude.text] if hit(rude) else []
        return " ".join(before + sentences + ([junk.text] if hit(junk) else []))

    # ----- the oracle ---------------------------------------------------------------------------

    def errors(self, prompt: str, answer: str) -> list[Error]:
        """Finds the errors of an answer, from left to right. A perfect answer has none: [].

        The answer must state each item of the request once, with the right value and unit. Every
        other sentence and every repetition is an error. Wording and order are free.

        Kinds: "value" and "unit" (wrong), "extra" and "doubled" (a sentence too many), "missing",
        "coupled" (right by itself, but behind a wrong value or unit where errors spread; it is
        right again once that error is corrected).
        """
        items = {item.key: item for item in self.items(prompt)}
        land = next((key[0] for key in items if isinstance(key[0], str)), None)
        spreads = bool(items) and (land or next(iter(items.values())).unit) in self.coupled
        found: list[Error] = []
        end_of: dict[tuple, int] = {}                       # item -> the end of its sentence
        for match in re.finditer(r"\s*(\.|[^.\s][^.]*\.?)", answer):
            start, end, text = match.start(1), match.end(1), match[1]
            state = self._read(text, land)
            item = state and items.get(state[0])
            if item is None or item.key in end_of:
                kind = "extra" if item is None else "doubled"
                found.append(Error(match.start(), end, kind, ""))
                continue
            end_of[item.key] = end
            behind = spreads and any(e.kind in ("value", "unit") for e in found)
            for part, right, kind in ((state[1], item.answer, "value"),
                                      (state[2], item.unit, "unit")):
                if part is not None and text[slice(*part)] != right:
                    found.append(Error(start + part[0], start + part[1], kind, right, item.key))
                elif behind and kind == "value":
                    found.append(Error(start + part[0], start + part[1], "coupled", right,
                                       item.key))
        previous = 0
        for item in items.values():
            if item.key not in end_of:
                # Either wording, drawn by the text: an editor without a style of its own.
                wording = random.Random(f"{prompt} {answer} {item.key}")
                fix = self.sentence(item, item.answer, item.unit, wording)
                fix = " " + fix if previous else fix + " "
                found.append(Error(previous, previous, "missing", fix, item.key))
            previous = end_of.get(item.key, previous)
        return sorted(found)

    @staticmethod
    def _read(sentence: str, land: str | None):
        """Reads a sentence as (item key, span of the value, span of the unit or None), or None."""
        if match := FACT_SENTENCE.fullmatch(sentence):
            return (match[2] or land, match[1] or match[3]), match.span(4), None
        if match := SUM_SENTENCE.fullmatch(sentence):
            return (int(match[1]), int(match[2])), match.span(3), match.span(4)
        return None
