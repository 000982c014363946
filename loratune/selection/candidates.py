"""What a study measured of its trials, as the candidates of a choice: losses, downstream scores, sizes, costs."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from loratune.downstream.results.scores import Result, read_results
from loratune.errors import SpecError
from loratune.record import StudyRecord, Trial
from loratune.selection.finalists import Noise, noise_from_twins, scaled
from loratune.selection.rule import Candidate, Rule
from loratune.selection.trial_metrics import measured_metrics, metric_names, parse_constraint
from loratune.system.names import nearest
from loratune.work import Hyperparameters

ALIASES = {"loss": "validation_loss"}

Scores = Mapping[int, Mapping[str, Result]]  # trial -> benchmark -> its scores


def candidate_name(trial: Trial | int) -> str:
    """`trial 7`: how a candidate is called in every sentence."""
    return f"trial {trial if isinstance(trial, int) else trial.number}"


def ranked_trials(study: StudyRecord) -> list[Trial]:
    """Trials trained to the end with a finite loss, the lowest first; of several with the same hyperparameters the first."""
    first: dict[Hyperparameters, Trial] = {}
    for trial in sorted(study.finished, key=lambda trial: (loss_of(trial), trial.number)):
        if math.isfinite(loss_of(trial)):
            first.setdefault(trial.hyperparameters, trial)
    return list(first.values())


def loss_of(trial: Trial) -> float:
    return math.nan if trial.value is None else trial.value


def scores_of(study: StudyRecord) -> dict[int, dict[str, Result]]:
    """What `loratune evaluate` measured of each trial; benchmarks that it did not finish do not count."""
    found: dict[int, dict[str, Result]] = {}
    for result in read_results(study.paths.evaluation):
        if result.model.isdigit() and result.done:
            found.setdefault(int(result.model), {})[result.benchmark] = result
    return found


def shared_benchmarks(trials: Sequence[Trial], scores: Scores) -> list[str]:
    """Those that every one of `trials` has answered, with at least one item in common."""
    each = [scores.get(trial.number, {}) for trial in trials]
    names = sorted(set.intersection(*(set(own) for own in each))) if each else []
    return [name for name in names if set.intersection(*(set(own[name].scores) for own in each))]


def candidates(trials: Sequence[Trial], losses: Mapping[int, Sequence[float]], scores: Scores) -> list[Candidate]:
    """One per trial. losses: trial -> by repeat. Scores are of the items that all of them answered, in one order."""
    names = shared_benchmarks(trials, scores)
    items = {name: sorted(set.intersection(*(set(scores[t.number][name].scores) for t in trials))) for name in names}
    return [
        Candidate(
            name=candidate_name(trial),
            losses=list(losses[trial.number]),
            scores={name: [scores[trial.number][name].scores[item] for item in items[name]] for name in names},
            measured=measured_metrics(trial),
        )
        for trial in trials
    ]


def metric_of(trial: Trial, name: str, scores: Scores) -> float:
    """One number, in the metric's unit (see trial_metrics.py); NaN where it was not measured."""
    own = scores.get(trial.number, {})
    means = {benchmark: result.score.value for benchmark, result in own.items()}  # over groups, where the benchmark is
    if name == "validation_loss":
        return loss_of(trial)
    if name == "score":
        return float(np.mean(list(means.values()))) if means else math.nan
    return {**means, **measured_metrics(trial)}.get(name, math.nan)


def rule_of(prefer: str | None, require: Sequence[str], trials: Sequence[Trial], scores: Scores, own: str = "") -> Rule:
    """The rule that the user states; by default loss, then score where all of `trials` have one, then the smaller adapter.

    own: the metric that was the study's objective in place of the loss, which then comes first.
    prefer: `loss,mmlu,adapter_mb`, one after the other; or `loss=1,adapter_mb=0.1`, a weighted sum. require: constraints.
    Raises SpecError for what is no metric, and what was never measured.
    """
    benchmarks = sorted({name for own in scores.values() for name in own})
    constraints = tuple(parse_constraint(text, benchmarks) for text in require)
    if prefer is None:
        score = ("score",) if shared_benchmarks(trials, scores) else ()
        return Rule(priorities=(*([own] if own else []), "validation_loss", *score, "adapter_mb"), constraints=constraints)
    parts = [part.partition("=") for part in prefer.split(",")]
    names = [ALIASES.get(name.strip(), name.strip()) for name, _, _ in parts]
    weighted = {sign for _, sign, _ in parts}
    if len(weighted) > 1 or len(set(names)) < len(names):
        raise SpecError(f"prefer {prefer!r}: give different metrics, each with a weight (loss=1,adapter_mb=0.1) or none (loss,adapter_mb)")
    allowed_names = [*ALIASES, *metric_names(), *benchmarks]
    for name in names:
        if name not in allowed_names:
            raise SpecError(
                f"prefer: {name!r} is no metric ({', '.join(metric_names())}), and no benchmark that `loratune evaluate` finished here "
                f"({', '.join(benchmarks) or 'none did'}){nearest(name, allowed_names)}"
            )
    if weighted == {""}:
        return Rule(priorities=tuple(names), constraints=constraints)
    try:
        weights = {name: float(weight) for name, (_, _, weight) in zip(names, parts, strict=True)}
    except ValueError:
        raise SpecError(f"prefer {prefer!r}: a weight must be a number") from None
    if not all(math.isfinite(weight) and weight > 0 for weight in weights.values()):
        raise SpecError(f"prefer {prefer!r}: weights must be above 0; every metric knows by itself which way is better")
    return Rule(weights=weights, constraints=constraints)


def allowed(trials: Sequence[Trial], rule: Rule, scores: Scores) -> list[Trial]:
    """Those that keep the constraints. Raises SpecError, with what came nearest, when none does."""
    found = [t for t in trials if all(c.holds(metric_of(t, c.metric, scores)) for c in rule.constraints)]
    if found:
        return found
    lines = [f"none of {len(trials)} finished trials keeps the constraints:"]
    for constraint in rule.constraints:
        values = [value for value in (metric_of(t, constraint.metric, scores) for t in trials) if math.isfinite(value)]
        keep = sum(constraint.holds(value) for value in values)
        span = f"from {min(values):.4g} to {max(values):.4g}" if values else "measured for none"
        lines.append(f"  {constraint}: kept by {keep}; {constraint.metric} is {span}")
    raise SpecError("\n".join(lines))


def noise_of(trials: Sequence[Trial]) -> Noise:
    """The noise of one loss, before any repeat: from trials that are nearly equal, else an assumption."""
    names = sorted({name for trial in trials for name in trial.params})
    columns = [_column([t.params.get(name, getattr(t.hyperparameters, name, None)) for t in trials]) for name in names]
    points = scaled(columns) if columns else np.zeros((len(trials), 1))
    return noise_from_twins(points, [loss_of(t) for t in trials])


def _column(values: Sequence[object]) -> list[float]:
    """A hyperparameter's values as numbers: on a log scale where they span much, the place among them where they are no numbers."""
    if all(isinstance(value, int | float) for value in values):
        x = np.array(values, dtype=float)
        return list(np.log(x) if x.min() > 0 and x.max() / x.min() >= 10 else x)
    kinds = sorted({str(value) for value in values})
    return [float(kinds.index(str(value))) for value in values]
