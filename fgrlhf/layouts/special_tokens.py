"""The small JSON files next to a tokenizer: which tokens are special, whether BOS comes first.

    tokenizer_config.json      bos_token, eos_token, ...; add_bos_token; added_tokens_decoder;
                               chat_template
    special_tokens_map.json    bos_token, eos_token, ...
    added_tokens.json          ids of added tokens by their text
    generation_config.json     bos_token_id, eos_token_id; also in config.json
    chat_template.jinja        the chat template, in place of the one in tokenizer_config.json

Each file may be missing.
"""

import re
from pathlib import Path

from fgrlhf.data.fields import UserError, check, show
from fgrlhf.data.files import read_text
from fgrlhf.layouts.stored import LONGEST, damaged, read_settings


class SpecialTokens:
    """The special tokens that the settings files of a folder name.

    Attributes: named, the text of special tokens by "bos", "eos", "unk" and "pad"; ids, their ids
    where a file gives only the id; added, the ids of added tokens by their text; adds_bos, None
    when no file says it; chat_template, a text or None. Raises UserError for a value of another
    type.
    """

    def __init__(self, folder: Path):
        def values(name: str) -> dict:
            return read_settings(folder / name) if (folder / name).exists() else {}

        config, place = values("tokenizer_config.json"), folder / "tokenizer_config.json"
        self.named, self.ids = {}, {}
        for name, found in (("special_tokens_map.json", values("special_tokens_map.json")),
                            (place.name, config)):
            for key in ("bos", "eos", "unk", "pad"):
                text = found.get(f"{key}_token")
                text = text.get("content") if isinstance(text, dict) else text
                if text is not None:
                    self.named[key] = check(str, text, str(folder / name), f"{key}_token")
        for name in ("config.json", "generation_config.json"):
            found = values(name)
            for key in ("bos", "eos"):
                id = found.get(f"{key}_token_id")
                id = id[0] if isinstance(id, list) and id else id      # Llama 3 has several EOS
                if id is not None:
                    self.ids[key] = check(int, id, str(folder / name), f"{key}_token_id")
        self.added = check(dict[str, int], values("added_tokens.json"),
                           str(folder / "added_tokens.json"), "added token")
        decoder = config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise damaged(place, f"added_tokens_decoder: expected an object, got {show(decoder)}")
        self.added |= added_ids([token | {"id": id} if isinstance(token, dict) else token
                                 for id, token in decoder.items()], place)
        self.adds_bos, self.chat_template = read_prompting(folder)

    def find(self, path: Path, ids: dict[str, int]) -> tuple[int, int]:
        """Returns the ids of BOS and EOS. A tokenizer without BOS has EOS for it, and adds none.

        ids: those of all tokens of the tokenizer at `path`, from 0 on, by their text.
        """
        if "bos" not in self.named and "bos" not in self.ids:
            self.adds_bos = False
        found = []
        for key in ("bos", "eos"):
            key = key if key in self.named or key in self.ids else "eos"
            text, id = self.named.get(key), self.ids.get(key)
            id = ids.get(text, id)
            if id is None or not 0 <= id < len(ids):
                raise UserError(f"{path}: {key.upper()}: expected one of its {len(ids)} tokens, "
                                f"got {show(id if text is None else text)}; give {key}_token in "
                                "tokenizer_config.json")
            found.append(id)
        return tuple(found)


def read_prompting(folder: Path) -> tuple[bool | None, str | None]:
    """Returns whether BOS is put before a prompt, and the chat template. None: no file says it.

    A list of named templates gives the template named "default".
    """
    place, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_settings(place) if place.exists() else {}
    adds_bos, template = config.get("add_bos_token"), config.get("chat_template")
    if not (adds_bos is None or isinstance(adds_bos, bool)):
        raise UserError(f"{place}: add_bos_token: expected true or false, got {show(adds_bos)}; "
                        "correct the file")
    if jinja.is_file():
        if (size := jinja.stat().st_size) > LONGEST:
            raise damaged(jinja, f"expected at most {LONGEST} bytes, got {size}")
        return adds_bos, read_text(jinja)
    if isinstance(template, list):
        template = next((entry.get("template") for entry in template if isinstance(entry, dict)
                         and entry.get("name") == "default"), None)
    return adds_bos, check(str | None, template, str(place), "chat_template")


def added_ids(tokens: list[dict], place: Path) -> dict[str, int]:
    """Returns ids by text of a list of {"id": 2, "content": "<|im_end|>", ...}."""
    ids = {}
    for token in check(list, tokens, str(place), "added_tokens"):
        token = token if isinstance(token, dict) else {}
        text, id = token.get("content"), token.get("id")
        if not isinstance(text, str) or not text or not re.fullmatch(r"\d{1,9}", str(id)):
            raise damaged(place, "added_tokens: expected an id and a text (content), got "
                                 f"{show(id)} and {show(text)}")
        ids[text] = int(id)
    return ids
