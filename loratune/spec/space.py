"""What a study searches: hyperparameters with their ranges, and how these look to Optuna.

A space is an ordered mapping of parameter names to definitions. Short forms:

    lora_r: [4, 8, 16]                                     # numbers: ordinal
    use_rslora: [true, false]                              # anything else: categorical
    learning_rate: {low: 1e-6, high: 1e-3, log: true}      # a range: int or float
    lora_dropout: 0.1                                      # one value: fixed
    warmup_ratio: null                                     # not in the space (takes it out of a preset)

Each has a `default`: unless given, the published one where it fits, else the middle of the range (the
first choice of a categorical). In the preset `recommended`, and in every space that the sampler `bracket`
searches, a default that nobody wrote is what `loratune recommend` says of model and data; it is filled in
when the study begins. `when: {other: [values]}` makes a parameter conditional: it exists only while an
earlier one has one of these values, else the constant of `training` holds.

To Optuna an ordinal is either an integer index, under the name `<name>_index` (samplers then see the
order), or a categorical of its values ("choice"). Fixed parameters are not shown to Optuna.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ValidationError, ValidatorFunctionWrapHandler, model_serializer, model_validator

from loratune.errors import SpecError
from loratune.spec.hyperparameters import ALIASES, NAMES, published_default
from loratune.spec.parameters import KINDS, Parameter
from loratune.spec.validation_errors import FieldPath, MistakesError, dotted, found_in, not_allowed, shown
from loratune.system.names import nearest

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import BaseTrial

Ordinals = Literal["index", "choice"]

_RANK = {"type": "ordinal", "values": [4, 8, 16, 32, 64, 128, 256, 512], "default": 8}
_DROPOUT = {"type": "ordinal", "values": [0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0], "default": 0.1}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # Outside the published protocol: its defaults are what `loratune recommend` says of model and data. Learning rates reach
    # from 1e-5, far below the best of every public sweep, to what models a hundred wide want, where the published bound of
    # 1e-3 binds. Dropout 1, which silences the adapter, is left out.
    "recommended": {
        "lora_r": {"type": "ordinal", "values": [4, 8, 16, 32, 64, 128, 256]},
        "alpha_ratio": {"type": "ordinal", "values": [0.25, 0.5, 1.0, 2.0]},
        "lora_dropout": {"type": "ordinal", "values": [0.0, 0.05, 0.1]},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True},
        "batch_size": {"type": "ordinal", "values": [4, 8, 16, 32, 64, 128]},
        "target_modules": {"type": "categorical", "choices": ["qv", "qkvo", "mlp", "all-linear"]},
    },
    # The 100-evaluation round of arXiv 2312.00949.
    "published": {
        "lora_r": _RANK,
        "lora_alpha": {"type": "int", "low": 1, "high": 64, "default": 32},
        "lora_dropout": _DROPOUT,
        "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-3, "log": True, "default": 1e-5},
    },
    # The scale alpha / r instead of alpha, which sat on its bound in 40 of the published 100 points: from
    # the best of them, 64 / 512, to the largest scale that the published space holds, 64 / 4.
    "ratio": {
        "lora_r": _RANK,
        "alpha_ratio": {"type": "float", "low": 0.125, "high": 16.0, "log": True, "default": 4.0},
        "lora_dropout": _DROPOUT,
        "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True, "default": 1e-5},
    },
}


class SearchSpace(BaseModel, frozen=True, defer_build=True):
    """The searched hyperparameters, in the order in which they are suggested."""

    parameters: dict[str, Parameter]
    unwritten: frozenset[str] = frozenset()  # parameters whose default nobody wrote
    recommended: bool = False  # whether it is made of the preset of that name
    to_fill: bool = False  # whether the recommendation is to take the place of the defaults that nobody wrote

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, definition: "str | Mapping[str, Any]") -> Self:
        """A space from a preset's name or from a mapping, short forms included. Raises SpecError with every mistake."""
        try:
            return cls.model_validate(definition)
        except ValidationError as error:
            found = found_in(error, cls)
            raise SpecError("\n".join(f"{dotted(('search_space', *path))}: {sentence}" for path, sentence in found)) from None

    @property
    def conditional(self) -> bool:
        """Whether some parameter exists only for some values of another."""
        return any(parameter.when for parameter in self.parameters.values())

    def distributions(self, ordinals: Ordinals) -> "dict[str, BaseDistribution]":
        """Optuna's names and distributions: conditional parameters included, fixed ones absent."""
        searched = {p.key(ordinals): p.distribution(ordinals) for p in self.parameters.values()}
        return {key: distribution for key, distribution in searched.items() if distribution is not None}

    def suggest(self, trial: "BaseTrial", ordinals: Ordinals) -> dict[str, Any]:
        """Ask `trial` for each active parameter in order. Returns their real values, fixed ones included."""
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.active(values):
                values[name] = parameter.suggest(trial, ordinals)
        return values

    def decode(self, params: Mapping[str, Any], ordinals: Ordinals) -> dict[str, Any]:
        """Real values from Optuna's `trial.params`; what `suggest` returned for them."""
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.active(values):
                raw = None if parameter.type == "fixed" else params[parameter.key(ordinals)]
                values[name] = parameter.decode(raw, ordinals)
        return values

    def encode(self, values: Mapping[str, Any], ordinals: Ordinals) -> dict[str, Any]:
        """Optuna's names and values from real ones: the inverse of `decode`; inactive and fixed parameters are left out."""
        return {
            p.key(ordinals): p.encode(values[name], ordinals)
            for name, p in self.parameters.items()
            if p.type != "fixed" and name in values and p.active(values)
        }

    def default_values(self) -> dict[str, Any]:
        """The real values of the space's default point, fixed ones included."""
        values: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            if parameter.active(values):
                values[name] = parameter.default
        return values

    def with_defaults(self, values: Mapping[str, Any]) -> Self:
        """The space with these values in place of the defaults that nobody wrote, as if written. Raises SpecError."""
        written = {name: {"type": p.type} | p.model_dump(exclude_defaults=True) for name, p in self.parameters.items()}
        for name in self.unwritten & values.keys():
            if self.parameters[name].type != "fixed":
                written[name]["default"] = values[name]
        return self.of(written).closed()

    def closed(self) -> Self:
        """The space with its defaults as they are, as if they had been written."""
        return self.model_copy(update={"unwritten": frozenset(), "recommended": False, "to_fill": False})

    def opened(self) -> Self:
        """The space whose defaults that nobody wrote are still to be filled in."""
        return self.model_copy(update={"to_fill": bool(self.unwritten)})

    def defaults(self, ordinals: Ordinals) -> dict[str, Any]:
        """The default point in Optuna's names and values, for `study.enqueue_trial`."""
        return self.encode(self.default_values(), ordinals)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """What people may write, short forms included."""
        scalar: dict[str, Any] = {"type": ["boolean", "number", "string"]}
        several = {"type": "array", "items": scalar, "minItems": 1}
        fields: dict[str, Any] = {
            "type": {"enum": list(KINDS)},
            **{key: {"type": "number"} for key in ("low", "high", "step")},
            "log": {"type": "boolean"},
            **dict.fromkeys(("values", "choices"), several),
            **dict.fromkeys(("value", "default"), scalar),
            "when": {"type": "object", "additionalProperties": {"anyOf": [scalar, several]}},
        }
        full = {"type": "object", "properties": fields, "additionalProperties": False}
        parameter = {"anyOf": [{"type": "null"}, scalar, several, full]}
        properties = {"preset": {"enum": list(PRESETS)}, **dict.fromkeys(NAMES, parameter)}
        return {"anyOf": [{"enum": list(PRESETS)}, {"type": "object", "properties": properties, "additionalProperties": False}]}

    @model_serializer
    def _written(self) -> dict[str, Any]:
        """What `of` reads back as an equal space: a default that is to be filled in is not written."""
        written = {name: {"type": p.type} | p.model_dump(mode="json", exclude_defaults=True) for name, p in self.parameters.items()}
        if not self.to_fill:
            return written
        for name in self.unwritten:
            written[name].pop("default", None)
        if self.recommended:
            return {"preset": "recommended", **dict.fromkeys(n for n in PRESETS["recommended"] if n not in written), **written}
        return written

    @model_validator(mode="wrap")
    @classmethod
    def _read(cls, given: Any, handler: ValidatorFunctionWrapHandler) -> Self:
        """Presets, aliases and short forms to full definitions; then everything checked, all mistakes at once."""
        if isinstance(given, cls):
            return given
        mistakes: list[tuple[FieldPath, str]] = []
        definitions, unwritten = _expand(given, mistakes)
        recommended = given == "recommended" or (isinstance(given, Mapping) and given.get("preset") == "recommended")
        try:
            kind = {"recommended": recommended and bool(unwritten), "to_fill": recommended and bool(unwritten)}
            space = handler({"parameters": definitions, "unwritten": unwritten, **kind})
            if not mistakes:
                mistakes += _cross_checks(space.parameters)
        except ValidationError as error:
            # pydantic's path is ("parameters", name, "int", "low"); people write name and low.
            mistakes += [((*path[1:2], *path[3:]), text) for path, text in found_in(error, cls)]
        if mistakes:
            raise MistakesError(mistakes)
        return space


