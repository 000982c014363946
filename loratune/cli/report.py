"""Write the report of one study, or the comparison of several, as one HTML file. Works while a study runs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="the studies' folders")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in the study's folder; comparison.html here for several")


def main(args: argparse.Namespace) -> int:
    from loratune.record import read
    from loratune.record.paths import StudyPaths
    from loratune.report import write_report

    records = [read(Path(folder)) for folder in args.folders]
    default = StudyPaths(args.folders[0]).report if len(records) == 1 else Path("comparison.html")
    args.facts["report"] = write_report(records, Path(args.output) if args.output else default)
    print(args.facts["report"])
    return 0
