"""Prepared data on disk: what every trial of a study reads.

A prepared folder is named by a hash over all that decides its content. For `train` and `validation`
each it holds three flat arrays that workers memory-map, and a manifest that says where every example
came from and went.

    train.ids.npy      int32 [tokens]        all examples, one after the other
    train.offsets.npy  int64 [examples + 1]  example i is ids[offsets[i] : offsets[i + 1]]
    train.mask.npy     bool  [tokens]        True: a response token, predicted and counted in the loss
    manifest.json      `Manifest`
"""

import functools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from loratune.data.sources import DataRecipe
from loratune.errors import StorageError
from loratune.system import files
from loratune.work import Json

ARRAYS = {"ids": np.int32, "offsets": np.int64, "mask": np.bool_}


@dataclass(frozen=True, kw_only=True)
class SourceCounts(Json):
    """What became of one source's rows. usable = rows - bad - dropped - overlapping; train + validation <= usable + repeats."""

    path: str
    role: str  # "train", or "validation" for an explicit validation source
    rows: int
    bad: int  # rows that could not be used and were skipped
    bad_rows: tuple[str, ...]  # their problems, in words, each with the places of its rows
    dropped: int  # the prompt alone fills max_length
    overlapping: int  # training rows left out because their question stands in an explicit validation source
    duplicates: int  # rows in the group of an earlier row, of this source or one before it; kept on one side
    train: int  # examples drawn
    validation: int
    repeats: int  # of `train`, those beyond the distinct ones there were
    cut: int  # of the examples drawn, those cut at max_length
    reasoning_left_out: int = 0  # thinking parts of earlier answers, in the examples drawn, that the chat template does not show
    history: int = 0  # usable rows whose field `history` was read
    unscored: int = 0  # answers in usable rows that are context only
    reasoning: int = 0  # answers in usable rows that have a reasoning part
    tools: int = 0  # usable rows that have tools
    unread: dict[str, int] = field(default_factory=dict)  # field that was not read -> usable rows where it holds something

    def fields(self) -> list[str]:
        """What was made of the rows' fields beyond question and answer, in words."""
        told = [
            (self.history, f"{self.history:,} rows with history: its exchanges come before the question, and their answers are scored too"),
            (self.unscored, f"{self.unscored:,} answers are context only, not scored (weight: 0, train: false)"),
            (self.reasoning, f"{self.reasoning:,} answers with a reasoning part"),
            (self.tools, f"{self.tools:,} rows with tools"),
        ]
        by_rows: dict[int, list[str]] = {}
        for name, rows in self.unread.items():
            by_rows.setdefault(rows, []).append(name)
        unread = "; ".join(
            f"{', '.join(names)} ({rows:,} row{'s' * (rows != 1)}{' each' * (len(names) > 1)})" for rows, names in by_rows.items()
        )
        return [*(text for count, text in told if count), *([f"fields not read: {unread}"] if unread else [])]


@dataclass(frozen=True, kw_only=True)
class SetCounts(Json):
    """Size of the training or validation set."""

    examples: int
    tokens: int
    response_tokens: int


@dataclass(frozen=True, kw_only=True)
class PromptUsed(Json):
    """The prompt that examples were given: the same for validation, for comparisons and for whoever uses the adapter."""

    kind: str = "alpaca"  # alpaca | chat | text
    note: str = "alpaca"  # in words, with the reason
    date: str = ""  # ISO, that the chat template shows
    thinking: bool = False  # whether answers have thinking parts
    end: str = ""  # the token that ends an answer; empty in data prepared before it was recorded
    template: str = ""  # the description's own template, of a question or of a chat; empty where it has none


@dataclass(frozen=True, kw_only=True)
class Manifest(Json):
    """How a prepared folder came to be."""

    hash: str
    recipe: DataRecipe
    tokenizer: str
    revision: str | None
    pad_token_id: int  # the EOS where the tokenizer has no pad; padding is masked, so its value never matters
    eos_token_id: int
    prompt: PromptUsed = PromptUsed()
    duplicates: int  # the sum of the sources'
    sources: tuple[SourceCounts, ...]
    train: SetCounts
    validation: SetCounts
    near_duplicates: int = 0  # validation examples with a question that is nearly one of training, see near_duplicates.py
    shared: int = 0  # validation examples with a question of training, where the split had to give up common ones
    notes: tuple[str, ...] = ()  # what else people should know of the split, in words


