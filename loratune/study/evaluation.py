"""A study's adapters scored on downstream benchmarks: what `loratune evaluate` does, from Python.

    for event in evaluate(Path("runs/study"), benchmarks=["mmlu"], data=Path("data")):
        print(event)

Which models, on which benchmarks, with the study's own model and validation data; how it is done is in `downstream/`.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratune import demo
from loratune.delivery.handover import selection_of
from loratune.downstream.evaluator import score_models
from loratune.downstream.events import Event
from loratune.downstream.job import LOCAL, VLLM, EvaluatedModel, EvaluationJob
from loratune.downstream.results.contamination import contamination_lines, find_contamination
from loratune.downstream.results.findings import finding_lines
from loratune.downstream.results.scores import BASE, Result, describe_model, model_name, read_results
from loratune.downstream.tasks.benchmarks import EMBEDDED, HARNESS, PUBLISHED, build_benchmark
from loratune.errors import EvaluationError, StorageError
from loratune.record import StudyRecord, read
from loratune.record.adapters import find_adapter, shipped_run
from loratune.selection.rerun import study_data
from loratune.system.files import AnyPath
from loratune.work import Message

TOP = 10  # trials with the lowest validation loss


@dataclass(frozen=True)
class Scored:
    """The end: every answer is on disk, below `folder`."""

    folder: Path
    results: tuple[Result, ...]  # of the models and benchmarks that were asked for, in the order of the benchmarks
    text: str  # the table, what may be concluded, and whether training data hold benchmark items
    shipped: str | None = None  # of the models, the one that a selection hands over


def evaluate(
    folder: AnyPath,
    *,
    benchmarks: Sequence[str] | None = None,
    top: int = TOP,
    data: AnyPath | None = None,
    tasks: AnyPath | None = None,
    subset: int | None = None,
    device: str | None = None,
    allow_code_execution: bool = False,
    weaker_sandbox: bool = False,
    trust_remote_code: bool = False,
    engine: str = LOCAL,
    server: str | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Event | Scored]:
    """Score the `top` trials of the study in `folder`, its default's adapter and the bare model, and yield what happens.

    After a selection also the adapter that is handed over: where it is a run of the chosen trial with another seed, it is a model of
    its own.

    benchmarks: their names; by default the published four, of the embedded demo its own. data: the benchmarks' data, else the hub.
    tasks: folder with descriptions of lm-evaluation-harness tasks. subset: items of each benchmark, the same every time. device: by
    default the study's. allow_code_execution: run what models write, in a sandbox; weaker_sandbox: without namespaces where they miss.
    trust_remote_code: let code run that comes with the model, where the study asks for it. engine: `loratune`, or `vllm`, which chooses
    its device itself; server: the address of a vLLM server that runs, else one is started and ended here.

    Setting `stop`, or closing the iterator, ends it without `Scored`; the same call goes on. Raises EvaluationError, StorageError, ...
    """
    if top < 1 or (subset is not None and subset < 1):
        raise EvaluationError(f"top and subset are whole numbers above 0; got {top} and {subset}.")
    if engine == VLLM and device is not None:
        raise EvaluationError(f"device: vLLM chooses its own; leave it out, or the engine {VLLM}.")
    record, stop = read(folder, trust_remote_code=trust_remote_code), stop or threading.Event()
    names = list(benchmarks) if benchmarks is not None else default_benchmarks(record)
    if not names:
        raise EvaluationError("no benchmark is named.")
    shipped = _shipped(record)
    models, lacking = models_to_score(record, top)
    if lacking:
        yield Message(
            text=f"Not on disk, so not scored: the adapters of trials {', '.join(lacking)} (output.keep_adapters sets how many are kept)."
        )
    scored = {model.name for model in models}
    if shipped is not None and shipped not in scored:
        yield Message(
            text=f"Not on disk, so not scored: the adapter that is handed over, {describe_model(shipped)}. "
            f"`loratune select {record.folder}` trains it again."
        )
    handed = f", among them the one handed over, {describe_model(shipped)}," if shipped in scored and shipped is not None else ""
    yield Message(text=f"Scoring {len(models) - 1} adapters of study {record.name}{handed} and the bare model on {', '.join(names)}")
    job = EvaluationJob(
        folder=record.paths.evaluation,
        recipe=record.base_model,
        models=tuple(models),
        benchmarks=tuple(names),
        validation=study_data(record).folder,
        recorded_base=record.base_loss,
        data=Path(data) if data is not None else None,
        tasks=Path(tasks) if tasks is not None else None,
        subset=subset,
        device=device or record.spec["executor"]["device"],
        allow_code_execution=allow_code_execution,
        weaker_sandbox=weaker_sandbox,
        engine=engine,
        server=server,
    )
    yield from score_models(job, stop=stop)
    if not stop.is_set():
        yield Message(text="Looking for the benchmarks' items in the training data")
        said = _contamination(record, names, Path(data) if data is not None else None)
        scores = _scored(record, models, names, top, shipped)
        yield replace(scores, text="\n".join([scores.text, "", *said])) if said else scores


def models_to_score(record: StudyRecord, top: int) -> tuple[list[EvaluatedModel], list[str]]:
    """(what is handed over, the best `top` trials, the default's and the bare model; the numbers of trials whose adapters are not on disk).

    Raises StorageError when no adapter is there."""
    wanted = {trial.number: trial for trial in record.ranking[:top]}
    if record.default is not None:
        wanted.setdefault(record.default.number, record.default)
    found: dict[str, EvaluatedModel] = {}  # what is handed over may be a trial's own run
    lacking, made = [], selection_of(record)
    if made is not None and (adapter := find_adapter(record, made.trial_of(record), made.shipped.run)) is not None:
        name = model_name(made.chosen, made.shipped.run)
        found[name] = EvaluatedModel(name=name, adapter=adapter, loss=made.shipped.validation_loss)
    for trial in wanted.values():
        if (adapter := find_adapter(record, trial, handed_over=True)) is not None:
            name = model_name(trial.number)
            found[name] = EvaluatedModel(name=name, adapter=adapter, loss=trial.value)
        else:
            lacking.append(str(trial.number))
    if not found:
        raise StorageError(
            f"{record.folder} holds no adapter of a finished trial. Let a trial finish; output.keep_adapters sets how many are kept."
        )
    return [*found.values(), EvaluatedModel(name=BASE, adapter=None, loss=record.base_loss)], lacking


def default_benchmarks(record: StudyRecord) -> list[str]:
    """The published four; of the embedded demo its own."""
    own = Path(str(record.spec["model"]["name_or_path"])) == demo.model_folder()
    return list(EMBEDDED if own else PUBLISHED)


def _shipped(record: StudyRecord) -> str | None:
    """Among the models, the one that a selection hands over; None before one, and when the study went on since."""
    chosen = shipped_run(record)
    return model_name(*chosen) if chosen is not None else None


def _scored(record: StudyRecord, models: Sequence[EvaluatedModel], benchmarks: Sequence[str], top: int, shipped: str | None) -> Scored:
    folder, losses = record.paths.evaluation, {model.name: model.loss for model in models if model.loss is not None}
    asked, order = {model.name for model in models}, [name.replace(":", "-") for name in benchmarks]
    results = [result for result in read_results(folder) if result.model in asked and result.benchmark in order]
    results.sort(key=lambda result: order.index(result.benchmark))
    best = [name for name in (model_name(trial.number) for trial in record.ranking[:top]) if name in asked]
    default = model_name(record.default.number) if record.default is not None else None
    lines = finding_lines(results, losses, best, default if default in asked else None, shipped)
    return Scored(folder, tuple(results), "\n".join(lines), shipped)


def _contamination(record: StudyRecord, names: Sequence[str], data: Path | None) -> list[str]:
    """Whether training data hold the items that were scored, in words. What goes wrong is told: the scores are there all the same."""
    try:
        # Nothing is run here, so the sandbox's strength does not matter.
        benchmarks = [build_benchmark(name, data, weaker=True) for name in names if not name.startswith(HARNESS)]
        trusted, prepared = record.base_model.trust_remote_code, study_data(record).folder
        said = contamination_lines(find_contamination(record.paths.evaluation, prepared, benchmarks, trust_remote_code=trusted))
    except Exception as error:  # of any kind, a tokenizer's own code among them
        said = [f"Whether benchmark items stand in the training data could not be checked: {type(error).__name__}: {error}"]
    foreign = [name for name in names if name.startswith(HARNESS)]
    return [*said, f"Not compared with the training data: {', '.join(foreign)}."] if foreign else said
