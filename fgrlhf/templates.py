r"""Prompt templates: the words and control tokens that a model expects around a prompt.

A template is a text with fields, never code. Here is the template "chatml":

    <|im_start|>user
    {prompt}<|im_end|>
    <|im_start|>assistant
    {response}<|im_end|>

{prompt} and {input} are the texts of a record. {context} is its passages, each "title: text" and an
empty line. The prompt ends where {response} is; without this field the whole template is the
prompt. The control token behind {response} is the model's end of a turn, and may be left out.

A template without {input} puts the input of a record on a line of its own behind the prompt. A line
"--- without input ---" divides a template in two: the upper part is for records with an input, and
the lower part for the others.

A control token of the template becomes its single id in the tokenizer. The same characters in a
record stay characters, so that no prompt can end its own turn. The text between two control tokens,
the template's and the record's, is encoded in one piece, as transformers encodes a chat.

TEMPLATES has the known templates by name. --template also takes a path: that of a text file, or
that of a model folder, whose encoding.json has the template of its training.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fgrlhf.data.fields import UserError, show
from fgrlhf.data.files import opened
from fgrlhf.engine.config import arg
from fgrlhf.engine.encoding import FILE, is_text, read_encoding
from fgrlhf.layouts.chat_template import advise
from fgrlhf.tokenizer import Tokenizer

WITHOUT_INPUT = "\n--- without input ---\n"
TEMPLATES = {
    "alpaca":                                   # Stanford Alpaca
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:" + WITHOUT_INPUT +
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{prompt}\n\n### Response:",
    "qa":                                       # passages and a question; no input is shown
        WITHOUT_INPUT.join(["{context}### Question:\n{prompt}\n\n### Response:"] * 2),
    "plain": "{prompt} ->",                     # for tiny models
    "chatml":                                   # SmolLM2, Qwen; without a system prompt
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>",
    "llama-2": "[INST] {prompt} [/INST]",       # LLaMA-2-Chat, Mistral-Instruct
    "llama-3":                                  # Llama-3-Instruct; without a system prompt
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{response}<|eot_id|>",
    "zephyr":                                   # TinyLlama-Chat; "<|user|>" is ordinary text there
        "<|user|>\n{prompt}</s>\n<|assistant|>\n{response}</s>",
}
# These are control tokens in every template, so that a tokenizer without them is refused.
CONTROL = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
           "<|end_header_id|>", "<|eot_id|>", "<s>", "</s>")
FIELDS = ("prompt", "input", "context", "response")
LARGEST = 64 << 10                              # bytes of a template file


class Template(NamedTuple):
    """A template, taken apart. Both texts end where the response begins."""

    name: str                       # for messages
    with_input: str                 # for records with an input
    without_input: str              # for records without
    joins: bool                     # whether the input goes behind the prompt
    end: str                        # the control token that ends a turn, or ""


class Part(NamedTuple):
    """A piece of a filled template."""

    text: str
    kind: str                       # "template", "record" or "control"


# ----- names, files, texts ------------------------------------------------------------------------

@lru_cache
def find_template(template: str) -> Template:
    """Returns the template of a name or of a template's own text.

    Raises UserError for an unknown name and for a text that is not a template.
    """
    if template in TEMPLATES:
        return _parse(TEMPLATES[template], template)
    if not is_text(template):
        raise UserError(f"template: expected one of {', '.join(TEMPLATES)}, got {show(template)}; "
                        "choose one of these, or write a template to a file")
    return _parse(template, "of a file")


def _parse(text: str, name: str) -> Template:
    parts, ends = [], []
    for part in text.split(WITHOUT_INPUT):
        before, *behind = part.split("{response}")
        for field in re.findall(r"\{([a-z_]+)\}", part):
            if field not in FIELDS:
                raise UserError(f"template: expected the fields {{{'}, {'.join(FIELDS)}}}, got "
                                f"{{{field}}}; correct the name")
        if "{prompt}" not in before:
            raise UserError("template: expected {prompt} before the response, got none in "
                            f"{show(part)}; add the field")
        end = "{response}".join(behind).strip()
        if re.search(r"\s|{(prompt|input|context|response)}", end) or len(end) > 100:
            raise UserError("template: expected one control token or nothing behind {response}, "
                            f"got {show(end)}; the prompt ends where the response begins")
        parts.append(before)
        ends.append(end)
    if len(parts) > 2 or len(set(ends)) > 1 or WITHOUT_INPUT.strip() in "".join(parts) \
            or len(parts) == 2 and "{input}" in parts[1]:
        raise UserError('template: expected at most one line "--- without input ---", the same end '
                        "of both parts and no {input} in the lower part; correct the template")
    return Template(name, parts[0], parts[-1], len(parts) == 1 and "{input}" not in parts[0],
                    ends[0])


def read_template(given: str) -> str:
    """Returns what --template means: a known name as it is, or the text that a path leads to.

    A path contains a "/" or ends in .txt. It is that of a template file, or that of a model folder,
    whose encoding.json has a name or a text. The last newline of a file is not part of its
    template. Raises UserError for anything else.
    """
    if given in TEMPLATES:
        return given
    if not ("/" in given or os.sep in given or given.endswith(".txt")):
        raise UserError(f"expected one of {', '.join(TEMPLATES)}, or the path of a file (with a "
                        f'"/", or ending in .txt), got {show(given)}')
    if Path(given).is_dir():
        encoding = read_encoding(given)
        if encoding is None:
            raise UserError(f"{given}: expected a template file, or a model folder with {FILE}, "
                            f"got a folder without {FILE}; name the model folder in it")
        try:
            find_template(encoding.template)
        except UserError as error:
            raise UserError(f"{Path(given) / FILE}: {error}") from None
        return encoding.template
    with opened(given, gunzip=False) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise UserError(f"{given}: expected a template of at most {LARGEST} bytes, got more; "
                        "choose another file")
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
        _parse(text, given)
    except UnicodeDecodeError:
        raise UserError(f"{given}: expected UTF-8, got other bytes; convert the file") from None
    except UserError as error:
        raise UserError(f"{given}: {error}") from None
    return text


def template_arg(default: str | None, help: str = "how a record becomes a prompt",
                 read: Callable[[str], str] = read_template):
    """Returns the field of a command's configuration for --template."""
    return arg(default, read=read, help=f"{help}: {', '.join(TEMPLATES)}, the path of a "
               "template file, or that of a trained model folder for the template of its training")


