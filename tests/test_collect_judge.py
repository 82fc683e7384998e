"""People compare two answers: the order, who gets which pair, what is written, and the figures."""

import json
import random
import statistics
import threading

import pytest

import eval as evaluation
from fgrlhf.collect import human, jury, preferences
from fgrlhf.collect import __main__ as collect
from fgrlhf.collect.actions import Actions
from fgrlhf.collect.agreement import Table, cohen_kappa
from fgrlhf.collect.change import marked
from fgrlhf.collect.judgements import (
    Judgement, Judgements, comparisons, drawn_left, for_judges, pair_ids,
    refuse_judgements_of_people)
from fgrlhf.collect.judging import JudgeDesk
from fgrlhf.collect.leases import LEASE, Conflict, Who
from fgrlhf.collect.lines import Lines
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_annotations, read_edits, read_pairs
from fgrlhf.data.records import Output, Provenance
from fgrlhf.engine.config import parse
from tests.test_collect_desk import Clock

ADA, ADA_ELSEWHERE, BOB = Who("Ada", "1", "a"), Who("Ada", "2", "b"), Who("Bob", "3", "c")


def answers(name: str, count: int, **more) -> list[Output]:
    return [Output(f"Question {n}?", f"{name} says {n}.", name, **more) for n in range(count)]


def tasks(count: int, judges: int = 1):
    return for_judges(comparisons(answers("new", count), answers("old", count)), judges, 0)


