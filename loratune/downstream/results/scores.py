"""Answers and their scores, kept with the study and read back. No torch.

    evaluation/
      0007/                  a model: a trial's number, or `base`; 0007-race-01: the trial trained again by a selection, which ships it
        mmlu.jsonl           one line per item, in the order they were done: id, group, answer, score, why
        mmlu.json            how it was measured: version, seed, model, adapter, number of items, seconds
        proof.json           the adapter check
      part-0.log             the output of one of several processes, if it died
      lock                   an empty file

Lines are only ever appended; a crash can tear the last one, which is then dropped. Results of another adapter, version, seed or engine
are put aside, never mixed in.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from loratune.errors import StorageError
from loratune.record.paths import ADAPTER_FILES, MAIN
from loratune.system.files import write_atomically
from loratune.system.jsonl import append_lines, read_lines

if TYPE_CHECKING:
    from loratune.statistics import Interval  # needs scipy, which `loratune status` need not wait for

BASE = "base"
_SEED = 0  # of the bootstrap
_EVALUATION, _PROCESSES = 0, 1  # bytes of the lock file: held by the evaluation, shared by the processes it started
_ORPHANS = 20.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one benchmark, as far as it was measured."""

    model: str  # folder's name: 0007, 0007-race-01, base
    benchmark: str
    facts: dict[str, Any]  # the .json
    scores: dict[str, float]  # item -> score
    groups: dict[str, str]  # item -> group
    answers: dict[str, str] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Items with a score."""
        return len(self.scores)

    @property
    def title(self) -> str:
        return str(self.facts.get("title", self.benchmark))

    @property
    def chance(self) -> float | None:
        """A uniform guesser's score; None where nobody knows it."""
        chance = self.facts.get("chance")
        return None if chance is None else float(chance)

    @property
    def done(self) -> bool:
        """Whether all items that were asked for have their score."""
        return len(self.scores) >= int(self.facts["items"])

    @property
    def value(self) -> float:
        """The benchmark's score: the mean over items, or over groups. Raises StatisticsError before the first item."""
        members: dict[str, list[float]] = {}
        for item, score in self.scores.items():
            members.setdefault(self.groups[item] if self.facts.get("mean_over_groups") else "", []).append(score)
        return fmean(map(fmean, members.values()))

    @functools.cached_property
    def score(self) -> "Interval":
        """The benchmark's score with its 95 % interval over items."""
        from loratune.statistics import bootstrap_mean

        return bootstrap_mean(list(self.scores.values()), _SEED, self._groups(self.scores))

    def against(self, other: "Result") -> "Interval":
        """This score minus the other's on the items that both answered. Raises ValueError when there are none."""
        from loratune.statistics import paired_difference

        both = [item for item in self.scores if item in other.scores]
        return paired_difference([self.scores[i] for i in both], [other.scores[i] for i in both], _SEED, self._groups(both))

    def _groups(self, items: Iterable[str]) -> list[str] | None:
        return [self.groups[item] for item in items] if self.facts.get("mean_over_groups") else None


def model_name(trial: int, run: str = MAIN) -> str:
    """The folder of a trial's results: 0007; of a run that is not the study's own, which another seed made, 0007-race-01."""
    return f"{trial:04d}" + (f"-{run}" if run != MAIN else "")


def describe_model(name: str) -> str:
    """`trial 7`, `trial 7 (race-01)`, `base model, untuned`: a model by its folder's name."""
    number, _, run = name.partition("-")
    if number.isdigit():
        return f"trial {int(number)}" + (f" ({run})" if run else "")
    return "base model, untuned" if name == BASE else name


def shipped_note(shipped: str, scored: bool) -> str:
    """The note under a table of scores: which model is handed over, and whose scores a trial's are."""
    if shipped.isdigit():
        return f"Handed over is the study's own run of {describe_model(shipped)}" + ("." if scored else ", which is not scored.")
    also = "scored as a model of its own" if scored else "and not scored yet"
    own = "A trial's scores are of its run in the study."
    return f"Handed over is {describe_model(shipped)}, trained with another seed, {also}. {own}"


