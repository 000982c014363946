"""The scores of a study's models in a table, and conclusions in sentences. Plain text; no torch.

The published table: over the trials with the lowest validation loss the minimum, maximum, mean and standard deviation
of each benchmark's score, beside the default's and the bare model's. Then what may be concluded: whether anything is
above chance, whether the adapter handed over and the best trial beat the default (paired over items), and whether validation
loss predicts the score over all scored trials.

A trial's scores are those of its run in the study. What a selection hands over may be a run of the chosen trial with another
seed: a model of its own (`shipped`), which counts neither among the best trials nor in the relation of loss and score.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loratune.downstream.results.scores import BASE, Result, by_model, describe_model, shipped_note
from loratune.statistics import Summary, sentence, summarise

_SEED = 0  # of the bootstraps


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One benchmark over a study's models."""

    benchmark: str
    title: str
    chance: float | None
    best: Summary | None  # over the best trials; None without any
    sentences: tuple[str, ...]


def findings(
    results: Sequence[Result], losses: Mapping[str, float], best: Sequence[str], default: str | None, shipped: str | None = None
) -> list[Finding]:
    """One per benchmark. losses: recorded, by model; best: the trials with the lowest, in order; default: its trial.

    shipped: the model that a selection hands over, where there is one.
    """
    found = []
    for benchmark in dict.fromkeys(result.benchmark for result in results):
        own = {result.model: result for result in results if result.benchmark == benchmark}
        top = [own[name].score.value for name in best if name in own]
        some = next(iter(own.values()))
        said = [*_protocol(own), *_chance(own), *_against(own, best, default, shipped), *_correlation(own, losses)]
        found.append(
            Finding(
                benchmark=benchmark,
                title=some.title,
                chance=some.chance,
                best=summarise(top) if top else None,
                sentences=tuple(said),
            )
        )
    return found


def finding_lines(
    results: Sequence[Result], losses: Mapping[str, float], best: Sequence[str], default: str | None, shipped: str | None = None
) -> list[str]:
    """The table and the sentences, for a terminal; arguments as of `findings`. `losses` may hold `base`."""
    if not results:
        return ["Nothing has been scored yet."]
    cells = by_model(results)
    found = findings(results, losses, best, default, shipped)
    order = [*dict.fromkeys([*([shipped] if shipped else []), *best, *([default] if default else []), *sorted(cells)])]
    head = ["", "loss", *(finding.title for finding in found)]
    rows = [head]
    for name in (name for name in order if name in cells):
        loss = f"{losses[name]:.4f}" if name in losses else ""
        rows.append([model_label(name, best, default, shipped), loss, *(_cell(cells[name].get(finding.benchmark)) for finding in found)])
    summaries = [finding.best for finding in found]
    for what in ("min", "max", "mean", "sd") if any(summaries) else ():
        values = [f"{100 * getattr(one, what):.1f}" if one else "" for one in summaries]
        rows.append([f"{what} of the {len([n for n in best if n in cells])} best", "", *values])
    rows.append(["chance", "", *("?" if f.chance is None else f"{100 * f.chance:.1f}" for f in found)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    text = ["Scores in %, with 95 % intervals over items:"]
    text += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if shipped is not None:
        text += ["", shipped_note(shipped, shipped in cells)]
    for finding in found:
        text += ["", f"{finding.title}:", *(f"  {line}" for line in finding.sentences)]
    return text


def model_label(name: str, best: Sequence[str], default: str | None, shipped: str | None = None) -> str:
    """`handed over, trial 7 (race-01)`, `best, trial 7`, `default, trial 0`, `trial 12`, `base model, untuned`."""
    roles = {"handed over": name == shipped, "best": name in best[:1], "default": name == default}
    return ", ".join([*(role for role, has in roles.items() if has), describe_model(name)])


def _cell(cell: Result | None) -> str:
    if cell is None:
        return ""
    score = cell.score
    value = f"{100 * score.value:.1f}"
    interval = f" [{100 * score.low:.1f}, {100 * score.high:.1f}]" if score.known else ""
    return value + interval + ("" if cell.done else f" ({cell.n:,} items so far)")


def _chance(own: Mapping[str, Result]) -> list[str]:
    """Whether anything is above what a uniform guesser would score, or one that always chooses the same."""
    some = next(iter(own.values()))
    chance, constant = some.chance, some.facts.get("constant")
    if chance is None:
        return []
    intervals = {name: result.score for name, result in own.items()}
    low, high = constant or (chance, chance)
    above = [name for name, interval in intervals.items() if interval.known and interval.low > max(chance, high)]
    same = f"; choosing the same for every item scores {100 * low:.1f} to {100 * high:.1f} %" if constant else ""
    what = f"chance ({100 * chance:.1f} %{same})"
    if not above and chance == 0:
        return ["No model answers any item correctly." if not any(i.value for i in intervals.values()) else "No model is clearly above 0."]
    if not above and all(interval.known and interval.high < min(chance, low) for interval in intervals.values()):
        return [f"Every model is below {what}, as happens when answers are none of the options: the scores do not say which is better."]
    if not above:
        return [f"No model is above {what}: differences between the models' scores say nothing about which is better."]
    if len(above) < len(own):
        return [f"{len(above)} of {len(own)} models are above {what}."]
    return [f"All {len(own)} models are above {what}."]


def _against(own: Mapping[str, Result], best: Sequence[str], default: str | None, shipped: str | None) -> list[str]:
    """What is handed over, and the best trial by loss, against the default and the bare model, paired over items."""
    lowest = next((name for name in best if name in own), None)
    said = _compared(own, shipped, "the adapter handed over", default) if shipped in own else []
    return said + (_compared(own, lowest, "the trial with the lowest loss", default) if lowest != shipped or not said else [])


def _compared(own: Mapping[str, Result], first: str | None, who: str, default: str | None) -> list[str]:
    said = []
    for name, words in ((default, "the default"), (BASE, "the bare model")):
        if first is None or name is None or name not in own or name == first:
            continue
        difference = own[first].against(own[name])
        points = f"{100 * difference.value:+.1f} points"
        if difference.known and difference.low == difference.high == 0:
            said.append(f"{_capital(who)} answers every item as well as {words}.")
            continue
        points += f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]" if difference.known else ""
        if difference.excludes(0):
            said.append(f"{_capital(who)} scores {'higher' if difference.value > 0 else 'lower'} than {words}: {points}.")
        else:
            said.append(f"The data cannot tell {who} from {words}: {points}.")
    return said


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _protocol(own: Mapping[str, Result]) -> list[str]:
    """Notes on the protocol that are needed to read the scores."""
    return list(dict.fromkeys(str(result.facts["protocol"]) for result in own.values() if result.facts.get("protocol")))


def _correlation(own: Mapping[str, Result], losses: Mapping[str, float]) -> list[str]:
    """Validation loss and score over all scored trials."""
    names = [name for name in own if name in losses and name.isdigit()]
    if len(names) < 3:
        return []
    loss, intervals = [losses[name] for name in names], [own[name].score for name in names]
    score = [interval.value for interval in intervals]
    widths = [interval.high - interval.low for interval in intervals if interval.known]
    error = math.sqrt(sum(w * w for w in widths) / len(widths)) / (2 * 1.96) if widths else None
    return [sentence(loss, score, _SEED, name=next(iter(own.values())).title, standard_error=error)]
