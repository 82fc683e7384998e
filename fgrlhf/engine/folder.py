"""Checks of an output folder before a run: what it holds, and who else writes there.

A run is refused before models are loaded when the folder is not its own: another process is writing
to it, another run has finished or begun in it, or --resume finds other settings or other inputs.
"""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_object, write_atomic
from fgrlhf.data.lock import lock
from fgrlhf.engine import config as configuration, distributed, states

MODELS = ("policy", "best", "reward")                    # the folders that a run writes
MAY_DIFFER = ("resume", "out", "keep", "keep_last", "save_every")   # in a run that is resumed
# These may differ too, but then numbers are added up in another order and round differently.
ROUNDING = ("device", "microbatch", "decode_batch", "checkpoint_activations", "offload")
LOGS = ("metrics.jsonl", "timing.jsonl", "samples.jsonl")       # one line per step each
LOCKS: dict[str, int | None] = {}          # the folders that this process holds


class OutputFolder:
    """The folder --out of one training run, new or resumed.

    `inputs` names the fields of `config` that hold files or folders the run depends on. Their
    sha256 is part of every state. A resumed run must find the same contents, at any path. `files`
    are further files that the run depends on, by their names. With `keep_last` the last state stays
    when the run is finished, and a call with --resume and more --iterations goes on from there.

    Making this object refuses an --out that cannot be used, and writes nothing. `open` makes and
    locks the folder.
    """

    def __init__(self, config, tokenizer_hash: str = "", inputs: tuple[str, ...] = (),
                 files: tuple[Path, ...] = (), keep_last: bool = False):
        self.folder, self.config, self.keep_last = Path(config.out), config, keep_last
        self.writes = distributed.rank() == 0                   # of several ranks, one writes
        self.state, self.seconds, self.opened = None, 0.0, False
        given = {name: getattr(config, name) for name in inputs if getattr(config, name)}
        for name, path in given.items() if config.resume else ():
            if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
                raise UserError(f"--{name.replace('_', '-')} {path}: expected a file, got a pipe, "
                                "which --resume cannot read again; write it to a file first")
        self.inputs = {name: states.fingerprint(path) for name, path in given.items()}
        self.inputs["tokenizer"] = tokenizer_hash
        self.inputs |= {file.name: states.fingerprint(file) for file in files}
        self._refuse_bad_place()
        self._refuse_other_files()
        self._refuse_other_run()
        if config.resume:
            self._find_state()

    @property
    def step(self) -> int:
        """The last completed step, 0 in a new run."""
        return self.state["step"] if self.state else 0

    def open(self) -> None:
        """Makes and locks the folder, and writes config.json. Only the first call does anything."""
        if self.opened:
            return
        self.opened = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.folder}: not writable ({error.strerror}); choose another "
                            "path") from None
        if not self.writes:
            return
        self._lock()
        self._refuse_other_run()                        # another process may have been faster
        for folder in (self.folder, *(self.folder / name for name in MODELS)):
            for left in folder.glob(".*.[0-9]*.tmp"):   # of a process that was killed
                left.unlink()
        for name in LOGS if self.config.resume else ():
            self._drop_lines_after(self.step, self.folder / name)
        (self.folder / "done.json").unlink(missing_ok=True)     # a finished run that goes on
        write_atomic(self.folder / "config.json", configuration.to_json(self.config).encode())

    def _lock(self) -> None:
        """Holds the folder for this process, which may make several runs in it one by one."""
        if os.path.realpath(self.folder) not in LOCKS:
            LOCKS[os.path.realpath(self.folder)] = lock(self.folder)

    def unlock(self) -> None:
        """Lets other processes use the folder."""
        if (held := LOCKS.pop(os.path.realpath(self.folder), None)) is not None:
            os.close(held)

    # ----- refusals -------------------------------------------------------------------------------

    def _refuse_bad_place(self) -> None:
        """Refuses an --out where no folder can be made, and one that is itself an input."""
        written = {os.path.realpath(self.folder / name) for name in ("", *MODELS)}
        for name in self.inputs:
            path = getattr(self.config, name, None)
            if path and os.path.realpath(path) in written:
                raise UserError(f"--out {self.folder}: expected a folder of its own, but the run "
                                f"would write over --{name.replace('_', '-')} {path}; choose "
                                "another path")
        there = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"--out {self.folder}: not writable ({there} is no folder in which you "
                            "may write); choose another path")

    def _refuse_other_files(self) -> None:
        """Refuses a folder with a model, or with settings, that no run of this project wrote."""
        config, advice = self.folder / "config.json", "choose another --out"
        if config.exists():
            if not {"out", "resume"} <= set(read_object(config, advice)):
                raise UserError(f"{config}: expected the settings of a run, got a file of another "
                                f"program, perhaps of a model; {advice}")
            return
        for name in (*MODELS, "params.json"):
            if (self.folder / name).exists():
                raise UserError(f"--out {self.folder}: holds {name}, but no run that wrote it; "
                                f"{advice}")

    def _refuse_other_run(self) -> None:
        """Refuses a folder that holds another run. Its own finished run ends the program.

        A folder that another process is writing to is refused first.
        """
        if self.writes and (self.folder / "config.json").exists():
            self._lock()
        if (self.folder / "done.json").exists():
            self._finished()
        if not self.config.resume and any((self.folder / name).exists() for name in LOGS):
            raise UserError(f"{self.folder}: holds an unfinished run; continue it with --resume, "
                            "choose another --out or remove it")

    def _finished(self) -> None:
        """Ends the program, unless more iterations can start from a state that was kept.

        With --resume and the settings of the finished run the status is 0. A pipeline that was
        killed before it recorded the success of a stage calls the stage again in this way.
        """
        if not self.config.resume:
            raise UserError(f"{self.folder}: holds a finished run; choose another --out or remove "
                            "it")
        now = self._settings()
        before = self._older_settings(read_object(self.folder / "config.json"))
        if (field := self._other_setting(now, before, now)) is not None:
            raise UserError(f"{self.folder}: holds a finished run with another "
                            f"--{field.replace('_', '-')}: it had {before.get(field)!r}, got "
                            f"{now[field]!r}; choose another --out or remove it")
        if now.get("iterations") != before.get("iterations"):
            if states.paths(self.folder):
                return
            raise UserError(f"{self.folder}: holds a finished run of {before['iterations']} "
                            "iterations, which cannot go on because it kept no training state "
                            "(--keep-last); choose another --out")
        done = read_object(self.folder / "done.json")
        self._check_inputs(done.get("inputs", self.inputs), self.folder / "done.json", before)
        if self.writes and not (self.keep_last or before.get("keep_last")):
            states.remove(self.folder)                  # a kill may have come before their removal
        print(f"{self.folder}: already complete")
        raise SystemExit(0)

    def _find_state(self) -> None:
        """Reads the newest state, if there is one, and compares it with this run."""
        found = states.newest(self.folder)
        if found is None:
            path, saved = self.folder / "config.json", {}
            if path.exists():                           # it was killed before its first state
                saved = read_object(path)
            elif self.writes:
                print(f"{self.folder}: no run to resume; a new one begins", file=sys.stderr)
        else:
            path, self.state = found
            saved = json.loads(self.state["config"])
        before, now = self._older_settings(saved), self._settings()
        if saved and (field := self._other_setting(before, before, now)) is not None:
            raise UserError(f"{path}: --resume needs the same --{field.replace('_', '-')}: the run "
                            f"was started with {before[field]!r}, got {now.get(field)!r}; give it "
                            "again, or choose another --out")
        if found is None:
            return
        self._check_inputs(self.state["inputs"], path, saved)
        self.seconds = self.state["seconds"]
        was, here = self.state["machine"], self._machine()
        changed = [f"{name} {was[name]} (now {here.get(name)})" for name in was
                   if was[name] != here.get(name)]
        if changed and self.writes:
            print(f"{path}: written with {', '.join(changed)}: the run goes on, but its bytes will "
                  "differ from those of a run that was never stopped", file=sys.stderr)

    def _settings(self) -> dict:
        """The configuration as config.json holds it."""
        return json.loads(configuration.to_json(self.config))

    def _older_settings(self, saved: dict) -> dict:
        """Returns saved settings, with the defaults of flags that did not exist at that time."""
        new = {field.name: field.default for field in dataclasses.fields(self.config)
               if field.name not in saved and field.default is not dataclasses.MISSING}
        defaults = json.loads(configuration.to_json(dataclasses.replace(self.config, **new)))
        return saved | {name: defaults[name] for name in new}

    def _other_setting(self, names: Iterable[str], before: dict, now: dict) -> str | None:
        """The first of the settings `names` that may not differ in one run, and does."""
        own = [*MAY_DIFFER, *ROUNDING, *self.inputs]        # of inputs the contents are compared
        if not now.get("lr_decay", True) and now["iterations"] > before.get("iterations", math.inf):
            own.append("iterations")                        # no step depends on their number
        return next((n for n in names if n not in own and before.get(n) != now.get(n)), None)

    def _machine(self) -> dict:
        """Returns what changes the last digits of a run and nothing else."""
        here = {name: getattr(self.config, name) for name in ROUNDING if hasattr(self.config, name)}
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        return here | {"device": self.config.device.replace("auto", auto),
                       "threads": torch.get_num_threads(), "ranks": distributed.size(),
                       "torch": str(torch.__version__)}

    def _check_inputs(self, before: dict[str, str], path: Path, settings: dict) -> None:
        """Refuses other contents than those of `before`. settings: those of the run, by name."""
        for name in self.inputs | before:
            if before.get(name, "") != self.inputs.get(name, ""):
                given = hasattr(self.config, name)          # otherwise a file or the tokenizer
                flag = "--" + name.replace("_", "-") if given else name
                how = "its contents have changed since the run was started; restore it"
                was, now = settings.get(name), getattr(self.config, name, None)
                if was != now:
                    how = (f"the run was started with {was}, got {now} with other contents; give "
                           f"{was} again")
                if name not in self.inputs or name not in before:
                    how = f"the run was started with{'' if name in before else 'out'} it; repeat"
                raise UserError(f"{path}: --resume needs the same {flag}: {how} or choose another "
                                "--out")

    @staticmethod
    def _drop_lines_after(step: int, path: Path) -> None:
        """Removes the lines that were written after `step`, and a line that was cut off."""
        if not path.exists() and (step == 0 or path.name == "samples.jsonl"):
            return                                      # --save-samples is an option
        data = path.read_bytes() if path.exists() else b""
        lines = [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]
        try:
            kept = [line for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError, RecursionError):
            kept = []
        if len(kept) < step:
            raise UserError(f"{path}: expected a line for each of the {step} steps of the training "
                            f"state, got {len(kept)}; restore the file, or start again in another "
                            "--out")
        write_atomic(path, b"".join(kept))
