"""The account of a selection: what was measured and decided, put together as its record."""

import math
from collections.abc import Sequence

from loratune.plugs import BENCHMARKS, METRICS
from loratune.record import StudyRecord, Trial
from loratune.selection.candidates import Scores, candidate_name, loss_of, metric_of, ranked_trials
from loratune.selection.finalists import Noise
from loratune.selection.race import Race
from loratune.selection.rerun import RACE, cost_of, fresh_seed, run_name
from loratune.selection.rule import Choice, Rule
from loratune.selection.selected import Finalist, FreshRun, RaceRecord, SelectionRecord, Shipped, UnbiasedLoss
from loratune.selection.trial_metrics import measured_metrics
from loratune.statistics import Interval
from loratune.work import Outcome

_WRITTEN = ("adapter_mb", "seconds", "tokens", "peak_memory_gib")  # of the metrics, those that selection.json has of each finalist


def account(
    study: StudyRecord,
    trials: Sequence[Trial],
    scores: Scores,
    *,
    rule: Rule,
    choice: Choice,
    chosen: Trial,
    excluded: int,
    race: Race | None,
    field: str,
    assumed: Noise,
    unbiased: UnbiasedLoss | None,
    shipped: Shipped,
    outcomes: Sequence[Outcome],
    notes: tuple[str, ...],
) -> SelectionRecord:
    """trials: the candidates, the study's lowest loss first. field: who was let in, in words. assumed: the noise before the race.
    outcomes: of all runs trained for the selection."""
    number = {candidate_name(t): t.number for t in trials}
    out = {drop.candidate: str(drop) for drop in race.dropped} if race else {}
    benchmarks = sorted({b for t in trials for b in scores.get(t.number, {})})
    # Of one finalist's seeds, what a seed does to all alike cannot be told from the noise.
    why = "no repeats" if race is None else "only one finalist has repeats"
    noise, source = Interval(assumed.sd, math.nan, math.nan, why=why), assumed.source
    if race is not None and race.noise.known:
        noise, source = race.noise, f"from the first {race.first} fresh seeds of {len(trials)} finalists"
    spent = cost_of(outcomes)
    return SelectionRecord(
        study=study.name,
        finished=len(study.finished),
        rule=str(rule),
        metrics=rule.metrics,
        own_metric=_own(rule),
        constraints=tuple(map(str, rule.constraints)),
        benchmarks=tuple(b for b in benchmarks if "score" in rule.metrics or b in rule.metrics),
        excluded=excluded,
        candidates=tuple(
            Finalist(
                trial=t.number,
                study_loss=loss_of(t),
                losses=tuple(race.losses[candidate_name(t)]) if race else (loss_of(t),),
                scores={b: metric_of(t, b, scores) for b in scores.get(t.number, {})},
                **{name: value for name, value in measured_metrics(t).items() if name in _WRITTEN},
                own={name: value for name, value in t.scores.items() if name not in BENCHMARKS},
                share=choice.shares.get(candidate_name(t), 0.0),
                out=out.get(candidate_name(t), ""),
            )
            for t in trials
        ),
        race=_raced(study, race, field, {candidate_name(t): t for t in trials}) if race else None,
        noise=noise,
        noise_source=source,
        lowest=ranked_trials(study)[0].number,
        chosen=chosen.number,
        share=choice.share,
        runner_up=number[choice.runner_up] if choice.runner_up else None,
        runner_up_share=choice.runner_up_share,
        why=choice.why,
        what_would_change=choice.what_would_change,
        unbiased=unbiased,
        shipped=shipped,
        runs=spent.runs,
        tokens=int(spent.tokens),
        device_seconds=spent.device_seconds,
        notes=notes,
    )


def _own(rule: Rule) -> dict[str, str]:
    """The metric of the user's own with which the rule begins, and its direction."""
    first = rule.metrics[0]
    return {"name": first, "direction": METRICS[first].direction} if first in METRICS and METRICS[first].own else {}


def run_of(study: StudyRecord, trial: Trial, part: str, repeat: int, loss: float) -> FreshRun:
    return FreshRun(trial=trial.number, repeat=repeat, seed=fresh_seed(int(study.spec["seed"]), run_name(part, repeat)), loss=loss)


def _raced(study: StudyRecord, race: Race, field: str, trials: dict[str, Trial]) -> RaceRecord:
    return RaceRecord(
        field=field,
        tolerance=race.tolerance,
        error_rate=race.error_rate,
        budget=race.budget,
        log=tuple(run_of(study, trials[name], RACE, repeat, loss) for name, repeat, loss in race.log),
        leader=trials[race.winner].number if race.winner else None,
        gap=race.gap,
        ending=race.ending,
        explained=tuple(race.explain().splitlines()),
    )
