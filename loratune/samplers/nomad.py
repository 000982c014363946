"""NOMAD's mesh adaptive direct search (MADS) as an Optuna sampler, through PyNomadBBO.

MADS (Audet and Dennis, SIAM J. Optim. 17(1), 2006) evaluates points of a mesh around the best one,
refines the mesh after failures and coarsens it after success. NOMAD 4 (Audet et al., ACM TOMS 48(3),
2022) wants to call its blackbox, so it runs in a child process, `nomad_process.py`, that hands out
blocks of points and waits for their answers.

The child is never saved. What NOMAD was told is: each NOMAD run and each answered block is a system
attribute of the Optuna study, written before NOMAD hears it. A process that finds no child of its
own starts one and answers it from that log, and NOMAD, being deterministic, ends where it was.

    study   "nomad:0002"         how run 2 was started: x0, bounds, types, seed, search space
            "nomad:0002:000005"  what was told about its block 5: [loss or null, ...]; of several objectives [[...] or null, ...]
    trial   "nomad"              {"slot": [run, block, index] or null, "params": {name: number}}

Points that another trial has answered, or is about to, are not evaluated again.
"""

import platform
import threading
import warnings
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from loratune.errors import LoratuneError, MissingExtraError, SearchSpentError
from loratune.samplers.base import Space, derived_seed, from_internal, known_search_space, random_value, to_internal
from loratune.samplers.nomad_child import Child, Run
from loratune.samplers.nomad_points import KEY, Code, Evaluated, Point, Slot, told_of