def shows_context(template: str) -> bool:
    """Tells whether prompts show the passages of a record."""
    found = find_template(template)
    return "{context}" in found.with_input + found.without_input


def say_hidden_passages(records: Sequence, template: str, path: str) -> None:
    """Says on stderr how many records of a file have passages that the template does not show."""
    hidden = sum(bool(record.context) for record in records)
    if hidden and not shows_context(template):
        print(f"{path}: {hidden} records have passages (context) that the template "
              f"{find_template(template).name} does not show; --template qa does", file=sys.stderr)


# ----- a record in a template ---------------------------------------------------------------------

@lru_cache
def _split(text: str, control: tuple[str, ...]) -> list[tuple[str, str]]:
    """Returns the parts of an unfilled text: (kind, text), where the kind may be "field"."""
    names = sorted({*control, *CONTROL} - {""}, key=len, reverse=True)
    pattern = "|".join([r"\{prompt\}", r"\{input\}", r"\{context\}", *map(re.escape, names)])
    pieces, position = [], 0
    for found in re.finditer(pattern, text):
        pieces.append(("template", text[position:found.start()]))
        field = found[0][1:-1] if found[0][1:-1] in FIELDS else None
        pieces.append(("field", field) if field else ("control", found[0]))
        position = found.end()
    return [piece for piece in [*pieces, ("template", text[position:])] if piece[1]]


def fill(record, template: str, control: tuple[str, ...] = ()) -> list[Part]:
    """Returns the parts of the prompt of a record, in order and none of them empty.

    control: the texts of the tokenizer's control tokens. `record` is any record with prompt, input
    and context.
    """
    found, added = find_template(template), record.input or ""
    values = {"input": added, "prompt": record.prompt, "context": "".join(
        f"{passage.title}: {passage.text}\n\n" for passage in record.context)}
    if added and found.joins:
        values["prompt"] += f"\n{added}"
    parts = [Part(values[text], "record") if kind == "field" else Part(text, kind)
             for kind, text in _split(found.with_input if added else found.without_input, control)]
    return [part for part in parts if part.text]


