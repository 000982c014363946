"""NOMAD's mesh adaptive direct search (MADS) as an Optuna sampler, through PyNomadBBO.

MADS (Audet and Dennis, SIAM J. Optim. 17(1), 2006) evaluates points of a mesh around the best one,
refines the mesh after failures and coarsens it after success. NOMAD 4 (Audet et al., ACM TOMS 48(3),
2022) wants to call its blackbox, so it runs in a child process, `nomad_process.py`, that hands out
blocks of points and waits for their answers.

The child is never saved. What NOMAD was told is: each NOMAD run and each answered block is a system
attribute of the Optuna study, written before NOMAD hears it. A process that finds no child of its
own starts one and answers it from that log, and NOMAD, being deterministic, ends where it was.

    study   "nomad:0002"         how run 2 was started: x0, bounds, types, seed, search space
            "nomad:0002:000005"  what was told about its block 5: [loss or null, ...]
    trial   "nomad"              {"slot": [run, block, index] or null, "params": {name: number}}

Points that another trial has answered, or is about to, are not evaluated again.
"""

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, distribution_to_json
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from loratune.errors import LoratuneError, SearchSpentError
from loratune.samplers.base import (
    Space,
    answer,
    derived_seed,
    from_internal,
    index_of,
    known_search_space,
    number_of_values,
    random_value,
    to_internal,
    value_at,
)

KEY = "nomad"
Point = list[float]  # coordinates as NOMAD sees them
Answer = float | None  # loss to minimise; None: failed
Slot = tuple[int, int, int]  # run, block, index in the block


