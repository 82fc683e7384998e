"""The desk of the human editor: leases (on a fake clock), drafts, accept, skip and undo."""

import json

import pytest

from fgrlhf.collect.desk import Desk
from fgrlhf.collect.leases import LEASE, Conflict, Who
from fgrlhf.collect.store import Store
from fgrlhf.collect.tasks import Task
from fgrlhf.data.fields import UserError

TASKS = [Task(f"r{n}", f"prompt {n}", f"the good answer {n}", f"the bad answer {n}")
         for n in range(4)]
ADA, ADA_AGAIN = Who("Ada", "tab 1", "load 1"), Who("Ada", "tab 1", "load 2")
ADA_ELSEWHERE, BOB = Who("Ada", "tab 2", "load 3"), Who("Bob", "tab 3", "load 4")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(tmp_path, clock):
    with Store(tmp_path / "edits.jsonl") as store:
        yield Desk(TASKS, store, 0.5, clock)


def again(desk: Desk, clock=None) -> Desk:
    """The desk of a program that was killed and started again: only the disk is left."""
    desk.store.close()
    desk.store.__init__(desk.store.path)
    return Desk(TASKS, desk.store, 0.5, clock or Clock())


def taken(desk: Desk, who: Who) -> str | None:
    held = desk.take(who)
    return held and held[0].id


# ----- leases -------------------------------------------------------------------------------------

def test_take_gives_two_tabs_different_records(desk):
    assert [taken(desk, who) for who in (ADA, ADA_ELSEWHERE, BOB)] == ["r0", "r1", "r2"]


def test_take_gives_a_reloaded_tab_its_record_again(desk):
    taken(desk, BOB)
    assert taken(desk, ADA) == taken(desk, ADA_AGAIN) == "r1"


def test_save_is_refused_to_the_page_that_a_reload_replaced(desk):
    taken(desk, ADA), taken(desk, ADA_AGAIN)
    with pytest.raises(Conflict, match="another tab"):
        desk.save(ADA, "r0", "the late answer 0")
    assert desk.take(ADA_AGAIN)[1] == "the late answer 0"         # the typed text is kept


def test_take_gives_an_expired_record_to_another_annotator(desk, clock):
    for who in (ADA, ADA_ELSEWHERE, Who("Ada", "tab 4", "a"), Who("Ada", "tab 5", "b")):
        assert taken(desk, who)
    assert desk.take(BOB) is None
    clock.now += LEASE - 1
    desk.save(ADA, "r0", "the odd answer 0")                        # renews the lease
    clock.now += 2
    task, text = desk.take(BOB)
    assert (task.id, text) == ("r1", "the bad answer 1")
    with pytest.raises(Conflict):
        desk.save(ADA_ELSEWHERE, "r1", "the odd answer 1")


def test_save_renews_a_lease_that_ran_out_while_nobody_came(desk, clock):
    taken(desk, ADA)
    clock.now += 10 * LEASE
    desk.save(ADA, "r0", "the odd answer 0")
    assert taken(desk, BOB) == "r1"


def test_save_on_leaving_frees_the_record_for_others(desk):
    taken(desk, ADA)
    desk.save(ADA, "r0", "the bad answer 0", leave=True)
    assert taken(desk, Who("Ada", "tab 9", "load 9")) == "r0"


def test_take_prefers_own_drafts_and_leaves_those_of_others_to_the_last(desk):
    for who, id in ((ADA, "r0"), (BOB, "r1")):
        assert taken(desk, who) == id
        desk.save(who, id, "the odd answer", leave=True)
    new = [Who("Bob", f"tab {n}", "x") for n in range(10, 14)]
    assert [taken(desk, who) for who in new] == ["r1", "r2", "r3", "r0"]


def test_save_of_a_record_that_the_tab_has_left_does_not_take_it_again(desk):
    taken(desk, ADA)
    desk.accept(ADA, "r0", "the odd answer 0")
    assert taken(desk, ADA) == "r1"
    desk.undo(ADA)
    with pytest.raises(Conflict):
        desk.save(ADA, "r1", "a message that came late")
    assert taken(desk, BOB) != "r0"


# ----- drafts -------------------------------------------------------------------------------------

def test_drafts_survive_the_program_and_stay_their_annotators(desk):
    taken(desk, ADA)
    desk.save(ADA, "r0", "the unfinished — answer 0\n")
    desk = again(desk)
    assert desk.take(Who("Ada", "new", "x"))[1] == "the unfinished — answer 0\n"
    desk.save(Who("Ada", "new", "x"), "r0", "the unfinished — answer 0\n", leave=True)
    bob = {taken(desk, Who("Bob", f"tab {n}", "x")) for n in range(4)}
    assert bob == {"r0", "r1", "r2", "r3"}
    assert desk.take(Who("Bob", "tab 3", "x"))[1] == "the bad answer 0"


def test_a_broken_file_of_drafts_is_refused_with_its_place(desk):
    desk.path.write_text('{"id": "r0"}\n')
    with pytest.raises(UserError, match=r"drafts.jsonl:1: annotator"):
        again(desk)


# ----- accept, skip, undo -------------------------------------------------------------------------

def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_accept_writes_text_annotator_and_time_spent(desk, clock):
    taken(desk, ADA)
    clock.now += 20
    desk.save(ADA, "r0", "the better answer 0")
    desk.save(ADA, "r0", "the better answer 0", leave=True)
    clock.now += 500                                                # the record is not open
    taken(desk, ADA_AGAIN)
    clock.now += 5
    desk.accept(ADA_AGAIN, "r0", "the better answer 0")
    [edit] = lines(desk.store.path)
    assert (edit["edited"], edit["original"], edit["annotator"]) == (
        "the better answer 0", "the bad answer 0", "Ada")
    assert edit["provenance"]["editor"] == "human" and edit["provenance"]["seconds"] == 25
    assert desk.path.read_text() == ""


