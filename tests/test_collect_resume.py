"""A collection goes on although the lines of its input have moved, and never edits another text."""

import json
import os
import subprocess
import sys

import pytest

from fgrlhf.collect import __main__ as collect
from fgrlhf.collect.desk import Desk, Draft, drafts_path, read_drafts
from fgrlhf.collect.leases import Who
from fgrlhf.collect.resume import resumed
from fgrlhf.collect.store import Skip, Store
from fgrlhf.collect.tasks import UNNAMED, read_tasks
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.data.records import Edit, Provenance
from fgrlhf.engine.config import parse
from tests.processes import ROOT
from tests.test_collect import LAND

HOW = Provenance("human", "2026-11-21T12:00:00Z", 1, 2.5)
PROMPT = f"Name the river and crop of {LAND}."


def pair(n: int, **more) -> dict:
    return {"prompt": PROMPT, "chosen": "?", "rejected": f"Its river is Nowhere {n}."} | more


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture
def main(tmp_path):
    """main(records...) writes pairs.jsonl, and the simulated editor edits what is open."""
    def call(*records, pairs="pairs.jsonl"):
        path = write(tmp_path / pairs, *records)
        assert collect.main(parse(collect.Config, argv=[
            "--pairs", str(path), "--out", str(tmp_path / "edits.jsonl"), "--editor", "simulated",
            "--world", "0"])) == 0
        return read_edits(tmp_path / "edits.jsonl")
    return call


def old(tmp_path, *numbers: int, name="pairs.jsonl:{}") -> None:
    """Writes what an older version wrote: ids by line number."""
    with Store(tmp_path / "edits.jsonl") as store:
        for n in numbers:
            store.add(Edit(name.format(n), PROMPT, pair(n)["rejected"], "Its river is it.",
                           annotator="old", provenance=HOW))


# Ids.

def test_a_record_keeps_its_id_and_others_get_one_from_their_content(tmp_path):
    first = read_tasks(write(tmp_path / "a.jsonl", pair(1), pair(2, id="mine"), pair(3)))
    moved = read_tasks(write(tmp_path / "b.jsonl", pair(0), pair(3), pair(2, id="mine"), pair(1)))
    assert first[1].id == "mine" and first[0].id.startswith(UNNAMED) and first[0].is_unnamed
    assert [task.id for task in moved[1:]] == [first[2].id, "mine", first[0].id]
    assert len({task.id for task in moved}) == 4


def test_records_that_differ_in_any_text_get_different_ids_and_equal_ones_too(tmp_path):
    records = [pair(1), pair(1, prompt="Other?"), pair(1, chosen="!"), pair(1, input="x"),
               pair(1, rejected="Other."), pair(1), pair(1)]
    ids = [task.id for task in read_tasks(write(tmp_path / "a.jsonl", *records))]
    assert len(set(ids)) == 7
    assert ids[5:] == [f"{ids[0]}-2", f"{ids[0]}-3"]


# Resuming.

def test_a_line_in_front_makes_no_record_done_and_edits_none_twice(tmp_path, main):
    first = main(pair(1), pair(2))
    both = main(pair(0), pair(1), pair(2))
    assert both[:2] == first
    assert [edit.original for edit in both] == [pair(n)["rejected"] for n in (1, 2, 0)]
    assert main(pair(2), pair(0), pair(1)) == both


@pytest.mark.parametrize("name", ["pairs.jsonl:{}", "pairs.jsonl: record {}", "pairs.json:{}"])
def test_edits_by_line_number_of_an_older_version_are_resumed_by_their_content(
        tmp_path, main, name):
    old(tmp_path, 1, 2, name=name)
    edits = main(pair(0), pair(1), pair(2))
    assert [edit.original for edit in edits] == [pair(n)["rejected"] for n in (1, 2, 0)]
    assert [edit.annotator for edit in edits[:2]] == ["old", "old"]
    assert main(pair(0), pair(1), pair(2), pair(3))[:3] == edits


def test_equal_records_of_an_older_version_are_resumed_each_once(tmp_path):
    with Store(tmp_path / "edits.jsonl") as store:
        for n in (1, 2):
            store.add(Edit(f"pairs.jsonl:{n}", PROMPT, "Same.", "Other.", provenance=HOW))
        tasks = read_tasks(write(tmp_path / "pairs.jsonl", *[pair(1, rejected="Same.")] * 3))
        tasks = resumed(tasks, store.records.values(), store.path, tmp_path / "pairs.jsonl")
        assert [task.id for task in tasks[:2]] == ["pairs.jsonl:1", "pairs.jsonl:2"]
        assert store.remaining(tasks) == tasks[2:] and tasks[2].is_unnamed


def test_a_skip_by_line_number_is_refused_because_it_does_not_tell_its_response(tmp_path, main):
    with Store(tmp_path / "edits.jsonl") as store:
        store.add(Skip("pairs.jsonl:1", "skipped", "unclear", "Ada", HOW))
    before = (tmp_path / "edits.skipped.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"edits.skipped.jsonl: record 'pairs.jsonl:1': expected an "
                                        "id made from the content.*delete the line or choose"):
        main(pair(1))
    assert (tmp_path / "edits.skipped.jsonl").read_bytes() == before
    assert len(main(pair(1), pairs="renamed.jsonl")) == 1      # no record of this file


@pytest.mark.parametrize("changed", [
    {"rejected": "Its river is elsewhere."}, {"prompt": PROMPT + "!"}, {"input": "In short."}])
