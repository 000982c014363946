"""Questions with reference answers, as the study's model is asked them: of its validation set, or of another file of rows.

Both come as the tokens that training would make of them, split where the last answer that is scored begins: so a model is asked exactly
as it was trained, and a tokenizer's special tokens are never written out and read again.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from loratune.data.formats import Markers
from loratune.data.prepared import Prepared
from loratune.data.prompts import UnfitError, choose_prompt
from loratune.data.sources import BadRow, DataSource, read_source, refuse
from loratune.data.tokenizers import load_tokenizer
from loratune.errors import DataError

_ENDLESS = 1 << 40  # tokens


@dataclass(frozen=True, kw_only=True)
class ReferenceQuestion:
    """One question, by its tokens."""

    id: str  # a hash of prompt and reference
    prompt: tuple[int, ...]
    reference: tuple[int, ...]  # the answer in the data, with the token that ends it; cut where a validation example is


def validation_questions(prepared: Prepared) -> list[ReferenceQuestion]:
    """Of the validation set, in its order; the last answer of a conversation counts. Those without a prompt are left out."""
    return list(_distinct(_split(*prepared.validation[number]) for number in range(len(prepared.validation))))


def file_questions(path: str, prepared: Prepared, *, trust_remote_code: bool) -> list[ReferenceQuestion]:
    """Of a file of rows, in any of the formats of instruction data, shown as the study's prompt shows them. Raises DataError."""
    used, recipe = prepared.manifest, prepared.manifest.recipe
    examples, bad = read_source(DataSource(path=path), recipe.on_bad_rows, markers=_markers(prepared))
    prompt = choose_prompt(
        tokenizer_of(prepared, trust_remote_code=trust_remote_code),
        used.prompt.template or recipe.prompt,
        date=used.prompt.date,
        score_reasoning=recipe.score_reasoning,
        markers=_markers(prepared),
    )
    found = []
    for example in examples:
        try:
            encoded = prompt.encode(example, _ENDLESS)
        except UnfitError as error:
            bad.append(BadRow(example.source, example.place, error.problem))
            continue
        if encoded is not None:
            found.append(_split(np.array(encoded.input_ids), np.array(encoded.response_mask)))
    refuse(path, bad, len(examples) + len(bad), recipe.on_bad_rows)
    questions = list(_distinct(found))
    if not questions:
        raise DataError(f"{path}: no row has a question and an answer.")
    return questions


def tokenizer_of(prepared: Prepared, *, trust_remote_code: bool) -> Any:
    """That the data were prepared with. Raises ModelError."""
    return load_tokenizer(prepared.manifest.tokenizer, prepared.manifest.revision, trust_remote_code)


def _markers(prepared: Prepared) -> Markers:
    return Markers(prepared.manifest.recipe.response_marker, prepared.manifest.recipe.instruction_marker)


def _split(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, answer) of an example: the last run of scored tokens, and all before it."""
    end = int(np.flatnonzero(mask)[-1]) + 1
    before = np.flatnonzero(~mask[:end])
    start = int(before[-1]) + 1 if len(before) else 0
    return ids[:start], ids[start:end]


def _distinct(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[ReferenceQuestion]:
    seen = set()
    for prompt, reference in pairs:
        digest = hashlib.sha256(prompt.astype(np.int64).tobytes() + b"|" + reference.astype(np.int64).tobytes()).hexdigest()[:16]
        if len(prompt) and digest not in seen:
            seen.add(digest)
            yield ReferenceQuestion(id=digest, prompt=tuple(prompt.tolist()), reference=tuple(reference.tolist()))
