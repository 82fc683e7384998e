"""Makes the files of the profile real from DeFacto as published.

    python -m fgrlhf.real.files --data DIR --out runs/real/data

DIR has train.jsonl and val.jsonl (github.com/microsoft/DeFacto, folder data). Every prompt is the
sentence of the article that an annotator chose as evidence, or what --prompt says (prompts.py).
Records of val whose article is in train are left out.

    SPLIT-edits.jsonl       the minimal edits that change something
    SPLIT-summaries.jsonl   all candidates, right and wrong, with the article as context
    SPLIT-prompts.jsonl     their prompts, with the article as context
    judge-edits.jsonl       the edits of val that are not of the first --test summaries
    candidates.json, annotators.json    those first summaries as published, and as the annotators
                            left them, in AlpacaEval's format
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Prompt, write_jsonl, write_outputs
from fgrlhf.engine.config import arg, parse, run
from fgrlhf.judge import answer_to
from fgrlhf.real.prompts import prompt_arg, read_split

SOURCE = ("DeFacto is public: git clone https://github.com/microsoft/DeFacto, and pass its folder "
          "data")


@dataclass(frozen=True)
class Config:
    data: str = arg(help="folder with DeFacto's train.jsonl and val.jsonl")
    out: str = arg(help="folder for the files")
    test: int = arg(160, least=1, help="number of summaries of val that test policies")
    prompt: str = prompt_arg()


def check_data(folder: str | None) -> Path:
    """Returns the folder of DeFacto's files. Raises UserError, with the source, without them."""
    if folder is None:
        raise UserError(f"--data: expected the folder of DeFacto's files; {SOURCE}")
    for name in ("train.jsonl", "val.jsonl"):
        if not (Path(folder) / name).is_file():
            raise UserError(f"--data {folder}: expected {name} in it; {SOURCE}")
    return Path(folder)


def write_files(config: Config) -> None:
    data, out = check_data(config.data), Path(config.out)
    summaries, edits = {}, {}
    for split in ("train", "val"):
        summaries[split], edits[split] = read_split(data / f"{split}.jsonl", config.prompt)
    trained = {summary.context for summary in summaries["train"]}
    twice = {summary.id for summary in summaries["val"] if summary.context in trained}
    for records in (summaries, edits):
        records["val"] = [record for record in records["val"] if record.id not in twice]
    if twice:
        print(f"{data}/val.jsonl: left out {len(twice)} records, because train has their articles",
              file=sys.stderr)
    for split in summaries:
        write_jsonl(out / f"{split}-edits.jsonl", edits[split])
        write_jsonl(out / f"{split}-summaries.jsonl", summaries[split])
        write_jsonl(out / f"{split}-prompts.jsonl",
                    [Prompt(s.id, s.prompt, context=s.context) for s in summaries[split]])
    test = summaries["val"][:config.test]
    tested = {summary.id for summary in test}
    write_jsonl(out / "judge-edits.jsonl", [e for e in edits["val"] if e.id not in tested])
    edited = {edit.id: edit.edited for edit in edits["val"]}
    prompts = [Prompt(s.id, s.prompt, context=s.context) for s in test]
    write_outputs(out / "candidates.json", [answer_to(prompt, s.output, "candidates")
                                            for prompt, s in zip(prompts, test)])
    write_outputs(out / "annotators.json", [
        answer_to(prompt, edited.get(s.id, s.output), "annotators")
        for prompt, s in zip(prompts, test)])


if __name__ == "__main__":
    run(lambda: write_files(parse(Config, __doc__)))
