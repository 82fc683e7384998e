"""Answers of a language model on the disk, by the hash of what was asked."""

import hashlib
import json
import os
import threading
from pathlib import Path

from fgrlhf.collecting.lines import Lines, lock
from fgrlhf.collecting.protocol import Reply
from fgrlhf.config import UserError
from fgrlhf.files import read_json


class Cache:
    """A JSONL file of {"key", "text", "complete"}. Thread-safe; one program at a time.

    The text of a question is not kept, only its hash: `key` of the URL and the body sent, which
    never holds the API key.
    """

    def __init__(self, path: Path):
        self.path, self._held, self._mutex = path, lock(path), threading.Lock()
        self._file = Lines(path)                  # cuts a torn last line before it is read
        self._replies = {}
        for place, value in read_json(path):
            try:
                self._replies[value["key"]] = Reply(value["text"], value["complete"])
            except (TypeError, LookupError):
                raise UserError(f"{place}: expected key, text and complete of an earlier answer; "
                                "choose another file") from None

    @staticmethod
    def key(url: str, body: dict) -> str:
        """The same for equal questions to the same server."""
        return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        with self._mutex:
            if key not in self._replies:
                self._file.append({"key": key} | reply._asdict())
                self._replies[key] = reply

    def close(self) -> None:
        self._file.close()
        os.close(self._held)
