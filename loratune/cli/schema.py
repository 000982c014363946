"""Print the JSON Schema of a study description, for editors that complete and check YAML."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    from loratune.spec import StudySpec

    args.facts = StudySpec.json_schema()
    if not args.json:  # the same text, either way
        print(json.dumps(args.facts, indent=1))
    return 0