def test_another_response_under_a_finished_id_is_noticed(tmp_path, main, changed):
    main(pair(1, id="a"), pair(2, id="b"))
    before = (tmp_path / "edits.jsonl").read_bytes()
    with pytest.raises(UserError, match="edits.jsonl: record 'a': expected the prompt and response"
                                        r" of .*pairs.jsonl, got others \(in 1 records\); delete"):
        main(pair(1, id="a", **changed), pair(2, id="b"), pair(3, id="c"))
    assert (tmp_path / "edits.jsonl").read_bytes() == before
    (tmp_path / "edits.jsonl").write_bytes(before.split(b"\n")[1] + b"\n")      # as it says
    assert len(main(pair(1, id="a"), pair(2, id="b"))) == 2


def test_another_response_under_a_skipped_id_is_noticed(tmp_path, main):
    [task] = read_tasks(write(tmp_path / "pairs.jsonl", pair(1, id="a")))
    with Store(tmp_path / "edits.jsonl") as store:
        store.add(task.skip("skipped", "unclear", "Ada", HOW))
    assert [edit.id for edit in main(pair(1, id="a"), pair(3, id="c"))] == ["c"]    # stays skipped
    with pytest.raises(UserError, match="edits.skipped.jsonl: record 'a': expected the prompt and"):
        main(pair(2, id="a"))


def test_another_preferred_response_or_more_records_are_no_reason_to_stop(main):
    first = main(pair(1, id="a"))
    assert main(pair(1, id="a", chosen="Better."), pair(2, id="b"))[:1] == first


@pytest.mark.parametrize("flag, value", [("--miss", "1.0"), ("--seed", "9"),
                                         ("--needless", "0.5"), ("--world", "0,lands=14")])
def test_another_simulated_editor_is_refused_and_the_same_one_goes_on(tmp_path, flag, value):
    path = write(tmp_path / "pairs.jsonl", *[pair(n, id=str(n)) for n in range(4)])

    def collected(**flags):
        flags = {"--miss": "0", "--world": "0", "--limit": "4"} | flags
        collect.main(parse(collect.Config, argv=[
            "--pairs", str(path), "--editor", "simulated", "--out", str(tmp_path / "edits.jsonl"),
            *(word for both in flags.items() for word in both)]))
        return read_edits(tmp_path / "edits.jsonl")
    first = collected(**{"--limit": "2"})
    made_by = "--world 0 --seed 0 --miss 0.0 --needless 0.0"
    assert [(e.annotator, e.provenance.model) for e in first] == [("simulated", made_by)] * 2
    with pytest.raises(UserError, match="edits.jsonl: record '0': expected the simulated editor "
                                        f"that made it, {made_by}, got .*{flag} {value}.*; give"):
        collected(**{flag: value})
    assert read_edits(tmp_path / "edits.jsonl") == first
    assert collected(**{"--miss": ".00"})[:2] == first
    for name in ("edits.jsonl", "edits.skipped.jsonl"):     # older records have no settings
        text = (tmp_path / name).read_text().replace(f', "model": "{made_by}"', "")
        (tmp_path / name).write_text(text)
    (tmp_path / "edits.jsonl").write_text((tmp_path / "edits.jsonl").read_text().split("\n")[0])
    assert len(collected(**{flag: value})) == 4


def test_a_draft_of_another_response_is_noticed_and_of_an_older_version_moved(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pair(1, id="a"))
    with Store(tmp_path / "edits.jsonl") as store:
        desk = Desk(read_tasks(path), store, 0.5)
        desk.take(Who("Ada", "tab", "load"))
        desk.save(Who("Ada", "tab", "load"), "a", "Its river is Somewhere 1.")
        drafts = read_drafts(drafts_path(store.path))
    assert [draft.text for draft in drafts] == ["Its river is Somewhere 1."]
    assert resumed(read_tasks(path), drafts, store.path, path)[0].id == "a"
    write(path, pair(2, id="a"))
    with pytest.raises(UserError, match="edits.drafts.jsonl: record 'a': expected the prompt and"):
        resumed(read_tasks(path), drafts, store.path, path)
    with pytest.raises(UserError, match="drafts.jsonl: record 'pairs.jsonl:1': expected an id"):
        resumed(read_tasks(path), [Draft("pairs.jsonl:1", "Ada", "x", 1.0)], store.path, path)


def test_dry_run_leaves_out_what_an_older_version_did(tmp_path, capsys):
    old(tmp_path, 1)
    path = write(tmp_path / "pairs.jsonl", pair(0), pair(1))
    collect.main(parse(collect.Config, argv=["--pairs", str(path), "--out", str(
        tmp_path / "edits.jsonl"), "--editor", "simulated", "--dry-run"]))
    assert capsys.readouterr().out.splitlines() == ["1 responses to edit", pair(0)["rejected"]]


# One process per file.

def test_a_second_process_is_refused_through_a_link_too_and_names_the_first(tmp_path):
    """The refused process also leaves no file behind."""
    path = write(tmp_path / "pairs.jsonl", pair(1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link.jsonl").symlink_to(tmp_path / "edits.jsonl")
    (tmp_path / "folder").symlink_to(tmp_path, target_is_directory=True)
    with Store(tmp_path / "edits.jsonl"):
        for out in ("edits.jsonl", "other/link.jsonl", "folder/edits.jsonl"):
            done = subprocess.run(
                [sys.executable, "-m", "fgrlhf.collect", "--pairs", str(path), "--out",
                 str(tmp_path / out), "--editor", "simulated", "--world", "0"], cwd=ROOT,
                capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
            assert f"expected no other writer, but process {os.getpid()} on" in done.stderr
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["link.jsonl"]


def test_records_through_a_link_are_those_of_the_file(tmp_path, main):
    first = main(pair(1))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link.jsonl").symlink_to(tmp_path / "edits.jsonl")
    with Store(tmp_path / "other/link.jsonl") as store:
        assert list(store.records.values()) == first
        assert store.skipped_path == tmp_path / "edits.skipped.jsonl"
