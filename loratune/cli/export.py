"""Copy a trial's adapter as an ordinary PEFT folder, or save the base model with the adapter merged into it."""

import argparse
from pathlib import Path

from loratune.cli.parser import add_trust


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="the study's folder")
    parser.add_argument("destination", metavar="DESTINATION", help="folder to make")
    parser.add_argument("--trial", type=int, metavar="N", help="default: the one that `loratune select` chose, else the best")
    add_trust(parser)
    parser.add_argument("--merged", action="store_true", help="the whole model, with the adapter merged into its weights")


def main(args: argparse.Namespace) -> int:
    from loratune.delivery.exporting import export

    trusted = args.trust_remote_code
    folder = export(Path(args.folder), Path(args.destination), trial=args.trial, merged=args.merged, trust_remote_code=trusted)
    args.facts["folder"] = folder
    print(folder)
    return 0
