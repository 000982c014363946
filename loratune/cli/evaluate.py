"""Score a study's adapters on downstream benchmarks: the best ten by validation loss, the default's, and the bare model.

    loratune evaluate runs/demo --allow-code-execution         the demo's own benchmarks
    loratune evaluate runs/study --benchmarks mmlu,bbh --data FOLDER
    loratune evaluate runs/study --benchmarks lm_eval:arc_easy

Benchmarks: mmlu, mmlu_loglikelihood, bbh, drop, humaneval, and any task of lm-evaluation-harness as lm_eval:TASK.
Before anything is scored, each adapter is shown to be on. Answers are kept in FOLDER/evaluation: stopped by Ctrl-C or
killed, the same command goes on.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.errors import EvaluationError, StorageError
from loratune.record import StudyRecord, Trial, read

if TYPE_CHECKING:
    from loratune.downstream.evaluate import Model, Progress

INTERRUPTED = 130
TOP = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="STUDY", help="the study's folder")
    parser.add_argument("--benchmarks", metavar="NAMES", help="separated by commas (default: the published four; the demo's own for it)")
    parser.add_argument("--data", metavar="FOLDER", help="the benchmarks' data (default: the Hugging Face hub)")
    parser.add_argument("--tasks", metavar="FOLDER", help="descriptions of lm-evaluation-harness tasks of your own")
    parser.add_argument("--subset", type=int, metavar="N", help="so many items of each benchmark, the same every time")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help=f"trials with the lowest validation loss (default: {TOP})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the study's")
    parser.add_argument("--allow-code-execution", action="store_true", help="run, in a sandbox, the programs that models write")
    parser.add_argument("--weaker-sandbox", action="store_true", help="accept the sandbox without namespaces where they are missing")


def main(args: argparse.Namespace) -> int:
    if args.top < 1 or (args.subset is not None and args.subset < 1):
        raise EvaluationError(f"--top and --subset are whole numbers above 0; got {args.top} and {args.subset}.")
    record = read(Path(args.folder))
    names = _benchmarks(record, args.benchmarks)
    models = choose(record, args.top)
    tuned = [model for model in models if model.adapter is not None]
    print(f"Scoring {len(tuned)} adapters of study {record.name} and the bare model on {', '.join(names)}", flush=True)
    stopped = _evaluate(args, record, names, models)
    from loratune.downstream.findings import lines
    from loratune.downstream.scores import FOLDER, read_results

    folder = record.folder / FOLDER
    if not stopped:
        losses = {model.name: model.loss for model in models if model.loss is not None}
        chosen = {model.name for model in models}
        order = [name.replace(":", "-") for name in names]
        results = [r for r in read_results(folder) if r.model in chosen and r.benchmark in order]
        results.sort(key=lambda result: order.index(result.benchmark))
        best = [_name(trial) for trial in _best(record, args.top) if _name(trial) in chosen]
        default = _name(record.default) if record.default is not None and _name(record.default) in chosen else None
        print("\n".join(["", *lines(results, losses, best, default), ""]))
        print(f"Every answer: {folder}")
        return 0
    print(f"Stopped; nothing is lost. Go on with: {shlex.join(args.command_line)}")
    return INTERRUPTED


def choose(record: StudyRecord, top: int) -> list["Model"]:
    """The best `top` trials whose adapters are on disk, the default's, and the bare model. Raises StorageError without any."""
    from loratune.downstream.evaluate import BASE, Model

    best = _best(record, top)
    wanted = {trial.number: trial for trial in best}
    if record.default is not None:
        wanted.setdefault(record.default.number, record.default)
    found = [
        Model(name=_name(trial), adapter=folder, loss=trial.value)
        for trial in wanted.values()
        if (folder := adapter_of(record, trial)) is not None
    ]
    if not found:
        raise StorageError(
            f"{record.folder} holds no adapter of a finished trial. Let a trial finish; output.keep_adapters says how many are kept."
        )
    lacking = [str(trial.number) for trial in wanted.values() if _name(trial) not in {model.name for model in found}]
    if lacking:
        print(f"Not on disk, so not scored: the adapters of trials {', '.join(lacking)} (output.keep_adapters says how many are kept).")
    return [*found, Model(name=BASE, adapter=None, loss=record.base_loss)]


