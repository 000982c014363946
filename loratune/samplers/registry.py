"""Names -> samplers. A new sampler is one file and one line of `_CLASSES`."""

import difflib
import importlib
import inspect
from collections.abc import Iterable
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from loratune.errors import SpecError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from loratune.samplers.bracket import Decision
    from loratune.samplers.prior import Prior

_CLASSES = {
    "bracket": "loratune.samplers.bracket_sampler:BracketSampler",
    "nomad": "loratune.samplers.nomad:NomadSampler",
    "nni_tpe": "loratune.samplers.nni_tpe:NniTpeSampler",
    "tpe": "optuna.samplers:TPESampler",
    "gp": "optuna.samplers:GPSampler",
    "cmaes": "optuna.samplers:CmaEsSampler",
    "qmc": "loratune.samplers.qmc:NumberedQmcSampler",
    "random": "optuna.samplers:RandomSampler",
    "nsga2": "optuna.samplers:NSGAIISampler",
}
NAMES: tuple[str, ...] = tuple(_CLASSES)
_NUMERIC = ("tpe", "gp", "cmaes", "qmc")  # model an ordinal better as a number
_UNCONDITIONAL = ("bracket", "nomad", "nni_tpe")
_NOT_OPTIONS = ("seed", "sequence_seed", "search_space", "when_spent", "start", "spread", "outside", "slots")  # the study's to decide
_SCALARS: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str, "None": type(None)}


def build(
    name: str,
    *,
    search_space: "dict[str, BaseDistribution]",
    seed: int,
    options: dict[str, Any],
    x0: dict[str, Any] | None = None,
    workers: int = 1,
    conditional: bool = False,
    prior: "Prior | None" = None,
    constants: dict[str, Any] | None = None,
) -> "BaseSampler":
    """The sampler of a study; what it proposes depends on the stored trials and the trial's number alone.

    options: the sampler's own keyword arguments, as in the study's YAML.
    x0: NOMAD's starting point, in the values of `search_space`. Not CMA-ES's: from the published default,
        a poor point, its first population stays too near (worse than random search after 45 trials).
    workers: trials that train at the same time.
    conditional: whether some parameters of the space exist only for some values of others.
    prior, constants: of bracket; how sure `x0` is as the first guess, and the hyperparameters that are not searched.

    Raises SpecError for an unknown name, an unknown option or one of a wrong type, a conditional
    space where the sampler cannot search one; MissingExtraError for nni_tpe without nni.
    """
    _known(name)
    if conditional and name in _UNCONDITIONAL:
        able = ", ".join(other for other in NAMES if other not in _UNCONDITIONAL)
        raise SpecError(f"sampler {name} cannot search a space with conditional parameters ('when'); these can: {able}")
    sampler_class = _sampler_class(name)
    _check_options(name, sampler_class, options)
    options = dict(options)
    # After the checks and the lookup, so that a mistake costs no import of Optuna.
    from loratune.samplers.seeded import SeededSampler, ViewSampler

    try:
        if name == "nomad":
            options.setdefault("block_size", workers)
            return ViewSampler(sampler_class(search_space=search_space, x0=x0, seed=seed, **options))
        if name == "bracket":
            sure = {} if prior is None else {"spread": prior.sd, "outside": prior.outside}
            start = {**{name: value for name, value in (constants or {}).items() if name not in search_space}, **(x0 or {})}
            return ViewSampler(sampler_class(search_space, start=start, slots=workers, seed=seed, **sure, **options))
        if name == "nni_tpe":
            return ViewSampler(sampler_class(search_space=search_space, seed=seed, **options))
        if name == "tpe" and conditional:
            options.setdefault("group", True)
        if name == "tpe":
            options.setdefault("constant_liar", workers > 1)
        if name == "qmc":  # one scrambled sequence for the whole study
            options = {"scramble": True, **options, "sequence_seed": seed, "search_space": None if conditional else search_space}
        return SeededSampler(partial(_seeded, sampler_class, options), seed)
    except ValueError as error:
        raise SpecError(f"sampler {name}: {error}") from error


def ordinals(name: str) -> Literal["index", "choice"]:
    """Whether the sampler wants an ordinal parameter as an integer index or as a categorical of its values."""
    return "index" if _known(name) in _NUMERIC else "choice"


def starts_itself(name: str) -> bool:
    """Whether the sampler proposes the first trial too, rather than being given the space's defaults."""
    return _known(name) == "bracket"


def length(study: "Study", number: int) -> Fraction:
    """The share of a full run that the sampler wants the trial trained, once it has proposed it."""
    from loratune.samplers.bracket_sampler import length_of

    return length_of(study.get_trials(deepcopy=False)[number])


def tell_untuned(study: "Study", loss: float) -> None:
    """Tell a sampler that asks for it the loss of the model before tuning."""
    from loratune.samplers.bracket_sampler import UNTUNED

    study._storage.set_study_system_attr(study._study_id, UNTUNED, loss)


def outlook(study: "Study") -> "Decision | None":
    """What a sampler that can tell expects to be left to find; else None."""
    sampler = getattr(study.sampler, "inner", study.sampler)
    return sampler.decision(study) if hasattr(sampler, "decision") else None


def ready(study: "Study") -> bool:
    """Whether the study's sampler can propose now; False where it first needs pending results.

    Raises SearchSpentError when it never will again.
    """
    sampler = study.sampler
    return not hasattr(sampler, "ready") or bool(sampler.ready(study))


def _seeded(sampler_class: type, options: dict[str, Any], seed: int) -> Any:
    return sampler_class(**options, seed=seed)


def _known(name: str) -> str:
    if name not in _CLASSES:
        raise SpecError(f"unknown sampler {name!r}{_near(name, NAMES)}")
    return name


def _near(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"; {hint}allowed: {', '.join(names)}"


def _sampler_class(name: str) -> Any:
    module, attribute = _CLASSES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def _check_options(name: str, sampler_class: type, options: dict[str, Any]) -> None:
    """Raise SpecError unless every option is a keyword argument of the sampler, of its type."""
    allowed = _options(sampler_class)
    for option, value in options.items():
        if option not in allowed:
            raise SpecError(f"sampler {name} has no option {option!r}{_near(option, allowed) if allowed else '; it has none'}")
        kinds = allowed[option]
        fits = any(isinstance(value, _SCALARS[kind]) and (isinstance(value, bool) <= (kind == "bool")) for kind in kinds)
        if not fits:
            raise SpecError(f"sampler {name}: option {option} = {value!r} must be {' or '.join(kinds)}")


def _options(sampler_class: type) -> dict[str, list[str]]:
    """Names and types of the keyword arguments that a YAML scalar can give."""
    found = {}
    for option, parameter in inspect.signature(sampler_class).parameters.items():
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        kinds = ["str"] if "Literal[" in text else [kind.strip() for kind in text.split("|")]
        if option not in _NOT_OPTIONS and all(kind in _SCALARS for kind in kinds):
            found[option] = kinds
    return found
