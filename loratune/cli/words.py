"""Trials and studies in a few words, for lines and tables of the terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loratune.record import COMPLETE, PAUSED, PRUNED, RUNNING, StudyRecord, Trial
from loratune.report.words import count, duration, in_order, label, loss, plural, show
from loratune.work import Outcome

if TYPE_CHECKING:
    from loratune.spec import StudySpec

__all__ = [
    "budget",
    "clock",
    "count",
    "counts",
    "duration",
    "ended",
    "label",
    "loss",
    "params",
    "plural",
    "result",
    "show",
    "totals",
    "varied",
]


def budget(spec: "StudySpec") -> str:
    """`3 full runs`, `100 trials`: the first limit that a study's description names."""
    given = spec.budget
    return f"{given.full_runs:g} full runs" if given.full_runs is not None else f"{given.most} trials"


def params(values: dict[str, Any]) -> str:
    """`rank 8, alpha 32, learning rate 1e-5`."""
    return ", ".join(f"{label(name)} {show(values[name])}" for name in in_order(set(values)))


def varied(trials: Iterable[Trial]) -> list[str]:
    """The searched parameters, those with one value in all trials left out, unless all have."""
    seen: dict[str, set[str]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            seen.setdefault(name, set()).add(show(value))
    names = in_order(set(seen))
    return [name for name in names if len(seen[name]) > 1] or names


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `3:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def counts(trials: Iterable[Trial], *, at_work: bool = True) -> str:
    """`12 complete, 3 pruned, 1 failed`. Without a driver `at_work`, no trial is running."""
    numbers: dict[str, int] = {}
    for trial in trials:
        state = "interrupted" if trial.state == RUNNING and not at_work else trial.state
        state = "short" if trial.short and state == PRUNED else state
        numbers[state] = numbers.get(state, 0) + 1
    order = [COMPLETE, PRUNED, PAUSED, *numbers]
    return ", ".join(f"{numbers[state]} {state}" for state in dict.fromkeys(order) if state in numbers) or "none yet"


def totals(snapshot: dict[str, Any]) -> list[str]:
    """Trials, speed, costs and time left, in words."""
    speed, left = snapshot.get("tokens_per_second"), snapshot.get("seconds_left")
    return [
        *_budget(snapshot),
        f"{count(speed)} tokens/s" if speed else "",
        f"{duration(snapshot['wall_seconds'])} elapsed",
        f"{snapshot['device_seconds'] / 3600:.2f} device-hours",
        f"about {duration(left)} left" if left is not None else "",
    ]


def _budget(snapshot: dict[str, Any]) -> list[str]:
    """`7/100 trials`, or `1.7 of 3 full runs, 11 trials` and what is left to find."""
    runs, left = snapshot.get("budget_full_runs"), snapshot.get("left_to_find")
    if runs is None:
        return [f"{snapshot['trials_ended']}/{snapshot['budget_trials']} trials"]
    spent = f"{snapshot['full_runs']:.1f} of {runs:g} full runs, {plural(snapshot['trials_ended'], 'trial')}"
    return [spent, f"at most {left:.4f} left to find (90 %)" if left is not None else ""]


def ended(trial: Trial, outcome: Outcome, base: float | None) -> str:
    """What became of a trial's segment, in one line."""
    seconds = f"{duration(outcome.train_seconds + outcome.validation_seconds + outcome.scoring_seconds)}"
    if trial.short and trial.state == PRUNED:
        return f"trial {trial.number}, a run of {trial.length:.2g} of the full length: validation loss {loss(trial.value)}, {seconds}"
    if trial.state in (COMPLETE, PAUSED, RUNNING):
        first = f" (base model {loss(base)})" if base is not None else ""
        waits = f", paused at step {outcome.key.rpartition('/')[2].lstrip('0')}" if trial.state == PAUSED else ""
        scores = "".join(f", {name} {score:.3f}" for name, score in outcome.scores.items())
        last = outcome.curve[-1].step if outcome.curve else None
        at = f" at step {trial.kept_step}, its lowest" if trial.kept_step not in (None, last) else ""
        return f"trial {trial.number}: validation loss {loss(trial.value)}{at}{first}{scores}{waits}, {seconds}"
    return f"trial {trial.number} {trial.state} after {seconds}: {trial.message}".rstrip(": ")


def result(record: StudyRecord) -> list[str]:
    """Best against default against base model, and what it cost: the lines that end a run."""
    best, default, base = record.best, record.default, record.base_loss
    if best is None or best.value is None:
        return [f"No trial was trained to its end ({counts(record.trials)}).", *_reasons(record)]
    rows = [(f"best, trial {best.number}", best.value, params(best.params))]
    if default is not None and default.value is not None and default.state == COMPLETE:
        gain = f"; the best is {default.value - best.value:.4f} lower" if best.number else "; nothing was better"
        rows.append((f"default, trial {default.number}", default.value, params(default.params) + gain))
    if base is not None:
        rows.append(("base model, untuned", base, ""))
    width = max(len(row[0]) for row in rows)
    lines = [f"Validation loss after {len(record.trials)} trials ({counts(record.trials)}):"]
    lines += [f"  {name:<{width}}  {loss(value)}  {text}".rstrip() for name, value, text in rows]
    lines.append(f"Cost: {record.device_seconds / 3600:.2f} device-hours, {count(record.tokens)} training tokens.")
    return lines


def _reasons(record: StudyRecord) -> list[str]:
    """What the last failed trial said."""
    said = [trial for trial in record.trials if trial.message]
    return [f"Trial {said[-1].number} said: {said[-1].message}"] if said else []
