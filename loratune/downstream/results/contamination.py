"""Benchmark items in the training data, which make a score worth less. No torch.

Compared are the training examples as they were trained, decoded from the prepared data (the sources may be gone), with the
items that were scored, by runs of 13 words (`data/near_duplicates.py` says how). The result lies beside the answers, in
`contamination.json`, and is made anew when data, items or the rule change. Tasks of lm-evaluation-harness are not compared:
the harness keeps their items to itself.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.data.near_duplicates import SHORTEST, N, held_items
from loratune.data.prepared import Prepared, PreparedTokens
from loratune.data.tokenizers import load_tokenizer
from loratune.downstream.results.scores import read_results
from loratune.downstream.tasks.base import Benchmark
from loratune.system.files import write_atomically
from loratune.work import Json

FILE = "contamination.json"
RULE = f"{N} words in a row, or the whole of a question of {SHORTEST} to {N - 1}"
_VERSION = 1  # raise when the rule changes
_SHOWN = 3  # items quoted per benchmark
_CHUNK = 1000  # examples decoded at once


@dataclass(frozen=True, kw_only=True)
class ContaminatedItem(Json):
    """An item that stands in the training data."""

    item: str
    words: str  # in common, normalised
    example: int  # of the training examples, the first that holds it


@dataclass(frozen=True, kw_only=True)
class Contamination(Json):
    """One benchmark against the training data."""

    identity: str  # of data, items and rule
    benchmark: str
    title: str
    items: int  # that were scored
    compared: int  # of these, long enough
    found: int  # of these, in the training data
    examples: int  # training examples that hold one
    samples: tuple[ContaminatedItem, ...] = ()  # those with most in common first

    def sentence(self) -> str:
        """The counts in words."""
        short = f", {self.items - self.compared:,} of them too short to compare" if self.compared < self.items else ""
        if not self.found:
            return f"none of {self.items:,} items found{short}."
        stands = "item stands" if self.found == 1 else "items stand"
        where = f"{self.examples:,} training example{'s' * (self.examples != 1)}"
        return f"{self.found:,} of {self.items:,} {stands} in {where}{short}."


@dataclass(frozen=True, kw_only=True)
class _All(Json):
    found: tuple[Contamination, ...]


def find_contamination(
    folder: Path, prepared: Path, benchmarks: Sequence[Benchmark], *, trust_remote_code: bool = False
) -> list[Contamination]:
    """Compare the items that have scores in `folder` with the training examples of the `prepared` data.

    What was compared before is only read. Raises DataError, ModelError, StorageError.
    """
    data = Prepared.load(prepared)
    scored: dict[str, set[str]] = {}
    for result in read_results(folder):
        scored.setdefault(result.benchmark, set()).update(result.scores)
    asked = [benchmark for benchmark in benchmarks if scored.get(benchmark.name)]
    identities = {b.name: _digest([_VERSION, data.manifest.hash, b.name, b.version, sorted(scored[b.name])]) for b in asked}
    known = {one.benchmark: one for one in read_contamination(folder)}
    lacking = [b for b in asked if b.name not in known or known[b.name].identity != identities[b.name]]
    if lacking:
        tokenizer = load_tokenizer(data.manifest.tokenizer, data.manifest.revision, trust_remote_code)
        items = [[item for item in b.items() if item.id in scored[b.name]] for b in lacking]
        texts = [[b.texts(item) for item in own] for b, own in zip(lacking, items, strict=True)]
        for b, own, found in zip(lacking, items, held_items(texts, _decoded(data.train, tokenizer)), strict=True):
            known[b.name] = Contamination(
                identity=identities[b.name],
                benchmark=b.name,
                title=b.title,
                items=len(own),
                compared=found.compared,
                found=len(found.documents),
                examples=len({place for places in found.documents.values() for place in places}),
                samples=tuple(
                    ContaminatedItem(item=own[item].id, words=found.shown[item], example=found.documents[item][0])
                    for item in sorted(found.runs, key=lambda item: (-found.runs[item], item))[:_SHOWN]
                ),
            )
        write_atomically(folder / FILE, _All(found=tuple(known.values())).to_json())
    return [known[b.name] for b in asked]


def read_contamination(folder: Path) -> list[Contamination]:
    """The comparisons made so far; none where the file is absent or damaged: it is made anew then."""
    try:
        return list(_All.from_json((folder / FILE).read_text()).found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def contamination_lines(found: Sequence[Contamination]) -> list[str]:
    """For a terminal; empty where nothing was compared."""
    text = [f"Benchmark items in the training data ({RULE}):"] if found else []
    for one in found:
        text.append(f"  {one.title}: {one.sentence()}")
        text += [f"    {sample.item}, in training example {sample.example:,}: {sample.words}" for sample in one.samples]
    return text


def _decoded(tokens: PreparedTokens, tokenizer: Any) -> Iterator[str]:
    for start in range(0, len(tokens), _CHUNK):
        ids = [tokens[place][0].tolist() for place in range(start, min(start + _CHUNK, len(tokens)))]
        yield from tokenizer.batch_decode(ids, skip_special_tokens=True)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
