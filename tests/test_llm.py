"""The language model as editor: the question, the accepted answers, and the refused ones.

Here the model is a function of the conversation. test_client.py tests the HTTP client, and
test_collect.py the whole command.
"""

import hashlib
import json
import time

import pytest

from fgrlhf.collect import llm
from fgrlhf.collect.client import Options
from fgrlhf.collect.judge import verdict
from fgrlhf.collect.llm import Flaw, leak, parse_object, question, read_edit
from fgrlhf.collect.protocol import Reply
from fgrlhf.collect.tasks import Answer, Task, load_prompt
from fgrlhf.data.records import Passage, Span

TASK = Task("r1", "Who sat on the mat?", "The cat did.", "  The black dog sat on the mat.\n")
INSTRUCTION = load_prompt("edit-1")


def says(edited, needs_change=True) -> str:
    return json.dumps({"needs_change": needs_change, "edited": edited})


class Model:
    """Replaces Client: gives the answers one after another, and keeps the questions."""

    def __init__(self, *answers: str | Reply):
        self.answers, self.asked = list(answers), []

    def ask(self, system: str, messages: list[dict]) -> Reply:
        self.asked.append((system, [dict(m) for m in messages]))
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Reply) else Reply(answer, True)


def edit(*answers, max_change=0.5, task=TASK) -> tuple[Answer, Model]:
    model = Model(*answers)
    return llm.editor(model, max_change)(task), model


def edit_of(said: str, original: str) -> tuple[Answer, Model]:
    return edit(said, task=Task("r", "P?", "good", original))


# The question.

def test_question_shows_everything_but_the_error_spans():
    task = Task("r", "P?", "good", "bad", "in", (Passage('a "b"', "text"),), (Span(0, 3, "TYPE"),))
    assert question(task) == (
        "<instruction>\nP?\n</instruction>\n\n<input>\nin\n</input>\n\n"
        '<passage title="a \\"b\\"">\ntext\n</passage>\n\n'
        "<preferred>\ngood\n</preferred>\n\n<response>\nbad\n</response>")
    assert question(Task("r", "P?", "good", "bad")).count("\n\n") == 2


def test_preview_shows_the_requests_and_estimates_four_characters_per_token(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)             # needs no key
    text = llm.preview(Options(model="m"), [TASK] * 3, show=1)
    assert text.count("POST https://api.anthropic.com/v1/messages") == 1
    assert json.dumps(question(TASK)) in text and '"model": "m"' in text
    sent = 3 * (len(INSTRUCTION) + len(question(TASK))) // 4
    assert text.endswith(f"3 requests, about {sent:,} tokens in and {3 * 72 // 4:,} out "
                         "(4 characters per token); nothing was sent")  # 72: 32, and 40 of JSON


@pytest.mark.parametrize("name, digest", [
    ("edit-1", "d01adaaedc137bff"), ("judge-1", "3693591b2590dc22"),
    ("human-2", "f76ba2cf29339fad")])
def test_prompts_never_change_under_their_number(name, digest):
    """Records name the version of their prompt, so a new wording needs a new file: edit-2.txt."""
    assert hashlib.sha256(load_prompt(name).encode()).hexdigest()[:16] == digest


# Accepted answers.

def test_editor_accepts_a_minimal_edit_and_keeps_the_outer_whitespace():
    answer, model = edit(says("The black cat sat on the mat."))
    assert answer == Answer("  The black cat sat on the mat.\n", "", 1)
    assert model.asked == [(INSTRUCTION, [{"role": "user", "content": question(TASK)}])]


@pytest.mark.parametrize("edited", [None, "The black dog sat on the mat."])
def test_editor_accepts_that_nothing_needs_a_change(edited):
    assert edit(says(edited, needs_change=False))[0] == Answer(TASK.rejected, "", 1)


@pytest.mark.parametrize("original, edited", [
    ("Lyon", "Paris"), ("4", "5"), ("Is it?", "It is."), ("It is good.", "It is good!"),
    ("Friedrich Schiller wrote Faust.", "Johann Wolfgang von Goethe wrote Faust.")])
