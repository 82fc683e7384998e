"""Two answers side by side in a real headless Chromium: keys, marks, the way to the edit, kills."""

import json
import time

import pytest

from fgrlhf.data.readers import read_edits, read_pairs
from tests.browser import ALT, CTRL, Tab
from tests.test_collect_page import (  # noqa: F401  (browser is a fixture)
    CONTRAST, SCRIPT, Program, browser, by_id, content, own_port)

PAIRS = [("Why is the sky blue?", "Blue light is scattered more.", "Blue light is scattered less."),
         ("Capital of France?", "It is Paris.", "It is Lyon."),
         ("Twice two?", "Four.", "Twice two is five."),
         ("The longest river?", "The Nile, by most accounts.", "The Rhine, by most accounts.")]


class Judging(Program):
    """`python -m fgrlhf.collect --ask ...` in a process of its own."""

    def __init__(self, folder, pairs: list[tuple[str, str, str]], ask: str, *flags: str):
        self.out = folder / "out.jsonl"
        for n, name in ((1, "A"), (2, "B")):
            (folder / f"{name}.json").write_text(json.dumps([
                {"instruction": pair[0], "output": pair[n], "generator": f"secret {name}",
                 "id": f"{k}"} for k, pair in enumerate(pairs)]))
        self.flags = ("--outputs", str(folder / "A.json"), "--reference", str(folder / "B.json"),
                      "--ask", ask, *flags)
        self.start()

    def judged(self) -> dict[str, dict]:
        return by_id(self.out.with_name("out.judgements.jsonl"))


@pytest.fixture
def start(tmp_path):
    """Starts programs that ask for judgements. They end with the test."""
    running, folder = [], own_port(tmp_path, "out.jsonl")

    def call(pairs=PAIRS, ask: str = "preference", *flags: str) -> Judging:
        running.append(Judging(folder, pairs, ask, "--annotator", "Ada", *flags))
        return running[-1]
    yield call
    for each in running:
        each.kill()


def shown(tab: Tab, done: int) -> Tab:
    """Waits for a pair, and until the page takes keys again."""
    tab.wait(f"document.getElementById('count').textContent.startsWith('{done} of ') && "
             "record?.kind === 'judge' && performance.now() - shownAt > SETTLE")
    return tab


def marks(tab: Tab, side: str) -> list[str]:
    return tab.run(f"Array.from(document.querySelectorAll('#{side} mark'), e => e.textContent)")


def test_keys_choose_skip_mark_and_undo(start, browser):  # noqa: F811
    program = start()
    tab = shown(browser.open(program.url), 0)
    assert "secret" not in tab.run("JSON.stringify(record) + document.body.innerHTML")
    left, right = content(tab, "left"), content(tab, "right")
    assert {left, right} == set(PAIRS[0][1:]) and marks(tab, "left") == []
    tab.press("d")
    assert marks(tab, "left") == [left.split()[-1][:-1]]
    assert marks(tab, "right") == [right.split()[-1][:-1]]
    tab.press("1")
    shown(tab, 1)
    first = program.judged()["0"]
    assert [first["output_2"], first["output_1"]][first["preference"] == 1] == left
    assert first["annotator"] == "Ada" and 0 < first["provenance"]["seconds"] < 60
    tab.press("t")
    shown(tab, 2)
    assert program.judged()["1"]["preference"] == 1.5
    tab.press("s")
    tab.wait("!!document.querySelector('#ask-reason[open]')")
    tab.press("2")                                # in a dialog a key chooses nothing
    tab.run("document.querySelector('#ask-reason [value=\"unclear prompt\"]').click()")
    tab.run("document.querySelector('#ask-reason .primary').click()")
    shown(tab, 3)
    skipped = by_id(program.out.with_name("out.judgements.skipped.jsonl"))
    assert skipped["2"]["reason"] == "unclear prompt" and len(program.judged()) == 2
    for done in (2, 1):
        tab.press("z", ALT)
        shown(tab, done)
    assert list(program.judged()) == ["0"] and content(tab, "prompt-text") == PAIRS[1][0]
    for done in (2, 3, 4):
        tab.press("2")
        if done < 4:
            shown(tab, done)
    tab.wait("document.querySelector('#finished h2').textContent === 'All 4 pairs are done'")
    tab.run("document.getElementById('again').click()")
    out, _ = program.process.communicate(timeout=20)
    assert program.process.returncode == 0 and out.startswith("4 judgements in ")
    assert len(read_pairs(program.out)) == 4
    tab.close()


def test_a_key_hit_twice_judges_one_pair_and_types_nothing(start, browser):  # noqa: F811
    program = start(PAIRS, "both")
    tab = shown(browser.open(program.url), 0)
    tab.press("1")
    tab.wait("record.kind === 'edit'")
    tab.press("1")
    time.sleep(0.1)
    assert content(tab) == program.judged()["0"][
        "output_2" if program.judged()["0"]["preference"] == 1 else "output_1"]
    tab.close()