class NomadSampler(BaseSampler):
    """Proposes what NOMAD's MADS wants to evaluate next. Single-objective; constraints by extreme barrier.

    Floats are continuous, on log10 when `log`; stepped floats, integers and categoricals are integer
    indices, so the choices of a categorical should stand in a meaningful order. Failed trials are told
    as failed, and so are those that violate a constraint; pruned ones with their last intermediate value.

    NOMAD proposes nothing while results are pending: one point at a time, or a block of `block_size`.
    A trial that is asked for nevertheless gets a random point (`ready` tells beforehand); so does a
    trial of which some parameters are fixed. Both teach NOMAD only if it asks for that very point.

    search_space: None takes the intersection of the study's trials, the first of which is then random.
    x0: starting points, in the search space's own values; the study's trials so far are added to them.
    latin_hypercube: number of points of an initial Latin hypercube.
    block_size: points that NOMAD hands out at once; about 1/8 of the places stay empty.
    max_evaluations: of one NOMAD run.
    restart: when a NOMAD run ends (its mesh is as fine as it gets), start another one from the best
        point and a random new one, with another seed.
    when_spent: after the last point of a finite space, or of the last run, "raise" SearchSpentError
        or propose "random" points.
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
        self._space = search_space
        self._x0 = [x0] if isinstance(x0, dict) else list(x0 or [])
        self._latin_hypercube = latin_hypercube
        self._block_size = block_size
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._max_evaluations = max_evaluations
        self._restart = restart
        self._when_spent = when_spent
        self._warned = False
        self._child: _Child | None = None
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
        self._raise_error_if_multi_objective(study)
        return known_search_space(study, self._space)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: Space) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
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
        self._raise_error_if_multi_objective(study)
        return random_value(self._seed, trial, param_name, param_distribution)

    def _next(self, study: Study, space: Space) -> tuple[Slot, dict[str, Any]] | None:
        """The next point nobody has taken, after telling NOMAD all that can be told; None while results are pending."""
        code = _Code(space)
        evaluated = _Evaluated(study, space, code)
        log = _read_log(study)
        if not log or log[-1].start["space"] != code.key:
            log.append(self._new_run(study, len(log), code, evaluated, evaluated.unseen(self._seed, len(log))))
        while True:
            run = log[-1]
            child = self._replayed(run)
            if child.block is None:
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
            answers = [_answer(owner, study.direction) for owner in owners if owner is not None]
            study._storage.set_study_system_attr(study._study_id, f"{KEY}:{here[0]:04d}:{here[1]:06d}", answers)
            run.told.append(answers)

    def _replayed(self, run: "_Run") -> "_Child":
        """A child that has been told exactly what `run` says."""
        if self._child is not None and not self._child.can_follow(run):
            self.close()
        if self._child is None:
            self._child = _Child(run.start)
        child = self._child
        try:
            for answers in run.told[len(child.told) :]:
                child.tell(answers)
        except BaseException:  # Ctrl-C in the middle of a message: the pipe is out of step, the log is not
            self.close()
            raise
        return child

    def _new_run(self, study: Study, number: int, code: "_Code", evaluated: "_Evaluated", unseen: Point | None) -> "_Run":
        """Decide how run `number` starts, and store it."""
        if number == 0:
            x0 = [code.encode_checked(params) for params in self._x0] + evaluated.promising()
            if not x0 and not self._latin_hypercube and unseen is not None:
                x0 = [unseen]
        else:
            x0 = [point for point in (evaluated.best(), unseen) if point is not None]
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
        study._storage.set_study_system_attr(study._study_id, f"{KEY}:{number:04d}", start)
        return _Run(start, [])

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


class _Run(NamedTuple):
    """One NOMAD optimisation: how it was started, and what each of its blocks was answered."""

    start: dict[str, Any]
    told: list[list[Answer]]


def _answer(trial: FrozenTrial, direction: StudyDirection) -> Answer:
    """A finished trial's loss as NOMAD is told it: None where the trial failed, is infeasible, or its loss infinite.

    Infeasible is failed (an extreme barrier): as a PB constraint, one violation among many points that
    violate nothing sent NOMAD 4.6's quadratic models into sub-searches of minutes.
    """
    told = answer(trial, direction)
    return told[0] if told is not None and told[1] == 0 and math.isfinite(told[0]) else None


def _read_log(study: Study) -> list[_Run]:
    attrs = study._storage.get_study_system_attrs(study._study_id)
    log: list[_Run] = []
    for key in sorted(key for key in attrs if key.startswith(f"{KEY}:")):  # a run sorts before its blocks
        if key.count(":") == 1:
            log.append(_Run(attrs[key], []))
        else:
            log[-1].told.append(list(attrs[key]))
    return log


class _Code:
    """The search space as NOMAD sees it: integers (I) and reals (R) between bounds, parameters in their given order."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.key = json.dumps({name: json.loads(distribution_to_json(d)) for name, d in space.items()})
        self.counts = [number_of_values(d) for d in space.values()]
        self.types = "".join("R" if count is None else "I" for count in self.counts)
        self.size = None if None in self.counts else int(np.prod([float(c) for c in self.counts if c is not None]))
        bounds = [_bounds(distribution) for distribution in space.values()]
        self.lower: Point = [low for low, _ in bounds]
        self.upper: Point = [high for _, high in bounds]

    def encode(self, params: dict[str, Any]) -> Point:
        """Raises KeyError for a missing parameter, ValueError for a value outside its distribution."""
        return [
            _real(d, params[name]) if count is None else float(index_of(d, params[name]))
            for (name, d), count in zip(self.space.items(), self.counts, strict=True)
        ]

    def encode_checked(self, params: dict[str, Any]) -> Point:
        """`encode` for a user's starting point. Raises ValueError naming the parameter that does not fit."""
        for name, distribution in self.space.items():
            if name not in params:
                raise ValueError(f"NomadSampler: x0 has no value for {name!r}")
            try:
                fits = distribution._contains(distribution.to_internal_repr(params[name]))
            except (ValueError, TypeError):
                fits = False
            if not fits:
                raise ValueError(f"NomadSampler: x0 has {name} = {params[name]!r}, which is not in {distribution}")
        return self.encode(params)

    def contains(self, point: Point) -> bool:
        return all(low <= x <= high for low, x, high in zip(self.lower, point, self.upper, strict=True))

    def decode(self, point: Point) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for (name, d), count, x in zip(self.space.items(), self.counts, point, strict=True):
            if count is not None:
                values[name] = value_at(d, round(x))
            elif isinstance(d, FloatDistribution):
                values[name] = min(max(10.0**x if d.log else x, d.low), d.high)
        return values


def _bounds(distribution: BaseDistribution) -> tuple[float, float]:
    count = number_of_values(distribution)
    if count is not None:
        return 0.0, count - 1.0
    if not isinstance(distribution, FloatDistribution):
        raise TypeError(f"NomadSampler cannot search {distribution}")
    return _real(distribution, distribution.low), _real(distribution, distribution.high)


def _real(distribution: BaseDistribution, value: float) -> float:
    return float(np.log10(value)) if getattr(distribution, "log", False) else float(value)


