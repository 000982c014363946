"""Make a study of an existing recipe: Axolotl's YAML, LLaMA-Factory's, or that of `trl sft`.

    loratune import axolotl.yml --output study.yaml
    loratune run study.yaml --dry-run

The recipe's own settings are the study's first trial. What cannot be carried over is listed, and stands in the file as comments.
"""

import argparse
from pathlib import Path

from loratune.errors import StorageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe's YAML file")
    parser.add_argument("--from", dest="tool", choices=("axolotl", "llamafactory", "trl"), help="default: told by its fields")
    parser.add_argument("--output", default="study.yaml", metavar="PATH", help="file to write (default: study.yaml)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def main(args: argparse.Namespace) -> int:
    from loratune.delivery.recipes.reading import read_recipe
    from loratune.system.files import write_atomically

    path = Path(args.output)
    if path.exists() and not args.force:
        raise StorageError(f"{path} exists. Choose another --output, or replace it with --force.")
    made = read_recipe(args.recipe, args.tool)
    write_atomically(path, made.to_yaml(args.recipe))
    args.facts |= {"file": path, "lost": made.lost, "notes": made.notes}
    if made.lost:
        print(f"Not carried over from {args.recipe}:")
        print("\n".join(f"  {line}" for line in made.lost))
    for note in made.notes:
        print(note)
    print(f"Wrote {path}. Next: loratune run {path} --dry-run")
    return 0