def write(path, name: str, count: int, **more):
    path.write_text(json.dumps([{"instruction": f"Question {n}?", "output": f"{name} says {n}.",
                                 "generator": name} | more for n in range(count)]))
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path, clock):
    with Judgements(tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl") as store:
        yield JudgeDesk(tasks(4), store, clock)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ----- pairs and their order ----------------------------------------------------------------------

def test_the_left_answer_is_drawn_from_seed_and_id_and_each_system_gets_half():
    left = [drawn_left(0, f"pair {n}") for n in range(2000)]
    assert 900 < left.count(1) < 1100                       # 4.5 standard deviations
    assert left == [drawn_left(0, f"pair {n}") for n in range(2000)]
    other = [drawn_left(1, f"pair {n}") for n in range(2000)]
    assert 900 < sum(a == b for a, b in zip(left, other)) < 1100


def test_shown_and_judge_agree_on_which_answer_is_where():
    for task in tasks(20):
        left, right = task.shown
        for choice, chosen in (("left", left), ("right", right)):
            judgement = task.judge(choice, "Ada", None)
            assert (judgement.output_1, judgement.output_2)[int(judgement.preference) - 1] == chosen
            assert judgement.as_pair().chosen == chosen
            assert judgement.chosen_left == (choice == "left")
        tie = task.judge("tie", "Ada", None)
        assert tie.preference == 1.5 and tie.as_pair() is tie.as_task() is tie.chosen_left is None


def test_pair_ids_are_those_of_the_outputs_or_follow_the_content_into_any_order():
    named = [Output("Q", "a", "new", "7")], [Output("Q", "b", "old", "7")]
    assert pair_ids(*named) == ["7"]
    numbered = [Output("Q", "a", "new", "7#2")], [Output("Q", "b", "old", "7#2")]
    assert "#" not in pair_ids(*numbered)[0]
    twice = [Output("Q", "a", "new", "7")] * 2, [Output("Q", "b", "old", "7")] * 2
    assert len(set(pair_ids(*twice))) == 2 and "7" not in pair_ids(*twice)
    new, old = answers("new", 5), answers("old", 5)
    assert pair_ids(new[::-1], old[::-1]) == pair_ids(new, old)[::-1]
    assert pair_ids(new[:2], old[:2]) == pair_ids(new, old)[:2]


def test_marked_keeps_every_character_and_joins_neighbours():
    assert marked("The  red\nfox, ran.", [False, True, True, False, False, True]) == [
        (False, "The  "), (True, "red\nfox"), (False, ", ran"), (True, ".")]
    assert marked("", []) == [] and marked(" a ", [True]) == [(False, " "), (True, "a"),
                                                              (False, " ")]


# ----- the desk -----------------------------------------------------------------------------------

def test_judge_writes_one_line_with_order_choice_and_time(desk, clock, tmp_path):
    task = desk.take(ADA)
    clock.now += 20
    desk.save(ADA, task.id)
    clock.now += 2.5
    desk.judge(ADA, task.id, "right")
    line, = lines(tmp_path / "judged.jsonl")
    assert (line["output_1"], line["output_2"]) == task.outputs
    assert line["preference"] == 3 - task.left and line["left"] == task.left
    assert (line["annotator"], line["provenance"]["seconds"]) == ("Ada", 22.5)
    pair, = read_pairs(tmp_path / "pairs.jsonl")
    assert (pair.chosen, pair.rejected) == task.shown[::-1] and pair.annotator == "Ada"


def test_a_file_of_judgements_is_read_as_annotations_and_as_pairs(desk, tmp_path):
    for choice in ("left", "tie", "right"):
        desk.judge(ADA, desk.take(ADA).id, choice)
    assert {a.preference for a in read_annotations(tmp_path / "judged.jsonl")} >= {1.5}
    assert [pair.chosen for pair in read_pairs(tmp_path / "judged.jsonl")] == [
        pair.chosen for pair in read_pairs(tmp_path / "pairs.jsonl")]


def test_tabs_get_different_pairs_and_a_pair_that_is_left_becomes_free(desk, clock):
    first, second = desk.take(ADA), desk.take(ADA_ELSEWHERE)
    assert first.id != second.id and desk.take(ADA).id == first.id
    desk.save(ADA, first.id, leave=True)
    assert desk.take(BOB).id == first.id
    clock.now += LEASE + 1
    assert desk.take(Who("Eve", "9", "z")).id == first.id
    with pytest.raises(Conflict, match="another tab"):
        desk.judge(BOB, first.id, "left")


def test_the_same_judgement_twice_is_one_and_another_is_refused(desk):
    task = desk.take(ADA)
    first = desk.judge(ADA, task.id, "left")
    assert desk.judge(ADA, task.id, "left") is first            # the answer to the page was lost
    for who, choice in ((ADA, "right"), (BOB, "left")):
        with pytest.raises(Conflict, match="already"):
            desk.judge(who, task.id, choice)
    with pytest.raises(UserError, match="expected one of left, right, tie, got 'both'"):
        desk.judge(ADA, desk.take(ADA).id, "both")
    assert len(lines(desk.store.path)) == 1


def test_nobody_judges_a_pair_twice_and_all_pairs_come_before_second_judges(tmp_path):
    with Judgements(tmp_path / "judged.jsonl") as store:
        desk = JudgeDesk(tasks(3, judges=2), store)
        for _ in range(3):
            desk.judge(ADA, desk.take(ADA).id, "left")
        assert desk.take(ADA) is None and desk.for_others("Ada") == 3
        assert desk.take(ADA_ELSEWHERE) is None
        one = desk.take(BOB)
        assert one.id == f"{one.pair}#2" and desk.for_others("Bob") == 0
        two = desk.take(Who("Bob", "4", "d"))
        assert two.pair != one.pair
        desk.judge(BOB, one.id, "tie")
        again = JudgeDesk(tasks(3, judges=2), store)            # the program starts again
        assert again.take(ADA) is None and again.for_others("Ada") == 2


def test_undo_and_skip_open_the_pair_again_and_keep_the_pairs_in_step(desk, tmp_path):
    first = desk.take(ADA)
    desk.judge(ADA, first.id, "left")
    second = desk.take(ADA)
    with pytest.raises(UserError, match="reason"):
        desk.skip(ADA, second.id, "", " ")
    desk.skip(ADA, second.id, "", "cannot judge")
    assert desk.undo(BOB) is None
    assert desk.undo(ADA) is second and not desk.store.skipped_path.read_text()
    assert desk.undo(ADA) is first
    assert not lines(tmp_path / "judged.jsonl") and not lines(tmp_path / "pairs.jsonl")
    desk.judge(ADA, first.id, "right")
    assert [pair["chosen"] for pair in lines(tmp_path / "pairs.jsonl")] == [first.shown[1]]


# ----- files --------------------------------------------------------------------------------------

def test_pairs_that_a_kill_left_behind_or_half_written_are_made_again(desk, tmp_path):
    for _ in range(3):
        desk.judge(ADA, desk.take(ADA).id, "left")
    desk.store.close()
    whole = (tmp_path / "pairs.jsonl").read_bytes()
    for left in (b"", whole[:-40], whole[: len(whole) // 2]):
        (tmp_path / "pairs.jsonl").write_bytes(left)
        Judgements(tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl").close()
        assert (tmp_path / "pairs.jsonl").read_bytes() == whole
    desk.store = Judgements(tmp_path / "judged.jsonl")           # for the fixture to close


def test_a_disk_that_is_full_between_a_judgement_and_its_pair_loses_neither(tmp_path, clock,
                                                                            monkeypatch):
    write, full = Lines.append, [True]

    def append(file, value):
        if full and file.path.name == "pairs.jsonl":
            raise UserError("pairs.jsonl: cannot be written (No space left on device)")
        write(file, value)
    monkeypatch.setattr(Lines, "append", append)
    with Judgements(tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl") as store:
        desk = JudgeDesk(tasks(2), store, clock)
        first = desk.take(ADA).id
        with pytest.raises(UserError, match="No space left"):
            desk.judge(ADA, first, "left")
        assert desk.judge(ADA, first, "left").id == first               # the page sends it again
        full.clear()
        second = desk.take(ADA).id
        desk.judge(ADA, second, "right")
        assert [pair["id"] for pair in lines(tmp_path / "pairs.jsonl")] == [second]
    assert [pair["id"] for pair in lines(tmp_path / "pairs.jsonl")] == [first, second]


def test_a_file_of_other_pairs_is_refused_and_kept(tmp_path):
    theirs = '{"id": "x", "prompt": "p", "chosen": "c", "rejected": "r"}\n'
    for text, message in ((theirs, "got the record 'x'; choose another --out"),
                          ('{"id": "x", "prompt": "p", "original": "c", "edited": "r"}\n',
                           "unknown field")):
        (tmp_path / "pairs.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            Judgements(tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl")
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
        assert (tmp_path / "pairs.jsonl").read_text() == text


def test_a_judgement_whose_line_is_deleted_is_open_again(desk, tmp_path):
    first, second = desk.take(ADA), desk.take(ADA_ELSEWHERE)
    desk.judge(ADA, first.id, "left")
    desk.judge(ADA_ELSEWHERE, second.id, "left")
    desk.store.close()
    kept = (tmp_path / "judged.jsonl").read_text().splitlines(keepends=True)[1:]
    (tmp_path / "judged.jsonl").write_text("".join(kept))
    desk.store = Judgements(tmp_path / "judged.jsonl", tmp_path / "pairs.jsonl")
    assert JudgeDesk(tasks(4), desk.store).take(ADA).id == first.id
    assert [pair["id"] for pair in lines(tmp_path / "pairs.jsonl")] == [second.id]


def test_a_language_model_does_not_write_over_judgements_of_people(desk, tmp_path):
    refuse_judgements_of_people(tmp_path / "none.jsonl")
    (tmp_path / "llm.jsonl").write_text('{"instruction": "q", "output_1": "a", "output_2": "b"}\n')
    refuse_judgements_of_people(tmp_path / "llm.jsonl")
    desk.judge(ADA, desk.take(ADA).id, "left")
    with pytest.raises(UserError, match="got 1 judgements of people; choose another file"):
        refuse_judgements_of_people(desk.store.path)
    edited = desk.store.path.read_text().replace('"left": ', '"left": 3')       # 31 or 32
    (tmp_path / "edited.jsonl").write_text(edited)
    with pytest.raises(UserError, match="got 1 judgements of people; choose another file"):
        refuse_judgements_of_people(tmp_path / "edited.jsonl")


@pytest.mark.parametrize("field, wrong, expected", [
    ("preference", 7, "1, 2, 1.5, got 7"), ("preference", "1", "1, 2, 1.5, got '1'"),
    ("left", 3, "1, 2, got 3"), ("left", True, "1, 2, got True"),
    ("left", [1], r"1, 2, got \[1\]")])
def test_a_judgement_that_was_edited_by_hand_is_refused_by_line_and_field(desk, tmp_path, field,
                                                                          wrong, expected):
    for _ in range(2):
        desk.judge(ADA, desk.take(ADA).id, "left")
    desk.store.close()
    first, second = lines(tmp_path / "judged.jsonl")
    (tmp_path / "judged.jsonl").write_text(f"{json.dumps(first)}\n"
                                           f"{json.dumps(second | {field: wrong})}\n")
    with pytest.raises(UserError, match=f"judged.jsonl:2: {field}: expected one of {expected};"):
        Judgements(tmp_path / "judged.jsonl")
    (tmp_path / "judged.jsonl").write_text(json.dumps(first | {"preference": 1}) + "\n")
    desk.store = Judgements(tmp_path / "judged.jsonl")          # 1 is as good as 1.0
    assert desk.store.judged()[0].as_pair().chosen == first["output_1"]


# ----- from judgement to edit ---------------------------------------------------------------------

class Page:
    """One load of the page: sends actions as the browser does, and keeps what it shows."""

    def __init__(self, actions: Actions, annotator: str = "Ada", tab: str = "t"):
        self.table = actions.table
        self.who = {"annotator": annotator, "tab": tab, "page": f"{annotator} {tab}"}
        self.status = self.record = self.view = None

    def __call__(self, action: str, **fields) -> "Page":
        about = {"id": self.record["id"], "kind": self.record["kind"]} if self.record else {}
        self.status, self.view = self.table[action](self.who | about | fields)
        if self.status == 200 and "record" in self.view:
            self.record = self.view["record"]
        return self

    def texts(self) -> list[str]:
        return ["".join(text for _, text in answer) for answer in self.record["answers"]]


@pytest.fixture
def both(tmp_path, monkeypatch):
    """both(drive) runs `--ask both` on 3 prompts; `drive` gets the actions in place of a server."""
    write(tmp_path / "A.json", "new", 3)
    write(tmp_path / "B.json", "old", 3)

    def call(drive, ask: str = "both"):
        monkeypatch.setattr(human, "serve", lambda actions, path, options: drive(actions))
        return collect.main(parse(collect.Config, argv=[
            "--outputs", str(tmp_path / "A.json"), "--reference", str(tmp_path / "B.json"),
            "--out", str(tmp_path / "edits.jsonl"), "--editor", "human", "--ask", ask]))
    return call


def test_ask_both_hands_the_worse_answer_to_the_page_that_judged_it(both, tmp_path, capsys):
    def drive(actions):
        ada, bob = Page(actions), Page(actions, "Bob", "u")
        ada("next")
        bob("next")
        left, right = ada.texts()
        assert ada.view["total"] == 3 and "new" not in json.dumps(ada.record["id"])
        ada("judge", choice="left")
        assert (ada.record["kind"], ada.record["rejected"], ada.record["chosen"]) == (
            "edit", right, left)
        assert ada.view["done"] == 0                            # the pair waits for its edit
        bob("judge", choice="tie")
        assert bob.record["kind"] == "judge" and bob.view["done"] == 1
        ada("accept", text=right.replace("says", "said"))
        assert ada.view["done"] == 2 and ada.record is None     # Bob has the last pair
    assert both(drive) == 0
    edit, = read_edits(tmp_path / "edits.jsonl")
    pair, = read_pairs(tmp_path / "edits.pairs.jsonl")
    assert edit.id == pair.id and edit.original == pair.rejected
    assert edit.edited == pair.rejected.replace("says", "said")
    said = capsys.readouterr().out
    assert "2 judgements in" in said and "1 preferences, 1 ties; 0 skipped, 1 open" in said
    assert "1 of 1 records done" in said


def test_ask_both_leaves_no_new_file_where_the_edits_are_refused(both, tmp_path):
    other = '{"id": "x", "prompt": "p", "chosen": "c", "rejected": "r"}\n'
    (tmp_path / "edits.jsonl").write_text(other)
    with pytest.raises(UserError, match="edits.jsonl:1: "):
        both(lambda actions: None)
    names = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")}
    assert names == {"A.json", "B.json", "edits.jsonl"}
    assert (tmp_path / "edits.jsonl").read_text() == other


def test_ask_both_goes_on_with_the_edit_after_a_kill_and_offers_it_to_others_last(both):
    seen = {}

    def begin(actions):
        ada = Page(actions)("next")("judge", choice="right")
        ada("save", text="a draft says 0.")
        seen["edit"] = ada.record["id"]
        raise KeyboardInterrupt                                 # as a kill: nothing is finished

    def go_on(actions):
        bob = Page(actions, "Bob", "u")("next")
        assert bob.record["kind"] == "judge"
        ada = Page(actions, "Ada", "new tab")("next")
        assert (ada.record["id"], ada.record["text"]) == (seen["edit"], "a draft says 0.")
        bob("judge", choice="tie")("judge", choice="tie")
        assert bob.record is None                               # Ada's edit is hers
        ada("leave", text="a draft says 0.")
        assert bob("next").record["id"] == seen["edit"]
    with pytest.raises(KeyboardInterrupt):
        both(begin)
    both(go_on)


def test_ask_both_undoes_in_the_order_of_the_decisions(both, tmp_path):
    def drive(actions):
        ada = Page(actions)("next")
        first, (left, right) = ada.record["id"], ada.texts()
        ada("judge", choice="left")("save", text="a draft of the wrong answer.")
        assert ada("undo").record["kind"] == "judge" and ada.record["id"] == first
        ada("judge", choice="right")
        assert ada.record["rejected"] == ada.record["text"] == left      # no draft of `right`
        ada("accept", text=left + " Yes.")
        assert ada.record["kind"] == "judge" and ada.record["id"] != first
        assert ada("undo").record["kind"] == "edit" and ada.record["text"] == left + " Yes."
        assert ada("undo").record["kind"] == "judge" and ada.record["id"] == first
        assert ada("undo").status == 422 and "nothing to undo" in ada.view["error"]
    both(drive)
    assert not lines(tmp_path / "edits.jsonl") and not lines(tmp_path / "edits.pairs.jsonl")


def test_a_judgement_whose_answer_another_person_has_edited_stays(both):
    def drive(actions):
        ada, bob = Page(actions)("next")("judge", choice="left"), Page(actions, "Bob", "u")
        edit = ada.record["id"]
        ada("leave")
        bob("next")("judge", choice="tie")("judge", choice="tie")
        assert bob.record["id"] == edit
        bob("accept", text=bob.record["text"] + " Yes.")
        assert ada("undo").status == 422 and "cannot be undone" in ada.view["error"]
    both(drive)


def test_undo_in_one_tab_takes_back_no_choice_of_the_same_moment_in_another_tab(both, monkeypatch):
    def drive(actions):
        one, other = Page(actions)("next"), Page(actions, tab="u")("next")
        first, second = one.record["id"], other.record["id"]
        one("judge", choice="left")
        choice = threading.Thread(target=lambda: other("judge", choice="tie"))
        remove = actions.edits.remove

        def slowly(*given):
            choice.start()
            choice.join(0.3)                            # it waits for the undo
            remove(*given)
        monkeypatch.setattr(actions.edits, "remove", slowly)
        assert one("undo").record["id"] == first and one.record["kind"] == "judge"
        choice.join()
        assert list(actions.judging.store.records) == [second]
    both(drive)


def test_what_holds_no_preference_is_left_out_and_counted(tmp_path, capsys):
    old, new = answers("old", 4), answers("new", 4)
    new[0], new[1] = old[0], Output("Question 1?", " ", "new")
    for name, outputs in (("A", new), ("B", old)):
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"instruction": o.instruction, "output": o.output} for o in outputs]))
    found = preferences.read_comparisons(tmp_path / "A.json", tmp_path / "B.json", 3, 0)
    assert [task.prompt for task in found] == ["Question 2?"]
    said = capsys.readouterr().err
    assert "1 of 3 pairs left out: the two answers are equal" in said
    assert "1 of 3 pairs left out: an answer is blank" in said


@pytest.mark.parametrize("flags, message", [
    (["--ask", "both", "--editor", "llm"], "--ask both: expected --editor human, got --editor llm"),
    (["--ask", "preference", "--editor", "human"], "expected --outputs and --reference"),
    (["--ask", "preference", "--editor", "human", "--outputs", "o.json", "--reference", "r.json"],
     "--out o.json: expected another file than --outputs"),
    (["--editor", "human"], "--ask edit: expected --pairs")])
def test_flags_that_do_not_go_together_are_refused(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        collect.main(parse(collect.Config, argv=["--out", "o.json", *flags]))
    assert not list(tmp_path.iterdir())


# ----- the figures --------------------------------------------------------------------------------

@pytest.mark.parametrize("count, n, low, high", [      # by hand, and as published for 8 of 10
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0),
    (50, 100, 0.4038, 0.5962)])
def test_wilson(count, n, low, high):
    assert jury.wilson(count, n) == pytest.approx((low, high), abs=1e-4)


def test_cohen_kappa_by_hand_and_as_the_table_of_two_labels():
    """10 pairs, 7 equal: p = .7; A says 1, 2, tie 5, 3, 2 times, B 4, 4, 2: e = (20+12+4)/100."""
    a = [1, 1, 1, 1, 1, 2, 2, 2, 1.5, 1.5]
    b = [1, 1, 1, 2, 1.5, 2, 2, 2, 1.5, 1]
    assert cohen_kappa(a, b) == pytest.approx((0.7 - 0.36) / (1 - 0.36))
    assert cohen_kappa([1, 1], [1, 1]) is cohen_kappa([], []) is None
    table, x, y = Table(), [True, False, True, True, False], [True, True, False, True, False]
    table.add(x, y)
    assert cohen_kappa(x, y) == pytest.approx(table.kappa)


def judgement(pair: int, preference: float, left: int, who: str, seconds: float) -> Judgement:
    id = f"{pair}" if who == "Ada" else f"{pair}#2"
    return Judgement(id, f"{pair}", "q", "a", "b", preference, left, annotator=who,
                     provenance=Provenance("human", "2026-11-28T12:00:00Z", 1, seconds))


def test_agreements_counts_only_pairs_that_both_judged():
    ours = [judgement(n, p, 1, "Ada", 1) for n, p in enumerate((1, 2, 2, 1.5))]
    theirs = [judgement(n, p, 1, "Bob", 1) for n, p in enumerate((1, 2, 1))]
    found, = jury.agreements([*ours, *theirs])
    assert found["judges"] == ["Ada", "Bob"] and found["pairs"] == 3
    assert found["same"] == pytest.approx(2 / 3)
    assert found["kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))     # e = (1*2 + 2*1) / 9
    assert -1 <= found["kappa_95"][0] <= found["kappa"] <= found["kappa_95"][1] <= 1


def test_pair_preferences_are_means_over_the_judges():
    found = [judgement(0, 2, 1, "Ada", 1), judgement(0, 1.5, 1, "Bob", 1),
             judgement(1, 1, 1, "Ada", 1)]
    assert jury.pair_preferences(found) == {"0": 0.75, "1": 0.0}


def test_win_rate_of_people_resumes_and_reports(tmp_path, monkeypatch, capsys):
    """Ada prefers the new answers, Bob always takes the left one; 2 judges, a break, 10 pairs."""
    A, B = write(tmp_path / "A.json", "new", 10), write(tmp_path / "B.json", "old", 10)
    equal = json.loads(A.read_text())
    equal[5]["output"] = "old says 5."                  # equal: a tie without a question
    A.write_text(json.dumps(equal))
    seen = []
    order = random.Random("pairs-0").sample(range(10), 10)

    def run(drive) -> dict:
        monkeypatch.setattr(human, "serve", lambda actions, path, options: drive(actions))
        return evaluation.win_rate(parse(evaluation.WinRateConfig, argv=[
            "--judge", "human", "--outputs", str(A), "--reference", str(B), "--judges", "2",
            "--judgements", str(tmp_path / "judged.jsonl")]))

    def first(actions):
        ada = Page(actions)("next")
        for _ in range(4):
            assert set(ada.record) == {"kind", "id", "prompt", "input", "context", "answers"}
            seen.append(ada.record["prompt"])
            ada("judge", choice="left" if ada.texts()[0].startswith("new") else "right")

    table = run(first)
    said = capsys.readouterr().err
    assert "1 of 10 pairs have equal answers: they count as ties and are not shown" in said
    assert "6 of 10 pairs left out: not judged yet, or skipped" in said
    assert order[-1] == 5                                       # the tie is not reached yet
    assert (table["wins"], table["losses"], table["ties"], table["left_out"]) == (4, 0, 0, 6)
    assert (table["judgements"], table["open"], table["agreement"]) == (4, 14, [])
    assert seen == [f"Question {n}?" for n in order[:4]]

    def second(actions):
        ada, bob = Page(actions)("next"), Page(actions, "Bob", "u")("next")
        while ada.record:
            ada("judge", choice="left" if ada.texts()[0].startswith("new") else "right")
        assert ada.view["others"] >= 4
        while bob.record:
            bob("judge", choice="left")
        while ada("next").record:
            ada("judge", choice="left" if ada.texts()[0].startswith("new") else "right")
        assert bob("finish").status == 200 and actions.finished.is_set()

    table = run(second)
    found = [record for record in map(json.loads, (tmp_path / "judged.jsonl").open())]
    assert len(found) == table["judgements"] == 18 and len({r["id"] for r in found}) == 18
    verdicts = {}
    for record in found:
        verdicts.setdefault(record["pair"], []).append(record["preference"] - 1)
    assert table["win_rate"] == pytest.approx(
        (sum(map(statistics.fmean, verdicts.values())) + 0.5) / 10)
    assert table["left_out"] == table["open"] == table["skipped"] == 0
    lefts = [record["preference"] == record["left"] for record in found]
    assert table["left_chosen"] == pytest.approx(sum(lefts) / 18) and table["judge"] == "human"
    assert table["agreement"][0]["judges"] == ["Ada", "Bob"] and table["agreement"][0]["pairs"] == 9
    assert table["median_seconds"] >= 0
    assert run(None)["win_rate"] == table["win_rate"]           # nothing is open: no page
    assert "all pairs are judged" in capsys.readouterr().err


def test_limit_judges_a_sample_and_other_answers_under_a_known_id_are_refused(tmp_path,
                                                                              monkeypatch):
    def run(*flags):
        monkeypatch.setattr(human, "serve", lambda actions, path, options: seen(actions))
        return evaluation.win_rate(parse(evaluation.WinRateConfig, argv=[
            "--judge", "human", "--outputs", str(tmp_path / "A.json"), "--reference",
            str(tmp_path / "B.json"), "--judgements", str(tmp_path / "judged.jsonl"), *flags]))

    def seen(actions):
        page = Page(actions)("next")
        while page.record:
            page("judge", choice="tie")

    write(tmp_path / "A.json", "new", 1, id="7")
    write(tmp_path / "B.json", "old", 1, id="7")
    assert run()["ties"] == 1
    write(tmp_path / "A.json", "newer", 1, id="7")
    with pytest.raises(UserError, match="record '7': expected the prompt and the two answers"):
        run()
    write(tmp_path / "A.json", "new", 9)
    write(tmp_path / "B.json", "old", 9)
    assert run("--limit", "4") == run("--limit", "4")           # the second one asks for nothing
    assert (run("--limit", "4")["ties"], run("--limit", "99")["ties"]) == (4, 9)
