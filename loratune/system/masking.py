"""Secrets kept out of what loratune writes and prints: passwords in URLs, tokens on command lines, secrets of the environment.

A storage URL may name an environment variable in place of a password, `postgresql://me:${PGPASSWORD}@host/db`; what is written
of a study then holds the name. A password that was spelt out is written as `***`.
"""

import os
import re
from collections.abc import Iterable
from urllib.parse import quote

from loratune.errors import StorageError

HIDDEN = "***"

_SECRET = r"(?:token|password|passwd|pwd|secret|api[-_]?key|credentials?)"
_IN_URL = re.compile(r"(://[^\s/:@'\"]*:)(?!\*\*\*@)(?!\$\{\w+\}@)[^\s'\"]+@")  # up to the last @: a password may hold one
_IN_QUERY = re.compile(rf"(?i)([?&;][\w-]*{_SECRET}=)(?!\$\{{)[^&;\s'\"]+")
_FLAG = re.compile(rf"(?i)^--?[\w.-]*{_SECRET}$")
_FLAG_WITH_VALUE = re.compile(rf"(?i)(--?[\w.-]*{_SECRET})([= ])(?!\$\{{)[^\s'\"]+")
_HUB_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}\b")
_ENVIRONMENT = re.compile(r"(?i)(?:token|password|passwd|secret|api_?key|credentials?|_pwd)$")  # not PWD, the working folder
_NAMED = re.compile(r"\$\{(\w+)\}")
_LEAST = 8  # characters; a shorter value of the environment stands in too many words by chance


def masked(text: str) -> str:
    """The text with `***` in place of every secret in it."""
    for value in _of_environment():
        text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    text = _FLAG_WITH_VALUE.sub(rf"\1\2{HIDDEN}", text)
    return _HUB_TOKEN.sub(HIDDEN, text)


def masked_command(words: Iterable[str]) -> list[str]:
    """A command line with `***` in place of every secret, also of a value that follows its flag as a word of its own."""
    shown: list[str] = []
    for word in map(str, words):
        shown.append(HIDDEN if shown and _FLAG.match(shown[-1]) else masked(word))
    return shown


def unmasked(url: str) -> str:
    """A storage URL with the environment variables that it names filled in, percent-encoded where they are a part of it.

    Raises StorageError for a variable that is not set, and for a URL whose password was not kept.
    """
    if f":{HIDDEN}@" in url or f"={HIDDEN}" in url:
        raise StorageError(
            f"storage {url}: the password is not kept in the study's folder. Give the URL again with --storage, or let it name an "
            "environment variable: ${NAME} in place of the password."
        )
    whole = _NAMED.fullmatch(url) is not None

    def filled(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if not value:
            raise StorageError(f"storage {masked(url)}: the environment variable {match[1]} is not set.")
        return value if whole else quote(value, safe="")

    return _NAMED.sub(filled, url)


def _of_environment() -> list[str]:
    """The environment's secrets, longest first, as they are and as they stand in a URL."""
    values = [value for name, value in os.environ.items() if _ENVIRONMENT.search(name) and len(value) >= _LEAST]
    return sorted({*values, *(quote(value, safe="") for value in values)}, key=len, reverse=True)
