"""From what people write (YAML, flags, Python) to one plain dict in canonical names, remembering where each value stood."""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.spec.hyperparameters import ALIASES as PARAMETER_ALIASES
from loratune.spec.validation_errors import FieldPath, dotted, shown
from loratune.system.names import close_names

SECTION_ALIASES: dict[str, dict[str, str]] = {
    "search_space": PARAMETER_ALIASES,
    "training": {
        **PARAMETER_ALIASES,
        "per_device_train_batch_size": "micro_batch_size",
        "per_device_eval_batch_size": "validation_batch_size",
        "eval_batch_size": "validation_batch_size",
        "scheduler": "lr_scheduler_type",
        "lr_scheduler": "lr_scheduler_type",
        "warmup_steps_ratio": "warmup_ratio",
    },
    "model": {"model_name_or_path": "name_or_path", "base_model": "name_or_path"},
    "data": {
        "val_size": "validation_fraction",
        "val_set_size": "validation_fraction",
        "test_size": "validation_fraction",
        "cutoff_len": "max_length",
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
    },
    "budget": {"n_trials": "trials"},
    "scoring": {"subset": "items"},
}
"""Names that people know from other tools, by section."""

ROOT_ALIASES: dict[str, tuple[str, str]] = {
    "n_trials": ("budget", "trials"),
    "model_name_or_path": ("model", "name_or_path"),
    "base_model": ("model", "name_or_path"),
}
"""Names at the top level that are fields of a section."""

SHORTHAND = {
    "model": "name_or_path",
    "data": "train",
    "search_space": "preset",
    "sampler": "name",
    "schedule": "name",
    "executor": "name",
    "output": "folder",
}
"""Sections that may be written as one text: the field it then means."""


DEFAULT = "default"
"""The preset that a study without a search space has, by its sampler."""

SECTIONS = {*SHORTHAND, *SECTION_ALIASES}


class _Loader(yaml.SafeLoader):
    """SafeLoader of JSON's types alone, that reads 1e-5 as a number, as YAML 1.2 does (YAML 1.1 wants 1.0e-5)."""


_JSON = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag in _JSON] for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {tag: build for tag, build in yaml.SafeLoader.yaml_constructors.items() if tag in _JSON or tag is None}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789."))


@dataclass(kw_only=True)
class Written:
    """What was written, in canonical names, with the mistakes that show before any type is known."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[FieldPath, str] = field(default_factory=dict)  # "study.yaml:12" or "--training.epochs"
    mistakes: list[tuple[FieldPath, str]] = field(default_factory=list)
    unread: bool = False  # whether a file is no YAML at all

    def add_mapping(self, given: Any, origin: str = "", lines: Mapping[FieldPath, int] | None = None) -> None:
        """Lay a mapping over what stands here: sections are joined field by field, a field is replaced whole."""
        if not isinstance(given, Mapping):
            self.mistakes.append(((), f"{origin + ': ' if origin else ''}got {shown(given)}; needed: a mapping of sections"))
            return
        lines = lines or {}
        seen: dict[FieldPath, str] = {}
        for path, value, written in _fields(_texts(given)):
            at = tuple(map(str, written))
            if path in seen:
                names = f"{seen[path]!r} and {dotted(at)!r}"
                self.mistakes.append((path, f"{names} are two names for the same field; give one"))
                continue
            seen[path] = dotted(at)
            self._put(path, value)
            for below, line in lines.items():
                if below[: len(at)] == at:
                    self.places[(*path, *below[len(at) :])] = f"{origin}:{line}"

    def add_file(self, path: Path) -> None:
        """Lay a YAML file over what stands here. Its mistakes of form (syntax, a key given twice) are collected."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            hint = "" if path.exists() else f".{_descriptions_near(path)} `loratune init {path}` writes a description to start from."
            self.mistakes.append(((), f"cannot read {path}: {reason}{hint}"))
            self.unread = True
            return
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            lines: dict[FieldPath, int] = {}
            for place, line, twice in _lines(node):
                lines[place] = line
                if twice:
                    self.mistakes.append((place, f"given twice, first on line {twice}; give it once"))
            self.add_mapping(loader.construct_document(node) if node else {}, str(path), lines)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.unread = True
            self.mistakes.append(((), "".join((str(path), *_problem(error)))))

    def add_flag(self, name: str, text: str) -> None:
        """Set one field by its dotted name, `data.train.0.path`; the text is read as YAML."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            value = loader.construct_document(node) if node else text or None  # "### Answer:" is a comment to YAML, a text to its writer
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self.mistakes.append(((), f"--{name} {text}: {_problem(error)[1]}"))
            return
        parts: FieldPath = tuple(int(part) if part.isdigit() else part for part in name.split("."))
        root = str(parts[0])
        if len(parts) == 1 and root in ROOT_ALIASES:
            parts = ROOT_ALIASES[root]
        elif len(parts) > 1:
            parts = (root, SECTION_ALIASES.get(root, {}).get(str(parts[1]), parts[1]), *parts[2:])
        if len(parts) == 1 and root in SHORTHAND and not isinstance(value, Mapping):
            if root in ("sampler", "search_space"):  # another name makes the old one's options meaningless
                self.values[root] = {}
            parts = (root, SHORTHAND[root])
        if root == "search_space" and len(parts) > 1:
            self.values.setdefault(root, {"preset": DEFAULT})  # which the flag changes
        if len(parts) == 1 and isinstance(value, Mapping):
            self.values.pop(root, None)
            self.add_mapping({root: value})
        else:
            self._put(parts, value, f"--{name}")
        self.places[parts] = f"--{name}"

    def place(self, path: FieldPath) -> str:
        """Where the value at `path`, or the nearest thing around it, was written; "" when nobody wrote it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return next((place for below, place in self.places.items() if below[: len(path)] == path and path), "")

    def _put(self, path: FieldPath, value: Any, place: str = "") -> None:
        holder: Any = self.values
        for depth, part in enumerate(path[:-1]):
            inside = _get(holder, part)
            if not isinstance(inside, dict | list):
                # A source written as a plain path grows into a mapping when one of its fields is set.
                fields = {"path": inside} if path[0] == "data" and isinstance(inside, str) else {}
                inside = [] if isinstance(path[depth + 1], int) else fields
                if not self._set(holder, part, inside, path):
                    return
                if place and path[: depth + 1] in self.places:
                    self.places[path[: depth + 1]] = place
            holder = inside
        value = [value] if path in (("data", "train"), ("data", "validation")) and isinstance(value, str | Mapping) else value
        self._set(holder, path[-1], copy.deepcopy(value), path)

    def _set(self, holder: Any, part: str | int, value: Any, path: FieldPath) -> bool:
        if isinstance(holder, list) and isinstance(part, int) and part <= len(holder):
            holder[part : part + 1] = [value]
        elif isinstance(holder, dict):
            holder[str(part)] = value
        else:
            self.mistakes.append((path, f"{part!r} is not an index of the list, 0 to {len(holder)}"))
            return False
        return True