class _Evaluated:
    """The study's trials as points: who evaluates which."""

    def __init__(self, study: Study, space: Space, code: _Code) -> None:
        self._code = code
        self._direction = study.direction
        self._trials: list[FrozenTrial] = []
        self._slots: dict[Slot, FrozenTrial] = {}
        points: list[Point] = []
        for trial in study.get_trials(deepcopy=False):
            record = trial.system_attrs.get(KEY)
            if record is not None and record["slot"] is not None:
                self._slots[tuple(record["slot"])] = trial
            params = trial.params
            if not trial.state.is_finished():  # its parameters may not be stored yet
                proposed = from_internal(record["params"], space) if record is not None and record["params"].keys() == space.keys() else {}
                params = {**proposed, **trial.system_attrs.get("fixed_params", {}), **params}
            with contextlib.suppress(KeyError, ValueError, TypeError):  # of another search space
                point = code.encode(params)
                if code.contains(point):
                    points.append(point)
                    self._trials.append(trial)
        self._points = np.array(points).reshape(len(points), len(space))
        # NOMAD's mesh and our logarithms are exact to about 1e-15 of a range; two points this near are one.
        self._near = 1e-12 * (np.array(code.upper) - np.array(code.lower))

    def owner(self, slot: Slot, point: Point) -> FrozenTrial | None:
        """The trial that was asked for this slot, or else the first one at this point."""
        if slot in self._slots:
            return self._slots[slot]
        found = np.flatnonzero(np.all(np.abs(self._points - point) <= self._near, axis=1))
        return self._trials[found[0]] if len(found) else None

    def promising(self) -> list[Point]:
        """Points that did not fail: evaluated or about to be."""
        return [
            point.tolist()
            for point, trial in zip(self._points, self._trials, strict=True)
            if not trial.state.is_finished() or _answer(trial, self._direction) is not None
        ]

    def best(self) -> Point | None:
        """The feasible point of least loss."""
        ranked = []
        for number, trial in enumerate(self._trials):
            told = _answer(trial, self._direction) if trial.state.is_finished() else None
            if told is not None:
                ranked.append((told, number))
        return self._points[min(ranked)[1]].tolist() if ranked else None

    def unseen(self, seed: int, run: int) -> Point | None:
        """A random point that no trial has; None when the finite space is exhausted."""
        rng = np.random.default_rng(derived_seed(seed, run, "unseen"))
        for _ in range(100):
            point = [
                float(rng.uniform(low, high) if kind == "R" else rng.integers(int(low), int(high) + 1))
                for kind, low, high in zip(self._code.types, self._code.lower, self._code.upper, strict=True)
            ]
            if self.owner((-1, -1, -1), point) is None:
                return point
        seen = {tuple(point) for point in self._points.tolist()}
        every = itertools.product(*(range(int(high) + 1) for high in self._code.upper))
        left = (point for point in every if point not in seen) if "R" not in self._code.types else iter(())
        first = next(left, None)
        return None if first is None else [float(x) for x in first]


class _Child:
    """A NOMAD process. `block` holds the points it waits for, None once it has ended, `reason` says why."""

    def __init__(self, start: dict[str, Any]) -> None:
        self.start = start
        self.told: list[list[Answer]] = []
        self.block: list[Point] | None = None
        self.reason = ""
        program = Path(__file__).with_name("nomad_process.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(program)],  # -P: our folder must not shadow other modules
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
        self.close = weakref.finalize(self, _end, self._process, os.getpid())
        self._send(start)
        self._receive()

    def can_follow(self, run: _Run) -> bool:
        return self.start == run.start and self.told == run.told[: len(self.told)]

    def tell(self, answers: list[Answer]) -> None:
        self.told.append(answers)
        self._send(answers)
        self._receive()

    def _send(self, message: Any) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the NOMAD process has no input")
        with contextlib.suppress(BrokenPipeError):  # it died; `_receive` says how
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> None:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        message: dict[str, Any] = json.loads(line) if line.endswith("\n") else self._post_mortem()
        if "error" in message:
            self.close()
            raise LoratuneError(f"NOMAD could not start: {message['error']}. Install it with: pip install PyNomadBBO")
        self.block = message.get("block")
        self.reason = message.get("end", "")

    def _post_mortem(self) -> dict[str, str]:
        """NOMAD answers some searches (one integer parameter, ...) with a crash, always at the same point: its end."""
        status = self._process.wait()
        if status in (-6, -11):  # abort, segmentation fault
            return {"end": f"it crashed with signal {-status}"}
        self.close()
        raise LoratuneError(f"The NOMAD process was killed from outside (status {status}). Run the same command again to continue.")


def _end(process: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that the child belongs to
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left unsent has no reader
                pipe.close()