def test_editor_accepts_a_short_answer_and_a_changed_mark(original, edited):
    answer, _ = edit_of(says(edited), original)
    assert answer == Answer(edited, "", 1)


def test_editor_keeps_the_line_ends_of_the_response():
    """Models write every line end as "\\n"."""
    answer, _ = edit_of(says("One.\nTwo.\nFour."), "One.\r\nTwo.\nThree.\r\n")
    assert answer.text == "One.\r\nTwo.\nFour.\r\n"


@pytest.mark.parametrize("before, after", [
    ("", ""), (" ", "\n"), ("```json\n", "\n```"), ("```\n", "\n```\n"), ("```json\n", ""),
    ("Here it is: ", ""), ("", " I hope this helps."), ("Use {braces}:\n\n", "\n{and so on}"),
    ("Here it is:\n```json\n", "\n```\nI changed one word."), ("[", "]"), ('{"a": 1} ', ""),
    ("<think>\nNo: {\"a\": 2}\n</think>\n\n", ""), ("It is 2.\n</think>\n", ""),
    ("<thinking>{</thinking>", ""), ("[THINK]Hm.[/THINK]", ""), ("\n<Reasoning>x</Reasoning>", ""),
    ("<seed:think>x</seed:think>", ""), ("◁think▷x◁/think▷", ""),
    ("<|channel|>analysis<|message|>{\"a\": 3}<|end|><|start|>assistant<|channel|>final<|message|>",
     "<|return|>"),
    ("<think>a</think> Once more. <think>{\"a\": 4}</think>", "")])
def test_parse_object_reads_the_one_object_behind_reasoning_and_inside_text(before, after):
    assert parse_object(before + '{"a": 1}' + after, "a") == {"a": 1}


@pytest.mark.parametrize("said", [
    "Close with </think>.", "<think> opens, </think> closes", 'He said "{}".', "a } b { c",
    "```\ncode\n```", '{"a": 2}'])
def test_parse_object_keeps_marks_inside_the_answer(said):
    whole = json.dumps({"a": said})
    for text in (whole, f"<think>Hm.</think>{whole}", f"```json\n{whole}\n```"):
        assert parse_object(text, "a") == {"a": said}


def test_parse_object_leaves_other_keys_out():
    assert parse_object('{"why": "x", "a": 1, "b": {"c": 2}}', "a", "b") == {"a": 1, "b": {"c": 2}}


# Refused answers.

@pytest.mark.parametrize("text, flaw", [
    ("", "not one JSON object"), ("The black cat sat.", "not one JSON object"),
    ('{"a": 1', "not one JSON object"), ("null", "not one JSON object"), ("{}", "with the keys a"),
    ('{"b": 1}', "with the keys a"), ('{"a": 1, "a": 2}', "a key appears twice"),
    ('{"a": 1}{"a": 2}', "several JSON objects that differ"), ("[" * 100_000, "not one JSON"),
    ('{"a":' * 100_000, "not one JSON object"), ('{"a": 1}</think>', "not one JSON object"),
    ('<think>Perhaps {"a": 1}', "the reasoning does not end"),
    ('{"b": {"a": 1}}', "with the keys a")])
def test_parse_object_refuses_everything_else(text, flaw):
    with pytest.raises(Flaw, match=flaw):
        parse_object(text, "a")


@pytest.mark.parametrize("text", ["{" * 10**6, '{"a":' * 200_000, '{"a":1,\n' * 110_000])
def test_parse_object_gives_up_on_a_million_characters_that_repeat(text):
    """Without a limit, the first of these texts takes five minutes."""
    start = time.perf_counter()
    with pytest.raises(Flaw, match="too many opening braces"):
        parse_object(text, "a")
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("text, flaw", [
    (says(""), "edited is empty"), (says(" \n"), "edited is empty"), (says(None), "is empty"),
    (says("The black dog  sat on the mat."), "same words"),
    (says("The black cat sat on the mat.", False), "needs_change is false, yet"),
    (says("A white horse stood there."), "of 7 words changed"),
    (says(["x"]), "edited a string"), (says("x", "yes"), "true or false"),
    ('{"needs_change": true, "edited": "The black \\ud800 sat on the mat."}', "surrogate"),
    # sure, here, is, the, edited and response are inserted, dog is substituted
    (says("Sure, here is the edited response: The black cat sat on the mat."), "7 of 13 words"),
    (says("Sure: The black cat sat on the mat."), "'Sure:'"),
    (says("<response>The black cat sat on the mat."), "'<response>'")])
