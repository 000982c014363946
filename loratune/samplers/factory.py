"""A study's sampler, by name. Which there are, with their capabilities, is declared in `loratune/plugs/builtin.py`."""

from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from loratune.errors import SpecError
from loratune.plugs import SAMPLERS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from loratune.samplers.bracket_rule import Proposal
    from loratune.samplers.prior import Prior


def build(
    name: str,
    *,
    search_space: "dict[str, BaseDistribution]",
    seed: int,
    options: dict[str, Any],
    x0: dict[str, Any] | None = None,
    workers: int = 1,
    conditional: bool = False,
    trials: int | None = None,
    prior: "Prior | None" = None,
    constants: dict[str, Any] | None = None,
) -> "BaseSampler":
    """The sampler of a study; what it proposes depends on the stored trials and the trial's number alone.

    options: the sampler's own keyword arguments, as in the study's YAML.
    x0: the starting point, in the values of `search_space`.
    workers: trials that train at the same time.
    conditional: whether some parameters of the space exist only for some values of others.
    trials: the study's budget of them.
    prior, constants: how sure `x0` is as the first guess, and the hyperparameters that are not searched.

    Raises SpecError for an unknown name, an unknown option or one of a wrong type, a conditional
    space where the sampler cannot search one; MissingExtraError for nni_tpe without nni.
    """
    plug = SAMPLERS[name]
    if conditional and not plug.conditional:
        able = ", ".join(SAMPLERS.those(lambda other: other.conditional))
        raise SpecError(f"sampler {name} cannot search a space with conditional parameters ('when'); these can: {able}")
    study = {"seed": seed, "search_space": search_space, "x0": x0, "workers": workers}
    keywords = SAMPLERS.keywords(name, study, options)  # before what follows, so that a mistake costs no import of Optuna
    more = {"conditional": conditional, "trials": trials, "prior": prior, "constants": constants or {}}
    keywords = {**keywords, **plug.settings({**study, **more}), **options}
    from loratune.samplers.seeded import SeededSampler, ViewSampler

    make = partial(_made, name, keywords)
    try:
        return ViewSampler(make(seed)) if plug.remembers else SeededSampler(make, seed)
    except ValueError as error:
        raise SpecError(f"sampler {name}: {error}") from error


def _made(name: str, keywords: dict[str, Any], seed: int) -> "BaseSampler":
    from optuna.samplers import BaseSampler

    return SAMPLERS.made(name, BaseSampler, {**keywords, "seed": seed} if "seed" in keywords else keywords)


def ordinals(name: str) -> Literal["index", "choice"]:
    """Whether the sampler wants an ordinal parameter as an integer index or as a categorical of its values."""
    return SAMPLERS[name].ordinals


def starts_itself(name: str) -> bool:
    """Whether the sampler proposes the first trial too, rather than being given the space's defaults."""
    return SAMPLERS[name].starts_itself


def length(study: "Study", number: int) -> Fraction:
    """The share of a full run that the sampler wants the trial trained, once it has proposed it."""
    from loratune.samplers.bracket_sampler import length_of

    return length_of(study.get_trials(deepcopy=False)[number])


def tell_untuned(study: "Study", loss: float) -> None:
    """Tell a sampler that asks for it the loss of the model before tuning."""
    from loratune.samplers.bracket_sampler import UNTUNED

    study._storage.set_study_system_attr(study._study_id, UNTUNED, loss)


def outlook(study: "Study") -> "Proposal | None":
    """What a sampler that can tell expects to be left to find; else None."""
    sampler = getattr(study.sampler, "inner", study.sampler)
    return sampler.proposal(study) if hasattr(sampler, "proposal") else None


def ready(study: "Study") -> bool:
    """Whether the study's sampler can propose now; False where it first needs pending results.

    Raises SearchSpentError when it never will again.
    """
    sampler = study.sampler
    return not hasattr(sampler, "ready") or bool(sampler.ready(study))
