"""The built-in world: the oracle finds planted errors, editor and annotator err at known rates."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fgrlhf.data import readers, records
from fgrlhf.data.fields import UserError
from fgrlhf.engine.config import parse
from fgrlhf.simulate import __main__ as simulate
from fgrlhf.simulate.__main__ import AnnotateConfig, WorldConfig, annotate, split_of, write_world
from fgrlhf.simulate.annotators import (
    minimal_edit, prefer, restyle, rewrite, spoil, swap_wording, wordings)
from fgrlhf.simulate.world import JUNK, RUDE, UNITS, World, read_world

ROOT = Path(__file__).resolve().parent.parent
WORLD = World(3)


def requests(count: int, seed: int = 0, world: World = WORLD) -> list[str]:
    rng = random.Random(seed)
    return [world.request(rng) for _ in range(count)]


def sentences(prompt: str, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [WORLD.sentence(item, item.answer, item.unit, rng) for item in WORLD.items(prompt)]


def wrong(prompt: str, seed: int = 0) -> str:
    """Returns a demonstration that has errors."""
    rng = random.Random(seed)
    while True:
        answer = WORLD.demonstrate(prompt, rng)
        if WORLD.errors(prompt, answer):
            return answer


def corrected(answer: str, errors) -> str:
    for error in reversed(errors):
        answer = answer[:error.start] + error.fix + answer[error.end:]
    return answer.strip()


# ----- requests -----------------------------------------------------------------------------------

def test_items_of_every_request_are_what_it_asks_for():
    for prompt in requests(200):
        items = WORLD.items(prompt)
        assert 1 <= len(items) == len({item.key for item in items})
        for item in items:
            if item.unit:
                assert int(item.answer) == sum(item.key)
                assert f"{item.key[0]} and {item.key[1]}" in prompt
                assert item.unit in prompt
            else:
                land, attribute = item.key
                assert land in prompt and attribute in prompt
                assert WORLD.facts[item.key] == item.answer


def test_requests_are_about_70_percent_facts():
    facts = sum(not WORLD.items(prompt)[0].unit for prompt in requests(1000))
    assert abs(facts - 700) < 4 * (1000 * 0.7 * 0.3) ** 0.5


def test_demonstrate_gives_the_systematic_errors_of_the_world():
    """A fact with an error gets one wrong value, with the probability of that fact."""
    key, mistake = next((k, m) for k, m in sorted(WORLD.mistakes.items(), key=str)
                        if isinstance(k[0], str))
    prompt, rng = f"Name the {key[1]} of {key[0]}.", random.Random(0)
    told = [WORLD.demonstrate(prompt, rng, tail=0.0) for _ in range(600)]
    share = sum(f" {mistake.text}." in text for text in told) / 600
    assert abs(share - mistake.p) < 4 * (mistake.p * (1 - mistake.p) / 600) ** 0.5
    assert all(f" {mistake.text}." in text or f" {WORLD.facts[key]}." in text for text in told)
    assert mistake.text != WORLD.facts[key]


# ----- the oracle ---------------------------------------------------------------------------------

def test_errors_of_a_right_answer_are_empty_in_any_order_and_wording():
    for seed, prompt in enumerate(requests(200)):
        parts = sentences(prompt, seed)
        assert WORLD.errors(prompt, " ".join(parts)) == []
        assert WORLD.errors(prompt, " ".join(reversed(parts))) == []


def planted(kind: str, prompt: str) -> tuple[str, str] | None:
    """(an answer with one error of this kind, its marked text), or None if there is no such."""
    parts, items = sentences(prompt), WORLD.items(prompt)
    if kind == "value":
        bad = WORLD.pool[items[-1].key][0]
        last = WORLD.sentence(items[-1], bad, items[-1].unit, random.Random(1))
        return " ".join(parts[:-1] + [last]), bad
    if kind == "unit":
        if not items[0].unit:
            return None
        bad = next(u for u in UNITS if u != items[0].unit)
        first = WORLD.sentence(items[0], items[0].answer, bad, random.Random(1))
        return " ".join([first] + parts[1:]), bad
    if kind == "missing":
        return " ".join(parts[:-1]), ""
    if kind == "doubled":
        return " ".join(parts[:1] + parts), " " + parts[0]
    if kind == "rude":
        return " ".join([RUDE[0]] + parts), RUDE[0]
    return " ".join(parts + [JUNK[0]]), " " + JUNK[0]


@pytest.mark.parametrize("kind, called",
                         [("value", "value"), ("unit", "unit"), ("missing", "missing"),
                          ("doubled", "doubled"), ("rude", "extra"), ("junk", "extra")])
def test_errors_finds_each_planted_error_at_its_place(kind, called):
    tried = 0
    for prompt in requests(100):
        if (plant := planted(kind, prompt)) is None:
            continue
        tried += 1
        answer, text = plant
        found = WORLD.errors(prompt, answer)
        assert [(error.kind, answer[error.start:error.end]) for error in found] == [(called, text)]
        assert WORLD.errors(prompt, corrected(answer, found)) == []
    assert tried > 20


def test_errors_counts_an_unfinished_sentence_as_extra_and_its_item_as_missing():
    """A truncated response looks like this."""
    prompt = next(p for p in requests(50) if not WORLD.items(p)[0].unit)
    whole = " ".join(sentences(prompt))
    assert sorted(error.kind for error in WORLD.errors(prompt, whole[:-3])) == ["extra", "missing"]


def test_errors_refuses_facts_of_another_land():
    prompt = next(p for p in requests(50) if not WORLD.items(p)[0].unit)
    item = WORLD.items(prompt)[0]
    other = next(land for land in WORLD.lands if land != item.key[0])
    sentence = f"The {item.key[1]} of {other} is {item.answer}."
    assert {error.kind for error in WORLD.errors(prompt, sentence)} == {"extra", "missing"}


def test_errors_sees_stray_full_stops():
    prompt = requests(1)[0]
    whole = " ".join(sentences(prompt))
    for text in (". " + whole, whole + ".", whole.replace(".", "..", 1)):
        assert [error.kind for error in WORLD.errors(prompt, text)] == ["extra"]
    assert WORLD.errors(prompt, whole + "  ") == []


def test_errors_of_an_empty_answer_are_all_items_missing():
    for prompt in requests(30):
        assert [e.kind for e in WORLD.errors(prompt, "")] == ["missing"] * len(WORLD.items(prompt))


# ----- the editor ---------------------------------------------------------------------------------

def test_minimal_edit_of_a_perfect_editor_leaves_no_error_in_any_answer():
    """Demonstrations, shuffled and cut demonstrations, and noise: good and bad policies."""
    rng = random.Random(0)
    for prompt in requests(300, 1):
        answer = WORLD.demonstrate(prompt, rng)
        parts = answer.split(". ")
        rng.shuffle(parts)
        for text in (answer, ". ".join(parts), answer[:rng.randrange(len(answer) + 1)],
                     answer[len(answer) // 2:],
                     "", "x", ". .", "is " + answer + " is"):
            assert WORLD.errors(prompt, minimal_edit(WORLD, prompt, text, rng)) == [], (prompt,
                                                                                        text)


def test_minimal_edit_writes_a_blank_between_sentences():
    rng = random.Random(0)
    for prompt in requests(100, 2):
        for text in (wrong(prompt), " ".join(sentences(prompt)[1:]),
                     " ".join(sentences(prompt)[:-1]), ""):
            assert not re.search(r"\.\S|\s\s", minimal_edit(WORLD, prompt, text, rng)), text


def test_minimal_edit_keeps_right_sentences():
    """A perfect answer does not change, and neither does a sentence without an error."""
    rng = random.Random(0)
    for prompt in requests(50):
        right = " ".join(sentences(prompt))
        assert minimal_edit(WORLD, prompt, right, rng) == right
        answer, _ = planted("value", prompt)
        assert minimal_edit(WORLD, prompt, answer, rng).split(". ")[:-1] == answer.split(". ")[:-1]


def test_minimal_edit_misses_errors_at_the_given_rate():
    rng, before, after = random.Random(0), 0, 0
    for seed, prompt in enumerate(requests(400, 3)):
        answer = wrong(prompt, seed)
        found = len(WORLD.errors(prompt, answer))
        edited = minimal_edit(WORLD, prompt, answer, rng, 0.3)
        before, after = before + found, after + len(WORLD.errors(prompt, edited))
    assert abs(after / before - 0.3) < 4 * (0.3 * 0.7 / before) ** 0.5
    assert minimal_edit(WORLD, prompt, answer, rng, miss=1.0) == answer


def test_minimal_edit_makes_needless_edits_at_the_given_rate_and_they_do_no_harm():
    rng, changed, prompts = random.Random(0), 0, requests(500, 4)
    for prompt in prompts:
        right = " ".join(sentences(prompt, len(prompt)))
        edited = minimal_edit(WORLD, prompt, right, rng, needless=0.2)
        changed += edited != right
        assert WORLD.errors(prompt, edited) == []
    assert abs(changed / 500 - 0.2) < 4 * (0.2 * 0.8 / 500) ** 0.5


def test_swap_wording_changes_one_sentence():
    land = WORLD.lands[0]
    assert swap_wording(f"The river of {land} is Amel. Its crop is rye.", land) != ""
    for text in (f"The river of {land} is Amel.", "Its crop is rye.", "3 plus 4 is 7 coins.",
                 "3 plus 4 makes 7 coins."):
        swapped = swap_wording(text, land)
        assert swapped != text and swap_wording(swapped, land) == text
    assert swap_wording("Leave me alone.", land) == "Leave me alone."


# ----- the annotator ------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_prefer_errs_in_half_of_the_noise(noise):
    """A label that a fair coin decides is wrong half of the time, in either order of answers."""
    rng, errors, n = random.Random(0), 0, 1000
    for i, prompt in enumerate(requests(n, 5)):
        right = " ".join(sentences(prompt))
        bad, _ = planted("missing", prompt)
        answers = (right, bad) if i % 2 else (bad, right)
        errors += answers[prefer(WORLD, prompt, *answers, rng, noise) - 1] != right
    assert abs(errors - n * noise / 2) <= 4 * (n * noise / 2) ** 0.5


def test_prefer_tosses_a_fair_coin_on_a_tie():
    rng, prompt = random.Random(0), requests(1)[0]
    answer = " ".join(sentences(prompt))
    firsts = sum(prefer(WORLD, prompt, answer, answer, rng) == 1 for _ in range(1000))
    assert abs(firsts - 500) < 4 * 250 ** 0.5


# ----- independence and determinism ---------------------------------------------------------------

def test_oracle_editor_and_annotator_share_no_state():
    """Calls do not change the results of other calls, nor the global random state."""
    prompt = requests(1, 6)[0]
    answer = wrong(prompt)
    state = random.getstate()
    edit = minimal_edit(WORLD, prompt, answer, random.Random(1), 0.5, 0.5)
    errors = WORLD.errors(prompt, answer)
    for other in requests(20, 7):
        prefer(WORLD, other, wrong(other), "", random.Random(2), 0.5)
        minimal_edit(WORLD, other, wrong(other), random.Random(2), 0.5, 0.5)
    assert WORLD.errors(prompt, answer) == errors
    assert minimal_edit(WORLD, prompt, answer, random.Random(1), 0.5, 0.5) == edit
    assert random.getstate() == state


def test_worlds_of_one_seed_are_equal_and_of_two_seeds_differ():
    again, other = World(3), World(4)
    assert vars(again) == vars(WORLD)
    for name in ("facts", "mistakes", "rude", "junk", "omission"):
        assert getattr(WORLD, name) != getattr(other, name)


def test_split_of_is_a_stable_hash_of_the_text():
    """crc32 of "a" and "b" modulo 8 by hand: 0xE8B7BE43 -> 3 (train), 0x71BEEFF9 -> 1 (dev)."""
    assert [zlib.crc32(x) for x in (b"a", b"b")] == [0xE8B7BE43, 0x71BEEFF9]
    assert [split_of(x) for x in "ab"] == ["train", "dev"]
    counts = Counter(split_of(prompt) for prompt in set(requests(4000, 8)))
    total = sum(counts.values())
    for split, share in (("train", 6 / 8), ("dev", 1 / 8), ("test", 1 / 8)):
        assert abs(counts[split] - total * share) < 4 * (total * share * (1 - share)) ** 0.5


def test_a_world_is_the_same_in_every_process():
    """Python's own hash differs between processes; nothing here may depend on it."""
    code = ("import random\nfrom fgrlhf.simulate.__main__ import split_of\n"
            "from fgrlhf.simulate.annotators import World, minimal_edit\n"
            "w, r = World(5), random.Random(1)\n"
            "ps = [w.request(r) for _ in range(50)]; ds = [w.demonstrate(p, r) for p in ps]\n"
            "print(vars(w), ps, ds, [w.errors(*x) for x in zip(ps, ds)],\n"
            "      [split_of(p) for p in ps],\n"
            "      [minimal_edit(w, *x, r, .3, .3) for x in zip(ps, ds)])")
    said = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(said) == 1 and len(said.pop()) > 1000


