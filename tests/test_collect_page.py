"""The human editor as people and attackers use it: the program itself and a real headless Chromium.

The tests press keys in the page, as an annotator does. Without a browser these tests are skipped;
the attacks that need no browser run everywhere.
"""

import http.client
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest

from fgrlhf.checkpoint import save_model
from fgrlhf.collect.human import PAGE, usual_port
from fgrlhf.collect.web import LARGEST, Server
from fgrlhf.data.fields import UserError
from fgrlhf.data.readers import read_edits
from fgrlhf.tokenizer import Tokenizer
from tests import browser as chromium
from tests.browser import ALT, CTRL, Browser, Tab
from tests.processes import ROOT, run
from tests.small import llama

RECORDS = [
    {"id": "moon", "prompt": "Who walked on the moon first?", "input": "One sentence.",
     "chosen": "Neil Armstrong did, in July 1969.", "rejected": "Buzz Aldrin did, in July 1969."},
    {"id": "tea", "prompt": "How long does tea steep?",
     "chosen": "Three minutes, then take it out.", "rejected": "Thirty minutes, then take it out."},
    {"id": "nile", "prompt": "Which river is longest?", "chosen": "The Nile, by most accounts.",
     "rejected": "The Rhine, by most accounts."}]


class Program:
    """`python -m fgrlhf.collect --editor human` in a process of its own."""

    def __init__(self, folder: Path, records: list[dict] = RECORDS, *flags: str):
        self.out, pairs = folder / "edits.jsonl", folder / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.flags = ("--pairs", str(pairs), *flags)
        self.start()

    def start(self) -> None:
        """Starts the program, or starts it again: on the same port, with a new token."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fgrlhf.collect", "--out", str(self.out), "--editor", "human",
             *self.flags], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"})
        self.url = re.search(r"http://\S+/", self.process.stderr.readline())[0]
        self.port = int(self.url.split(":")[2].split("/")[0])
        self.path = "/" + self.url.split("/", 3)[3]

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def edits(self) -> dict[str, dict]:
        return by_id(self.out)

    def skipped(self) -> dict[str, dict]:
        return by_id(self.out.with_name("edits.skipped.jsonl"))

    def request(self, method: str, path: str, body=None, **headers) -> tuple[int, str, dict]:
        """Sends a request as it is; returns (status, body, headers) of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(), dict(answer.getheaders())
        finally:
            connection.close()

    def post(self, action: str, value, **headers) -> tuple[int, str]:
        """Sends an action as the page does; `headers` replace the page's own."""
        own = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        return self.request("POST", self.path + action, json.dumps(value), **own | headers)[:2]


PORTS = set()


def own_port(folder: Path, out: str = "edits.jsonl") -> Path:
    """Returns a folder in `folder`, mostly itself, of which no other test has the usual port.

    The browser keeps names and drafts per port, and all tests of a file share the browser.
    """
    while usual_port(folder / out) in PORTS:
        folder = folder / "another"
    folder.mkdir(parents=True, exist_ok=True)
    PORTS.add(usual_port(folder / out))
    return folder


