"""Trials and studies in few words, for lines and tables of the terminal."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loratune.record import COMPLETE, PAUSED, PRUNED, RUNNING, StudyRecord, Trial
from loratune.record.nodes import by_node
from loratune.system.formatting import count, device_time, duration, in_order, label, loss, plural, price, show
from loratune.work import Outcome

if TYPE_CHECKING:
    from loratune.spec import StudySpec
    from loratune.study.driver import Delivery


def budget(spec: "StudySpec") -> str:
    """`3 full runs`, `100 trials`: the first limit of a study."""
    given = spec.budget
    return f"{given.full_runs:g} full runs" if given.full_runs is not None else plural(given.most, "trial")


def params(values: dict[str, Any]) -> str:
    """`rank 8, alpha 32, learning rate 1e-5`."""
    return ", ".join(f"{label(name)} {show(values[name])}" for name in in_order(set(values)))


def varied_parameters(trials: Iterable[Trial]) -> list[str]:
    """The searched parameters, without those that have one value in all trials, unless all have."""
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


def shown_state(trial: Trial, active: bool) -> str:
    """The trial's state; `interrupted` for one that was in training when the study, which is not `active`, stopped."""
    return "interrupted" if trial.state == RUNNING and not active else str(trial.state)


def counts(trials: Iterable[Trial], *, active: bool = True) -> str:
    """`12 complete, 3 pruned, 1 failed`. In a study that is not `active`, no trial is running."""
    numbers: dict[str, int] = {}
    for trial in trials:
        state = shown_state(trial, active)
        state = "short" if trial.short and state == PRUNED else state
        numbers[state] = numbers.get(state, 0) + 1
    order = [COMPLETE, PRUNED, PAUSED, *numbers]
    return ", ".join(f"{numbers[state]} {state}" for state in dict.fromkeys(order) if state in numbers) or "none yet"


def totals(numbers: dict[str, Any]) -> list[str]:
    """Trials, full runs, speed, cost and time left, from progress.json or from `loratune status --json`."""
    tokens, speed, left = numbers.get("tokens"), numbers.get("tokens_per_second"), numbers.get("seconds_left")
    spent = numbers.get("spent") or {}  # with what runs now, and what was interrupted
    runs, improvement = numbers.get("budget_full_runs"), numbers.get("left_to_find")
    trials = f"{numbers['trials_ended']}/{numbers['budget_trials']} trials" if "trials_ended" in numbers and runs is None else ""
    if "trials_ended" in numbers and runs is not None:
        trials = plural(numbers["trials_ended"], "trial")
    said = [
        f"{numbers['full_runs']:.1f} of {runs:g} full runs" if runs is not None else "",
        trials,
        f"at most {improvement:.4f} left to find (90 %)" if improvement is not None else "",
        f"{count(speed)} tokens/s" if speed else "",
        f"{duration(numbers['wall_seconds'])} elapsed",
        device_time(spent.get("device_seconds", numbers["device_seconds"])),
        _cost(spent.get("cost"), numbers.get("budget_max_cost"), numbers.get("currency", "")),
        f"{count(tokens)} training tokens" if tokens is not None else "",
        f"about {duration(left)} left" if left is not None else "",
    ]
    return [part for part in said if part]


def _cost(spent: float | None, most: float | None, currency: str) -> str:
    if spent is None:
        return ""
    return price(spent, currency) if most is None else f"{spent:.2f} of {price(most, currency)}"


def ended(trial: Trial, outcome: Outcome, base: float | None) -> str:
    """The result of a trial's segment, in one line."""
    seconds = duration(outcome.train_seconds + outcome.validation_seconds + outcome.scoring_seconds)
    if trial.short and trial.state == PRUNED:
        return f"trial {trial.number}, a run of {trial.length:.2g} of the full length: validation loss {loss(trial.value)}, {seconds}"
    if trial.state not in (COMPLETE, PAUSED, RUNNING):
        return f"trial {trial.number} {trial.state} after {seconds}: {trial.message}".rstrip(": ")
    first = f" (base model {loss(base)})" if base is not None else ""
    paused = f", paused at step {outcome.key.rpartition('/')[2].lstrip('0')}" if trial.state == PAUSED else ""
    seconds += f", on {outcome.node}" if outcome.node else ""
    scores = "".join(f", {name} {score:.3f}" for name, score in outcome.scores.items())
    last = outcome.curve[-1].step if outcome.curve else None
    at = f" at step {trial.kept_step}, its lowest" if trial.kept_step not in (None, last) else ""
    return f"trial {trial.number}: validation loss {loss(trial.value)}{at}{first}{scores}{paused}, {seconds}"


def standing(record: StudyRecord) -> list[str]:
    """Best, default and base model, a line each."""
    rows, best, default, base = [], record.best, record.default, record.base_loss
    own = record.own_objective
    if best is not None:
        rows.append((f"best, trial {best.number}", best.value, _scored(best, own) + params(best.params)))
    if default is not None and default.value is not None and default.state == COMPLETE:
        gap = ""
        if own:
            gap = _scored(default, own)
        elif best is not None and best.value is not None:
            gap = f"{default.value - best.value:.4f} above the best; " if best.number else "no trial is better; "
        rows.append((f"default, trial {default.number}", default.value, gap + params(default.params)))
    if base is not None:
        rows.append(("base model, untuned", base, ""))
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"{name:<{width}}  {loss(value)}  {text}".rstrip() for name, value, text in rows]


def _scored(trial: Trial, own: str) -> str:
    """`exact_match 0.62; `: what the study searched by, where that is no loss."""
    return f"{own} {trial.scores[own]:.4g}; " if own in trial.scores else ""


def result(record: StudyRecord) -> list[str]:
    """Best against default against base model, and the cost: the lines that end a run."""
    if record.best is None or record.best.value is None:
        messages = [f"The last message, of trial {trial.number}: {trial.message}" for trial in record.trials if trial.message]
        return [f"No trial was trained to its end ({counts(record.trials)}).", *messages[-1:]]
    cost = "" if record.cost is None else f", {price(record.cost, record.currency)}"
    of = f"{record.own_objective} and validation" if record.own_objective else "Validation"
    return [
        f"{of} loss after {plural(len(record.trials), 'trial')} ({counts(record.trials)}):",
        *(f"  {line}" for line in standing(record)),
        f"Cost: {device_time(record.spent_device_seconds)}{_on_nodes(record)}{cost}, {count(record.tokens)} training tokens.",
    ]


def _on_nodes(record: StudyRecord) -> str:
    shares = by_node(record.trials)
    lost = sum(share.lost for share in shares)
    went = f" ({plural(lost, 'attempt')} lost to nodes that went)" if lost else ""
    return f" on {plural(len(shares), 'node')}{went}" if shares else ""


def delivered(delivery: "Delivery") -> list[str]:
    """Where the results of a study are."""
    found = {"Settings": delivery.best, "Report": delivery.report, "Adapter": delivery.adapter}
    return [f"{name + ':':<9} {path}" for name, path in found.items() if path is not None]
