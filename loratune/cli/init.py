"""Write a study description to start from: every field with its default and its meaning."""

import argparse
from pathlib import Path

from loratune.errors import StorageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default="study.yaml", metavar="PATH", help="file to write (default: study.yaml)")
    parser.add_argument("--model", metavar="PATH", help="base model: local folder or hub id")
    parser.add_argument("--data", metavar="PATH", help="instruction data to train on")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def main(args: argparse.Namespace) -> int:
    from loratune.spec.commented import template
    from loratune.system.files import write_atomically

    path = Path(args.path)
    if path.is_dir():
        raise StorageError(f"{path} is a folder. Name a file, for example {path / 'study.yaml'}.")
    if path.exists() and not args.force:
        raise StorageError(f"{path} exists. Choose another name, or replace it with --force.")
    given = {name: value for name, value in (("model", args.model), ("data", args.data)) if value is not None}
    write_atomically(path, template(**given))
    args.facts["file"] = path
    missing = [name for name in ("model", "data") if name not in given]
    todo = f"Set {' and '.join(missing)} in it, then" if missing else "Next"
    print(f"Wrote {path}. {todo}: loratune run {path} --dry-run")
    return 0
