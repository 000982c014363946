"""Which tool a recipe is of, and the study that it makes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loratune.delivery.recipes import axolotl, llamafactory, trl
from loratune.delivery.recipes.recipe import ForeignRecipe
from loratune.errors import SpecError
from loratune.spec import StudySpec
from loratune.system.files import AnyPath

TOOLS: dict[str, tuple[tuple[str, ...], Callable[[ForeignRecipe], None]]] = {
    "axolotl": (axolotl.MARKS, axolotl.read_axolotl),
    "llamafactory": (llamafactory.MARKS, llamafactory.read_llamafactory),
    "trl": (trl.MARKS, trl.read_trl),
}


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A study made of a recipe."""

    tool: str
    study: dict[str, Any]  # as `StudySpec.load(base=...)` takes it
    lost: tuple[str, ...]  # what was not carried over, each with why
    notes: tuple[str, ...]

    def to_yaml(self, origin: str) -> str:
        """The study's YAML, with what was not carried over as comments."""
        told = [f"# Made of {origin} ({self.tool}). Its own settings are the first trial; the others are searched around them."]
        told += ["# Not carried over:"] * bool(self.lost) + [f"#   {line}" for line in self.lost] + [f"# {line}" for line in self.notes]
        text = yaml.safe_dump(self.study, sort_keys=False, allow_unicode=True, width=120)
        return "\n".join(line.replace("\n", " ") for line in told) + "\n" + text


def read_recipe(path: AnyPath, tool: str | None = None) -> Imported:
    """The study of a recipe. tool: axolotl, llamafactory or trl; None: told by its fields.

    Raises SpecError for a file that is none, trains something else than LoRA, or makes no valid study.
    """
    given = _mapping(Path(path))
    tool = tool or _tool_of(given, str(path))
    recipe = ForeignRecipe(str(path), given)
    TOOLS[tool][1](recipe)
    recipe.finish()
    study = {name: part for name, part in recipe.study.items() if part != {}}
    study["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(path).stem).strip("-._") or "imported"
    study = {"name": study.pop("name"), **study}
    StudySpec.load(base=study)
    return Imported(tool=tool, study=study, lost=tuple(recipe.lost), notes=tuple(recipe.notes))


def _mapping(path: Path) -> dict[str, Any]:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise SpecError(f"{path}: holds no fields; needed: a recipe of {', '.join(TOOLS)}")
    return {str(name): value for name, value in given.items()}


def _tool_of(given: dict[str, Any], path: str) -> str:
    for tool, (marks, _) in TOOLS.items():
        if (all if tool != "llamafactory" else any)(mark in given for mark in marks):
            return tool
    if "model_name_or_path" in given:  # and no use_peft: said by TRL's reader
        return "trl"
    raise SpecError(
        f"{path}: not a known recipe. Axolotl's has base_model and datasets, LLaMA-Factory's stage and finetuning_type, "
        "TRL's model_name_or_path and use_peft; or name the tool with --from."
    )