def adapter_of(record: StudyRecord, trial: Trial) -> Path | None:
    """Where the trial's adapter lies: where it was trained, else, of the best, the one handed over."""
    places = [record.folder / "trials" / _name(trial) / "main" / "adapter"]
    if record.best is not None and trial.number == record.best.number and not (record.folder / "selection.json").exists():
        places.append(record.folder / "adapter")
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def _best(record: StudyRecord, top: int) -> list[Trial]:
    return sorted(record.finished, key=lambda trial: (trial.value, trial.number))[:top]


def _name(trial: Trial) -> str:
    return f"{trial.number:04d}"


def _benchmarks(record: StudyRecord, given: str | None) -> list[str]:
    from loratune import demo
    from loratune.downstream.registry import EMBEDDED, PUBLISHED

    if given is not None:
        names = [name.strip() for name in given.split(",") if name.strip()]
        if not names:
            raise EvaluationError("--benchmarks names none.")
        return names
    own = Path(str(record.spec["model"]["name_or_path"])) == demo.model_folder()
    return list(EMBEDDED if own else PUBLISHED)


def _evaluate(args: argparse.Namespace, record: StudyRecord, names: list[str], models: list["Model"]) -> bool:
    """Run the evaluation, showing how far it is; whether it was stopped."""
    from loratune.cli.interrupt import Interrupt
    from loratune.downstream.evaluate import Progress, evaluate
    from loratune.downstream.scores import FOLDER
    from loratune.work import ModelRecipe

    line = _Line()
    with Interrupt() as interrupt:
        events = evaluate(
            record.folder / FOLDER,
            recipe=ModelRecipe(**record.spec["model"]),
            models=models,
            benchmarks=names,
            validation=_validation(record),
            recorded_base=record.base_loss,
            data=Path(args.data) if args.data else None,
            tasks=Path(args.tasks) if args.tasks else None,
            subset=args.subset,
            device=args.device or record.spec["executor"]["device"],
            allow_code_execution=args.allow_code_execution,
            weaker_sandbox=args.weaker_sandbox,
            stop=interrupt.stop,
        )
        for event in events:
            if isinstance(event, Progress):
                line.show(event)
            else:
                line.end()
                print(event.text, flush=True)
        line.end()
        return interrupt.stop.is_set()


def _validation(record: StudyRecord) -> Path:
    """The study's prepared data; prepared anew when the cache was emptied."""
    import json

    from loratune.record.trials import text_of

    recipe = record.folder / "recipe.json"
    folder = Path(json.loads(text_of(recipe))["data"])
    if not (folder / "manifest.json").is_file():
        from loratune.driver import prepare_data
        from loratune.spec import StudySpec

        folder = prepare_data(StudySpec.load(record.folder / "spec.yaml"), []).folder
    return folder


class _Line:
    """Progress on one line that is written over; where output is no terminal, a line at each tenth."""

    def __init__(self) -> None:
        self._open, self._tenth = False, -1

    def show(self, event: "Progress") -> None:
        from loratune.cli.words import clock

        left = f", about {clock(event.seconds_left)} left" if event.seconds_left is not None and event.done < event.total else ""
        text = f"  {event.benchmark}: {event.done:,} of {event.total:,} answers, {clock(event.seconds)}{left}"
        tenth = 10 * event.done // event.total
        if sys.stdout.isatty():
            print(f"\r{text}\x1b[K", end="", flush=True)
            self._open = True
        elif tenth != self._tenth or event.done == event.total:
            print(text, flush=True)
        self._tenth = tenth

    def end(self) -> None:
        if self._open:
            print()
        self._open, self._tenth = False, -1
