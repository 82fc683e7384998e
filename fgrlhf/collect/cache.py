"""Stores the answers of a language model on disk, under the hash of the question."""

import hashlib
import json
import os
import threading
from pathlib import Path

from fgrlhf.collect.lines import Lines, lock_file
from fgrlhf.collect.protocol import Reply
from fgrlhf.data.fields import UserError
from fgrlhf.data.files import read_json


class Cache:
    """A JSONL file of {"key", "text", "complete"}. Thread-safe; one process writes to it.

    The file holds no question, only its hash: `key` of the URL and the request's body. The body
    never contains the API key. Raises UserError for a file that holds something else.
    """

    def __init__(self, path: Path):
        self.path, self._held, self._mutex = path, lock_file(path), threading.Lock()
        self._file = Lines(path)                  # first: it removes a line that was cut off
        self._replies = {}
        for place, value in read_json(path):
            try:
                self._replies[value["key"]] = Reply(value["text"], value["complete"])
            except (TypeError, LookupError):
                raise UserError(f"{place}: expected key, text and complete of an earlier answer, "
                                "got something else; delete the line or choose another file"
                                ) from None

    @staticmethod
    def key(url: str, body: dict) -> str:
        """The sha256 of the URL and the body: equal for equal questions to the same server."""
        return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Appends an answer; on disk when this returns. A known key is not written again."""
        with self._mutex:
            if key not in self._replies:
                self._file.append({"key": key} | reply._asdict())
                self._replies[key] = reply

    def close(self) -> None:
        self._file.close()
        os.close(self._held)
