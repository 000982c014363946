"""Copy a trial's adapter as an ordinary PEFT folder, or save the base model with the adapter merged into it.

With --format the settings alone are written, as a file of TRL, Axolotl or LLaMA-Factory, or as PEFT's configuration:

    loratune export runs/mine axolotl.yml --format axolotl
"""

import argparse
from pathlib import Path

from loratune.cli.parser import add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the study's folder")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make; with --format, file to write")
    parser.add_argument("--trial", type=int, metavar="N", help="default: the one that `loratune select` chose, else the best")
    add_trust(parser)
    parser.add_argument("--format", choices=("trl", "axolotl", "llamafactory", "peft"), help="write the settings as this tool's file")
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")


def main(args: argparse.Namespace) -> int:
    if args.format:
        from loratune.delivery.recipes.writing import export_recipe

        path, notes = export_recipe(args.folder, args.destination, args.format, trial=args.trial)
        print("\n".join([str(path), *notes]))
        return 0
    from loratune.delivery.exporting import export

    trusted = args.trust_remote_code
    print(export(Path(args.folder), Path(args.destination), trial=args.trial, merged=args.merged, trust_remote_code=trusted))
    return 0
