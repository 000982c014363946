"""A study's adapters scored on downstream benchmarks: what `loratune evaluate` does, from Python.

    for event in evaluate(Path("runs/study"), benchmarks=["mmlu"], data=Path("data")):
        print(event)

Which models, on which benchmarks, with the study's own model and validation data; how it is done is in `downstream/`.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune import demo, driver
from loratune.downstream import evaluate as downstream
from loratune.downstream.evaluate import BASE
from loratune.downstream.events import Event, Note
from loratune.downstream.findings import lines
from loratune.downstream.part import Model
from loratune.downstream.registry import EMBEDDED, PUBLISHED
from loratune.downstream.scores import FOLDER, Result, read_results
from loratune.errors import EvaluationError, StorageError
from loratune.record import StudyRecord, Trial, read
from loratune.record.trials import text_of
from loratune.spec import StudySpec
from loratune.work import ModelRecipe

TOP = 10  # trials with the lowest validation loss


@dataclass(frozen=True)
class Scored:
    """The end: every answer is on disk, below `folder`."""

    folder: Path
    results: tuple[Result, ...]  # of the models and benchmarks that were asked for, in the order of the benchmarks
    text: str  # the table, and what may be concluded


def evaluate(
    folder: Path,
    *,
    benchmarks: Sequence[str] | None = None,
    top: int = TOP,
    data: Path | None = None,
    tasks: Path | None = None,
    subset: int | None = None,
    device: str | None = None,
    allow_code_execution: bool = False,
    weaker_sandbox: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[Event | Scored]:
    """Score the `top` trials of the study in `folder`, its default's adapter and the bare model, and yield what happens.

    benchmarks: their names; by default the published four, of the embedded demo its own. data: the benchmarks' data, else the hub.
    tasks: folder with descriptions of lm-evaluation-harness tasks. subset: items of each benchmark, the same every time. device: by
    default the study's. allow_code_execution: run what models write, in a sandbox; weaker_sandbox: without namespaces where they miss.

    Setting `stop`, or closing the iterator, ends it without `Scored`; the same call goes on. Raises EvaluationError, StorageError, ...
    """
    if top < 1 or (subset is not None and subset < 1):
        raise EvaluationError(f"top and subset are whole numbers above 0; got {top} and {subset}.")
    record, stop = read(folder), stop or threading.Event()
    names = list(benchmarks) if benchmarks is not None else default_benchmarks(record)
    if not names:
        raise EvaluationError("no benchmark is named.")
    models, lacking = choose(record, top)
    if lacking:
        yield Note(
            f"Not on disk, so not scored: the adapters of trials {', '.join(lacking)} (output.keep_adapters says how many are kept)."
        )
    tuned = sum(model.adapter is not None for model in models)
    yield Note(f"Scoring {tuned} adapters of study {record.name} and the bare model on {', '.join(names)}")
    yield from downstream.evaluate(
        record.folder / FOLDER,
        recipe=ModelRecipe(**record.spec["model"]),
        models=models,
        benchmarks=names,
        validation=_validation(record),
        recorded_base=record.base_loss,
        data=data,
        tasks=tasks,
        subset=subset,
        device=device or record.spec["executor"]["device"],
        allow_code_execution=allow_code_execution,
        weaker_sandbox=weaker_sandbox,
        stop=stop,
    )
    if not stop.is_set():
        yield _scored(record, models, names, top)


def choose(record: StudyRecord, top: int) -> tuple[list[Model], list[str]]:
    """(the best `top` trials, the default's and the bare model; the numbers of trials whose adapters are not on disk).

    Raises StorageError when no adapter is there."""
    wanted = {trial.number: trial for trial in _best(record, top)}
    if record.default is not None:
        wanted.setdefault(record.default.number, record.default)
    places = {trial.number: adapter_of(record, trial) for trial in wanted.values()}
    found = [Model(name=_name(trial), adapter=place, loss=trial.value) for n, trial in wanted.items() if (place := places[n]) is not None]
    if not found:
        raise StorageError(
            f"{record.folder} holds no adapter of a finished trial. Let a trial finish; output.keep_adapters says how many are kept."
        )
    base = Model(name=BASE, adapter=None, loss=record.base_loss)
    return [*found, base], [str(number) for number, place in places.items() if place is None]


def adapter_of(record: StudyRecord, trial: Trial) -> Path | None:
    """Where the trial's adapter lies: where it was trained, else, of the best, the one handed over."""
    places = [record.folder / "trials" / _name(trial) / "main" / "adapter"]
    if record.best is not None and trial.number == record.best.number and not (record.folder / "selection.json").exists():
        places.append(record.folder / "adapter")
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def default_benchmarks(record: StudyRecord) -> list[str]:
    """The published four; of the embedded demo its own."""
    own = Path(str(record.spec["model"]["name_or_path"])) == demo.model_folder()
    return list(EMBEDDED if own else PUBLISHED)


def _scored(record: StudyRecord, models: Sequence[Model], benchmarks: Sequence[str], top: int) -> Scored:
    folder, losses = record.folder / FOLDER, {model.name: model.loss for model in models if model.loss is not None}
    asked, order = {model.name for model in models}, [name.replace(":", "-") for name in benchmarks]
    results = [result for result in read_results(folder) if result.model in asked and result.benchmark in order]
    results.sort(key=lambda result: order.index(result.benchmark))
    best = [_name(trial) for trial in _best(record, top) if _name(trial) in asked]
    default = _name(record.default) if record.default is not None and _name(record.default) in asked else None
    return Scored(folder, tuple(results), "\n".join(lines(results, losses, best, default)))


def _validation(record: StudyRecord) -> Path:
    """The study's prepared data; prepared anew when the cache was emptied."""
    folder = Path(json.loads(text_of(record.folder / "recipe.json"))["data"])
    if not (folder / "manifest.json").is_file():
        folder = driver.prepare_data(StudySpec.load(record.folder / "spec.yaml"), [], date=record.prompt.get("date", "")).folder
    return folder


def _best(record: StudyRecord, top: int) -> list[Trial]:
    return sorted(record.finished, key=lambda trial: (trial.value, trial.number))[:top]


def _name(trial: Trial) -> str:
    return f"{trial.number:04d}"
