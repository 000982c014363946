"""From a `DataRecipe` to a prepared folder: read, tokenise, split, draw, write; once, then only read."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
    SourceCounts,
    discard,
    pack_tokens,
    write_prepared,
)
from loratune.data.prompts import Encoded, UnfitError, choose_prompt, has_reasoning, template_of
from loratune.data.sources import BadRow, DataRecipe, DataSource, Example, fields_of, grouped, refuse
from loratune.data.split_report import common_questions, linked
from loratune.data.tasks import SFT, TrainingTask
from loratune.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from loratune.errors import DataError, StorageError

_FORMAT = 2  # raise when the arrays, the prompts or the split change meaning, so that old caches are not used
_LISTED = 20  # problems of bad rows that are quoted per source, and places of each
_ENDLESS = 1 << 40  # tokens
_CUT = 0.05  # of the examples that are cut at max_length is told with what would keep them


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
    train = [_tokenise(source, "train", recipe, encode, report) for source in recipe.train]
    held_out = [_tokenise(source, "validation", recipe, encode, report) for source in recipe.validation]
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
        notes=(*_cut_note(everything, recipe.max_length), *notes, *common.examples),
        sources=tuple(r.counts() for r in everything),
        **{n: SetCounts(examples=len(t), tokens=len(t.ids), response_tokens=int(t.mask.sum())) for n, t in sets.items()},
    )
    write_prepared(folder, manifest, sets)
    return Prepared.load(folder)


# ---- the steps, each on all rows of a source ----


@dataclass(kw_only=True)
class _Rows:
    """One source's usable examples. `questions`, `texts`, `encoded`, `truncated` and `left_out` run in parallel."""

    source: DataSource
    role: str  # train | validation
    rows: int
    bad: list[BadRow]
    fields: dict[str, Any]  # data.fields_of
    questions: list[split.Questions] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # split.identity
    encoded: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # (ids, response_mask)
    truncated: list[bool] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens before they were cut, of these rows and the dropped ones
    left_out: list[int] = field(default_factory=list)  # thinking parts that the template does not show
    thinking: bool = False  # whether any answer has a thinking part
    dropped: int = 0
    overlapping: int = 0
    duplicates: int = 0
    pool: list[int] = field(default_factory=list)  # places that may train
    train: list[int] = field(default_factory=list)  # places drawn, repeats included
    validation: list[int] = field(default_factory=list)

    def counts(self) -> SourceCounts:
        return SourceCounts(
            path=self.source.path,
            role=self.role,
            rows=self.rows,
            bad=len(self.bad),
            bad_rows=tuple(grouped(self.bad, _LISTED)),
            dropped=self.dropped,
            overlapping=self.overlapping,
            duplicates=self.duplicates,
            train=len(self.train),
            validation=len(self.validation),
            repeats=len(self.train) - len(set(self.train)),
            cut=sum(self.truncated[i] for i in (*self.train, *self.validation)),
            **self.fields,
            reasoning_left_out=sum(self.left_out[i] for i in (*self.train, *self.validation)),
        )


def _tokenise(
    source: DataSource, role: str, recipe: DataRecipe, encode: Callable[[Example, int], Encoded | None], report: Callable[[str], None]
) -> _Rows:
    report(f"reading {source.path}")
    examples, bad = recipe.read(source)
    rows = _Rows(source=source, role=role, rows=len(examples) + len(bad), bad=bad, fields=fields_of(examples))
    for number, example in enumerate(examples):
        if number and number % 10_000 == 0:
            report(f"tokenised {number:,} of {len(examples):,} rows of {source.path}")
        try:
            encoded = encode(example, recipe.max_length)
        except UnfitError as error:
            rows.bad.append(BadRow(example.source, example.place, error.problem))
            if recipe.on_bad_rows == "error":
                refuse(source.path, rows.bad, rows.rows, recipe.on_bad_rows)
            continue
        if encoded is None:
            whole = encode(example, _ENDLESS)
            rows.lengths += [whole.length] if whole else []
            rows.dropped += 1
            continue
        rows.questions.append(split.questions_of(example))
        rows.texts.append(split.identity(example))
        rows.encoded.append((np.array(encoded.input_ids, dtype=np.int32), np.array(encoded.response_mask)))
        rows.truncated.append(encoded.truncated)
        rows.lengths.append(encoded.length)
        rows.left_out.append(encoded.reasoning_left_out)
        rows.thinking = rows.thinking or has_reasoning(example)
    if rows.encoded or rows.dropped:
        refuse(source.path, rows.bad, rows.rows, recipe.on_bad_rows)
    else:
        raise DataError(f"{source.path}: no usable row among {len(rows.bad)}. The last: {rows.bad[-1]}.")
    if not rows.encoded:
        raise DataError(f"{source.path}: every prompt alone fills max_length = {recipe.max_length} tokens. Raise max_length.")
    return rows


def _cut_note(sources: Sequence[_Rows], max_length: int) -> list[str]:
    """A warning where more than 5 % of the usable examples do not fit, with the max_length that would keep 95 % and 99 % of them whole."""
    lengths = np.sort(np.array([length for rows in sources for length in rows.lengths]))
    cut = int((lengths > max_length).sum())
    if cut <= _CUT * len(lengths):
        return []
    keep = [int(lengths[int(np.ceil(part * len(lengths))) - 1]) for part in (0.95, 0.99)]
    return [
        f"warning: {cut / len(lengths):.0%} of the examples are longer than max_length, {max_length:,} tokens, and lose their end; "
        f"max_length: {keep[0]:,} keeps 95 % of them whole, {keep[1]:,} 99 %"
    ]


def _spell_alike(sources: Sequence[_Rows]) -> None:
    spelt = iter(split.one_spelling([q for rows in sources for q in rows.questions]))
    for rows in sources:
        rows.questions = [next(spelt) for _ in rows.questions]


def _use_validation_sources(recipe: DataRecipe, train: Sequence[_Rows], held_out: Sequence[_Rows]) -> None:
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


def _split_training_sources(recipe: DataRecipe, train: Sequence[_Rows], notes: list[str]) -> None:
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


def _draw_training(recipe: DataRecipe, train: Sequence[_Rows]) -> None:
    if not any(r.pool for r in train):
        raise DataError("no training example is left beside validation. Add data, or ask for less validation.")
    wanted = split.quotas([len(r.pool) for r in train], [r.source.count for r in train], _weights(train), recipe.train_count)
    for rows, count in zip(train, wanted, strict=True):
        if count and not rows.pool:
            raise DataError(f"{rows.source.path}: {count:,} training examples requested, but validation leaves none.")
        if count:
            drawn = split.draw([rows.texts[i] for i in rows.pool], count, recipe.seed)
            rows.train = [rows.pool[i] for i in drawn]


def _owners(sources: Sequence[_Rows]) -> list[int]:
    return [number for number, rows in enumerate(sources) for _ in rows.questions]


def _by_source(rows: np.ndarray, sources: Sequence[_Rows]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum([len(r.questions) for r in sources])[:-1])


def _count_duplicates(sources: Sequence[_Rows], keys: Sequence[str]) -> None:
    by_source = _by_source(np.array(keys, dtype=object), sources)
    for rows, found in zip(sources, split.duplicates([part.tolist() for part in by_source]), strict=True):
        rows.duplicates = found


def _enough(rows: _Rows, count: int) -> None:
    if count > len(rows.questions):
        raise DataError(
            f"{rows.source.path}: {count:,} validation examples requested of {len(rows.questions):,} usable rows; validation never repeats."
        )


def _weights(rows: Sequence[_Rows]) -> list[float] | None:
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