class NomadSampler(BaseSampler):
    """Proposes what NOMAD's MADS wants to evaluate next. Constraints by extreme barrier.

    Several objectives are searched by DMulti-MADS (Bigeon, Audet and Le Digabel, Computational Optimization and
    Applications 79, 2021), which polls around points of the front by turns.

    Floats are continuous, on log10 when `log`; stepped floats, integers and categoricals are integer
    indices, so the choices of a categorical should stand in a meaningful order. Failed trials are told
    as failed, and so are those that violate a constraint; pruned ones with their last intermediate value.

    NOMAD proposes nothing while results are pending: one point at a time, or a block of `block_size`.
    A trial that is asked for nevertheless gets a random point (`ready` tells beforehand); so does a
    trial of which some parameters are fixed. Both teach NOMAD only if it asks for that very point.

    search_space: None takes the intersection of the study's trials, the first of which is then random.
    x0: starting points, in the search space's own values; the study's trials so far are added to them.
    latin_hypercube: number of points of an initial Latin hypercube.
    block_size: points that NOMAD hands out at once; about 1/8 of the places stay empty, with several objectives 4 in 10.
    max_evaluations: of one NOMAD run.
    restart: when a NOMAD run ends (its mesh is as fine as it gets), start another one from the best
        point (of several objectives the front) and a random new one, with another seed.
    when_spent: after the last point of a finite space, or of the last run, "raise" SearchSpentError
        or propose "random" points.

    Raises MissingExtraError when PyNomadBBO is not installed.
    """

    def __init__(
        self,
        *,
        search_space: Space | None = None,
        x0: list[dict[str, Any]] | dict[str, Any] | None = None,
        latin_hypercube: int = 0,
        block_size: int = 1,
        seed: int | None = None,
        max_evaluations: int = 100_000,
        restart: bool = True,
        when_spent: Literal["raise", "random"] = "raise",
    ) -> None:
        for name, number, least in (
            ("latin_hypercube", latin_hypercube, 0),
            ("block_size", block_size, 1),
            ("max_evaluations", max_evaluations, 1),
        ):
            if number < least:  # NOMAD would answer with a segmentation fault
                raise ValueError(f"NomadSampler: {name} must be at least {least}, got {number}")
        if find_spec("PyNomad") is None:
            arm = platform.machine() == "aarch64"
            cause = "PyNomadBBO has no wheel for Linux on aarch64; the other samplers do without" if arm else ""
            raise MissingExtraError("NOMAD 4", cause=cause, command="pip install PyNomadBBO")
        self._space = search_space
        self._x0 = [x0] if isinstance(x0, dict) else list(x0 or [])
        self._latin_hypercube = latin_hypercube
        self._block_size = block_size
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._max_evaluations = max_evaluations
        self._restart = restart
        self._when_spent = when_spent
        self._warned = False
        self._child: Child | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def close(self) -> None:
        """End the child process. The next proposal starts another one."""
        with self._lock:
            if self._child is not None:
                self._child.close()
            self._child = None

    def ready(self, study: Study) -> bool:
        """Whether the next trial can have NOMAD's point, or needs none. Raises SearchSpentError when there never will be one."""
        if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # enqueued: its parameters are given
            return True
        space = known_search_space(study, self._space)
        with self._lock:
            return not space or self._next(study, space) is not None

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> Space:
        return known_search_space(study, self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        if not search_space:
            return {}
        with self._lock:
            earlier = trial.system_attrs.get(KEY)
            if earlier is not None and earlier["params"].keys() == search_space.keys():  # killed before its parameters were stored
                return from_internal(earlier["params"], search_space)
            fixed = trial.system_attrs.get("fixed_params", {}).keys() & search_space.keys()
            proposal = None if fixed else self._next(study, search_space)
            if proposal is not None:
                slot, params = proposal
            else:
                slot, params = None, {name: random_value(self._seed, trial, name, d) for name, d in search_space.items()}
                if not fixed:
                    self._warn(trial)
            record = {"slot": slot, "params": to_internal(params, search_space)}
            study._storage.set_trial_system_attr(trial._trial_id, KEY, record)
            return params

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        return random_value(self._seed, trial, param_name, param_distribution)

    def _next(self, study: Study, space: Space) -> tuple[Slot, dict[str, Any]] | None:
        """The next point nobody has taken, after telling NOMAD all that can be told; None while results are pending."""
        code = Code(space)
        evaluated = Evaluated(study, space, code)
        log = _read_log(study)
        if not log or log[-1].start["space"] != code.key:
            log.append(self._new_run(study, len(log), code, evaluated, evaluated.unseen(self._seed, len(log))))
        while True:
            run = log[-1]
            child = self._replayed(run)
            if child.block is None:
                if not run.told:  # it refused to begin, and so would the next
                    raise LoratuneError(f"NOMAD ended before its first point: {child.reason or 'it gives no reason'}.")
                unseen = evaluated.unseen(self._seed, len(log))
                if not self._restart:
                    self._spent(f"NOMAD stopped: {child.reason}")
                    return None
                if unseen is None:
                    self._spent(f"all {code.size} points of the search space have been tried")
                    return None
                log.append(self._new_run(study, len(log), code, evaluated, unseen))
                continue
            here = (len(log) - 1, len(run.told))
            owners = [evaluated.owner((*here, index), point) for index, point in enumerate(child.block)]
            for index, owner in enumerate(owners):
                if owner is None:
                    return (*here, index), code.decode(child.block[index])
            if not all(owner.state.is_finished() for owner in owners if owner is not None):
                return None
            answers = [told_of(owner, study.directions) for owner in owners if owner is not None]
            study._storage.set_study_system_attr(study._study_id, f"{KEY}:{here[0]:04d}:{here[1]:06d}", answers)
            run.told.append(answers)

    def _replayed(self, run: "Run") -> "Child":
        """A child that has been told exactly what `run` says."""
        if self._child is not None and not self._child.can_follow(run):
            self.close()
        if self._child is None:
            self._child = Child(run.start)
        child = self._child
        try:
            for answers in run.told[len(child.told) :]:
                child.tell(answers)
        except BaseException:  # Ctrl-C in the middle of a message: the pipe is out of step, the log is not
            self.close()
            raise
        return child

    def _new_run(self, study: Study, number: int, code: "Code", evaluated: "Evaluated", unseen: Point | None) -> "Run":
        """Decide how run `number` starts, and store it."""
        if number == 0:
            x0 = [code.encode_checked(params) for params in self._x0] + evaluated.promising()
            if not x0 and not self._latin_hypercube and unseen is not None:
                x0 = [unseen]
        else:
            x0 = evaluated.best() + ([unseen] if unseen is not None else [])
        start: dict[str, Any] = {
            "space": code.key,
            "x0": [point for i, point in enumerate(x0) if point not in x0[:i]],
            "lower": code.lower,
            "upper": code.upper,
            "types": code.types,
            # Small, for NOMAD steps its generator once per unit of the seed (12 s for 1e9); not 0, which it treats apart.
            "seed": 1 + derived_seed(self._seed, number, "NOMAD") % 2**16,
            "latin_hypercube": self._latin_hypercube if number == 0 else 0,
            "block_size": self._block_size,
            "max_evaluations": self._max_evaluations,
        }
        if len(study.directions) > 1:
            start["objectives"] = len(study.directions)
        study._storage.set_study_system_attr(study._study_id, f"{KEY}:{number:04d}", start)
        return Run(start, [])

    def _spent(self, why: str) -> None:
        if self._when_spent == "raise":
            raise SearchSpentError(f"The search is over: {why}.")

    def _warn(self, trial: FrozenTrial) -> None:
        if not self._warned:
            warnings.warn(
                f"NOMAD has no point for trial {trial.number} while the results of others are pending: it gets a random one. "
                "For parallel trials, set block_size to their number; trials of a killed process that nobody will finish "
                "must be told as failed (study.tell(number, state=TrialState.FAIL)).",
                stacklevel=2,
            )
        self._warned = True


def _read_log(study: Study) -> list[Run]:
    attrs = study._storage.get_study_system_attrs(study._study_id)
    log: list[Run] = []
    for key in sorted(key for key in attrs if key.startswith(f"{KEY}:")):  # a run sorts before its blocks
        if key.count(":") == 1:
            log.append(Run(attrs[key], []))
        else:
            log[-1].told.append(list(attrs[key]))
    return log
