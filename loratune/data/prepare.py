"""From a `DataRecipe` to a prepared folder: read, tokenise, split, draw, write; once, then only read."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loratune.data import records, split
from loratune.data.formats import Markers
from loratune.data.prepared import (
    Manifest,
    Prepared,
    PromptUsed,
    SetCounts,
    discard,
    pack_tokens,
    write_prepared,
)
from loratune.data.prompts import choose_prompt, template_of
from loratune.data.sources import DataRecipe
from loratune.data.split_report import common_questions, linked
from loratune.data.tasks import SFT, TrainingTask
from loratune.data.tokenised_rows import SourceRows, cut_note, tokenised
from loratune.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from loratune.errors import DataError, StorageError

_FORMAT = 2  # raise when the arrays, the prompts or the split change meaning, so that old caches are not used


def prepare(
    recipe: DataRecipe,
    *,
    tokenizer: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: Path,
    date: str = "",
    task: TrainingTask = SFT,
    report: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """The recipe's examples, split and tokenised, from `cache` if they lie there, else made and put there.

    `tokenizer` is a local folder or hub id. date: ISO, for a chat template that shows one; empty: today. Same
    file contents, recipe, tokenizer and, where it is shown, date: same folder, only read. The folder is written
    aside and renamed, so a crash leaves nothing half done and of two processes that prepare at once one result
    stands.

    The recipe is one that a description may hold (spec.sections.Data). Raises DataError for data that cannot be used, ModelError
    for the tokenizer.
    """
    files, dated = tokenizer_fingerprint(tokenizer, revision, trust_remote_code)
    template = template_of(recipe.prompt)
    dated = "strftime_now" in template if template else dated and recipe.prompt != "alpaca" and not recipe.response_marker
    date = (date or datetime.date.today().isoformat()) if dated else ""
    name = _content_hash(recipe, files, date, task, template)
    folder = Path(cache) / name
    if folder.exists():
        try:
            return Prepared.load(folder)
        except StorageError:
            report(f"{folder} is damaged; preparing the data again")
            discard(folder)
    loaded = load_tokenizer(tokenizer, revision, trust_remote_code)
    markers = Markers(recipe.response_marker, recipe.instruction_marker)
    prompt = choose_prompt(loaded, template or recipe.prompt, date=date, score_reasoning=recipe.score_reasoning, markers=markers)
    encode = partial(task.encode, prompt)
    train = [tokenised(source, "train", recipe, encode, report) for source in recipe.train]
    held_out = [tokenised(source, "validation", recipe, encode, report) for source in recipe.validation]
    _spell_alike([*train, *held_out])
    notes: list[str] = []
    if held_out:
        _use_validation_sources(recipe, train, held_out)
    else:
        _split_training_sources(recipe, train, notes)
    _draw_training(recipe, train)
    everything = [*train, *held_out]
    report("comparing validation with training")
    trained = [r.questions[i] for r in everything for i in sorted(set(r.train))]
    common = common_questions(trained, [r.questions[i] for r in everything for i in r.validation])
    sets = {
        "train": pack_tokens([r.encoded[i] for r in train for i in r.train]),
        "validation": pack_tokens([r.encoded[i] for r in everything for i in r.validation]),
    }
    manifest = Manifest(
        hash=name,
        recipe=recipe,
        tokenizer=tokenizer,
        revision=revision,
        pad_token_id=loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id,
        eos_token_id=loaded.eos_token_id,
        prompt=PromptUsed(
            kind=prompt.kind,
            note=prompt.note,
            date=prompt.date,
            thinking=any(r.thinking for r in everything),
            end=str(loaded.convert_ids_to_tokens(min(prompt.ends))),
            template=template,
        ),
        duplicates=sum(r.duplicates for r in everything),
        shared=common.shared,
        near_duplicates=common.near,
        notes=(*cut_note(everything, recipe.max_length), *notes, *common.examples),
        sources=tuple(r.counts() for r in everything),
        **{n: SetCounts(examples=len(t), tokens=len(t.ids), response_tokens=int(t.mask.sum())) for n, t in sets.items()},
    )
    write_prepared(folder, manifest, sets)
    return Prepared.load(folder)


# ---- the steps, each on all rows of a source ----


def _spell_alike(sources: Sequence[SourceRows]) -> None:
    spelt = iter(split.one_spelling([q for rows in sources for q in rows.questions]))
    for rows in sources:
        rows.questions = [next(spelt) for _ in rows.questions]


def _use_validation_sources(recipe: DataRecipe, train: Sequence[SourceRows], held_out: Sequence[SourceRows]) -> None:
    """Validation from its own sources; whatever asks the same question leaves training."""
    wanted = split.quotas(
        [len(r.questions) for r in held_out], [r.source.count for r in held_out], _weights(held_out), recipe.validation_count
    )
    for rows, count in zip(held_out, wanted, strict=True):
        _enough(rows, count)
        rows.validation = split.draw(rows.texts, count, recipe.seed).tolist()
    asked = [r.questions[i] for r in held_out for i in r.validation]
    leaks = split.overlapping([q for r in train for q in r.questions], _owners(train), asked)
    for rows, part in zip(train, _by_source(leaks, train), strict=True):
        rows.overlapping = int(part.sum())
        rows.pool = np.flatnonzero(~part).tolist()
    for sources in (train, held_out):
        _count_duplicates(sources, split.groups([q for r in sources for q in r.questions]))


def _split_training_sources(recipe: DataRecipe, train: Sequence[SourceRows], notes: list[str]) -> None:
    """Validation held out of every training source, in whole groups."""
    sizes = [len(r.questions) for r in train]
    if recipe.validation_fraction is not None:
        wanted = split.apportion(max(1, round(recipe.validation_fraction * sum(sizes))), sizes)
    else:
        # Sources without a count of their own share what the total leaves; without a total they hold nothing out.
        none = None if recipe.validation_count else 0
        own = [none if r.source.validation_count is None else r.source.validation_count for r in train]
        wanted = split.quotas(sizes, own, _weights(train), recipe.validation_count)
    for rows, count in zip(train, wanted, strict=True):
        _enough(rows, count)
    questions = [q for r in train for q in r.questions]
    held_out = split.hold_out(questions, _owners(train), wanted, recipe.seed)
    _count_duplicates(train, held_out.keys)
    for rows, part, count in zip(train, _by_source(held_out.chosen, train), wanted, strict=True):
        held = np.flatnonzero(part).tolist()
        rows.validation = [held[i] for i in split.shuffled([rows.texts[i] for i in held], recipe.seed)]
        rows.pool = np.flatnonzero(~part).tolist()
        if len(held) < count:
            notes.append(
                f"{rows.source.path}: {len(held):,} instead of {count:,} validation examples: groups of equal questions are too large"
            )
    notes += linked(questions, held_out.keys)
    if not any(r.validation for r in train):
        raise DataError(
            "the split leaves no validation example: too few rows, or all ask the same question. Add data, or a validation source."
        )


def _draw_training(recipe: DataRecipe, train: Sequence[SourceRows]) -> None:
    if not any(r.pool for r in train):
        raise DataError("no training example is left beside validation. Add data, or ask for less validation.")
    wanted = split.quotas([len(r.pool) for r in train], [r.source.count for r in train], _weights(train), recipe.train_count)
    for rows, count in zip(train, wanted, strict=True):
        if count and not rows.pool:
            raise DataError(f"{rows.source.path}: {count:,} training examples requested, but validation leaves none.")
        if count:
            drawn = split.draw([rows.texts[i] for i in rows.pool], count, recipe.seed)
            rows.train = [rows.pool[i] for i in drawn]


def _owners(sources: Sequence[SourceRows]) -> list[int]:
    return [number for number, rows in enumerate(sources) for _ in rows.questions]


def _by_source(rows: np.ndarray, sources: Sequence[SourceRows]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum([len(r.questions) for r in sources])[:-1])


def _count_duplicates(sources: Sequence[SourceRows], keys: Sequence[str]) -> None:
    by_source = _by_source(np.array(keys, dtype=object), sources)
    for rows, found in zip(sources, split.duplicates([part.tolist() for part in by_source]), strict=True):
        rows.duplicates = found


def _enough(rows: SourceRows, count: int) -> None:
    if count > len(rows.questions):
        raise DataError(
            f"{rows.source.path}: {count:,} validation examples requested of {len(rows.questions):,} usable rows; validation never repeats."
        )


def _weights(rows: Sequence[SourceRows]) -> list[float] | None:
    weights = [r.source.weight for r in rows]
    return None if None in weights else [w for w in weights if w is not None]


# ---- the cache's name ----


def _content_hash(recipe: DataRecipe, tokenizer_files: list[tuple[str, str]], date: str, task: TrainingTask, template: str) -> str:
    parts = [
        _FORMAT,
        _as_before(dataclasses.asdict(recipe)),
        [records.source_digests(s.path, s.split) for s in (*recipe.train, *recipe.validation)],
        tokenizer_files,
        date,
        *([] if task is SFT else [task.name]),  # so that older caches stay what they are
        *([template] if template else []),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _as_before(plain: Any) -> Any:
    """Without the fields that came later, where they hold nothing: older caches stay what they are."""
    if isinstance(plain, dict):
        return {name: _as_before(value) for name, value in plain.items() if name not in _LATER or value}
    return [_as_before(value) for value in plain] if isinstance(plain, list | tuple) else plain


_LATER = ("columns", "response_marker", "instruction_marker")
