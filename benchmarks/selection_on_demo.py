"""Is the adapter that `loratune select` ships no worse than the study's raw minimum, on data that nobody used?

    python -m benchmarks.selection_on_demo [--studies 10] [--folder runs/selection_on_demo]

Small studies of the embedded model: ten random trials each (the first are the defaults), 160 training and 200 validation examples,
each study with a seed of its own, which also draws its data. The learning rates are near the optimum, as after a good sampler's
first trials, so that seeds matter as much as hyperparameters. Then `select` with its usual settings. Four adapters of each study:

raw minimum        of the trial with the lowest validation loss: what a study hands over without selection
chosen trial       the study's own adapter of the trial that the race and the rule chose
shipped            of the chosen trial's adapters, the study's and those with fresh seeds, the one with the lowest validation loss
default            of trial 0

and their losses on 1,500 test examples: from the part of the demo's world that is in no data file. Stopped, the same command goes on.
Writes benchmarks/results/selection_on_demo/: results.json, figure.svg and figure.png. About ten minutes of one core.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from loratune import demo
from loratune.data.cache import cache_folder
from loratune.data.prepare import prepare
from loratune.data.prepared import Prepared
from loratune.data.sources import DataRecipe, DataSource
from loratune.errors import StorageError
from loratune.record import COMPLETE, read
from loratune.record.adapters import find_adapter
from loratune.selection import SelectionRecord, read_selection, select
from loratune.spec import StudySpec
from loratune.statistics import Interval, student_mean
from loratune.study.driver import tune
from loratune.system.files import write_atomically
from loratune.system.machine import environment
from loratune.work import ModelRecipe
from tools.make_demo.tasks import examples

RESULTS = Path(__file__).resolve().parent / "results" / "selection_on_demo"
TRIALS, TRAIN, VALIDATION, TEST = 10, 160, 200, 1500
ADAPTERS = ("raw minimum", "chosen trial", "shipped", "default")
COLOURS = ("#d55e00", "#009e73", "#0072b2", "#5e6670")


def spec_of(folder: Path, seed: int, trials: int) -> StudySpec:
    flags = {
        "output.folder": str(folder / f"study-{seed}"),
        "name": f"study-{seed}",
        "seed": seed,
        "data.train_count": TRAIN,
        "data.validation_count": VALIDATION,
        "training.validations": 1,
        "search_space.learning_rate": "{low: 1.0e-3, high: 6.0e-3, log: true, default: 1.0e-3}",
        "sampler": "random",
        "budget.trials": trials,
        "output.keep_adapters": trials,
        "executor.name": "inline",
        "executor.workers": 1,
    }
    return StudySpec.load(None, [(name, str(value)) for name, value in flags.items()], demo.study())


def study(folder: Path, seed: int, trials: int, test: Prepared) -> dict[str, Any]:
    """One study, its selection, and the test losses; what is on disk is not done again."""
    spec = spec_of(folder, seed, trials)
    done = spec.folder / "test.json"
    if done.is_file():
        chosen = read_selection(spec.folder)
        return dict(json.loads(done.read_text())) | (facts(chosen) if chosen else {})
    record = read(spec.folder) if (spec.folder / "spec.yaml").is_file() else None
    if record is None or sum(trial.state == COMPLETE for trial in record.trials) < trials:
        for _ in tune(spec):
            pass
    for _ in select(spec.folder):
        pass
    record, chosen = read(spec.folder), read_selection(spec.folder)
    if chosen is None:
        raise StorageError(f"the selection of {spec.folder} was stopped; run the same command again")
    by_number = {trial.number: trial for trial in record.trials}
    places = {
        "raw minimum": find_adapter(record, by_number[chosen.lowest]),
        "chosen trial": find_adapter(record, by_number[chosen.chosen]),
        "shipped": find_adapter(record, by_number[chosen.chosen], chosen.shipped.run),
        "default": find_adapter(record, by_number[0]),
    }
    losses = {name: loss_of(place, test) for name, place in places.items() if place is not None}
    found = {"seed": seed, "test": losses, **facts(chosen), "trials": {t.number: t.value for t in record.finished}}
    write_atomically(done, json.dumps(found, indent=1))
    return found


def facts(chosen: SelectionRecord) -> dict[str, Any]:
    """What the selection said, in short."""
    unbiased = chosen.unbiased
    known = [finalist.study_loss for finalist in chosen.candidates]
    known += [run.loss for run in chosen.race.log] if chosen.race else []
    known += [run.loss for run in unbiased.runs] if unbiased else []
    return {
        "lowest": chosen.lowest,
        "chosen": chosen.chosen,
        "shipped": chosen.shipped.run,
        "shipped_is_the_lowest_of_all_runs": chosen.shipped.validation_loss <= min(known),
        "share": chosen.share,
        "validation": {
            "raw minimum": chosen.finalist(chosen.lowest).study_loss,
            "chosen trial": chosen.finalist(chosen.chosen).study_loss,
            "shipped": chosen.shipped.validation_loss,
        },
        "fresh_seeds": unbiased.chosen.value if unbiased else None,
        "gain": unbiased.gain.value if unbiased and unbiased.gain else None,
        "noise": chosen.noise.value,
        "finalists": len(chosen.candidates),
        "runs": chosen.runs,
        "explained": [line for line in chosen.explain().splitlines() if "`" not in line],  # no commands with folders in them
    }


def test_data(folder: Path) -> Prepared:
    """The test examples, tokenised as the study's validation examples are."""
    path = folder / "test.jsonl"
    if not path.is_file():
        rows = examples("test", TEST, seed=7)
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    train, _ = demo.data_files()
    recipe = DataRecipe(train=(DataSource(path=str(train)),), validation=(DataSource(path=str(path)),), train_count=16, max_length=128)
    return prepare(recipe, tokenizer=str(demo.model_folder()), cache=cache_folder() / "data")


