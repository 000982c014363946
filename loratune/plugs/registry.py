"""Registries: names -> plugs, those of other packages included, without importing what a plug makes."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, TypeVar

from loratune.errors import SpecError
from loratune.system.names import nearest

_SCALARS: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "None": type(None)}


@dataclass(frozen=True, kw_only=True)
class Plug:
    """One declaration. `make` is what is made when the plug is used: a class or function, or its address "package.module:name".

    It is called with keyword arguments alone: those that the study gives (each kind lists them) where it names them, and the user's
    options, which are its other keyword arguments of scalar types.
    """

    name: str
    make: str | Callable[..., Any]
    help: str = ""  # one line
    options: Mapping[str, str] = field(default_factory=dict)  # help on options, by name; their types are read from `make`
    given: ClassVar[tuple[str, ...]] = ()  # keyword arguments that come from the study
    not_options: tuple[str, ...] = ()  # keyword arguments of scalar types that are none

    @property
    def factory(self) -> Callable[..., Any]:
        """What `make` names, imported."""
        return imported(self.make)


def imported(address: str | Callable[..., Any]) -> Callable[..., Any]:
    """What stands at "package.module:name"; anything else as it is."""
    if not isinstance(address, str):
        return address
    module, _, attribute = address.partition(":")
    return getattr(importlib.import_module(module), attribute)


P = TypeVar("P", bound=Plug)


class Registry(Generic[P]):
    """The plugs of one kind.

    noun: as in an error, "sampler". Entry points of the group `loratune.<noun>s` are found by name and imported when asked for.
    """

    def __init__(self, noun: str, kind: type[P], builtin: Iterable[P]) -> None:
        self.noun, self.group, self.kind = noun, f"loratune.{noun}s", kind
        self._own = {plug.name: plug for plug in builtin}
        self._registered: dict[str, P] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names: loratune's in their order, then those of other packages and of `register`."""
        return tuple(dict.fromkeys([*self._own, *sorted(point.name for point in self._points), *self._registered]))

    @property
    def builtin(self) -> tuple[str, ...]:
        """The names of loratune's own, for a field's description."""
        return tuple(self._own)

    @property
    def described(self) -> str:
        """loratune's own with their help: `full: every trial to its end; halving: ...`."""
        return "; ".join(f"{name}: {plug.help}" for name, plug in self._own.items())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> P:
        """The plug of that name. Raises SpecError for an unknown one, and for one that is broken, naming its distribution."""
        points = [point for point in self._points if point.name == name]
        owners = [*(["loratune"] if name in self._own else []), *map(_owner, points), *(["register"] if name in self._registered else [])]
        if len(owners) > 1:
            raise SpecError(f"{self.noun} {name!r} is declared twice: by {' and by '.join(owners)}. Uninstall or rename one of them.")
        if not owners:
            raise SpecError(f"unknown {self.noun} {name!r}; allowed: {', '.join(self.names)}{nearest(name, self.names)}")
        return self._from(points[0]) if points else self._own.get(name) or self._registered[name]

    def register(self, plug: P) -> None:
        """Add a plug for this process. Raises SpecError for a name that another one has."""
        if not isinstance(plug, self.kind):
            raise SpecError(f"{plug!r} is no {self.kind.__name__}")
        if plug.name in self.names and self._registered.get(plug.name) != plug:
            raise SpecError(f"there is a {self.noun} {plug.name!r} already")
        self._registered[plug.name] = plug

    def unregister(self, name: str) -> None:
        self._registered.pop(name, None)

    def those(self, able: Callable[[P], bool]) -> list[str]:
        """The names of all plugs with a capability; a broken one of another package is left out."""
        found = []
        for name in self.names:
            try:
                plug = self[name]
            except SpecError:
                continue
            if able(plug):
                found.append(name)
        return found

    def options(self, name: str) -> dict[str, list[str]]:
        """The plug's options and their types: keyword arguments of scalar types that the study does not give. Imports what it makes."""
        plug = self[name]
        found = {}
        for option, parameter in inspect.signature(self.factory(name)).parameters.items():
            annotation = parameter.annotation
            text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
            kinds = ["str"] if "Literal[" in text else [kind.strip() for kind in text.split("|")]
            if option not in {*plug.given, *plug.not_options} and all(kind in _SCALARS for kind in kinds):
                found[option] = kinds
        return found

    def keywords(self, name: str, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """What the plug's factory is called with: of `given` what it names, and the user's options.

        Raises SpecError for an option that it has not, or of a wrong type; for a factory that cannot be imported or needs more.
        """
        plug = self[name]
        parameters = inspect.signature(self.factory(name)).parameters
        needed = {key for key, p in parameters.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if lacking := sorted(needed - {*given, *options}):
            raise self._broken(name, f"it needs {', '.join(lacking)}, which nobody gives; a {self.noun} is given {', '.join(given)}")
        allowed = self.options(name)
        for option, value in options.items():
            if option not in allowed:
                these = f"allowed: {', '.join(allowed)}{nearest(option, allowed)}" if allowed else "it has none"
                raise SpecError(f"{self.noun} {name} has no option {option!r}; {these}")
            kinds = allowed[option]
            if not any(isinstance(value, _SCALARS[kind]) and (isinstance(value, bool) <= (kind == "bool")) for kind in kinds):
                about = f" ({plug.options[option]})" if option in plug.options else ""
                raise SpecError(f"{self.noun} {name}: option {option} = {value!r} must be {' or '.join(kinds)}{about}")
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {**{key: value for key, value in given.items() if everything or key in parameters}, **options}

    def make(self, name: str, kind: type, given: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
        """Call the plug's factory, which makes a `kind`. Raises as `keywords`, and SpecError where it makes something else."""
        return self.made(name, kind, self.keywords(name, given, options or {}))

    def made(self, name: str, kind: type, keywords: Mapping[str, Any]) -> Any:
        """Call the plug's factory with these."""
        made = self.factory(name)(**keywords)
        if not isinstance(made, kind):
            raise self._broken(name, f"it makes {made!r:.60}, needed: a {kind.__module__}.{kind.__qualname__}")
        return made

    def factory(self, name: str) -> Callable[..., Any]:
        """What the plug makes, imported. Raises SpecError naming the distribution of a plug whose factory cannot be imported."""
        plug = self[name]
        if name in self._own:
            return plug.factory
        try:
            return plug.factory
        except Exception as error:  # whatever another package's modules raise
            raise self._broken(name, f"{plug.make}: {type(error).__name__}: {error}") from error

    @property
    def _points(self) -> tuple[EntryPoint, ...]:
        return _entry_points(self.group, tuple(sys.path))

    def _from(self, point: EntryPoint) -> P:
        try:
            plug = point.load()
        except Exception as error:  # whatever another package's modules raise
            raise self._broken(point.name, f"{type(error).__name__}: {error}") from error
        if not isinstance(plug, self.kind):
            raise self._broken(point.name, f"{point.value} is {plug!r:.60}, needed: a loratune.plugs.{self.kind.__name__}")
        if plug.name != point.name:
            raise self._broken(point.name, f"{point.value} calls itself {plug.name!r}")
        return plug

    def _broken(self, name: str, why: str) -> SpecError:
        owner = next((_owner(point) for point in self._points if point.name == name), "")
        whose = f" of the distribution {owner}" if owner else ""
        return SpecError(f"{self.noun} {name!r}{whose} cannot be used: {why}.{f' Repair or uninstall {owner}.' if owner else ''}")


def _owner(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


@functools.lru_cache(maxsize=64)
def _entry_points(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Reading all distributions' metadata takes tens of milliseconds: once for each `sys.path`."""
    return tuple(entry_points(group=group))
