"""Every mistake in a study's description, one line each: which field, what was given, what is allowed."""

import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from loratune.system.names import nearest

FieldPath = tuple[str | int, ...]

NEEDED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "greater_than": "a number > {gt:g}",
    "greater_than_equal": "a number >= {ge:g}",
    "less_than": "a number < {lt:g}",
    "less_than_equal": "a number <= {le:g}",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-', the first a letter or digit",
    "too_short": "at least {min_length} of them",
    "invalid-json-value": "text, a number, true, false, null, or lists and mappings of these",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}


class MistakesError(ValueError):
    """Several mistakes found by one validator: (path below the validated value, sentence) each."""

    def __init__(self, found: Iterable[tuple[FieldPath, str]]) -> None:
        self.found = list(found)
        super().__init__("\n".join(dotted(path) + ": " + text if path else text for path, text in self.found))


def dotted(path: Iterable[str | int]) -> str:
    """("data", "train", 0, "path") -> "data.train.0.path"."""
    return ".".join(map(str, path))


def shown(value: object) -> str:
    """What was given, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def not_allowed(given: object, allowed: Iterable[str]) -> str:
    """The sentence for a value outside a closed set."""
    names = list(allowed)
    return f"got {shown(given)}; allowed: {', '.join(names)}{nearest(given, names) if isinstance(given, str) else ''}"


def found_in(error: ValidationError, model: type[BaseModel], elsewhere: Callable[[str], str] | None = None) -> list[tuple[FieldPath, str]]:
    """(path, sentence) of every mistake in `error`, raised by `model`.

    elsewhere: the dotted path under which an unknown name is a field of another section, or "".
    """
    found: list[tuple[FieldPath, str]] = []
    for entry in error.errors():
        path, kind, given, context = entry["loc"], entry["type"], entry["input"], entry.get("ctx", {})
        cause = context.get("error")
        if kind == "too_short" and given:
            continue  # its items are wrong, and each says so itself
        if isinstance(cause, MistakesError):
            found += [((*path, *below), sentence) for below, sentence in cause.found]
        elif kind == "value_error":
            found.append((path, str(cause)))
        elif kind == "missing":
            found.append((path, f"missing: {_description(model, path)}"))
        elif kind == "extra_forbidden":
            known = [name for name, field in _class_at(model, path[:-1]).model_fields.items() if not field.exclude]
            home = elsewhere(str(path[-1])) if elsewhere else ""
            hint = f"; write it as {home}" if home else nearest(path[-1], known) or f"; the fields here: {', '.join(known)}"
            found.append((path, f"unknown field{hint}"))
        elif kind in ("literal_error", "union_tag_invalid"):
            tags = context.get("expected") or context["expected_tags"]
            value = given if kind == "literal_error" else context["tag"]
            found.append((path, not_allowed(value, re.findall("'([^']*)'", str(tags)) or [str(tags)])))
        else:
            needed = NEEDED.get(kind, entry["msg"]).format(**context)
            found.append((path, f"got {shown(given)}; needed: {needed}"))
    return found


def _class_at(model: type[BaseModel], path: FieldPath) -> type[BaseModel]:
    """The model whose fields stand under `path`; the last known one when the path leaves the models."""
    for part in path:
        if isinstance(part, str) and part in model.model_fields:
            inner = list(_models_in(model.model_fields[part].annotation))
            # Of a union, pydantic puts the chosen one's `type` into the path.
            chosen = [kind for kind in inner if "type" in kind.model_fields and kind.model_fields["type"].default in path]
            model = next(iter(chosen or inner), model)
    return model


def _models_in(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, tuple, list, dict, typing.Annotated):
        for inner in typing.get_args(annotation):
            yield from _models_in(inner)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _description(model: type[BaseModel], path: FieldPath) -> str:
    field = _class_at(model, path[:-1]).model_fields.get(str(path[-1]))
    if field is None:
        return "a value is needed"
    return field.description or next((str(inner.__doc__) for inner in _models_in(field.annotation)), "a value is needed")
