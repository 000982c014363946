"""Trials of a finished study, trained again: with the race's seeds, with seeds that choose nothing, or with their own.

    study/finalists/
      recipe.json             the study's
      trials/0007/race-00/    trial 7 with the race's first seed: log.txt, outcomes/0000240.json, perhaps adapter/
      trials/0007/check-00/   with a seed that was run after the choice
      trials/0007/practice-00/  common practice instead of its own settings, with the seed of check-00
      trials/0007/main/       with the study's own, when its adapter had been removed; the adapter lies here then

A run is named by its trial and its part in the selection, and the name gives its seed, the same for all trials. So there is no
resume path: every start asks for the same runs, and one whose outcome is on disk is not trained again. Recorded apart from the
study's own trials, these runs never count as the study's.
"""

import math
import shutil
import threading
from collections.abc import Generator, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np

from loratune import executors
from loratune.data.order import total_steps
from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe
from loratune.errors import StorageError, error_of
from loratune.executors import Executor
from loratune.executors.devices import unused_gpu
from loratune.plugs import EXECUTORS
from loratune.record import Record, StudyRecord, Trial
from loratune.record.reader import WRITTEN_ANEW
from loratune.system.files import parsed
from loratune.work import Message, Outcome, Progress, Recipe, Segment, State

RACE, CHECK, AGAIN = "race", "check", "main"  # parts of a selection; the last is the study's own run
PRACTICE = "practice"  # common practice, with the check's seeds


@dataclass(frozen=True, kw_only=True)
class RerunFinished:
    """A run came to its end."""

    trial: Trial
    run: str  # race-00, check-00, main
    outcome: Outcome


class Stopped(Exception):  # noqa: N818  # no error
    """`stop` was set."""


Event = Message | RerunFinished | Progress


def run_name(part: str, repeat: int) -> str:
    return f"{part}-{repeat:02d}"


