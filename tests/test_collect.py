"""The command as a user runs it: 500 records, a faulty server, SIGKILL; exit status and files."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import eval as evaluation
import train_rm
from fgrlhf.checkpoint import save_model
from fgrlhf.collect import __main__ as collect, summary
from fgrlhf.collect.store import Store, outcome_of
from fgrlhf.collect.tasks import Task
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.data.records import Provenance
from fgrlhf.engine.config import parse
from fgrlhf.simulate.world import World
from fgrlhf.tokenizer import train
from tests.misbehaving import FAULTS, KEY, Server
from tests.small import llama
from tests.test_layout import ROOT

WORLD = World(0)
LAND = WORLD.lands[0]
RIGHT = f"Its river is {WORLD.facts[LAND, 'river']}. Its crop is {WORLD.facts[LAND, 'crop']}."


def write_pairs(path: Path, count: int, **more) -> Path:
    """Preferences numbered 0..count-1: "dog" is to become "cat"."""
    path.write_text("".join(json.dumps({
        "id": f"r{i}", "prompt": f"Number {i}?", "chosen": f"Animal {i} is good.",
        "rejected": f"The black dog {i} sat on the mat, happily."} | more) + "\n"
        for i in range(count)))
    return path


def good(body: dict) -> str:
    """The answer of a model that does what it is asked."""
    text = body["messages"][0]["content"]
    response = re.search(r"<response>\n(.*)\n</response>", text, re.DOTALL)[1]
    return json.dumps({"needs_change": True, "edited": response.replace("dog", "cat")})


def number(body: dict) -> int:
    return int(re.search(r"Number (\d+)\?", body["messages"][0]["content"])[1])


def command(tmp_path, server, *more) -> list[str]:
    return [sys.executable, "-m", "fgrlhf.collect", "--pairs", str(tmp_path / "pairs.jsonl"),
            "--out", str(tmp_path / "edits.jsonl"), "--editor", "llm", "--model", "m",
            "--base-url", server.url, "--workers", "16", "--timeout", "0.5", "--backoff", "0.01",
            *map(str, more)]


def start(words: list[str], tmp_path) -> subprocess.Popen:
    log = open(tmp_path / f"log-{time.monotonic_ns()}.txt", "wb")
    return subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {
        "ANTHROPIC_API_KEY": KEY, "OMP_NUM_THREADS": "1"})


def written(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def holders_of_the_key(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 4
    return [path for path in files if KEY.encode() in path.read_bytes()]


def test_collect_loses_and_doubles_nothing_of_500_records_with_faults_and_two_kills(tmp_path):
    """Every fifth request meets a fault, and the program is killed twice.

    Of each 50 records, one always gets a blank edit and one always gets a complete rewrite; these
    and no others are refused. One more record of each 50 needs no change.
    """
    def behave(body, count):
        behave.requests += 1
        if behave.requests % 5 == 0:
            return FAULTS[behave.requests // 5 % len(FAULTS)], good(body)
        if number(body) % 50 == 7:
            return "ok", json.dumps({"needs_change": True, "edited": ""})
        if number(body) % 50 == 8:
            return "ok", json.dumps({"needs_change": True, "edited": "Quite another text."})
        if number(body) % 50 == 9:
            return "ok", json.dumps({"needs_change": False, "edited": None})
        return "ok", good(body)

    behave.requests = 0
    write_pairs(tmp_path / "pairs.jsonl", 500)
    out, kills = tmp_path / "edits.jsonl", []
    with Server(behave, hang_seconds=1.5) as server:
        words = command(tmp_path, server, "--timeout", 1)
        for kill_at in (120, 300):
            process = start(words, tmp_path)
            while written(out) < kill_at:
                assert process.poll() is None, "the program ended before it was killed"
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert written(out) < 480
            done = {json.loads(line)["id"] for line in out.read_bytes().split(b"\n")[:-1]}
            kills.append((len(server.seen), done))
        assert start(words, tmp_path).wait() == 0
        sent = len(server.seen)
        assert start(words, tmp_path).wait() == 0 and len(server.seen) == sent     # nothing to do
    for count, done in kills:                              # no question is asked and paid for again
        assert not done & {f"r{number(seen['body'])}" for seen in server.seen[count:]}
    ids = [json.loads(line)["id"] for path in (out, tmp_path / "edits.skipped.jsonl")
           for line in path.read_text().splitlines()]
    assert sorted(ids) == sorted(f"r{i}" for i in range(500))
    for edit in read_edits(out):
        i = int(edit.id[1:])
        same = i % 50 == 9
        assert edit.edited == f"The black {'dog' if same else 'cat'} {i} sat on the mat, happily."
        assert (edit.annotator, edit.provenance.editor, edit.provenance.model) == ("m", "llm", "m")
        assert edit.provenance.prompt_version == "edit-1" and edit.provenance.attempts == 1
    with Store(out) as store:
        refused = {r.id for r in store.records.values() if not hasattr(r, "edited")}
        assert refused == {f"r{i}" for i in range(500) if i % 50 in (7, 8)}
        assert Counter(map(outcome_of, store.records.values())) == {
            "edited": 470, "identical": 10, "refused": 20}
    assert holders_of_the_key(tmp_path) == []


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(flags...) runs the command in this process; write pairs.jsonl first."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)

    def call(*flags, status=0):
        assert status == collect.main(parse(collect.Config, argv=[
            "--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "edits.jsonl"),
            *map(str, flags)]))
    return call


def test_collect_stops_at_its_budget_and_goes_on_in_the_next_run(tmp_path, main, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 10)
    flags = ("--editor", "llm", "--model", "m", "--max-requests", 4, "--workers", 2)
    with Server(lambda body, count: ("ok", good(body))) as server:
        for done in (4, 8, 10):
            main(*flags, "--base-url", server.url)
            out = capsys.readouterr().out
            assert f"{done} of 10 records done" in out
            assert ("stopped: all --max-requests 4 are sent" in out) == (done < 10)
        assert len(server.seen) == 10


def test_collect_leaves_unanswered_records_to_the_next_run_and_says_so(tmp_path, main, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    flags = ("--editor", "llm", "--model", "m", "--backoff", 0, "--base-url")
    with Server(lambda body, count: (400, {}, b"too long") if number(body) == 1 else
                ("ok", good(body))) as server:
        main(*flags, server.url, status=1)
    out = capsys.readouterr().out
    assert "2 of 3 records done" in out and "record 'r1': HTTP 400: too long" in out
    with Server(lambda body, count: ("ok", good(body))) as server:
        main(*flags, server.url)
        assert [number(s["body"]) for s in server.seen] == [1]
    assert "3 of 3 records done" in capsys.readouterr().out


def test_collect_takes_answers_paid_for_before_a_stricter_check(tmp_path, main, capsys):
    """A wider --max-change accepts refused answers from the cache, without a new request."""
    write_pairs(tmp_path / "pairs.jsonl", 3)
    flags = ("--editor", "llm", "--model", "m")
    with Server(lambda body, count: ("ok", good(body))) as server:
        main(*flags, "--base-url", server.url, "--max-change", 0.05, "--free-words", 0)
        assert "3 refused" in capsys.readouterr().out and len(server.seen) == 6
        (tmp_path / "edits.skipped.jsonl").unlink()
        main(*flags, "--base-url", server.url)
        assert "3 edited" in capsys.readouterr().out and len(server.seen) == 6


def test_collect_by_the_simulated_editor_corrects_what_the_oracle_finds_and_resumes(
        tmp_path, main, capsys):
    wrong = RIGHT.replace("Its crop is", "Its crop was")
    write_pairs(tmp_path / "pairs.jsonl", 4, prompt=f"Name the river and crop of {LAND}.",
                chosen="?", rejected=wrong)
    main("--editor", "simulated", "--world", 0, "--limit", 2)
    first = (tmp_path / "edits.jsonl").read_bytes()
    main("--editor", "simulated", "--world", 0)
    assert (tmp_path / "edits.jsonl").read_bytes().startswith(first)
    edits = read_edits(tmp_path / "edits.jsonl")
    assert [e.id for e in edits] == ["r0", "r1", "r2", "r3"]
    assert all(not WORLD.errors(e.prompt, e.edited) and e.original == wrong for e in edits)
    assert "4 edited, 0 identical, 0 skipped, 0 refused" in capsys.readouterr().out


def test_collect_simulated_refuses_pairs_of_another_world_before_it_writes(tmp_path, main, capsys):
    asked = dict(prompt=f"Name the river and crop of {LAND}.", chosen="?", rejected="No.")
    write_pairs(tmp_path / "pairs.jsonl", 2, **asked, dataset="world 0,coupled=1")
    with pytest.raises(UserError, match=r"pairs\.jsonl: record 'r0': dataset: expected world 0, .*"
                                        r"; give --world 0,coupled=1, or a file of world 0$"):
        main("--editor", "simulated", "--world", 0)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]
    main("--editor", "simulated", "--world", "0,coupled=1")
    assert {e.dataset for e in read_edits(tmp_path / "edits.jsonl")} == {"world 0,coupled=1"}
    assert capsys.readouterr().err.count("which world") == 0


def test_collect_simulated_draws_do_not_depend_on_where_a_run_was_stopped(tmp_path, main):
    write_pairs(tmp_path / "pairs.jsonl", 20, prompt=f"Name the river and crop of {LAND}.",
                chosen="?", rejected="Its river is Nowhere. Its crop is mud.")
    flags = ("--editor", "simulated", "--world", 0, "--miss", 0.5, "--needless", 0.3)
    texts = []
    for parts in ((20,), (3, 11, 20)):
        for limit in parts:
            main(*flags, "--limit", limit)
        texts.append([e.edited for e in read_edits(tmp_path / "edits.jsonl")])
        (tmp_path / "edits.jsonl").unlink()
    assert texts[0] == texts[1] and len(set(texts[0])) > 2


def test_summary_counts_a_share_on_a_border_into_the_tenth_below(tmp_path):
    """1, 1, 2, 3 and 10 of ten words are changed; an unchanged text is not counted."""
    task, letters = Task("", "p", "c", "a b c d e f g h i j"), "abcdefghij"
    how = Provenance("human", "2026-11-21T12:00:00Z", 1, 1.0)
    tasks = [replace(task, id=str(i)) for i in range(6)]
    with Store(tmp_path / "e.jsonl") as store:
        for task, changed in zip(tasks, (1, 1, 2, 3, 10, 0)):
            text = " ".join(letters.upper()[:changed] + letters[changed:])
            store.add(task.edit(text, None, how))
        lines = summary.edited(tasks, store).splitlines()[2:]
    assert [int(line.split()[2]) for line in lines] == [2, 1, 1, 0, 0, 0, 0, 0, 0, 1]
    assert lines[0] == "  to  10%      2  " + "#" * 40 and lines[1].endswith("  " + "#" * 20)


def test_summary_counts_only_the_records_of_its_tasks_and_says_how_many_others_there_are(tmp_path):
    how = Provenance("human", "2026-11-21T12:00:00Z", 1, 1.0)
    tasks = [Task(str(i), "p", "c", "a b c d e f g h i j") for i in range(5)]
    with Store(tmp_path / "e.jsonl") as store:
        for task, changed in zip(tasks[:4], ("A", "K L M N O P Q R S T", "B", "C")):
            store.add(task.edit(changed + task.rejected[len(changed):], None, how))
        store.add(tasks[4].skip("skipped", "unclear", "Ada", how))
        few, every = (summary.edited(part, store).splitlines() for part in (tasks[:2], tasks))
        other = summary.edited([replace(tasks[0], id="new")], store)
    counts = "records done in " + str(tmp_path / "e.jsonl")
    assert few[0] == (f"2 of 2 {counts}: 2 edited, 0 identical, 0 skipped, 0 refused; 3 other "
                      "records are in the collection too")
    assert [int(line.split()[2]) for line in few[2:]] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert every[0] == f"5 of 5 {counts}: 4 edited, 0 identical, 1 skipped, 0 refused"
    assert other == (f"0 of 1 {counts}: 0 edited, 0 identical, 0 skipped, 0 refused; 5 other "
                     "records are in the collection too")


def test_summary_counts_an_edit_of_whitespace_only_as_no_changed_word(tmp_path):
    task = Task("1", "p", "c", "a b")
    with Store(tmp_path / "e.jsonl") as store:
        store.add(task.edit("a  b", None, Provenance("human", "2026-11-21T12:00:00Z", 1, 1.0)))
        lines = summary.edited([task], store).splitlines()
    assert "1 edited" in lines[0] and lines[2].startswith("  to  10%      1  ##")


def test_collect_dry_run_writes_nothing_and_needs_no_key(tmp_path, main, capsys, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    write_pairs(tmp_path / "pairs.jsonl", 3)
    main("--editor", "llm", "--dry-run", "--limit", 2)
    assert "2 requests, about" in capsys.readouterr().out
    main("--editor", "simulated", "--dry-run")
    assert "3 responses to edit" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_collect_prints_any_text_where_stdout_is_not_utf_8(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 1, rejected="A dog. 🙂")
    done = subprocess.run(
        [sys.executable, "-m", "fgrlhf.collect", "--pairs", str(tmp_path / "pairs.jsonl"), "--out",
         str(tmp_path / "edits.jsonl"), "--editor", "human", "--dry-run"], cwd=ROOT,
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == "1 responses to edit\nA dog. 🙂\n"


def test_collect_dry_run_leaves_out_what_is_done(tmp_path, main, capsys):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    with Server(lambda body, count: ("ok", good(body))) as server:
        main("--editor", "llm", "--model", "m", "--base-url", server.url, "--limit", 1)
        before = (tmp_path / "edits.jsonl").read_bytes()
        main("--editor", "llm", "--model", "m", "--base-url", server.url, "--dry-run")
        assert len(server.seen) == 1
    out = capsys.readouterr().out
    assert "2 requests, about" in out and "record 'r1'" in out and "record 'r0'" not in out
    assert (tmp_path / "edits.jsonl").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    (("--editor", "llm"), "expected --model"), (("--editor", "simulated"), "expected --world"),
    (("--editor", "llm", "--model", "m", "--base-url", "http://example.org"), "unencrypted"),
    (("--editor", "llm", "--model", "m", "--max-change", "1.5"), "--max-change 1.5: expected"),
    (("--editor", "simulated", "--world", "0", "--max-change", "0.2"),
     "--max-change: expected --editor llm or human, got --editor simulated, which does not use it"),
    (("--editor", "human", "--model", "m"), "--model: expected --editor llm, got --editor human"),
    (("--editor", "llm", "--model", "m", "--seed", "1"), "--seed: expected --editor simulated or")])
def test_collect_refuses_bad_flags_before_it_writes(tmp_path, main, flags, message):
    write_pairs(tmp_path / "pairs.jsonl", 1)
    with pytest.raises(UserError, match=message):
        main(*flags)
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize("ask", ["edit", "preference", "both"])
def test_collect_leaves_no_new_empty_file_after_an_address_that_is_refused(tmp_path, ask):
    given = {"--pairs": write_pairs(tmp_path / "pairs.jsonl", 1)}
    if ask != "edit":
        given = {"--outputs": tmp_path / "A.json", "--reference": tmp_path / "B.json"}
        for path in given.values():
            path.write_text(json.dumps([{"instruction": "Q?", "output": path.stem,
                                         "generator": "m"}]))
    (tmp_path / "out.skipped.jsonl").touch()                   # not new
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="--port 99999: cannot be used"):
        collect.main(parse(collect.Config, argv=[
            "--ask", ask, "--editor", "human", "--port", "99999", "--out",
            str(tmp_path / "out.jsonl"), *(str(word) for both in given.items() for word in both)]))
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == before


def test_collect_refuses_to_write_into_its_own_pairs(tmp_path):
    path = write_pairs(tmp_path / "pairs.jsonl", 1)
    before = path.read_bytes()
    with pytest.raises(UserError, match="expected another file than --pairs"):
        collect.main(parse(collect.Config, argv=["--pairs", str(path), "--out", str(path),
                                                 "--editor", "simulated", "--world", "0"]))
    assert path.read_bytes() == before


def test_collect_refuses_a_second_run_on_the_same_file(tmp_path, main):
    write_pairs(tmp_path / "pairs.jsonl", 1, prompt=f"Name the river of {LAND}.")
    with Store(tmp_path / "edits.jsonl"):
        with pytest.raises(UserError, match="expected no other writer"):
            main("--editor", "simulated", "--world", 0)


def test_collect_interrupted_keeps_the_answers_under_way(tmp_path):
    """After Ctrl-C the answers to questions under way still reach the cache: they are paid for."""
    gate = threading.Event()
    write_pairs(tmp_path / "pairs.jsonl", 8)

    def behave(body, count):
        if number(body) >= 4:
            gate.wait(5)
        return "ok", good(body)

    with Server(behave) as server:
        words = command(tmp_path, server, "--workers", 4, "--timeout", 20)
        server._mutex = threading.Semaphore(16)            # so that answers can wait
        process = start(words, tmp_path)
        while len(server.seen) < 8 and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        gate.set()
        assert process.wait(20) == 130
        asked = len(server.seen)
        assert written(tmp_path / "edits.cache.jsonl") == 8
        assert start(words, tmp_path).wait() == 0 and len(server.seen) == asked
    assert len(read_edits(tmp_path / "edits.jsonl")) == 8


def test_collected_edits_train_a_reward_model(tmp_path, main):
    """train_rm.py reads the file unchanged: 11 edits, and one record that needed no change."""
    write_pairs(tmp_path / "pairs.jsonl", 12)
    save_model(llama(vocab_size=290, max_seq_len=160), tmp_path / "small",
               tokenizer=train(["The black dog sat on the mat, happily."], 290,
                               tmp_path / "t.model"))
    keep = json.dumps({"needs_change": False, "edited": None})
    with Server(lambda body, count: ("ok", keep if number(body) == 5 else good(body))) as server:
        main("--editor", "llm", "--model", "m", "--base-url", server.url)
    train_rm.train(parse(train_rm.Config, argv=[
        "--data", str(tmp_path / "edits.jsonl"), "--model", str(tmp_path / "small"),
        "--epochs", "2", "--batch", "4", "--out", str(tmp_path / "rm")]))
    assert json.loads((tmp_path / "rm" / "done.json").read_text())["records"] == 11
    assert len((tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("text", [collect.__doc__, (
    ROOT / "fgrlhf/collect/README.md").read_text()], ids=["help", "README"])
def test_every_command_in_the_help_and_the_readme_is_understood(text):
    lines = re.findall(r"^ *python -m fgrlhf\.collect (--pairs .*)", text.replace("\\\n", ""), re.M)
    assert len(lines) > 3
    for line in lines:
        parse(collect.Config, argv=shlex.split(line))


# The same client as a judge.

def test_eval_win_rate_by_a_language_model_agrees_with_its_recorded_judgements(
        tmp_path, monkeypatch):
    """40 wins, 20 ties, 40 losses, with faults; a second run asks nothing."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    for name in ("system", "reference"):
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"instruction": f"Number {i}?", "output": f"{name} {i}", "generator": name}
            for i in range(100)]))

    def behave(body, count):
        behave.requests += 1
        text, i = body["messages"][0]["content"], number(body)
        ours = "first" if "<first>\nsystem" in text else "second"
        theirs = {"first": "second", "second": "first"}[ours]
        said = json.dumps({"better": ours if i < 40 else "first" if i < 60 else theirs})
        fault = FAULTS[behave.requests // 5 % len(FAULTS)]
        return fault if behave.requests % 5 == 0 else "ok", said

    behave.requests = 0

    def win_rate(*flags) -> dict:
        return evaluation.win_rate(parse(evaluation.WinRateConfig, argv=[*map(str, flags)]))

    with Server(behave, hang_seconds=1.5) as server:
        flags = ("--judge", "llm", "--outputs", tmp_path / "system.json", "--reference",
                 tmp_path / "reference.json", "--model", "m", "--base-url", server.url,
                 "--judgements", tmp_path / "judged.jsonl", "--timeout", 1.0, "--backoff", 0.01,
                 "--workers", 8)
        found = win_rate(*flags)
        sent = len(server.seen)
        assert win_rate(*flags) == found and len(server.seen) == sent
    assert (found["wins"], found["ties"], found["losses"]) == (40, 20, 40)
    assert found["win_rate"] == 0.5 and sent >= 200
    again = win_rate("--judge", "annotations", "--annotations", tmp_path / "judged.jsonl")
    assert again == found | {"judge": "annotations"}
    assert holders_of_the_key(tmp_path) == []
