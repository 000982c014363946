"""Print the JSON Schema of a study description, for editors that complete and check YAML."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    from loratune.spec import StudySpec

    print(json.dumps(StudySpec.json_schema(), indent=1))
    return 0
