"""The chat template that a model brings along, and which template of ours fits it.

A chat template is a program of its author, and is never run. It is only searched for marks.
"""

import re

# The marks by which `recognise` knows a chat template.
_MARKS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama-2": ("[INST] ", " [/INST]"),
    "zephyr": ("<|user|>", "<|assistant|>"),
    "alpaca": ("Below is an instruction that describes a task", "### Instruction:",
               "### Response:"),
}
_FOREIGN = ("<|end|>", "<|endofprompt|>", "[gMASK]")        # Phi, GLM: "<|user|>" is a token there


def recognise(chat_template: str) -> str | None:
    """Returns the name of the known template that a model's own chat template is, or None.

    None is also returned for a chat template with the marks of several known ones.
    """
    found = [name for name, marks in _MARKS.items() if all(mark in chat_template for mark in marks)]
    if len(found) != 1 or found == ["zephyr"] and any(f in chat_template for f in _FOREIGN):
        return None
    return found[0]


def advise(chat_template: str) -> str:
    """Returns one line for stderr: which --template fits a model with this chat template."""
    name = recognise(chat_template)
    if name is None:
        return ("this model has a chat template of its own kind; write its text to a file and give "
                "--template FILE")
    line = f"this model has a chat template: --template {name} fits it"
    if system := re.search(r"<\|im_start\|>system(?:\\n|\n)([^<{\'\"]{1,300})", chat_template):
        line += (f", but has no system prompt; the model's own is {' '.join(system[1].split())!r}; "
                 "a template file can hold it")
    elif "Cutting Knowledge Date" in chat_template:
        line += ", but has no system prompt; the model's own says two dates"
    return line