def fresh_seed(study_seed: int, run: str) -> int:
    """The seed of a run, 32 bits: the study's own for `main`, else a hash of the study's seed, the part and the repeat."""
    part, _, repeat = run.partition("-")
    if part == AGAIN:
        return study_seed
    part = CHECK if part == PRACTICE else part
    return int(np.random.SeedSequence([study_seed, (RACE, CHECK).index(part), int(repeat)]).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class RerunCost:
    """Of some runs: tokens of training, seconds of a device."""

    runs: int = 0
    tokens: float = 0.0
    device_seconds: float = 0.0

    def __add__(self, other: "RerunCost") -> "RerunCost":
        return RerunCost(
            runs=self.runs + other.runs, tokens=self.tokens + other.tokens, device_seconds=self.device_seconds + other.device_seconds
        )

    def __str__(self) -> str:
        return f"{self.runs} runs, {self.tokens:,.0f} training tokens, {self.device_seconds / 3600:.2g} device-hours"


def cost_of(outcomes: Iterable[Outcome]) -> RerunCost:
    """What they did cost, each being one run."""
    total = RerunCost()
    for o in outcomes:
        total += RerunCost(runs=1, tokens=o.tokens, device_seconds=(o.train_seconds + o.validation_seconds) * o.devices)
    return total


def expected_cost(trials: Sequence[Trial], runs: int) -> RerunCost:
    """What `runs` more runs of such trials will cost, by what their own last run cost in the study."""
    own = [cost_of(t.last_run) for t in trials]
    return RerunCost(
        runs=runs,
        tokens=runs * float(np.mean([cost.tokens for cost in own])),
        device_seconds=runs * float(np.mean([cost.device_seconds for cost in own])),
    )


def study_data(study: StudyRecord) -> Prepared:
    """The study's prepared data; made again from its files where the cache was emptied. Raises StorageError when these changed."""
    folder = Path(parsed(study.paths.recipe, Recipe.from_json, WRITTEN_ANEW).data)
    if (folder / "manifest.json").is_file():
        return Prepared.load(folder)
    recipe = study.base_model
    prepared = prepare(
        DataRecipe.from_plain({**study.spec["data"], "seed": study.spec["seed"]}),
        tokenizer=recipe.name_or_path,
        revision=recipe.revision,
        trust_remote_code=recipe.trust_remote_code,
        cache=folder.parent,
        date=study.prompt["date"],
    )
    if prepared.folder.name != folder.name:
        raise StorageError(
            f"the data or the tokenizer changed since {study.folder} was run: it was {folder.name}, it is {prepared.folder.name}. "
            "Restore the files."
        )
    return prepared


class Rerun:
    """Trains a study's trials again. A context; needs the study's lock (`record.open_record`)."""

    def __init__(self, study: StudyRecord, lock: int, stop: threading.Event) -> None:
        self.folder = study.paths.finalists.folder
        self.outcomes: dict[str, Outcome] = {}  # of all runs asked for, by key
        self._study, self._stop = study, stop
        self._record = Record(self.folder, lock)
        self._recipe: Recipe | None = None
        self._examples = 0
        self._executor: Executor | None = None
        self._warning: str | None = None  # to be told once

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.close()

    def train(self, wanted: Iterable[tuple[Trial, str]], *, adapters: bool = False) -> Generator[Event, None, list[float]]:
        """Train (trial, run) together, as many at a time as there are slots, unless that was done before (and, with `adapters`, these
        are there).

        Returns their losses, infinite where one diverged or ran out of memory. Raises Stopped, and TrainingError, or the error that
        names the bad input, when a run cannot be trained here; another start tries it again.
        """
        segments = [(trial, self._segment(trial, run)) for trial, run in wanted]
        trials = {segment.key: (trial, segment) for trial, segment in segments}
        done = {
            key: known
            for key, (_, segment) in trials.items()
            for known in [self._record.outcome(segment)]
            if known is not None and (not adapters or self._record.paths.of(segment).adapter.is_dir())
        }
        waiting = [segment for key, (_, segment) in trials.items() if key not in done]
        flying = 0
        while len(done) < len(trials):
            if self._stop.is_set():
                raise Stopped
            executor = self._start()
            if self._warning:
                yield Message(text=self._warning)
                self._warning = None
            while waiting and flying < executor.capacity:
                executor.submit(waiting.pop(0))
                flying += 1
            self._record.beat()
            for item in executor.collect(timeout=1.0):
                if isinstance(item, Message | Progress):
                    yield item
                elif item.state in (State.BAD_INPUT, State.CRASHED):
                    raise error_of(item.error, f"{item.key}: {item.message}")
                elif item.state is not State.CANCELLED:
                    self._record.keep(item)  # before anything else is done with it
                    done[item.key] = item
                    flying -= 1
                    trial, segment = trials[item.key]
                    yield RerunFinished(trial=trial, run=segment.run, outcome=item)
        self.outcomes |= {key: done[key] for key in trials}
        losses = [done[key].validation_loss for key in trials]
        return [math.inf if loss is None else loss for loss in losses]

    def keep_adapters(self, part: str, keep: Set[tuple[int, str]]) -> None:
        """Remove the adapters of all finished runs of a part ("": of all) but `keep`, (trial's number, run), and their checkpoints."""
        for trial in self._record.paths.trials_there():
            for run in trial.runs():
                if not run.folder.name.startswith(part) or not run.outcomes.is_dir():
                    continue
                for checkpoint in run.checkpoints():
                    checkpoint.unlink(missing_ok=True)
                if (trial.number, run.folder.name) not in keep:
                    shutil.rmtree(run.adapter, ignore_errors=True)

    def _segment(self, trial: Trial, run: str) -> Segment:
        """The trial's full run, as the study trains it."""
        self._load()
        h = trial.hyperparameters
        steps = total_steps(self._examples, h.batch_size, h.epochs)
        seed = fresh_seed(int(self._study.spec["seed"]), run)
        # Where the best point is kept, a run has the points that the study's own has, or it is another kind of run.
        points = tuple(p.step for p in trial.curve if 0 < p.step < steps) if self._load().training.keep == "best" else ()
        return Segment(trial=trial.number, run=run, hyperparameters=h, seed=seed, total_steps=steps, stop_step=steps, validate_at=points)

    def _load(self) -> Recipe:
        """The study's recipe, its data there."""
        if self._recipe is None:
            # The model is the one of the description, which the reader may have to trust: recipe.json has no say in that.
            recipe = replace(parsed(self._study.paths.recipe, Recipe.from_json, WRITTEN_ANEW), model=self._study.base_model)
            prepared = study_data(self._study)
            self._examples = len(prepared.train)
            self._recipe = replace(recipe, data=str(prepared.folder.resolve()))
        return self._recipe

    def _start(self) -> Executor:
        """The executor, started when the first run needs it."""
        if self._executor is None:
            recipe, chosen = self._load(), self._study.spec["executor"]
            options = chosen.get("options")
            devices = executors.devices_for(
                chosen["name"],
                device=chosen["device"],
                chosen=chosen["devices"],
                per_trial=recipe.devices_per_trial,
                threads=chosen["threads"],
                options=options,
            )
            on_cluster = EXECUTORS[chosen["name"]].count is not None
            if on_cluster and recipe.device == "cpu":
                devices = []
            self._warning = None if on_cluster else unused_gpu(chosen["device"], devices)
            self._record.recipe(recipe)
            self._executor = executors.build(
                chosen["name"],
                recipe=recipe,
                root=self.folder.resolve(),
                lock=self._record.lock,
                devices=devices,
                workers=Record(self._study.folder, self._record.lock).pin("workers", chosen["workers"] or 1),
                threads=chosen["threads"],
                max_retries=chosen["max_retries"],
                hang_timeout=chosen["hang_timeout"],
                options=options,
            )
        return self._executor