def test_ask_both_goes_straight_to_the_worse_answer_and_on(start, browser):  # noqa: F811
    program = start(PAIRS, "both")
    tab = shown(browser.open(program.url), 0)
    better, worse = content(tab, "right"), content(tab, "left")
    assert "How to judge" in content(tab, "guide")
    tab.press("2")
    tab.wait("record.kind === 'edit' && document.activeElement.id === 'text'")
    assert content(tab) == worse and content(tab, "preferred-text") == better
    assert "How to edit" in content(tab, "guide") and content(tab, "count") == "0 of 4 done"
    time.sleep(0.5)
    tab.run("document.getElementById('text').select()")
    tab.type(better)
    tab.press("Enter", CTRL)
    shown(tab, 1)
    edit, = read_edits(program.out)
    assert (edit.id, edit.original, edit.edited) == ("0", worse, better)
    tab.press("z", ALT)
    tab.wait("record.kind === 'edit'")
    tab.press("z", ALT)
    shown(tab, 0)
    assert program.judged() == {} and content(tab, "right") == better
    tab.close()


def test_hostile_texts_stay_texts_and_fit_at_every_width(start, browser):  # noqa: F811
    rtl = "عاصمة فرنسا هي باريس."
    program = start([(SCRIPT, SCRIPT + " a", "W" * 3000), (rtl, rtl, "It is Paris.")])
    tab = shown(browser.open(program.url), 0)
    tab.press("d")
    assert {content(tab, "left"), content(tab, "right")} == {SCRIPT + " a", "W" * 3000}
    assert content(tab, "prompt-text") == SCRIPT and tab.run("typeof hacked") == "undefined"
    assert tab.run("document.querySelectorAll('img, body script').length") == 0
    for done in (0, 1):
        for width in (400, 800, 1440):
            tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900,
                     deviceScaleFactor=1, mobile=False)
            assert tab.run("document.documentElement.scrollWidth <= innerWidth"), width
            sides = tab.run("['left', 'right'].map(id => document.getElementById(id)"
                            ".getBoundingClientRect().top)")
            assert (sides[0] == sides[1]) == (width > 400)
        if not done:
            tab.press("t")
            shown(tab, 1)
    direction = "getComputedStyle(document.getElementById('{}')).direction"
    side = "left" if content(tab, "left") == rtl else "right"
    other = "right" if side == "left" else "left"
    assert [tab.run(direction.format(id)) for id in ("prompt-text", side, other)] == [
        "rtl", "rtl", "ltr"]
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pair_can_be_read_and_used_without_eyes_or_mouse(scheme, start, browser):  # noqa: F811
    """WCAG 2.2: 1.4.3 contrast, 4.1.2 names, 2.1.1 keyboard, 2.1.4 single keys can be off."""
    program = start()
    tab = shown(browser.open(program.url), 0)
    tab.call("Emulation.setEmulatedMedia",
             features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.press("d")
    found = tab.run(CONTRAST)
    assert len(found) > 15 and min(found)[0] >= 4.5, min(found)
    tree = {(role, name.strip()) for role, name in tab.tree()}
    assert {("button", "Answer 1 is better"), ("button", "Answer 2 is better"), ("button", "Tie"),
            ("button", "Skip…"), ("button", "Mark differences"), ("heading", "Answer 1"),
            ("heading", "Answer 2"), ("heading", "Which answer is better?"),
            ("progressbar", "Records done")} <= tree
    assert all(name for role, name in tree if role in ("button", "textbox", "radio", "link"))
    assert tab.run("document.activeElement.id") == "pair-title"
    assert content(tab, "spoken") == f"0 of 4 done. Now: {PAIRS[0][0]}"
    order = []
    for _ in range(7):
        tab.press("Tab")
        order.append(tab.run("document.activeElement.id"))
    assert order == ["differences", "left", "right", "choose-left", "choose-tie", "skip-pair",
                     "choose-right"]
    tab.press("/", ALT)
    tab.wait("!!document.querySelector('#shortcuts[open]')")
    tab.run("document.getElementById('plain-keys').click()")
    tab.press("Escape")
    tab.wait("!asking")
    tab.press("1")
    tab.run("document.getElementById('choose-tie').focus()")
    tab.press("Enter")
    shown(tab, 1)
    assert program.judged()["0"]["preference"] == 1.5
    assert content(tab, "spoken") == f"A tie was chosen. 1 of 4 done. Now: {PAIRS[1][0]}"
    tab.close()


def test_three_tabs_and_two_people_lose_nothing_in_a_kill(start, browser):  # noqa: F811
    pairs = [(f"Question {n}?", f"The answer {n} is right.", f"The answer {n} is wrong.")
             for n in range(12)]
    program = start(pairs)
    tabs = [browser.open(program.url) for _ in range(3)]
    for tab in tabs:
        shown(tab, 0)
    tabs[2].run("annotator = 'Bob', next()")             # as the button with the name does
    assert len({content(tab, "prompt-text") for tab in tabs}) == 3
    for done, tab in enumerate(tabs):
        tab.press("1")
        shown(tab, done + 1)
    program.kill()
    tabs[0].press("2")
    assert "does not answer" in tabs[0].wait("!document.getElementById('alert').hidden && "
                                             "document.getElementById('alert').textContent")
    before = program.judged()
    assert len(before) == 3
    program.start()
    for tab in tabs:
        tab.go(program.url)
    done = 3
    while done < 12:
        for tab in tabs[:12 - done]:
            tab.wait("record?.kind === 'judge' && performance.now() - shownAt > SETTLE")
            tab.press("2")
            tab.wait(f"document.getElementById('count').textContent === '{done + 1} of 12 done'")
            done += 1
    after = program.judged()
    assert len(after) == 12 and before.items() <= after.items()
    assert {pair.id for pair in read_pairs(program.out)} == set(after)
    assert [after[id]["annotator"] for id in before] == ["Ada", "Ada", "Bob"]
    for tab in tabs:
        tab.close()
