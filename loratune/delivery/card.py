"""The part of the model card that is measured after the search: downstream scores, and whose they are."""

from loratune.downstream.results.scores import BASE, Result, describe_model, model_name
from loratune.record import StudyRecord, Trial
from loratune.report.evidence import Downstream, downstream_of
from loratune.selection import SelectionRecord
from loratune.system.formatting import percent


def scores_section(record: StudyRecord, trial: Trial, selection: SelectionRecord | None) -> list[str]:
    """Blocks of Markdown on the benchmarks that were answered to their end; none where nothing was.

    trial: whose adapter the card is of, by the selection that holds for the study or by the lowest loss.
    """
    found = downstream_of(record, selection)
    if found is None:
        return []
    this = model_name(trial.number, selection.shipped.run if selection is not None else "main")
    own_run = model_name(trial.number)
    rows = {this: "**this adapter**"}
    if this != own_run:
        rows[own_run] = f"{describe_model(own_run)} as the study trained it, another seed"
    if found.default is not None and found.default not in rows:
        rows[found.default] = f"default hyperparameters, {describe_model(found.default)}"
    rows[BASE] = "base model"
    names = [f.benchmark for f in found.findings if any(_done(found, model, f.benchmark) for model in rows)]
    if not names:
        return []
    titles = {f.benchmark: f.title for f in found.findings}
    table = [("", *(titles[name] for name in names)), ("---",) * (len(names) + 1)]
    table += [
        (said, *(_spelt(_done(found, model, name)) for name in names))
        for model, said in rows.items()
        if model in found.cells or model == this
    ]
    lacks = [] if this in found.cells else ["This adapter has not been scored itself; `loratune evaluate` does."]
    protocols = dict.fromkeys(str(said) for r in found.results if r.benchmark in names and (said := r.facts.get("protocol")))
    return [
        "## Downstream scores",
        "In %, with 95 % intervals over items. Each row is of the adapter that it names, of no other seed.",
        "\n".join("| " + " | ".join(row) + " |" for row in table),
        *lacks,
        *([" ".join(protocols)] if protocols else []),
    ]


def _done(found: Downstream, model: str, benchmark: str) -> Result | None:
    cell = found.cells.get(model, {}).get(benchmark)
    return cell if cell is not None and cell.done else None


def _spelt(cell: Result | None) -> str:
    if cell is None:
        return "–"
    score = cell.score
    return percent(score.value) + (f" ({percent(score.low)} to {percent(score.high)})" if score.known else "")
