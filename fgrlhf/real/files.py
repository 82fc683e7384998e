"""Makes the files of the profile real from DeFacto as published.

    python -m fgrlhf.real.files --data DIR --out runs/real/data

DIR has train.jsonl and val.jsonl (github.com/microsoft/DeFacto, folder data). Every prompt is the
sentence of the article that an annotator chose as evidence.

    SPLIT-edits.jsonl       the minimal edits that change something
    SPLIT-summaries.jsonl   all candidates, right and wrong, with the article as context
    SPLIT-prompts.jsonl     their prompts, with the article as context
"""

from dataclasses import dataclass
from pathlib import Path

from fgrlhf.data.defacto import read_evidence_edits, read_summaries
from fgrlhf.data.fields import UserError
from fgrlhf.data.records import Prompt, write_jsonl
from fgrlhf.engine.config import arg, parse, run

SOURCE = ("DeFacto is public: git clone https://github.com/microsoft/DeFacto, and pass its folder "
          "data")


@dataclass(frozen=True)
class Config:
    data: str = arg(help="folder with DeFacto's train.jsonl and val.jsonl")
    out: str = arg(help="folder for the files")


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
    for split in ("train", "val"):
        file, summaries = data / f"{split}.jsonl", read_summaries(data / f"{split}.jsonl")
        write_jsonl(out / f"{split}-edits.jsonl", read_evidence_edits(file))
        write_jsonl(out / f"{split}-summaries.jsonl", summaries)
        write_jsonl(out / f"{split}-prompts.jsonl",
                    [Prompt(s.id, s.prompt, context=s.context) for s in summaries])


if __name__ == "__main__":
    run(lambda: write_files(parse(Config, __doc__)))
