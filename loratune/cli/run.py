"""Search for the best hyperparameters, or continue a study.

Give a study description (see `loratune init`), the folder of a study to continue, or flags alone:

    loratune run --demo                                        about two minutes, nothing to download
    loratune run --model meta-llama/Llama-2-7b-hf --data alpaca.json
    loratune run study.yaml --budget.trials 30 --training.epochs 1
    loratune run runs/study                                    continue where it stopped

Any field of the description is also a flag: --training.batch_size 64, --search_space.lora_r '[8, 16]',
--data.train.0.format alpaca. After Ctrl-C or a kill, the same command continues.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.errors import ModelError, SpecError, StorageError, TrainingError
from loratune.plugs import SAMPLERS

if TYPE_CHECKING:
    from loratune.spec import StudySpec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_study_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="estimate what the study will cost, without starting it")


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """What describes a study, as `load_spec` reads it."""
    parser.add_argument("target", nargs="?", metavar="SPEC.yaml|FOLDER", help="study description, or folder of a study to continue")
    parser.add_argument("--model", metavar="PATH", help="base model: local folder or hub id")
    parser.add_argument("--data", metavar="PATH", action="append", default=[], help="instruction data to train on; may be repeated")
    parser.add_argument("--validation", metavar="PATH", action="append", default=[], help="data to validate on; may be repeated")
    parser.add_argument("--output", metavar="FOLDER", help="the study's folder (default: runs/<name>)")
    parser.add_argument("--trials", metavar="N", help="number of trials")
    parser.add_argument("--sampler", metavar="NAME", help=", ".join(SAMPLERS.builtin))
    parser.add_argument("--warm-start", metavar="FOLDER", nargs="+", default=[], help="earlier studies that sharpen the first guess")
    parser.add_argument("--demo", action="store_true", help="use the embedded model and data; other flags still apply")
    parser.set_defaults(overrides=None)


def main(args: argparse.Namespace) -> int:
    spec = load_spec(args)
    if args.dry_run:
        from loratune.cli.dry_run import dry_run

        return dry_run(spec, args.facts)
    return _search(spec, args)


def load_spec(args: argparse.Namespace) -> "StudySpec":
    """The study that the command line describes. Raises SpecError with all errors, StorageError for a folder that is no study."""
    from loratune.record.paths import StudyPaths
    from loratune.spec import StudySpec

    path = Path(args.target) if args.target else None
    continued = path is not None and path.is_dir()
    if not args.target and not args.demo and not args.model and not args.data and not args.overrides:
        raise SpecError("nothing to tune. Give a description (`loratune init` writes one), --model and --data, or --demo.")
    overrides = _convenience(args) + (args.overrides or [])
    if path is not None and continued:
        if not StudyPaths(path).spec.is_file() or not StudyPaths(path).lock.is_file():
            near = sorted(path.glob("*.yaml"))
            hint = f"Did you mean {near[0]}?" if near else "`loratune init` writes a description to start from."
            raise StorageError(f"{path} is not a study's folder: no study was begun in it. {hint}")
        overrides = [("output.folder", json.dumps(str(path))), *overrides]  # where it is now, should it have been moved
        path = StudyPaths(path).spec
    base = None
    if args.demo and not continued:
        from loratune.demo import DEMO_RUNS, study

        base = study()
        if path is None and not any(name.startswith(("budget", "sampler", "n_trials")) for name, _ in overrides):
            base["budget"] = {"full_runs": DEMO_RUNS}
    spec = StudySpec.load(path, overrides, base)
    if spec.data.holds_out_by_default:
        print("A tenth of the data is held out for validation; to change that, write data.validation_fraction or data.validation.")
    if continued:
        _check_consent(spec, {name for name, _ in overrides})
    return spec


def _check_consent(spec: "StudySpec", given: set[str]) -> None:
    """Only the user can consent to running code, not the folder, which may come from somebody else.

    Raises ModelError for code that comes with a model, SpecError for other code.
    """
    asked = {
        "model.trust_remote_code": spec.model.trust_remote_code,
        "model.attn_implementation": "/" in (spec.model.attn_implementation or ""),  # code of a hub's repository
        "scoring.allow_code_execution": spec.scoring.allow_code_execution,
        "scoring.weaker_sandbox": spec.scoring.weaker_sandbox,
    }
    asked["metrics"] = bool(spec.metrics)
    missing = [name for name, needed in asked.items() if needed and name not in given]
    if missing:
        values = {"model.attn_implementation": spec.model.attn_implementation}
        short = [metric.shortest for metric in spec.metrics]
        values["metrics"] = shlex.quote(short[0] if len(short) == 1 and isinstance(short[0], str) else json.dumps(short))
        flags = " ".join(f"--{name} {values.get(name, 'true')}" for name in missing)
        kind = ModelError if any(name.startswith("model.") for name in missing) else SpecError
        raise kind(
            f"the study in {spec.folder} asks to run code: {', '.join(missing)}. A folder cannot allow that by itself: if you trust its "
            f"source, add {flags}."
        )


def _convenience(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The short flags as fields; texts are quoted, so that YAML reads no path as a number."""
    given = (
        ("model.name_or_path", args.model, json.dumps),
        ("data.train", args.data, json.dumps),
        ("data.validation", args.validation, json.dumps),
        ("output.folder", args.output, json.dumps),
        ("sampler", args.sampler, str),
        ("sampler.warm_start", args.warm_start, json.dumps),
        ("budget.trials", args.trials, str),
    )
    return [(field, spelt(value)) for field, value, spelt in given if value not in (None, [])]


def _search(spec: "StudySpec", args: argparse.Namespace) -> int:
    from loratune.cli.interrupt import Interrupt, stopped
    from loratune.cli.status import facts
    from loratune.cli.trial_lines import budget, delivered, result
    from loratune.cli.view import open_view
    from loratune.record.paths import StudyPaths
    from loratune.study.driver import deliver, tune
    from loratune.system.files import has_working_folder

    quiet()
    word = "Continuing study" if StudyPaths(spec.folder).spec.is_file() else "Study"
    print(f"{word} {spec.name} in {spec.folder}: {budget(spec)} by {spec.sampler.name}")
    with Interrupt() as interrupt:
        with open_view(spec, sys.stdout) as view:
            interrupt.show = view.note
            for event in tune(spec, interrupt.stop):
                view.show(event)
        if interrupt.stop.is_set():
            return stopped(args)
        if not has_working_folder():  # removed meanwhile: the adapter is checked with PyTorch, whose libraries need one
            os.chdir(spec.folder)
        delivery = deliver(spec.folder, trust_remote_code=spec.model.trust_remote_code)
    ended = result(delivery.record)
    print("\n".join(["", *ended, "", *delivered(delivery)]))
    args.facts |= facts(delivery.record) | {"report": delivery.report, "best_yaml": delivery.best, "adapter": delivery.adapter}
    if delivery.best is not None:
        return 0
    args.facts["error"] = {"kind": TrainingError.__name__, "message": " ".join(ended)}  # nothing to hand over
    return TrainingError.exit_code


def quiet() -> None:
    """Keep the libraries' own messages off the terminal; workers write theirs to the trials' logs."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
