"""A model's tokenizer: loading it, and what tells it from every other one."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from loratune.errors import ModelError
from loratune.system import hub

_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "*.model"),
    *("chat_template*", "additional_chat_templates/*"),
)
_CHOICE = ("config.json", "*.py")  # what tells Transformers which class of tokenizer it is


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Transformers' tokenizer of a local folder or hub id. Raises ModelError."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    try:
        with hub.asked_once(name):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder) if folder.is_dir() else name, revision=revision, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # missing, offline, gated, unknown class, a broken file: each with its own class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        nor = "" if folder.exists() else f" Nor is there a folder {name} here.{hub.folders_near(name)}"
        raise ModelError(f"{name}: the tokenizer cannot be loaded: {reason[:300]}{nor}") from error
    if not len(tokenizer):
        raise ModelError(f"{name}: no tokenizer files. Put tokenizer.json or tokenizer.model beside config.json.")
    return tokenizer


def tokenizer_fingerprint(name: str, revision: str | None, trust_remote_code: bool) -> tuple[list[tuple[str, str]], bool]:
    """(names and digests of a tokenizer's files, those of a hub tokenizer as it would be saved; whether they ask for the date)."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        hub.refuse_missing_folder(name)
        with tempfile.TemporaryDirectory() as saved:
            load_tokenizer(name, revision, trust_remote_code).save_pretrained(saved)
            return tokenizer_fingerprint(saved, None, False)
    found = {patterns: [f for p in patterns for f in folder.glob(p) if f.is_file()] for patterns in (_FILES, _CHOICE)}
    files = sorted({file for some in found.values() for file in some})
    if not found[_FILES]:
        raise ModelError(f"{name}: the folder holds no tokenizer files (tokenizer.json, tokenizer_config.json, ...).")
    contents = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    dated = any(b"strftime_now" in content for content in contents.values())
    return [(file, hashlib.sha256(content).hexdigest()) for file, content in contents.items()], dated