@dataclass(frozen=True)
class PreparedTokens:
    """A memory-mapped sequence of tokenised examples."""

    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    mask: np.ndarray  # bool [tokens]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [length], response_mask bool [length]) of one example, copied out of the map."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        start, stop = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return np.array(self.ids[start:stop]), np.array(self.mask[start:stop])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [examples], tokens of each."""
        return np.diff(self.offsets)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared folder, opened."""

    folder: Path
    manifest: Manifest
    train: PreparedTokens
    validation: PreparedTokens

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Open a prepared folder. Raises StorageError when it is missing, incomplete or damaged."""
        folder = Path(folder)
        try:
            manifest = Manifest.from_json((folder / "manifest.json").read_text())
            train, validation = (_open(folder, name, getattr(manifest, name)) for name in ("train", "validation"))
        except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{folder}: the prepared data are missing or damaged ({error}). Remove the folder; the next run prepares it anew."
            ) from error
        return cls(folder=folder, manifest=manifest, train=train, validation=validation)

    def summary(self) -> str:
        """A few lines for people: sizes, then whatever was merged, cut, left out or repeated."""
        m = self.manifest
        names = ("cut", "dropped", "bad", "overlapping", "reasoning_left_out")
        cut, dropped, bad, over, left_out = (sum(getattr(s, name) for s in m.sources) for name in names)
        notes = [
            (m.duplicates, f"{m.duplicates:,} rows that repeat an earlier row's question, kept on its side of the split"),
            (over, f"{over:,} training rows left out because validation has the same question"),
            (cut, f"{cut:,} cut at {m.recipe.max_length:,} tokens"),
            (dropped, f"{dropped:,} dropped (the prompt alone fills {m.recipe.max_length:,} tokens)"),
            (bad, f"{bad:,} bad row{'s' if bad != 1 else ''} skipped"),
            (m.shared, f"{m.shared:,} validation examples share a question with training"),
            (m.near_duplicates, f"{m.near_duplicates:,} validation examples have a question nearly the same as one in training"),
            (left_out, f"{left_out:,} thinking parts of earlier answers left out, as the chat template does"),
        ]
        lines = [
            f"{m.train.examples:,} train / {m.validation.examples:,} validation examples; {m.train.tokens:,} / {m.validation.tokens:,} "
            f"tokens, of them {m.train.response_tokens:,} / {m.validation.response_tokens:,} in responses",
            "; ".join(text for count, text in notes if count) or "no duplicates; nothing cut, dropped or skipped",
            *m.notes,
            f"prompt: {m.prompt.note}",
        ]
        for s in m.sources:
            if len(m.sources) > 1:
                lines.append(f"{s.path}: {s.rows:,} rows; {s.train:,} train, {s.validation:,} validation")
            if s.repeats:
                lines.append(f"{s.path}: {s.train:,} training examples drawn from {s.train - s.repeats:,}: {s.repeats:,} are repeats")
            before = f"{s.path}: " if len(m.sources) > 1 else ""
            lines += [before + line for line in s.fields()]
            lines += [f"skipped: {row}" for row in s.bad_rows]
        return "\n".join(lines)


def pack_tokens(examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> PreparedTokens:
    """Flat arrays of (ids, response_mask) pairs, at least one."""
    ids, masks = zip(*examples, strict=True)
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    return PreparedTokens(
        ids=np.concatenate(ids).astype(np.int32), offsets=offsets.astype(np.int64), mask=np.concatenate(masks).astype(np.bool_)
    )


def write_prepared(folder: Path, manifest: Manifest, sets: Mapping[str, PreparedTokens]) -> None:
    """Write a prepared folder aside and rename it into place; one that stands there already, stays.

    Raises StorageError when the disk is full, the folder is read-only, and the like.
    """
    with files.new_folder(folder, replace=False) as fresh:  # another process may have been faster, with the same content
        for name, tokens in sets.items():
            for array in ARRAYS:
                np.save(fresh / f"{name}.{array}.npy", getattr(tokens, array))
        (fresh / "manifest.json").write_text(manifest.to_json())


def discard(folder: Path) -> None:
    """Remove a damaged folder: renamed first, so that no reader meets half of it."""
    try:
        aside = files.aside(folder)
        folder.rename(aside)
        shutil.rmtree(aside)
    except FileNotFoundError:
        pass  # another process was faster
    except OSError as error:
        raise StorageError(f"cannot remove the damaged folder {folder}: {error.strerror or error}. Remove it by hand.") from error


def _open(folder: Path, name: str, counts: SetCounts) -> PreparedTokens:
    arrays = {array: np.load(folder / f"{name}.{array}.npy", mmap_mode="r") for array in ARRAYS}
    wanted = {"ids": counts.tokens, "offsets": counts.examples + 1, "mask": counts.tokens}
    for array, data in arrays.items():
        if data.shape != (wanted[array],) or data.dtype != ARRAYS[array]:
            raise ValueError(f"{name}.{array}.npy holds {data.dtype} {data.shape}, expected {wanted[array]} entries")
    return PreparedTokens(**arrays)
