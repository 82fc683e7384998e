"""CoachLM (Liu et al. 2024, arXiv 2311.13246): its expert_revisions.json as published.

    Raw Instruction, Raw Input, Raw Response                 a record of Alpaca's data
    Revised Instruction, Revised Input, Revised Response     the same, revised by an expert

A record is the edit from the raw to the revised response. Many experts revised the instruction or
the input too; the two responses then answer different prompts and are no edit. The revised side of
such a record is still a demonstration.
"""

from pathlib import Path

from fgrlhf.data.fields import Text, take
from fgrlhf.data.records import Demonstration, Edit, NoEdit, Prompt

FIELDS = {"Raw Instruction", "Raw Response", "Revised Response"}


def build_edit(value: dict, place: str) -> Edit | NoEdit:
    """Builds the edit of a response. Its id is its place in the file."""
    id = Path(place).name
    raw, revised = (_request(value, side, place) for side in ("Raw", "Revised"))
    original = take(value, "Raw Response", Text, place)
    edited = take(value, "Revised Response", str, place)
    if not edited.strip():
        return NoEdit(Prompt(id, *revised), "the revised response is blank")
    if raw != revised:
        return NoEdit(Demonstration(id, revised[0], edited, revised[1]),
                      "the expert revised the prompt too")
    return Edit(id, raw[0], original, edited, raw[1])


def _request(value: dict, side: str, place: str) -> tuple[str, str | None]:
    """Returns (prompt, input). The input of a record without an instruction is the prompt."""
    instruction = take(value, f"{side} Instruction", str, place)
    if not instruction.strip():
        return take(value, f"{side} Input", Text, place), None
    return instruction, take(value, f"{side} Input", str, place) or None