def loss_of(adapter: Path, test: Prepared) -> float:
    """The one loss, on the test examples."""
    import peft
    import torch

    from loratune.finetune import model
    from loratune.finetune.validation import validate

    base = model.load(ModelRecipe(name_or_path=str(demo.model_folder())), torch.device("cpu"))
    tuned = peft.PeftModel.from_pretrained(base.model, str(adapter))
    return validate(tuned, test.validation, batch_size=64, pad_id=base.pad_id)[0]


def summary(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean differences to the raw minimum on test data, negative: better, with Student's 95 % intervals over studies."""
    found: dict[str, Any] = {}
    for name in ADAPTERS[1:]:
        differences = [one["test"][name] - one["test"]["raw minimum"] for one in studies]
        told: Interval = student_mean(differences)
        found[name] = {
            "minus_raw_minimum": told.value,
            "low": told.low if told.known else None,
            "high": told.high if told.known else None,
            "better": sum(d < 0 for d in differences),
            "equal": sum(d == 0 for d in differences),
            "worse": sum(d > 0 for d in differences),
        }
    found["another_trial_chosen"] = sum(one["chosen"] != one["lowest"] for one in studies)
    found["shipped_is_the_lowest_of_all_runs"] = sum(one["shipped_is_the_lowest_of_all_runs"] for one in studies)
    found["runs"] = float(np.mean([one["runs"] for one in studies]))
    return found


def draw(studies: list[dict[str, Any]]) -> Figure:
    """Left: test losses of each study. Right: differences to the raw minimum's."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.arange(len(studies))
    for name, colour, marker in zip(ADAPTERS[:3], COLOURS, "o^s", strict=False):
        left.plot(places, [one["test"][name] for one in studies], marker, color=colour, label=name, markersize=5, alpha=0.9)
    left.set(xlabel="study", ylabel="test loss, nats per response token", xticks=places)
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.1, columnspacing=1.0)
    for place, (name, colour) in enumerate(zip(ADAPTERS[1:3], COLOURS[1:3], strict=True)):
        differences = np.array([one["test"][name] - one["test"]["raw minimum"] for one in studies])
        right.plot(np.full(len(studies), place) + np.linspace(-0.15, 0.15, len(studies)), differences, "o", color=colour, markersize=5)
        right.plot([place - 0.25, place + 0.25], [differences.mean()] * 2, color=colour, linewidth=2)
    right.axhline(0, color="#5e6670", linewidth=0.8, linestyle=":")
    right.set(ylabel="test loss minus the raw minimum's", xticks=[0, 1], xticklabels=ADAPTERS[1:3], xlim=(-0.5, 1.5))
    for axes in (left, right):
        axes.xaxis.label.set_size(8.5)
        axes.yaxis.label.set_size(8.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=10)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--folder", type=Path, default=Path("runs/selection_on_demo"), help="where the studies are kept")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    test = test_data(args.folder)
    studies = []
    for seed in range(args.studies):
        studies.append(study(args.folder, seed, args.trials, test))
        one = studies[-1]
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in one["test"].items())
        print(f"study {seed}: {told}; trial {one['chosen']} chosen, the lowest was {one['lowest']}; {one['runs']} runs", flush=True)
    machine = environment()
    machine.pop("host")
    settings = {"trials": args.trials, "train": TRAIN, "validation": VALIDATION, "test": len(test.validation), "studies": args.studies}
    found = summary(studies)
    everything = {"settings": settings, "summary": found, "environment": machine, "studies": studies}
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    figure = draw(studies)
    for ending in ("svg", "png"):
        figure.savefig(args.results / f"figure.{ending}", dpi=160)
    for name in ADAPTERS[1:]:
        one = found[name]
        interval = f" [{one['low']:.4f}, {one['high']:.4f}]" if one["low"] is not None else ""
        print(f"{name:13} minus raw minimum: {one['minus_raw_minimum']:+.4f}{interval}; {one['better']} better, {one['worse']} worse")


if __name__ == "__main__":
    main()