# ----- files --------------------------------------------------------------------------------------

def small_world(path: Path, **changes) -> Path:
    sizes = dict(world=1, demonstrations=60, train=20, dev=8, test=8, vocab_size=340)
    write_world(WorldConfig(out=str(path), **sizes | changes))
    return path


def test_write_world_writes_disjoint_splits_and_the_same_bytes_again(tmp_path):
    first, second, other = (small_world(tmp_path / n, **c)
                            for n, c in (("a", {}), ("b", {}), ("c", {"seed": 1})))
    prompts = {split: [p.prompt for p in readers.read_prompts(first / f"{split}.jsonl")]
               for split in ("train", "dev", "test")}
    assert {split: len(found) for split, found in prompts.items()} == {"train": 20, "dev": 8,
                                                                       "test": 8}
    for split, found in prompts.items():
        assert len(set(found)) == len(found) and {split_of(p) for p in found} == {split}
    assert {split_of(d.prompt)
            for d in readers.read_demonstrations(first / "demonstrations.jsonl")} == {"train"}
    for name in ("train.jsonl", "dev.jsonl", "test.jsonl", "demonstrations.jsonl",
                 "tokenizer.model"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert (first / "train.jsonl").read_bytes() != (other / "train.jsonl").read_bytes()


def test_write_world_refuses_more_requests_than_there_are(tmp_path, monkeypatch):
    """A world of 3 lands has less than 28,000 dev requests. (The default waits for 10^6 draws.)"""
    monkeypatch.setattr(simulate, "IDLE_DRAWS", 200)
    with pytest.raises(UserError, match=r"^--dev 200000: expected at most \d+, because world "
                                        r"0,lands=3 gave no further dev request in 200 draws; "):
        small_world(tmp_path / "w", world="0,lands=3", dev=200_000)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("size", ["-1", "0", "259", str(2 ** 31)])
def test_a_vocabulary_that_sentencepiece_cannot_make_is_refused(size, capsys):
    """It wants more than the 259 bytes and control tokens, and a C int."""
    with pytest.raises(SystemExit, match="2"):
        parse(WorldConfig, argv=["--out", "x", "--vocab-size", size])
    assert f"argument --vocab-size: expected a number from 260 to 2147483647, got {size};" in (
        capsys.readouterr().err)


def test_a_vocabulary_that_is_too_large_or_small_for_the_text_is_refused(tmp_path):
    for size, possible in ((10 ** 6, "texts that give at most"), (260, "texts that need")):
        with pytest.raises(UserError, match=f"tokenizer.model: .* expected {size} .*{possible}"):
            small_world(tmp_path / "w", vocab_size=size)
    assert not (tmp_path / "w").exists()


def test_annotate_gives_one_pair_and_one_edit_of_the_worse_answer(tmp_path):
    world, rng = World(1), random.Random(0)
    prompts = requests(40, 9, world)
    firsts, seconds = ([records.Output(p, world.demonstrate(p, rng), "m") for p in prompts]
                       for _ in range(2))
    for name, outputs in (("a", firsts), ("b", seconds)):
        records.write_outputs(tmp_path / f"{name}.json", outputs)
    annotate(AnnotateConfig(str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(tmp_path),
                            world=1, spans=True))
    count = lambda prompt, text: len(world.errors(prompt, text))
    pairs = readers.read_pairs(tmp_path / "pairs.jsonl")
    made = readers.read_edits(tmp_path / "edits.jsonl")
    assert len(pairs) > 20 and len(made) > 15
    for pair in pairs:
        assert count(pair.prompt, pair.chosen) <= count(pair.prompt, pair.rejected)
    by_prompt = {f.instruction: (f.output, s.output) for f, s in zip(firsts, seconds)}
    for edit in made:
        answers = by_prompt[edit.prompt]
        assert count(edit.prompt, edit.original) == max(count(edit.prompt, a) for a in answers)
        assert edit.original in answers and count(edit.prompt, edit.edited) == 0
        marked = [(s.start, s.end, s.type) for s in edit.spans]
        assert marked == [e[:3]
                          for e in world.errors(edit.prompt, edit.original) if e.start < e.end]


def test_annotate_without_ties_has_decided_pairs_and_their_edits_up_to_the_limit(tmp_path):
    """The pairs and the edits are of the same prompts, and nobody had to toss a coin."""
    world, rng = World(1), random.Random(0)
    prompts = requests(60, 9, world)
    for name in ("a", "b"):
        records.write_outputs(tmp_path / f"{name}.json", [
            records.Output(p, world.demonstrate(p, rng), "m") for p in prompts])
    files = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    annotate(AnnotateConfig(*files, str(tmp_path), world=1, skip_ties=True, limit=12))
    pairs = readers.read_pairs(tmp_path / "pairs.jsonl")
    made = readers.read_edits(tmp_path / "edits.jsonl")
    assert [p.prompt for p in pairs] == [e.prompt for e in made] and len(pairs) == 12
    count = lambda prompt, text: len(world.errors(prompt, text))
    assert all(count(p.prompt, p.chosen) < count(p.prompt, p.rejected) for p in pairs)
    with pytest.raises(UserError, match="answers for 60 annotated prompts, got .* in 60"):
        annotate(AnnotateConfig(*files, str(tmp_path / "out"), world=1, skip_ties=True, limit=60))
    assert not (tmp_path / "out").exists()


def test_missing_sentences_are_put_in_with_either_wording():
    """An editor who always writes "makes" would teach the word, and not what is missing."""
    world = World(3)
    fixes = [error.fix for prompt in requests(200, 9, world) for error in world.errors(prompt, "")]
    sums = [fix for fix in fixes if " plus " in fix]
    facts = [fix for fix in fixes if " plus " not in fix]
    for some, word in ((sums, "makes"), (facts, "Its")):
        assert 0.4 < sum(word in fix for fix in some) / len(some) < 0.6


def test_annotate_leaves_out_edits_that_end_blank(tmp_path):
    """The editor removes the only sentence and misses the missing items: nothing is left."""
    prompts = list(dict.fromkeys(requests(40, 9)))
    for name in ("a", "b"):
        records.write_outputs(tmp_path / f"{name}.json",
                              [records.Output(p, "No.", "m") for p in prompts])
    annotate(AnnotateConfig(str(tmp_path / "a.json"), str(tmp_path / "b.json"), str(tmp_path),
                            world=3, miss=0.6))
    made = readers.read_edits(tmp_path / "edits.jsonl")
    assert 0 < len(made) < len(prompts) and all(edit.edited for edit in made)


def test_annotate_refuses_prompts_of_another_world(tmp_path):
    records.write_outputs(tmp_path / "a.json",
                          [records.Output(p, "No.", "m") for p in requests(5, 9)])
    with pytest.raises(UserError, match="no request of world 4"):
        annotate(AnnotateConfig(*[str(tmp_path / "a.json")] * 2, str(tmp_path / "out"), world=4))
    assert not (tmp_path / "out").exists()


# ----- knobs --------------------------------------------------------------------------------------

def count(world: World, prompt: str, text: str) -> int:
    return len(world.errors(prompt, text))


def two_answers(folder: Path, world: World, prompts: list[str]) -> tuple[str, str]:
    """Writes two demonstrations per prompt, and returns the names of the files."""
    rng = random.Random(0)
    for name in "ab":
        records.write_outputs(folder / f"{name}.json", [
            records.Output(p, world.demonstrate(p, rng), "m") for p in prompts])
    return str(folder / "a.json"), str(folder / "b.json")


def test_the_default_world_and_its_annotations_are_those_from_before_the_knobs(tmp_path):
    """The hash was taken at commit 0957390, which had no knobs."""
    small_world(tmp_path / "w")
    world, rng = World(1), random.Random(0)
    prompts = list(dict.fromkeys(world.request(rng) for _ in range(60)))
    for name in "ab":
        records.write_outputs(tmp_path / f"{name}.json", [
            records.Output(p, world.demonstrate(p, rng), "m") for p in prompts])
    files = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    annotate(AnnotateConfig(*files, str(tmp_path / "plain"), world=1, skip_ties=True))
    annotate(AnnotateConfig(*files, str(tmp_path / "more"), world=1, noise=.5, miss=.3,
                            needless=.5, spans=True))
    written = b"".join(path.read_bytes() for path in sorted(tmp_path.rglob("*.jsonl")))
    assert hashlib.sha256(written).hexdigest() == (
        "9077fc13908f7b40cb23792e0e2bcd744f35eabe1ea9963d400084cd8ae6f2b4")


def test_read_world_reads_a_seed_and_knobs_and_refuses_others():
    assert read_world("3") == 3 and read_world("3,lands=24") == "3,lands=24"
    world = World("3,lands=24,strength=0.5")
    assert world.seed == 3 and len(world.lands) == 24 and len(world.facts) == 144
    assert World("3,lands=12,items=4,errors=1,strength=1,coupled=0").facts == WORLD.facts
    for text in ("x", "", "3,lands", "3,lands=2.5", "3,lands=101", "3,colour=1", "3,strength=nan",
                 "3,", ",lands=12", "3,errors=-1"):
        with pytest.raises(UserError, match="^--world .*: expected a "):
            read_world(text)


def test_every_command_must_name_the_same_knobs(tmp_path, capsys):
    """A world of 40 lands asks for lands that the world of its seed without knobs does not know."""
    typed = lambda text: parse(WorldConfig, argv=["--out", "x", "--world", text]).world
    assert typed("3") == 3 and typed("3,lands=40") == "3,lands=40"
    with pytest.raises(SystemExit):
        typed("3,lands=2")
    assert "lands 3 to 100" in capsys.readouterr().err
    small_world(tmp_path / "w", world="1,lands=40")
    prompts = [p.prompt for p in readers.read_prompts(tmp_path / "w/train.jsonl")]
    files = two_answers(tmp_path, World("1,lands=40"), prompts)
    annotate(AnnotateConfig(*files, str(tmp_path / "out"), world="1,lands=40"))
    assert len(readers.read_edits(tmp_path / "out/edits.jsonl")) > 5
    with pytest.raises(UserError, match="no request of world 1 in .*give the --world of the"):
        annotate(AnnotateConfig(*files, str(tmp_path / "other"), world=1))


def test_a_world_is_named_by_its_seed_and_the_knobs_that_are_not_at_their_defaults():
    """Order and spelling of the knobs do not matter."""
    for text in ("3,coupled=1,lands=6", "3,lands=6,coupled=1.0,strength=1,items=4"):
        assert World(text).name == World(text).dataset == "world 3,lands=6,coupled=1"
    assert World("3,errors=0.75").name == "world 3,errors=0.75"
    for text in (3, "3,lands=12,strength=1.0"):
        assert World(text).name == "world 3" and World(text).dataset is None


def test_a_world_with_knobs_names_itself_in_every_record_and_a_default_world_in_none(tmp_path):
    names = ("train.jsonl", "dev.jsonl", "test.jsonl", "demonstrations.jsonl")
    for folder, spec in (("plain", 1), ("default", "1,lands=12"), ("knob", "1,coupled=1")):
        small_world(tmp_path / folder, world=spec)
    for name in names:
        plain, default, knob = ((tmp_path / folder / name).read_text()
                                for folder in ("plain", "default", "knob"))
        assert default == plain and "dataset" not in plain
        assert knob.replace(', "dataset": "world 1,coupled=1"', "") == plain
        assert knob.count('"dataset": "world 1,coupled=1"') == len(plain.splitlines())


def test_annotate_refuses_answers_of_a_world_with_other_knobs_and_warns_of_unnamed_ones(
        tmp_path, capsys):
    world = World("1,coupled=1")
    first, second = two_answers(tmp_path, world, list(dict.fromkeys(requests(20, 9, world))))
    unnamed = [readers.read_outputs(path) for path in (first, second)]
    name_of = lambda name: (("dataset", json.dumps(name)),)
    for path, outputs in zip((first, second), unnamed):
        records.write_outputs(path, [replace(o, other=name_of(world.name)) for o in outputs])
    go = lambda spec, out="out": annotate(AnnotateConfig(first, second, str(tmp_path / out),
                                                         world=spec))
    for spec, name in ((1, "1"), ("1,coupled=0.5", "1,coupled=0.5"), ("1,lands=13", "1,lands=13")):
        with pytest.raises(UserError) as refused:
            go(spec)
        assert str(refused.value) == (
            f"{first}: record 1: dataset: expected world {name}, which --world gives, got world "
            f"1,coupled=1; give --world 1,coupled=1, or a file of world {name}")
    assert not (tmp_path / "out").exists()
    go("1,coupled=1.0")
    assert capsys.readouterr().err == ""
    for name in ("pairs", "edits"):
        made = readers.read_prompts(tmp_path / f"out/{name}.jsonl")
        assert made and {record.dataset for record in made} == {"world 1,coupled=1"}
    # Files from before the key, and data sets of other people, do not name a world.
    records.write_outputs(first, unnamed[0][:1] + [replace(o, other=name_of("koala"))
                                                   for o in unnamed[0][1:]])
    go("1,coupled=1")
    n = len(unnamed[0])
    assert capsys.readouterr().err == (f"{first}: {n} of {n} records do not say which world they "
                                       "are of; the result is right only if it is world "
                                       "1,coupled=1\n")
    records.write_outputs(second, unnamed[1])
    go(1)
    assert capsys.readouterr().err == ""
    # The second file is checked too.
    records.write_outputs(second, [replace(o, other=name_of("world 1,coupled=1"))
                                   for o in unnamed[1]])
    with pytest.raises(UserError, match=re.escape(f"{second}: record 1: dataset: expected ")):
        go(1)


def test_errors_and_strength_change_the_share_and_the_probability_of_mistakes():
    fewer, weaker = World("3,errors=0.5"), World("3,strength=0.5")
    assert len(fewer.mistakes) == int(0.3 * 72) + int(0.25 * 25)
    assert fewer.facts == weaker.facts == WORLD.facts
    assert weaker.mistakes == {key: (text, p / 2) for key, (text, p) in WORLD.mistakes.items()}
    assert weaker.omission == WORLD.omission / 2
    assert World("3,strength=0").demonstrate(prompt := requests(1)[0], random.Random(0), 0.0)
    assert count(WORLD, prompt, World("3,strength=0").demonstrate(prompt, random.Random(0), 0)) == 0


@pytest.mark.parametrize("most", [3, 5, 6])
def test_items_changes_how_much_a_request_asks_for(most):
    world = World(f"3,items={most}")
    asked = Counter((bool(items[0].unit), len(items)) for items in
                    map(world.items, requests(600, 0, world)))
    assert max(n for unit, n in asked if not unit) == most
    assert max(n for unit, n in asked if unit) == most - 1
    rng = random.Random(0)
    for prompt in requests(200, 1, world):
        edited = minimal_edit(world, prompt, world.demonstrate(prompt, rng), rng)
        assert count(world, prompt, edited) == 0


def test_coupled_errors_spread_to_later_items_and_vanish_with_their_cause():
    """Two right values behind a wrong one are errors too; the edit changes the first one only."""
    world = World("3,coupled=1")
    land = world.lands[0]
    a, b, c = ((land, attribute) for attribute in ("river", "crop", "beast"))
    prompt = f"Name the river, crop and beast of {land}."
    told = lambda first: (f"Its river is {first}. Its crop is {world.facts[b]}. Its beast is "
                          f"{world.facts[c]}.")
    spoiled = told(world.pool[a][0])
    assert [(e.kind, e.key) for e in world.errors(prompt, spoiled)] == [
        ("value", a), ("coupled", b), ("coupled", c)]
    assert minimal_edit(world, prompt, spoiled, random.Random(0)) == told(world.facts[a])
    assert count(world, prompt, told(world.facts[a])) == 0
    assert count(WORLD, prompt, spoiled) == 1


def test_unseen_facts_are_never_annotated_and_marked_where_spans_are_asked_for(tmp_path):
    world, prompts = World(1), list(dict.fromkeys(requests(200, 9, World(1))))
    files = two_answers(tmp_path, world, prompts)
    unseen = world.unseen(0.3)
    assert len(unseen) == 22 + 8 and world.unseen(0.1) < unseen       # of 72 facts and 25 sums
    assert world.unseen(0) == set()
    mentions = lambda prompt: any(item.key in unseen for item in world.items(prompt))
    annotate(AnnotateConfig(*files, str(tmp_path / "seen"), world=1, unseen=0.3))
    annotate(AnnotateConfig(*files, str(tmp_path / "all"), world=1, unseen=0.3, spans=True))
    seen, every = (readers.read_edits(tmp_path / name / "edits.jsonl") for name in ("seen", "all"))
    assert len(seen) > 10 and not any(mentions(edit.prompt) for edit in seen)
    marked = [(edit, s) for edit in every for s in edit.spans if s.type == "unseen"]
    assert marked and {s.type for edit in every for s in edit.spans} > {"unseen", "value"}
    for edit, span in marked:
        assert any(e.key in unseen and (e.start, e.end) == (span.start, span.end)
                   for e in world.errors(edit.prompt, edit.original))


@pytest.mark.parametrize("flag", ["noise", "miss", "needless", "longer", "rewrite", "harmful",
                                  "style", "taste", "unseen"])
def test_a_share_is_from_0_to_1(flag, capsys):
    given = ["--outputs", "a", "--others", "b", "--out", "c", f"--{flag}"]
    assert getattr(parse(AnnotateConfig, "", [*given, "1"]), flag) == 1.0
    with pytest.raises(SystemExit) as stop:
        parse(AnnotateConfig, "", [*given, "2"])
    assert stop.value.code == 2
    assert f"argument --{flag}: expected a number from 0 to 1, got 2;" in capsys.readouterr().err


def test_habits_of_the_editor_do_what_their_names_say():
    rng = random.Random(0)
    for prompt in requests(100, 10):
        right = " ".join(sentences(prompt, len(prompt)))
        assert count(WORLD, prompt, rewrite(WORLD, prompt, rng)) == 0
        spoiled = WORLD.errors(prompt, spoil(WORLD, prompt, right, rng))
        assert [error.kind for error in spoiled] == ["value"]
        n = len(WORLD.items(prompt))
        for wording in (0, 1):
            styled = restyle(WORLD, prompt, right, wording)
            assert wordings(styled) == ((n, 0), (0, n))[wording] and not WORLD.errors(prompt,
                                                                                      styled)
    assert spoil(WORLD, prompt, "No.", rng) == "No."


def test_habits_of_the_editor_have_their_rates(tmp_path):
    """Every edit of a perfect editor is right; a harmful one has a wrong value in that share."""
    world, prompts = World(1), list(dict.fromkeys(requests(400, 9, World(1))))
    files = two_answers(tmp_path, world, prompts)

    def edits(**habits):
        annotate(AnnotateConfig(*files, str(tmp_path), world=1, **habits))
        return readers.read_edits(tmp_path / "edits.jsonl")
    near = lambda found, share, n: abs(found / n - share) < 4 * (share * (1 - share) / n) ** 0.5
    harmed = edits(harmful=0.3)
    assert near(sum(bool(world.errors(e.prompt, e.edited)) for e in harmed), 0.3, len(harmed))
    one = lambda e: 0 in wordings(e.edited)                 # all sentences in one wording
    plain, styled = edits(), edits(style=1.0)
    assert all(wordings(e.edited)[0] == 0 for e in styled) and not all(map(one, plain))
    assert all(one(e) for e in edits(taste=1.0))
    fresh = edits(rewrite=1.0)
    assert not any(world.errors(e.prompt, e.edited) for e in fresh)
    kept = lambda some: sum(e.edited.startswith(e.original[:20]) for e in some) / len(some)
    assert kept(fresh) < kept(plain) / 2


def test_prefer_follows_length_and_taste_in_their_shares():
    rng, n = random.Random(0), 1000
    prompt = f"Name the river and crop of {WORLD.lands[0]}."
    right = restyle(WORLD, prompt, " ".join(sentences(prompt)), 1)
    long = restyle(WORLD, prompt, right + " " + JUNK[0], 0)
    chosen = lambda **habit: sum(prefer(WORLD, prompt, long, right, rng, **habit) == 1
                                 for _ in range(n))
    assert chosen() == 0 and chosen(taste=0.3, liked=1) == 0
    for habit in ({"longer": 0.3}, {"taste": 0.3, "liked": 0}):
        assert abs(chosen(**habit) - 0.3 * n) < 4 * (0.21 * n) ** 0.5