def by_id(path: Path) -> dict[str, dict]:
    return {record["id"]: record for record in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def start(tmp_path):
    """Starts programs on records and flags. They end with the test."""
    running, folder = [], own_port(tmp_path)

    def call(records: list[dict] = RECORDS, *flags: str) -> Program:
        running.append(Program(folder, records, *flags))
        return running[-1]
    yield call
    for each in running:
        each.kill()


@pytest.fixture
def program(start) -> Program:
    return start()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium.find() is None:
        pytest.skip("needs Chromium on the PATH, or the path of the browser in CHROMIUM")
    with Browser(tmp_path_factory.mktemp("browser") / "profile") as running:
        yield running


@pytest.fixture
def tab(browser, program):
    opened = enter(browser.open(program.url))
    yield opened
    opened.close()


SHOWN = "document.querySelector('#record:not([hidden]) #prompt-text')?.textContent"
SAVED = "document.getElementById('saved').textContent === 'Draft saved'"


def enter(tab: Tab, name: str = "Ada") -> Tab:
    tab.wait("!!document.querySelector('#ask-name[open]')")
    tab.type(name)
    tab.press("Enter")
    tab.wait(SHOWN)
    return tab


def showing(tab: Tab, n: int) -> Tab:
    tab.wait(f"{SHOWN} === {json.dumps(RECORDS[n]['prompt'])}")
    return tab


def write(tab: Tab, text: str) -> None:
    """Replaces the text in the editor by typing, and waits until the draft is saved."""
    tab.run("document.getElementById('text').focus(), document.getElementById('text').select()")
    tab.type(text)
    tab.wait(SAVED)


def content(tab: Tab, id: str = "text") -> str:
    return tab.run(f"document.getElementById('{id}')." + ("value" if id == "text" else
                                                          "textContent"))


def alert(tab: Tab) -> str:
    return tab.wait("!document.getElementById('alert').hidden && "
                    "document.getElementById('alert').textContent")


# ----- editing ------------------------------------------------------------------------------------

def test_an_edit_is_shown_word_by_word_and_accepted_by_keys(program, tab):
    assert content(tab) == "Buzz Aldrin did, in July 1969." and content(tab, "input-text")
    write(tab, "Neil Armstrong did, on 20 July 1969!")
    assert tab.run("Array.from(document.querySelectorAll('#diff del, #diff ins'), "
                   "e => e.localName + ' ' + e.textContent)") == [
        "del Buzz Aldrin", "ins Neil Armstrong", "del in", "ins on 20", "del .", "ins !"]
    assert content(tab, "share") == "57% changed (5 words may always change)"
    write(tab, "Neil Armstrong did, on the 20th of July!")
    assert content(tab, "share") == "88% changed, above the limit of 50%"
    tab.press("Enter", CTRL)
    assert alert(tab).startswith("7 of 8 words changed (88%), at most 50% allowed")
    assert program.edits() == {}
    write(tab, "Neil Armstrong did, in July 1969.")
    assert content(tab, "share") == "33% changed (limit 50%)"
    assert content(tab, "tokens") == "2 words: 2 deleted, 2 inserted, 4 kept"
    assert tab.run("document.querySelectorAll('#guide[open] li').length") > 3
    tab.press("Enter", CTRL)
    showing(tab, 1)
    assert not tab.run("document.getElementById('guide').open")
    edit = program.edits()["moon"]
    assert (edit["original"], edit["edited"], edit["annotator"]) == (
        "Buzz Aldrin did, in July 1969.", "Neil Armstrong did, in July 1969.", "Ada")
    how = edit["provenance"]
    assert (how["editor"], how["prompt_version"]) == ("human", "human-2")
    assert 0 < how["seconds"] < 60
    assert content(tab, "count") == "1 of 3 done"


def test_an_edit_without_a_change_is_accepted_only_after_a_question(program, tab):
    tab.press("Enter", CTRL)
    tab.wait("!!document.querySelector('#ask-same[open]')")
    tab.press("Escape")
    tab.wait("!asking")
    assert program.edits() == {} and content(tab, "count") == "0 of 3 done"
    tab.press("Enter", CTRL)
    tab.wait("!!document.querySelector('#ask-same[open]')")
    tab.press("Tab")                              # from "Keep editing" to "Accept unchanged"
    tab.press("Enter")
    showing(tab, 1)
    assert program.edits()["moon"]["edited"] == RECORDS[0]["rejected"]


def test_skip_asks_for_a_reason_and_undo_takes_it_back(program, tab):
    write(tab, "Neil Aldrin did, in July 1969.")
    tab.press("k", ALT)
    tab.run("document.getElementById('other').focus()")
    tab.type("twins <b>")
    tab.press("Enter")
    showing(tab, 1)
    assert program.skipped()["moon"]["reason"] == "twins <b>" and program.edits() == {}
    write(tab, "Thirteen minutes, then take it out.")
    tab.press("Enter", CTRL)
    showing(tab, 2)
    tab.press("z", ALT)
    showing(tab, 1)
    assert content(tab) == "Thirteen minutes, then take it out." and program.edits() == {}
    tab.press("z", ALT)
    showing(tab, 0)
    assert content(tab) == "Neil Aldrin did, in July 1969." and program.skipped() == {}
    tab.press("Enter", CTRL)
    showing(tab, 1)                               # with its draft
    assert content(tab) == "Thirteen minutes, then take it out."
    assert program.edits()["moon"]["edited"] == "Neil Aldrin did, in July 1969."


def test_revert_can_itself_be_undone_in_the_text(tab):
    write(tab, "Nobody.")
    tab.press("r", ALT)
    tab.wait(f"document.getElementById('text').value === {json.dumps(RECORDS[0]['rejected'])}")
    tab.run("document.execCommand('undo')")
    assert content(tab) == "Nobody."


def test_the_preferred_response_is_shown_on_demand(tab):
    assert not any("Armstrong" in name for _, name in tab.tree())
    tab.press("p", ALT)
    assert any("Armstrong" in name for _, name in tab.tree())
    tab.press("p", ALT)
    assert not any("Armstrong" in name for _, name in tab.tree())


def test_skip_has_no_reason_until_the_annotator_chooses_one(program, tab):
    """Neither Enter nor a reason without text skips; the reason of the last record is not kept."""
    for n, reason in enumerate(("too much is wrong", "offensive or private")):
        tab.press("k", ALT)
        tab.wait("!!document.querySelector('#ask-reason[open]')")
        assert tab.run("document.querySelectorAll('#ask-reason [type=radio]:checked').length") == 0
        assert content(tab, "other") == ""
        tab.run("document.querySelector('#ask-reason .primary').click()")
        tab.run("document.getElementById('other').focus()")
        tab.type(" ")
        tab.run("document.querySelector('#ask-reason .primary').click()")
        assert tab.run("document.getElementById('ask-reason').open") and len(program.skipped()) == n
        tab.run(f"document.querySelector('#ask-reason [value=\"{reason}\"]').click()")
        tab.run("document.querySelector('#ask-reason .primary').click()")
        showing(tab, n + 1)
    assert [record["reason"] for record in program.skipped().values()] == [
        "too much is wrong", "offensive or private"]


def test_a_short_answer_is_edited(start, browser):
    records = [{"id": "lyon", "prompt": "Which city is the capital of France?", "chosen": "Paris.",
                "rejected": "Lyon."},
               {"id": "faust", "prompt": "Who wrote Faust?", "chosen": "Goethe wrote Faust.",
                "rejected": "Friedrich Schiller wrote Faust."}]
    program = start(records, "--annotator", "Bob")
    tab = browser.open(program.url)
    tab.wait(SHOWN)
    write(tab, "Paris.")
    assert content(tab, "share") == "100% changed (5 words may always change)"
    tab.press("Enter", CTRL)
    tab.wait(f"{SHOWN} === 'Who wrote Faust?'")
    write(tab, "Johann Wolfgang von Goethe wrote Faust.")
    tab.press("Enter", CTRL)
    tab.wait("!document.getElementById('finished').hidden")
    assert [edit["edited"] for edit in program.edits().values()] == [
        "Paris.", "Johann Wolfgang von Goethe wrote Faust."]
    tab.close()


def test_line_ends_are_kept_line_by_line(start, browser):
    rejected = ["One line.\r\nTwo lines.\nThree lines.", "One line.\rTwo lines.",
                "One line.\r\nTwo more lines.\r\n"]
    program = start([RECORDS[0] | {"id": str(n), "rejected": text}
                     for n, text in enumerate(rejected)], "--annotator", "Bob")
    tab = browser.open(program.url)
    for n, typed in enumerate(("One line.\nTwo lines.\nThree rows.", "One line.\nTwo rows.",
                               "One line.\nA line.\nThree more lines.\n")):
        tab.wait(f"document.getElementById('count').textContent === '{n} of 3 done' && {SHOWN}")
        assert content(tab, "tokens") == "nothing changed yet"
        write(tab, typed)
        tab.press("Enter", CTRL)
    tab.wait("document.querySelector('#finished h2').textContent.endsWith('done')")
    edits = program.edits()
    assert [edits[str(n)]["edited"] for n in range(3)] == [
        "One line.\r\nTwo lines.\nThree rows.", "One line.\rTwo rows.",
        "One line.\r\nA line.\r\nThree more lines.\r\n"]
    assert [edits[str(n)]["original"] for n in range(3)] == rejected
    assert edits["0"]["annotator"] == "Bob"
    tab.run("document.getElementById('again').click()")            # "Stop the program"
    out, _ = program.process.communicate(timeout=10)
    assert program.process.returncode == 0 and out.startswith("3 of 3 records done")
    tab.close()


def test_a_response_above_one_megabyte_is_edited(start, browser):
    long = "".join(f"wörd{i % 7919} é" + ("\n" if i % 20 == 19 else " ") for i in range(90_000))
    assert len(long.encode()) > LARGEST
    program = start([RECORDS[0] | {"rejected": long + "the end is bad."}], "--annotator", "Bob")
    tab = browser.open(program.url)
    tab.wait(SHOWN, 120)
    tab.run("(() => { const t = document.getElementById('text'); t.focus(); "
            "t.setSelectionRange(t.value.length - 4, t.value.length - 1); })()")
    tab.run("document.execCommand('insertText', false, 'good')")
    tab.wait(SAVED, 120)
    assert content(tab, "tokens").startswith("1 word: 1 deleted, 1 inserted, ")
    tab.press("Enter", CTRL)
    tab.wait("!document.getElementById('finished').hidden", 120)
    assert program.edits()["moon"]["edited"] == long + "the end is good."
    tab.close()


def test_a_text_that_is_too_long_to_send_is_named(program, tab):
    tab.run("largest = 1000, document.getElementById('text').select()")
    tab.type("much " * 300)
    assert alert(tab) == "The text is too long to be saved. Shorten it, or revert it."
    write(tab, "Neil Armstrong did, in July 1969.")
    assert tab.run("document.getElementById('alert').hidden")


def test_right_to_left_texts_are_shown_from_right_to_left(start, browser):
    record = {"id": "1", "prompt": "ما عاصمة فرنسا؟", "input": "باختصار.", "chosen": "باريس.",
              "rejected": "ليون.", "context": [{"title": "فرنسا", "text": "عاصمتها باريس."}]}
    program = start([record], "--annotator", "سلمى")
    tab = browser.open(program.url)
    tab.wait(SHOWN)
    tab.press("p", ALT)
    for what in ("#text", "#prompt-text", "#input-text", "#preferred-text", "#diff",
                 "#context .prose"):
        assert tab.run(f"getComputedStyle(document.querySelector('{what}')).direction"
                       ) == "rtl", what
    assert tab.run("getComputedStyle(document.getElementById('share')).direction") == "ltr"
    tab.close()


# ----- crashes ------------------------------------------------------------------------------------

def test_a_reload_in_the_middle_of_an_edit_keeps_record_and_draft(program, tab):
    tab.run("document.getElementById('text').select()")
    tab.type("Neil — “quoted” did")                # and reload before it can be saved
    tab.reload()
    showing(tab, 0)
    assert content(tab) == "Neil — “quoted” did"


def test_kill_9_of_the_server_loses_neither_edits_nor_text_typed_afterwards(program, tab):
    write(tab, "Neil Armstrong did, in July 1969.")
    tab.press("Enter", CTRL)
    showing(tab, 1)
    write(tab, "Three minutes, then take it")
    program.kill()
    tab.run("getSelection().collapseToEnd()")
    tab.type(" out")
    assert "does not answer" in alert(tab)
    tab.type(" again.")
    program.start()
    assert "new address" in tab.wait("document.getElementById('alert').textContent"
                                     ".match(/.*has a new address.*/)?.[0]")
    tab.go(program.url)
    showing(tab, 1)
    assert content(tab) == "Three minutes, then take it out again."
    assert content(tab, "count") == "1 of 3 done" and list(program.edits()) == ["moon"]
    tab.press("Enter", CTRL)
    showing(tab, 2)
    tab.press("z", ALT)
    showing(tab, 1)
    tab.press("z", ALT)                           # accepted by the program that was killed
    showing(tab, 0)
    assert program.edits() == {}


def test_a_server_that_hangs_is_reported_and_nothing_counts_as_accepted(program, tab):
    tab.run("AbortSignal.timeout = ms => AbortSignal.abort()")     # as after 15 seconds
    tab.type("Yes: ")
    tab.press("Enter", CTRL)
    assert "does not answer" in alert(tab) and content(tab, "count") == "0 of 3 done"
    tab.run("AbortSignal.timeout = ms => new AbortController().signal")
    tab.wait(f"{SAVED} && document.getElementById('alert').hidden")
    tab.press("Enter", CTRL)
    showing(tab, 1)
    assert program.edits()["moon"]["edited"] == "Yes: " + RECORDS[0]["rejected"]


def test_a_newer_draft_replaces_an_old_copy_in_the_browser(program, tab):
    write(tab, "Neil Aldrin did, in July 1969.")
    tab.run("localStorage['draft Ada moon'] = JSON.stringify({known: ['older'], text: 'old'})")
    tab.reload()
    showing(tab, 0)
    assert content(tab) == "Neil Aldrin did, in July 1969."


def test_kill_9_of_the_browser_loses_no_draft(program, tmp_path, browser):
    with Browser(tmp_path / "profile") as doomed:
        tab = enter(doomed.open(program.url))
        write(tab, "Neil Armstrong did.")
        doomed.kill()
    program.kill()                                # otherwise the lease must end first
    program.start()
    tab = enter(browser.open(program.url))
    assert content(showing(tab, 0)) == "Neil Armstrong did."
    tab.close()


# ----- several tabs -------------------------------------------------------------------------------

def test_tabs_never_show_the_same_record(program, tab, browser):
    second = browser.open(program.url)            # the browser knows the name
    showing(second, 1)
    third = showing(browser.open(program.url), 2)
    fourth = browser.open(program.url)
    fourth.wait("document.querySelector('#finished h2').textContent === 'No record is free now'")
    third.close()
    fourth.run("document.getElementById('again').click()")
    showing(fourth, 2)
    for other in (second, fourth):
        other.close()


def test_a_duplicated_tab_takes_the_record_and_the_first_tab_says_so(tab, browser, program):
    write(tab, "Neil Aldrin did, in July 1969.")
    id = tab.run("sessionStorage.tab")
    twin = showing(browser.open(program.url), 1)
    twin.run(f"sessionStorage.tab = {json.dumps(id)}")             # as when a tab is duplicated
    twin.reload()
    showing(twin, 0)
    assert content(twin) == "Neil Aldrin did, in July 1969."
    tab.type("?")
    tab.wait("document.querySelector('#finished:not([hidden]) h2')?.textContent"
             " === 'This page no longer has the record'")
    tab.press("Enter", CTRL)                      # does nothing
    tab.run("document.getElementById('again').click()")
    showing(tab, 1)
    twin.press("Enter", CTRL)
    showing(twin, 2)
    assert list(program.edits()) == ["moon"]
    twin.close()


# ----- accessibility ------------------------------------------------------------------------------

def test_every_control_has_a_name_and_the_diff_reads_without_colour(tab):
    write(tab, "Neil Aldrin did, in July 1969.")
    tab.press("p", ALT)
    tree = tab.tree()
    assert {("textbox", "Response to edit"), ("button", "Accept"), ("button", "Skip…"),
            ("button", "Revert"), ("button", "Hide preferred"), ("button", "Undo last record"),
            ("button", "Shortcuts"), ("button", "Annotator: Ada"), ("progressbar", "Records done"),
            ("region", "Changes"), ("region", "Preferred response"), ("region", "Prompt")
            } <= {(role, name.strip()) for role, name in tree}
    roles = [role for role, _ in tree]
    assert roles.count("deletion") == roles.count("insertion") == 1
    assert all(name for role, name in tree if role in ("button", "textbox", "radio", "link"))
    assert tab.run("getComputedStyle(document.querySelector('del')).textDecorationLine + ' ' + "
                   "getComputedStyle(document.querySelector('ins')).textDecorationLine"
                   ) == "line-through underline"
    assert content(tab, "spoken") == "0 of 3 done. Now: Who walked on the moon first?"
    tab.wait("document.getElementById('spoken').textContent === "
             "'17% changed (limit 50%); 1 word: 1 deleted, 1 inserted, 5 kept'")


def test_the_keyboard_reaches_everything_in_reading_order(tab):
    tab.press("z", ALT)                           # nothing to undo: nothing happens
    tab.run("document.getElementById('undo').disabled = false,"
            "document.querySelector('.skip-link').focus()")
    order = []
    for _ in range(10):
        tab.press("Tab")
        order.append(tab.run("document.activeElement.id || document.activeElement.localName"))
    assert order == ["undo", "help", "name", "summary", "compare", "text", "diff", "revert", "skip",
                     "accept"]
    tab.press("/", ALT)
    listed = tab.wait("document.querySelector('#shortcuts[open]')?.innerText")
    assert "Ctrl Enter" in listed and "Alt K" in listed


CONTRAST = """
(() => {
  const shade = colour => {
    const [r, g, b, a] = [...colour.match(/[\\d.]+/g).map(Number), 1];
    const linear = v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    return [.2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b), a];
  };
  const ground = e => {
    const [light, opacity] = shade(getComputedStyle(e).backgroundColor);
    return opacity === 1 || !e.parentElement ? light : ground(e.parentElement);
  };
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.disabled &&
    !e.closest(":disabled") && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
  ).map(e => {
    const [a, b] = [shade(getComputedStyle(e).color)[0], ground(e)].sort((x, y) => y - x);
    return [(a + .05) / (b + .05), e.outerHTML.slice(0, 60)];
  });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme, tab):
    """WCAG 2.2, criterion 1.4.3, asks for a contrast of at least 4.5 to 1."""
    tab.call("Emulation.setEmulatedMedia",
             features=[{"name": "prefers-color-scheme", "value": scheme}])
    for text in ("Neil Aldrin did, in July 1969.", "Nobody ever did anything of the kind there."):
        write(tab, text)                          # within the limit, above it
        tab.press("p", ALT)
        found = tab.run(CONTRAST)
        assert len(found) > 15 and min(found)[0] >= 4.5, min(found)


# ----- attacks ------------------------------------------------------------------------------------

SCRIPT = "</textarea><script>hacked = 1</script><img src=x onerror='hacked = 1'>"
WHO = {"annotator": "Eve", "tab": "t", "page": "p"}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """One program for all attacks. None of them may change it."""
    running = Program(tmp_path_factory.mktemp("target"))
    yield running
    running.kill()


@pytest.fixture
def unharmed(target):
    """Checks after the test that nothing was written and that the page is still served."""
    yield
    assert target.edits() == {} and target.skipped() == {}
    assert not target.out.with_name("edits.drafts.jsonl").exists()
    assert target.request("GET", target.path)[0] == 200
    assert target.post("start", {})[0] == 200


def test_a_script_in_any_text_of_a_record_stays_text(start, browser):
    record = {"id": SCRIPT, "prompt": SCRIPT, "input": SCRIPT, "chosen": "x " + SCRIPT,
              "rejected": SCRIPT, "context": [{"title": SCRIPT, "text": SCRIPT}]}
    program = start([record], "--annotator", SCRIPT)
    tab = browser.open(program.url)
    tab.wait(SHOWN)
    tab.press("p", ALT)
    tab.run("document.querySelector('details').open = true")
    write(tab, "Good " + SCRIPT)
    for id in ("text", "diff", "prompt-text", "input-text", "preferred-text", "context", "name"):
        assert SCRIPT in content(tab, id), id
    assert tab.run("typeof hacked") == "undefined"
    assert tab.run("document.querySelectorAll('img, body script').length") == 0
    assert tab.run("try { document.body.innerHTML = '<b>'; 'parsed' } catch { 'refused' }"
                   ) == "refused"
    tab.press("Enter", CTRL)
    tab.wait("!document.getElementById('finished').hidden")
    assert program.edits()[SCRIPT]["edited"] == "Good " + SCRIPT
    tab.close()


def test_the_form_and_the_script_of_another_site_are_refused(
        target, browser, unharmed):
    """The other site even knows the secret address."""
    accept = json.dumps(WHO | {"id": "moon", "text": "hacked did, in July 1969."})
    page = f"""<form method=post enctype=text/plain action="{target.url}accept">
        <input name='{accept[:-1]}, "reason": "' value='"}}'></form><script>
        fetch("{target.url}accept", {{method: "POST", mode: "no-cors", body: {accept!r}}})
          .then(() => fetch("{target.url}accept", {{method: "POST", body: {accept!r},
            headers: {{"Content-Type": "application/json"}}}}))
          .catch(() => 0).then(() => document.forms[0].submit())</script>"""

    class Evil(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = browser.open(f"http://127.0.0.1:{server.server_port}/")
        assert "another site" in tab.wait("location.pathname.endsWith('accept') && "
                                          "document.body?.innerText")
        tab.close()
        server.shutdown()


@pytest.mark.parametrize("origin", ["http://evil.test", "null", "https://127.0.0.1:{port}",
                                    "http://127.0.0.1", "http://localhost:{port}", None])
def test_a_foreign_origin_is_refused(target, unharmed, origin):
    headers = {"Origin": origin.format(port=target.port)} if origin else {}
    status, text, _ = target.request(
        "POST", target.path + "next", json.dumps(WHO), **{"Content-Type": "application/json"},
        **headers)
    assert (status, text) == (403, "request from another site\n")


@pytest.mark.parametrize("host", ["evil.test:{port}", "evil.test", "127.0.0.1", "127.0.0.1:1",
                                  "127.0.0.1.evil.test:{port}", "127.0.0.1:{port}.evil.test",
                                  "192.168.0.1:{port}", "evil.test@127.0.0.1:{port}", ":{port}",
                                  ""])
def test_a_foreign_host_is_refused(target, unharmed, host):
    """DNS rebinding: the attacker's own name points at this machine."""
    host = host.format(port=target.port)
    for status, text, _ in (
            target.request("GET", target.path, Host=host),
            target.request("POST", target.path + "next", json.dumps(WHO), Host=host,
                            Origin=f"http://{host}", **{"Content-Type": "application/json"})):
        assert status == 403 and text.startswith("unknown host: ") and "--public-url" in text


def test_a_foreign_name_for_this_machine_is_refused_in_the_browser(target, browser, unharmed):
    tab = browser.open(f"http://evil.test:{target.port}{target.path}")
    assert tab.run("location.host + ' ' + document.body.innerText").startswith(
        f"evil.test:{target.port} unknown host: ")
    tab.close()


@pytest.mark.parametrize("path", [
    "/", "/index.html", "/wrong-token/", "/{token}", "/{token}/../../../../etc/passwd",
    "/{token}/..%2f..%2fetc%2fpasswd", "/{token}//etc/passwd", "/{token}/../human.py",
    "/{token}/style.css/", "/{token}/.", "/{token}/index.html%00.js", "/{token}/?x",
    "/{token}/page/index.html", "http://127.0.0.1:{port}/{token}/", "/" + "a" * 60000])
def test_no_other_path_is_served(target, unharmed, path):
    path = path.format(token=target.path.strip("/"), port=target.port)
    status, text, _ = target.request("GET", path)
    assert status == 404 and "root:" not in text and "<" not in text


def test_a_body_of_100_megabytes_is_refused_before_it_is_read(target, unharmed):
    size = 100 << 20
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as connection:
        here = f"127.0.0.1:{target.port}"
        connection.sendall(f"POST {target.path}save HTTP/1.1\r\nHost: {here}\r\n"
                           f"Origin: http://{here}\r\nContent-Length: {size}\r\n"
                           "Content-Type: application/json\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        with pytest.raises(ConnectionError):
            for _ in range(100):
                connection.sendall(b"x" * (1 << 20))
    memory = Path(f"/proc/{target.process.pid}/status")
    if memory.exists():
        assert int(re.search(r"VmHWM:\s+(\d+)", memory.read_text())[1]) < 100 << 10       # KiB


@pytest.mark.parametrize("method, headers, body, status", [
    ("POST", {"Content-Type": "text/plain"}, "{}", 415),
    ("POST", {"Content-Type": "application/x-www-form-urlencoded"}, "annotator=Eve", 415),
    ("POST", {"Content-Length": str(LARGEST + 1)}, None, 413),
    ("POST", {"Content-Length": "9" * 5000}, None, 413),
    ("POST", {"Content-Length": "-1"}, None, 411), ("POST", {"Content-Length": "٣"}, None, 411),
    ("POST", {"Transfer-Encoding": "chunked"}, None, 411),
    ("POST", {}, "[]", 422), ("POST", {}, "{", 400), ("POST", {}, "\xff", 400),
    ("POST", {}, "[" * 100000, 400), ("POST", {}, '{"annotator": 1}', 422),
    ("POST", {}, '{"unknown": "field"}', 422), ("POST", {}, "{}", 422),
    ("PUT", {}, "{}", 501), ("DELETE", {}, None, 501), ("OPTIONS", {}, None, 501)])
def test_odd_requests_are_refused(target, unharmed, method, headers, body, status):
    own = {"Origin": f"http://127.0.0.1:{target.port}", "Content-Type": "application/json"}
    body = body and body.encode("latin-1")
    headers = {name: value.encode("utf-8") for name, value in (own | headers).items()}
    assert target.request(method, target.path + "next", body, **headers)[0] == status


def test_noise_and_silent_connections_do_not_stop_the_server(target, unharmed):
    silent = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(30)]
    for noise in (b"\0" * 1000, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", os.urandom(500)):
        with socket.create_connection(("127.0.0.1", target.port), timeout=10) as connection:
            connection.sendall(noise + b"\r\n\r\n")
            connection.shutdown(socket.SHUT_WR)
            assert b"200 OK" not in connection.recv(10000)
    assert target.request("GET", target.path)[0] == 200
    for connection in silent:
        connection.close()


def test_every_answer_forbids_scripts_frames_and_caches(target):
    for path, headers in ((target.path, {}), ("/nothing", {}), (target.path, {"Host": "evil"})):
        sent = target.request("GET", path, **headers)[2]
        policy = sent["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy and "form-action 'none'" in policy
        assert sent["Cache-Control"] == "no-store" and sent["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in sent and sent["Server"] == "fgrlhf"


def test_the_page_refers_to_no_other_site():
    for path in PAGE.iterdir():
        assert not re.search(r"https?:|//\w+\.|@import|url\(", path.read_text()), path


def test_the_token_is_new_in_every_run_and_in_no_file(program, tmp_path):
    first = program.path.strip("/")
    assert len(first) >= 20
    program.post("next", WHO)
    program.kill()
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or first not in path.read_text()
    program.start()
    assert program.path.strip("/") != first


def test_another_port_is_used_if_the_usual_port_is_taken(start, tmp_path):
    usual = usual_port(tmp_path / "edits.jsonl")
    with socket.create_server(("127.0.0.1", usual)):
        program = start()
        assert program.port != usual and program.request("GET", program.path)[0] == 200
        program.kill()
    program.start()
    assert program.port == usual


def test_a_file_has_a_usual_port_also_if_its_name_is_not_utf_8(tmp_path):
    odd, other = (tmp_path / os.fsdecode(name) for name in (b"e\xff.jsonl", b"e\xfe.jsonl"))
    assert 20000 <= usual_port(odd) < 30000 and usual_port(odd) != usual_port(other)
    assert usual_port(Path("/é.jsonl")) == 20000 + zlib.crc32("/é.jsonl".encode()) % 10000


@pytest.mark.parametrize("host, port", [("127.0.0.1", "taken"), ("127.0.0.1", "99999"),
                                        ("no.such.host.invalid", "0")])
def test_an_address_that_cannot_be_used_is_refused_in_one_line(host, port):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1] if port == "taken" else int(port)
        with pytest.raises(UserError, match=f"--host {host} --port {port}: cannot be used"):
            Server(PAGE, {}, host, [port], allow_remote=True)


def test_another_interface_needs_allow_remote_and_warns(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    command = [sys.executable, "-m", "fgrlhf.collect", "--pairs", str(tmp_path / "pairs.jsonl"),
               "--out", str(tmp_path / "edits.jsonl"), "--editor", "human", "--host", "0.0.0.0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--allow-remote" in done.stderr
    process = subprocess.Popen([*command, "--allow-remote"], cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline().startswith("warning: 0.0.0.0: ")
        port = int(re.search(r":(\d+)/", process.stderr.readline())[1])
        for host, status in ((f"192.168.0.7:{port}", 404), (f"evil.test:{port}", 403)):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/", headers={"Host": host})
            assert connection.getresponse().status == status
            connection.close()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out.startswith("0 of 1 records done")
    finally:
        process.kill()


# ----- end to end ---------------------------------------------------------------------------------

def test_fifty_real_records_are_edited_in_the_page_and_trained_on(start, tmp_path, data_dir,
                                                                 browser):
    """The human corrections of QA-Feedback, typed in as edits."""
    lines = (data_dir / "qa_feedback/edits.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines)
               if record["edited"].strip() and record["edited"] != record["original"]][:50]
    program = start(records, "--max-change", "1", "--annotator", "Ada")
    tab = browser.open(program.url)
    for n, record in enumerate(records):
        tab.wait(f"document.getElementById('count').textContent === '{n} of 50 done' && {SHOWN}")
        assert content(tab) == record["original"]
        tab.run("document.getElementById('text').select()")
        tab.type(record["edited"])
        tab.press("Enter", CTRL)
    tab.wait("!document.getElementById('finished').hidden")
    tab.close()
    program.kill()
    edits = read_edits(program.out)
    assert [(edit.id, edit.edited) for edit in edits] == [
        (record["id"], record["edited"]) for record in records]
    tokenizer = Tokenizer(data_dir / "stories260K/tokenizer.model")
    save_model(llama(vocab_size=tokenizer.vocab_size, max_seq_len=4096), tmp_path / "model",
               tokenizer=tokenizer)
    done = run(tmp_path, "train_rm.py", "--data", program.out, "--model", tmp_path / "model",
               "--out", tmp_path / "rm", "--template", "qa", "--prompt-tokens", 64, "--epochs", 1,
               "--batch", 25)
    assert done.status == 0, done.err
    logged = [json.loads(line) for line in
              (tmp_path / "rm/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2]