def _descriptions_near(path: Path) -> str:
    """` Did you mean study.yaml?`, of the YAML files beside it; "" where none has a near name."""
    there = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = close_names(path.name, there)
    return f" Did you mean {path.parent / near[0]}?" if near else ""


def _texts(given: Any, depth: int = 5) -> Any:
    """The same with every pathlib.Path as text, which is how a description holds it. Paths stand no deeper; a cycle may go on for ever."""
    if depth and isinstance(given, Mapping):
        return {key: _texts(value, depth - 1) for key, value in given.items()}
    if depth and isinstance(given, list):
        return [_texts(value, depth - 1) for value in given]
    return os.fspath(given) if isinstance(given, os.PathLike) else given


def _get(holder: Any, part: str | int) -> Any:
    if isinstance(holder, list):
        return holder[part] if isinstance(part, int) and part < len(holder) else None
    return holder.get(str(part))


def _fields(given: Mapping[Any, Any]) -> Iterator[tuple[FieldPath, Any, tuple[Any, ...]]]:
    """(canonical path, value, path as written) of every field, one level into the sections."""
    for key, value in given.items():
        section = str(key)
        if value is None and section in SECTIONS:
            continue  # a section with nothing under it
        if section in ROOT_ALIASES:
            yield ROOT_ALIASES[section], value, (key,)
        elif section in SHORTHAND and (isinstance(value, str) or (section == "data" and isinstance(value, list))):
            yield (section, SHORTHAND[section]), value, (key,)
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                yield (section, SECTION_ALIASES.get(section, {}).get(str(name), str(name))), inner, (key, name)
        else:
            yield (section,), value, (key,)


def _lines(node: yaml.Node | None, path: FieldPath = (), seen: set[int] | None = None) -> Iterator[tuple[FieldPath, int, int]]:
    """(path, line, line of an earlier same key or 0) of every mapping key and list item; of an anchor, once."""
    seen = set() if seen is None else seen
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            here = (*path, str(key.value))
            yield here, line, first.get(str(key.value), 0) if key.value != "<<" else 0
            first[str(key.value)] = line
            yield from _lines(value, here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1, 0
            yield from _lines(item, (*path, index), seen)


def _problem(error: Exception) -> tuple[str, str]:
    """(":line: " or ": ", what is wrong) of a YAML error."""
    mark = getattr(error, "problem_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        return ": ", f"not valid YAML: the character {error.character!r} (place {error.position:,}) is not allowed; remove it"
    what = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return f":{mark.line + 1}: " if mark else ": ", f"not valid YAML: {what}"


def lines_of(written: Written, found: Iterable[tuple[FieldPath, str]]) -> str:
    """The text of a SpecError: one line for each mistake, with the place where it was written."""
    text = []
    for path, sentence in [*written.mistakes, *found]:
        place = written.place(path)
        where = f"{dotted(path)}{f' ({place})' if place else ''}: " if path else ""
        text.append(where + sentence)
    return "\n".join(dict.fromkeys(text))
