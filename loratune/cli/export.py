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
    parser.add_argument("--format", choices=("trl", "axolotl", "llamafactory", "peft"), help="write the settings as this tool's file")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")
    parser.add_argument("--push", metavar="USER/NAME", help="upload it to this repository of the Hugging Face Hub")
    parser.add_argument("--private", action="store_true", help="a repository that --push creates is private")


def main(args: argparse.Namespace) -> int:
    from tempfile import TemporaryDirectory

    if args.format and (args.push or args.merged or not args.destination):
        raise SpecError("--format writes one file: give its name as DESTINATION, without --push and --merged.")
    if args.format:
        from loratune.delivery.recipes.writing import export_recipe

        path, notes = export_recipe(args.folder, args.destination, args.format, trial=args.trial)
        args.facts |= {"file": path, "notes": notes}
        print("\n".join([str(path), *notes]))
        return 0
    from loratune.delivery.exporting import export

    if not args.destination and not args.push:
        raise SpecError("nowhere to export to. Give a DESTINATION folder, or --push USER/NAME.")
    with TemporaryDirectory() as aside:
        folder = export(
            args.folder,
            args.destination or Path(aside) / "export",
            trial=args.trial,
            merged=args.merged,
            trust_remote_code=args.trust_remote_code,
        )
        if args.destination:
            args.facts["folder"] = folder
            print(folder)
        if args.push:
            from loratune.delivery.push import push

            args.facts["address"] = push(folder, args.push, private=args.private)
            print(args.facts["address"])
    return 0