@contextlib.contextmanager
def sole_evaluation(folder: Path) -> Iterator[None]:
    """While open, no other evaluation answers into `folder`. Raises StorageError while one does.

    A POSIX lock: it ends with the process, whatever children of a killed one are still about. Of these only the ones that
    write are waited for (`join_evaluation`); they end by themselves.
    """
    handle = _lock_file(folder)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _EVALUATION)
            _wait_for_orphans(handle)
        except OSError:
            raise StorageError(f"{folder} is being written by another evaluation. Wait for it, or stop it first.") from None
        yield
    finally:
        os.close(handle)


def join_evaluation(folder: Path) -> None:
    """Until this process ends, it answers into `folder` on behalf of the evaluation that started it."""
    fcntl.lockf(_lock_file(folder), fcntl.LOCK_SH, 1, _PROCESSES)


def _lock_file(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}. Make the folder writable, then run again.") from error


def _wait_for_orphans(handle: int) -> None:
    """Raises OSError when the processes of a killed evaluation do not end."""
    deadline = time.monotonic() + _ORPHANS
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _PROCESSES)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            fcntl.lockf(handle, fcntl.LOCK_UN, 1, _PROCESSES)
            return


class ResultWriter:
    """Writes one model's results on one benchmark. `identity` decides which results may stand together."""

    def __init__(self, folder: Path, model: str, benchmark: str, identity: dict[str, Any]) -> None:
        self._lines, self._facts = folder / model / f"{benchmark}.jsonl", folder / model / f"{benchmark}.json"
        self._identity = identity
        before = {"engine": "loratune", **_facts(self._facts)} if self._facts.is_file() else {}  # older ones do not name it
        if any(before.get(name, self) != value for name, value in identity.items()):
            _put_aside(self._facts, self._lines)
            before = {}
        self.seconds = float(before.get("seconds", 0.0))
        self.done = {str(line["id"]) for line in read_lines(self._lines)}

    def add(self, lines: Sequence[dict[str, Any]], seconds: float) -> None:
        """Append scored items, each with `id`, `group`, `answer` and `score`. Raises StorageError."""
        append_lines(self._lines, lines)
        self.done |= {str(line["id"]) for line in lines}
        self.seconds += seconds

    def describe(self, facts: dict[str, Any]) -> None:
        """Write down how the lines are measured, before the first of them."""
        write_atomically(self._facts, json.dumps({**self._identity, **facts, "seconds": round(self.seconds, 3)}, indent=1) + "\n")


def read_results(folder: Path, *, begun: bool = False) -> list[Result]:
    """All results below `folder` (a study's `evaluation`), trials by number, then base. Safe while they are written.

    begun: also those that were asked for and have no answer yet.
    """
    found = []
    for facts in sorted(folder.glob("*/*.json")):
        lines = read_lines(facts.with_suffix(".jsonl"))
        if facts.name == "proof.json" or not (lines or begun):
            continue
        found.append(
            Result(
                model=facts.parent.name,
                benchmark=facts.stem,
                facts=_facts(facts),
                scores={line["id"]: float(line["score"]) for line in lines},
                groups={line["id"]: str(line["group"]) for line in lines},
                answers={line["id"]: str(line["answer"]) for line in lines},
            )
        )
    return found


def by_model(results: Iterable[Result]) -> dict[str, dict[str, Result]]:
    """model -> benchmark -> result, in the results' order."""
    rows: dict[str, dict[str, Result]] = {}
    for result in results:
        rows.setdefault(result.model, {})[result.benchmark] = result
    return rows


def adapter_fingerprint(adapter: Path | None) -> str | None:
    """SHA-256 of a PEFT folder's configuration and weights; None for the bare model. Raises StorageError."""
    if adapter is None:
        return None
    try:
        return hashlib.sha256(b"".join((adapter / name).read_bytes() for name in ADAPTER_FILES)).hexdigest()
    except OSError as error:
        raise StorageError(f"{adapter} holds no adapter: {error.strerror}, {Path(str(error.filename)).name}.") from error


def _facts(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}. Remove it and its .jsonl; the items are then answered again.") from error


def _put_aside(*paths: Path) -> None:
    """Rename to name.1.bak, .2.bak, ...: nothing computed is lost."""
    for path in paths:
        if path.is_file():
            number = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.{n}.bak").exists())
            path.rename(path.with_name(f"{path.name}.{number}.bak"))