def render_prompt(record, template: str) -> str:
    """Returns the text that the policy sees before the response, control tokens written out.

    alpaca, qa, plain and llama-2 do not end in a blank, because the first piece of the response
    brings its own. Raises UserError for an unknown template.
    """
    return "".join(part.text for part in fill(record, template))


# ----- ids ----------------------------------------------------------------------------------------

def check_template(tokenizer: Tokenizer, template: str, trains: bool = False,
                   model: str | None = None) -> None:
    """Raises UserError when the tokenizer lacks a control token of the template.

    trains: also says on stderr when the template ends a turn with another token than EOS, with
    which all responses end in training. model: the folder of the model; stderr also says which
    template fits when a chat model from elsewhere is given the default template, plain.
    """
    if model and template == "plain" and tokenizer.chat_template and not read_encoding(model):
        print(f"{model}: {advise(tokenizer.chat_template)}", file=sys.stderr)
    found, control = find_template(template), tokenizer.control
    texts = [text for form in (found.with_input, found.without_input)
             for kind, text in _split(form, tuple(control)) if kind == "control"]
    wanted = dict.fromkeys([*texts, found.end] if found.end else texts)
    if lacking := [text for text in wanted if text not in control]:
        raise UserError(f"template {found.name}: expected a tokenizer with the control tokens "
                        f"{', '.join(wanted)}, got {tokenizer.path} without {', '.join(lacking)}; "
                        "choose another template, or a model that was trained with this one")
    if trains and end_of_turn(tokenizer, template) not in (None, tokenizer.eos_id):
        eos = next((text for text, id in control.items() if id == tokenizer.eos_id), "its EOS")
        print(f"template {found.name}: its turns end with {found.end}, but responses are trained "
              f"to end with the tokenizer's EOS, {eos}", file=sys.stderr)


def end_of_turn(tokenizer: Tokenizer, template: str) -> int | None:
    """Returns the id of the control token that ends a turn, or None."""
    return tokenizer.control.get(find_template(template).end)


def encode_filled(tokenizer: Tokenizer, record, template: str) -> list[int]:
    """Returns the ids of the prompt of a record.

    BOS comes first where the tokenizer wants it, but not twice when the template begins with it.
    Raises UserError when the tokenizer lacks a control token of the template.
    """
    check_template(tokenizer, template)
    ids = []
    for is_control, group in _segments(tokenizer, record, template):
        ids += [tokenizer.control[part.text] for part in group] if is_control else \
            tokenizer.encode("".join(part.text for part in group))
    return [tokenizer.bos_id] * (tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]) + ids


def shorten(tokenizer: Tokenizer, record, template: str, limit: int) -> list[int]:
    """Returns the ids of `encode_filled` without the first ids of the record's own text.

    As many ids are removed as are above `limit`. BOS and every id that stands for a character of
    the template are kept. The texts of a record lose their beginning in the order in which the
    template shows them. Raises UserError, which names the record, when the ids that are kept are
    more than `limit`.
    """
    ids, removable = encode_filled(tokenizer, record, template), []
    for is_control, group in _segments(tokenizer, record, template):
        if is_control:
            removable += [False] * len(group)
            continue
        own = [part.kind == "record" for part in group for _ in part.text] + [False]
        removable += [all(own[start:max(end, start + 1)]) for start, end in
                      tokenizer.offsets("".join(part.text for part in group))]
    removable = [False] * (len(ids) - len(removable)) + removable               # BOS
    excess = max(0, len(ids) - limit)
    if sum(removable) < excess:
        raise UserError(f"record {record.id!r}: prompt: expected at most {limit} tokens, got "
                        f"{len(ids) - sum(removable)} that belong to the template "
                        f"{find_template(template).name}; raise --prompt-tokens")
    removed = set([k for k, own in enumerate(removable) if own][:excess])
    return [id for k, id in enumerate(ids) if k not in removed]


def _segments(tokenizer: Tokenizer, record, template: str) -> list[tuple[bool, list[Part]]]:
    """Returns runs of control tokens (True) and of text between them (False), in order."""
    parts = fill(record, template, tuple(tokenizer.control))
    return [(is_control, list(group)) for is_control, group in
            itertools.groupby(parts, lambda part: part.kind == "control")]
