"""Copy a trial's adapter as an ordinary PEFT folder, or save the base model with the adapter merged into it.

With --format the settings alone are written, as a file of TRL, Axolotl or LLaMA-Factory, or as PEFT's configuration:

    loratune export runs/mine axolotl.yml --format axolotl
"""

import argparse
from pathlib import Path

from loratune.cli.parser import add_trust
from loratune.errors import SpecError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the study's folder")
    parser.add_argument(
        "destination", nargs="?", metavar="DESTINATION", help="folder to make; with --format, file to write; may be left out with --push"
    )
    parser.add_argument("--trial", type=int, metavar="N", help="default: the one that `loratune select` chose, else the best")
    add_trust(parser)
    forms = ("trl", "axolotl", "llamafactory", "peft")
    parser.add_argument("--format", type=_form, choices=forms, help="write the settings as this tool's file; without it, PEFT's folder")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="a repository that --push creates is private")


def _form(name: str) -> str:
    """As given; the names that people write for a folder are told how to have it."""
    if name.lower() in ("hf", "huggingface", "transformers", "safetensors", "adapter", "merged"):
        raise argparse.ArgumentTypeError(f"{name!r}: leave --format out for PEFT's folder; add --merged for the whole model, Transformers'")
    return name


def main(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    if args.format and (args.push or args.merged or not args.destination):
        raise SpecError("--format writes one file: give its name as DESTINATION, without --push and --merged.")
    if args.format:
        from loratune.delivery.handover import chosen_trial
        from loratune.delivery.recipes.writing import export_recipe
        from loratune.record import read

        path, notes = export_recipe(args.folder, args.destination, args.format, trial=args.trial)
        args.facts |= {"file": path, "notes": notes, "trial": chosen_trial(read(args.folder), args.trial)[0].number}
        print("\n".join([str(path), *notes]))
        return 0
    from loratune.delivery.exporting import exported

    if not args.destination and not args.push:
        raise SpecError("nowhere to export to. Give a DESTINATION folder, or --push USER/NAME.")
    with TemporaryDirectory() as aside:
        made = exported(
            args.folder,
            args.destination or Path(aside) / "export",
            trial=args.trial,
            merged=args.merged,
            trust_remote_code=args.trust_remote_code,
        )
        args.facts |= {"trial": made.trial, "run": made.run, "bytes": made.size}
        if args.destination:
            args.facts["folder"] = made.folder
            print(made.folder)
        if args.push:
            from loratune.delivery.push import push

            args.facts["address"] = push(made.folder, args.push, private=args.private)
            print(args.facts["address"])
    return 0