def _expand(given: Any, mistakes: list[tuple[FieldPath, str]]) -> tuple[dict[str, dict[str, Any]], frozenset[str]]:
    """(full definitions by canonical name, in order, those whose default nobody wrote); what cannot be read is added to `mistakes`."""
    if isinstance(given, str):
        given = {"preset": given}
    if not isinstance(given, Mapping):
        raise MistakesError([((), f"got {shown(given)}; needed: a preset ({', '.join(PRESETS)}) or a mapping of parameters")])
    preset = given.get("preset")
    if preset is not None and preset not in list(PRESETS):
        mistakes.append((("preset",), not_allowed(preset, PRESETS)))
    definitions: dict[str, Any] = dict(PRESETS.get(preset, {})) if isinstance(preset, str) else {}
    seen: dict[str, str] = {}
    wrote = set[str]()
    for written, value in ((str(key), value) for key, value in given.items()):
        name = ALIASES.get(written, written)
        if written == "preset":
            continue
        if name not in NAMES:
            mistakes.append(((written,), f"not a searchable parameter{nearest(written, NAMES) or '; these are: ' + ', '.join(NAMES)}"))
        elif name in seen:
            mistakes.append(((name,), f"{seen[name]!r} and {written!r} are two names for the same parameter; give one"))
        elif value is None:
            definitions.pop(name, None)
        else:
            try:
                definitions[name] = _definition(name, value, definitions.get(name))
            except ValueError as error:
                mistakes.append(((name,), str(error)))
                definitions.pop(name, None)
        seen.setdefault(name, written)
        if isinstance(value, Mapping) and value.get("default") is not None:
            wrote.add(name)
    full = {name: _with_default(name, definition) for name, definition in definitions.items()}
    return full, frozenset(full) - wrote


