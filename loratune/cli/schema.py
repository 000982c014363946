"""Print the JSON Schema of a study description. Editors that read it complete and check the YAML as you type."""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    from loratune.spec import StudySpec

    print(json.dumps(StudySpec.json_schema(), indent=1))
    return 0