def test_read_edit_refuses(text, flaw):
    with pytest.raises(Flaw, match=flaw):
        read_edit(text, TASK, 0.5, INSTRUCTION)


def test_leak_finds_eight_words_of_the_instruction_in_a_row_and_not_seven():
    seven = "Change only where it is necessary: what"               # the colon is no word
    assert leak(f"The dog. {seven} is", TASK, INSTRUCTION) is not None
    assert leak(f"The dog. {seven} sat", TASK, INSTRUCTION) is None


def test_leak_finds_a_tag_behind_one_that_the_response_has_itself():
    task = Task("r", "p", "c", "Write <passage> there.")
    assert leak("Write <passage> here.", task, INSTRUCTION) is None
    assert "'</response>'" in leak("Write <passage> here.</response>", task, INSTRUCTION)


def test_leak_allows_text_that_the_record_contains_itself():
    said = "Here is the edited response: change only where it is necessary: what is false."
    task = Task("r", "p", "c", said)
    assert leak(said + " Yes", task, INSTRUCTION) is None
    assert leak(said + " Yes", TASK, INSTRUCTION) is not None


@pytest.mark.parametrize("original, edited, leaked", [
    ("Here are three tips: eat, rest.", "Here are two tips: eat, rest.", None),
    ("Sure: here are three: eat, rest.", "Sure: here are two: eat, rest.", None),
    ("Sorry. Here is one: eat.", "Here is one: eat.", None),           # without its beginning
    ("Here are three tips: eat, rest.", "Sure: Here are two: eat, rest.", " Here are two:"),
    ("Here are two tips: eat, rest.", "The edited text: eat, rest.", "The edited text:"),
    ("Two tips: eat, rest.", "Here are two tips: eat, rest.", "Here are two tips:")])
def test_leak_tells_a_preamble_added_from_the_original_one_edited(original, edited, leaked):
    found = leak(edited, Task("r", "p", "c", original), INSTRUCTION)
    assert found is None if leaked is None else repr(leaked) in found


def test_editor_asks_once_more_saying_what_was_wrong():
    rewrite = says("A white horse stood there.")
    answer, model = edit(rewrite, says("The black cat sat on the mat."))
    assert answer.text == "  The black cat sat on the mat.\n" and answer.attempts == 2
    again = model.asked[1][1]
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == rewrite
    # A white horse stood there: five words substituted, "the" and "mat" deleted
    assert "7 of 7 words changed (100%), at most 50% allowed" in again[2]["content"]


@pytest.mark.parametrize("second", ["", "no JSON", says("A white horse stood there."), says("")])
def test_editor_refuses_a_record_after_two_bad_answers_and_asks_no_third_time(second):
    answer, model = edit(says(""), second)
    assert answer.text is None and answer.attempts == 2 and answer.reason
    assert model.answers == []


def test_editor_says_that_an_answer_was_cut_short_and_never_sends_a_blank_turn():
    answer, model = edit(Reply("", False), Reply('{"needs_change": tr', False))
    assert answer.text is None and answer.reason.startswith("the answer was cut short or declined")
    assert model.asked[1][1][1] == {"role": "assistant", "content": "(no answer)"}


# The judge's answers.

@pytest.mark.parametrize("text, expected", [
    ('{"better": "first"}', 1.0), ('{"better": "tie"}', 1.5),
    ('<think>The {"better": "first"} one? No.</think>\nIt is:\n```json\n{"better": "second"}\n```',
     2.0), ('{"why": "true", "better": "second"}', 2.0)])
def test_verdict_reads_the_answer_of_a_reasoning_model(text, expected):
    assert verdict(text) == expected


@pytest.mark.parametrize("text", ['{"better": "both"}', '{"better": ["first"]}', "first",
                                  '{"better": "first"} or {"better": "second"}'])
def test_verdict_refuses_everything_else(text):
    with pytest.raises(Flaw):
        verdict(text)