def _definition(name: str, value: Any, preset: dict[str, Any] | None) -> dict[str, Any]:
    """One parameter's definition from its short or long form, `type` inferred; a mapping changes its preset's fields."""
    number = NAMES[name].kind in ("int", "float")
    if isinstance(value, Mapping):
        fields = {str(key): item for key, item in value.items()}
    elif isinstance(value, list | tuple):
        fields = {"values" if number else "choices": list(value)}
    else:
        fields = {"value": value}
    if "name" in fields:
        raise ValueError("unknown field 'name'; the parameter's name is its key")
    if "type" not in fields:
        fields = {"type": _inferred_type(name, fields, preset), **fields}
    if preset and isinstance(value, Mapping) and fields["type"] == preset["type"]:
        fields = {**preset, **fields}
    if isinstance(fields.get("when"), Mapping):
        fields["when"] = {ALIASES.get(key, key): item if isinstance(item, list | tuple) else [item] for key, item in fields["when"].items()}
    return {"name": name, **fields}


def _inferred_type(name: str, fields: dict[str, Any], preset: dict[str, Any] | None) -> Any:
    for key, kind in (("values", "ordinal"), ("choices", "categorical"), ("value", "fixed")):
        if key in fields:
            return kind
    bounds = [fields[key] for key in ("low", "high") if key in fields]
    if preset and len(bounds) < 2:
        return preset["type"]
    if not bounds:
        raise ValueError(f"got {shown(fields)}; needed: a value, a list, or a mapping with low and high, values, choices or value")
    whole = all(isinstance(bound, int) for bound in bounds)
    return "int" if NAMES[name].kind == "int" or (whole and NAMES[name].often_whole) else "float"


def _with_default(name: str, definition: dict[str, Any]) -> dict[str, Any]:
    definition = {"name": name, **definition}
    kind = KINDS.get(definition["type"]) if isinstance(definition["type"], str) else None
    if kind is not None and definition.get("default") is None:
        try:
            definition["default"] = kind.middle(definition, published_default(name))
        except (ArithmeticError, LookupError, TypeError, ValueError):
            definition["default"] = 0  # something else in the definition is wrong, and its check speaks first
    return definition


def _cross_checks(parameters: Mapping[str, Parameter]) -> list[tuple[FieldPath, str]]:
    """Mistakes that concern several parameters."""
    found: list[tuple[FieldPath, str]] = []
    if all(parameter.type == "fixed" for parameter in parameters.values()):
        found.append(((), f"nothing to search: give at least one of {', '.join(NAMES)} a range, or write: published"))
    if "lora_alpha" in parameters and "alpha_ratio" in parameters:
        found.append((("alpha_ratio",), "lora_alpha = alpha_ratio * lora_r, so give one of them (null takes the other out)"))
    earlier: list[str] = []
    for name, parameter in parameters.items():
        for other, values in parameter.when.items():
            if other not in earlier:
                hint = "; it must stand before" if other in parameters else nearest(other, earlier)
                found.append(((name, "when"), f"{other!r} is not an earlier parameter of this space{hint}"))
            else:
                found += [
                    ((name, "when", other), f"{other} never has the value {value!r}")
                    for value in values
                    if not parameters[other].holds(value)
                ]
        earlier.append(name)
    return found