def test_accept_delivered_twice_writes_once(desk):
    taken(desk, ADA)
    desk.accept(ADA, "r0", "the better answer 0")
    desk.accept(ADA, "r0", "the better answer 0")
    assert len(lines(desk.store.path)) == 1
    with pytest.raises(Conflict, match="finished"):
        desk.accept(BOB, "r0", "the other answer 0")


@pytest.mark.parametrize("text, reason", [("", "empty"), (" \n", "empty"),
                                          ("not a word of it stays here", "100%.*at most 50%")])
def test_accept_refuses_blank_and_large_edits(desk, text, reason):
    taken(desk, ADA)
    with pytest.raises(UserError, match=reason):
        desk.accept(ADA, "r0", text)
    assert desk.store.path.read_text() == "" and desk.take(ADA_AGAIN) == (TASKS[0], text)


def test_accept_refuses_a_record_held_by_another_tab(desk):
    taken(desk, ADA), taken(desk, BOB)
    with pytest.raises(Conflict, match="another tab"):
        desk.accept(BOB, "r0", "the better answer 0")
    assert desk.store.path.read_text() == ""


def full_disk(*_):
    raise UserError("edits.jsonl: cannot be written (No space left on device)")


def test_accept_on_a_full_disk_keeps_the_draft_and_can_be_repeated(desk, monkeypatch):
    taken(desk, ADA)
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "add", full_disk)
        with pytest.raises(UserError, match="No space"):
            desk.accept(ADA, "r0", "the better answer 0")
    assert desk.take(ADA_AGAIN) == (TASKS[0], "the better answer 0")
    desk.accept(ADA_AGAIN, "r0", "the better answer 0")
    assert len(lines(desk.store.path)) == 1


def test_undo_on_a_full_disk_leaves_the_record_accepted(desk, monkeypatch):
    taken(desk, ADA)
    desk.accept(ADA, "r0", "the better answer 0")
    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "withdraw", full_disk)
        with pytest.raises(UserError, match="No space"):
            desk.undo(ADA)
    assert desk.progress("Ada")["done"] == 1
    assert desk.undo(ADA) == (TASKS[0], "the better answer 0")


def test_skip_needs_a_reason_and_keeps_it(desk):
    taken(desk, ADA)
    with pytest.raises(UserError, match="reason"):
        desk.skip(ADA, "r0", "the bad answer 0", " ")
    for _ in range(2):                                              # the same call twice
        desk.skip(ADA, "r0", "the bad answer 0", "cannot judge")
    [skip] = lines(desk.store.skipped_path)
    assert (skip["id"], skip["reason"], skip["annotator"]) == ("r0", "cannot judge", "Ada")


def test_undo_reopens_the_last_of_this_annotator_with_its_text(desk):
    taken(desk, ADA), taken(desk, BOB)
    desk.accept(ADA, "r0", "the better answer 0")
    desk.skip(BOB, "r1", "the odd answer 1", "too hard")
    assert desk.undo(ADA) == (TASKS[0], "the better answer 0")
    assert desk.undo(BOB) == (TASKS[1], "the odd answer 1")
    assert desk.undo(ADA) is None
    assert desk.store.path.read_text() == desk.store.skipped_path.read_text() == ""
    desk.accept(ADA, "r0", "the best answer 0")
    assert [edit["edited"] for edit in lines(desk.store.path)] == ["the best answer 0"]


def test_undo_goes_back_past_a_restart_in_the_order_of_time(desk):
    for n, skipped in enumerate((False, True, False)):
        assert taken(desk, ADA) == f"r{n}"
        if skipped:
            desk.skip(ADA, f"r{n}", TASKS[n].rejected, "too hard")
        else:
            desk.accept(ADA, f"r{n}", TASKS[n].rejected)
    desk = again(desk)
    assert desk.progress("Ada") == {"done": 3, "total": 4, "undo": True}
    assert [desk.undo(ADA)[0].id for _ in range(3)] == ["r2", "r1", "r0"]
    assert desk.progress("Ada") == {"done": 0, "total": 4, "undo": False}


def test_accept_keeps_the_line_ends_of_the_response_and_may_be_repeated(tmp_path):
    with Store(tmp_path / "edits.jsonl") as store:
        desk = Desk([Task("r", "p", "c", "One.\r\nTwo.\nThree.\rFour.")], store, 0.5)
        taken(desk, ADA)
        for _ in range(2):
            desk.accept(ADA, "r", "One.\nTwo.\nThree.\nFive.")
        assert store.records["r"].edited == "One.\r\nTwo.\nThree.\rFive."
        assert desk.undo(ADA)[1] == "One.\r\nTwo.\nThree.\rFive."


def test_accept_lets_the_free_words_of_a_short_answer_change(tmp_path):
    with Store(tmp_path / "edits.jsonl") as store:
        desk = Desk([Task("r", "p", "Paris.", "Lyon.")], store, 0.5, free_words=0)
        taken(desk, ADA)
        with pytest.raises(UserError, match="1 of 1 words changed"):
            desk.accept(ADA, "r", "Paris.")
        desk.free_words = 1
        desk.accept(ADA, "r", "Paris.")
        assert store.records["r"].edited == "Paris."
