"""Recommend hyperparameters in about a second, without training: learning rate, scale, rank, layers, batch size, epochs, warmup.

    loratune recommend --model meta-llama/Llama-2-7b-hf --data alpaca.json
    loratune recommend study.yaml --json
    loratune recommend --model m --data d.json --warm-start runs/a runs/b     sharpened by earlier studies

It is arithmetic on a table of public findings (loratune/samplers/prior.json), each with its source. The bracket search begins there.
"""

import argparse
from typing import TYPE_CHECKING, Any

from loratune.cli import run

if TYPE_CHECKING:
    from loratune.spec import StudySpec
    from loratune.study.guess import Guess

_SHOWN = ("learning_rate", "alpha_ratio", "lora_alpha", "lora_r", "lora_dropout", "target_modules", "batch_size", "epochs", "warmup_ratio")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run.add_study_arguments(parser)
    parser.add_argument("--memory", metavar="GIB", type=float, help="memory of the device that will train, which limits the rank")


def main(args: argparse.Namespace) -> int:
    from loratune.study.guess import guess

    spec = run.load_spec(args)
    made = guess(spec, memory=args.memory * 2**30 if args.memory else None)
    if args.json:
        args.facts = plain(made)
    else:
        _print(made)
    return 0


def plain(made: "Guess") -> dict[str, Any]:
    """The guess as plain values: rates and ratios as numbers, the spread of the learning rate in factors of ten."""
    from dataclasses import asdict

    from loratune.record.common_practice import COMMON_PRACTICE

    recommendation = made.recommendation
    return {
        "recommended": recommendation.values,
        "reasons": recommendation.reasons,
        "learning_rate_spread": recommendation.prior.sd,
        "outside": recommendation.prior.outside,
        "notes": _notes(made),
        "facts": asdict(made.facts),
        "common_practice": COMMON_PRACTICE,
    }


def _notes(made: "Guess") -> list[str]:
    """The recommendation's notes, and that the data had no part in it where they were not read."""
    unread = "data not counted: they are on the Hugging Face hub, or larger than 100 MiB; recommended without them"
    return [*made.recommendation.notes, *([unread] if made.facts.examples is None else [])]


def first_guess(spec: "StudySpec") -> tuple["StudySpec", "Guess | None"]:
    """The study with the recommendation in place of the defaults that nobody wrote, and that; as it is, where nothing asks for it.

    Of a study that began, the recommendation is that of its first start.
    """
    from loratune.study.guess import guess_of, with_guess

    made = guess_of(spec)
    return (spec, None) if made is None else (with_guess(spec, made.recommendation), made)


def guess_lines(spec: "StudySpec", made: "Guess | None") -> list[str]:
    """The first guess in lines; none where there is no guess."""
    if made is None:
        return []
    from loratune.cli.trial_lines import params

    recommendation = made.recommendation
    values, factor = params(spec.search_space.default_values()), 10**recommendation.prior.sd
    lines = [f"First guess: {values}; the learning rate give or take a factor of {factor:.2g}"]
    return [*lines, *(f"  {note}" for note in recommendation.notes)]


def _print(made: "Guess") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from loratune.system.formatting import label, show

    recommendation, facts = made.recommendation, made.facts
    console = Console(highlight=False)
    known = [
        facts.family,
        f"{facts.parameters:,} weights" if facts.parameters else "",
        f"{facts.hidden_size:,} wide" if facts.hidden_size else "",
        {True: "with a chat template", False: "without a chat template"}.get(facts.instruct, "") if facts.instruct is not None else "",
        f"{facts.examples:,} training examples" if facts.examples is not None else "",
    ]
    console.print(", ".join(filter(None, known)), markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name, options in (("", {"no_wrap": True}), ("value", {"justify": "right", "no_wrap": True}), ("because", {})):
        table.add_column(name, **options)
    for name in _SHOWN:
        table.add_row(label(name), show(recommendation.values[name]), recommendation.reasons.get(name, ""))
    console.print(table)
    factor = 10**recommendation.prior.sd
    console.print(f"The best learning rate lies within a factor of {factor:.2g} of this in two of three studies.")
    for note in _notes(made):
        console.print(note, markup=False)
