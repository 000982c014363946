"""What a study was asked to do and on what it ran, in words: from its description, its data's manifest, its sessions."""

import shlex
from pathlib import Path
from typing import Any

from loratune.record import StudyRecord, Trial
from loratune.report.tables import sampler_of, searched, setting, space_of
from loratune.system.files import text_of
from loratune.system.formatting import count, in_order, label, metric, plural, show


def spec_rows(record: StudyRecord, trial: Trial | None = None) -> list[tuple[str, str]]:
    """The description in a few lines: (what, how). Hyperparameters are those of `trial`; without one, what every trial has in common."""
    spec = record.spec
    model, data, training = (dict(spec.get(part) or {}) for part in ("model", "data", "training"))
    budget, schedule, sampler = (dict(spec.get(part) or {}) for part in ("budget", "schedule", "sampler"))
    rows = [("Base model", _model(model)), ("Training data", _sources(data.get("train"))), ("Validation data", _validation(data))]
    rows += [("Examples", counts)] if (counts := example_counts(record)) else []
    rows += [("Prompt", record.prompt["note"])] if record.prompt else []
    rows += [("Length", f"at most {data['max_length']} tokens, prompt and response")] if "max_length" in data else []
    rows += [("Training", _training(record, training, trial)), ("Budget", _budget(budget))]
    rows += [("Notes", "; ".join(notes))] if (notes := _notes(record)) else []
    goals = [f"{metric(name)}{' (more is better)' if way == 'maximize' else ''}" for name, way in record.objectives.items()]
    rows += [("Objectives", "; ".join(goals))] if len(goals) > 1 else []
    rows += [("Constraints", "; ".join(spec["constraints"]))] if spec.get("constraints") else []
    if own := spec.get("metrics"):
        rows.append(("Own metrics", "; ".join(map(_own_metric, own))))
    options = show(sampler.get("options") or {})
    rows.append(("Sampler", sampler_of(record).split(" + ")[0] + (f" ({options})" if options else "")))
    if schedule.get("name", "full") == "full":
        short = " but the short runs of the search" if any(trial.short for trial in record.trials) else ""
        rows.append(("Schedule", f"full: every configuration{short} is trained to the end"))
    else:
        rows.append(("Schedule", f"{schedule.pop('name')}: {show(schedule)}"))
    return [*rows, ("Seed", show(spec.get("seed")))]


def _own_metric(metric: dict[str, Any]) -> str:
    way = "more is better" if metric["direction"] == "maximize" else "less is better"
    source = metric["data"] or "the validation set"
    return f"{metric['name']}, {way}: {metric['function']} of up to {metric['examples']} answers to {source}"


def _notes(record: StudyRecord) -> list[str]:
    """Lines on the model and the data that were told before the first trial."""
    path = record.paths.notes
    return text_of(path).splitlines() if path.is_file() else []


def example_counts(record: StudyRecord) -> str:
    """Sizes of the training and validation sets; empty when the prepared data is not there."""
    parts = []
    for name, purpose in (("train", "for training"), ("validation", "for validation")):
        size = record.manifest.get(name)
        if isinstance(size, dict):
            parts.append(f"{size['examples']} {purpose} ({count(size['tokens'])} tokens, {count(size['response_tokens'])} in responses)")
    return "; ".join(parts)


def sources(record: StudyRecord) -> tuple[list[str], list[list[str]]]:
    """(head, rows): what became of each source's rows; no rows when the prepared data is not there."""
    found = record.manifest.get("sources", ())
    names = ("rows", "train", "validation", "duplicates", "left out", "cut")
    numbers = [{**s, "left out": s["bad"] + s["dropped"] + s["overlapping"]} for s in found]
    rows = [[str(s["path"]), *(str(s[name]) for name in names)] for s in numbers]
    if len(numbers) > 1:
        rows.append(["all", *(str(sum(s[name] for s in numbers)) for name in names)])
    return ["path", *names], rows


def space(record: StudyRecord) -> list[tuple[str, str, str]]:
    """(hyperparameter, allowed values, default) of everything the search space names."""
    parameters = space_of(record).parameters
    rows = []
    for name in in_order(set(parameters)):
        parameter = parameters[name]
        if parameter.type == "fixed":
            rows.append((label(name), "fixed", show(parameter.value)))
            continue
        if parameter.type == "int" or parameter.type == "float":
            allowed = f"{show(parameter.low)} to {show(parameter.high)}" + (", log scale" if parameter.log else "")
            allowed += f", in steps of {show(parameter.step)}" if parameter.step else ""
        elif parameter.type == "ordinal":
            allowed = show(parameter.values)
        else:
            allowed = show(parameter.choices)
        if parameter.when:
            allowed += "; only when " + " and ".join(f"{label(other)} is {show(values)}" for other, values in parameter.when.items())
        rows.append((label(name), allowed, show(parameter.default)))
    return rows


def environment_rows(record: StudyRecord) -> list[tuple[str, str]]:
    """What the last session ran on: (name, value)."""
    found = record.sessions[-1].get("environment") if record.sessions else None
    if not isinstance(found, dict):
        return []
    # The machine's name is nobody's business once the report is passed on.
    told = {name: item for name, item in found.items() if name != "host" and item not in (None, "", [], {})}
    lines = [({"memory_gib": "memory, GiB"}.get(name, name), _plain(item)) for name, item in told.items()]
    return [*lines, ("starts", plural(len(record.sessions), "session"))]


def command(record: StudyRecord) -> str:
    """The command that started the study."""
    first = record.sessions[0].get("command") if record.sessions else None
    if isinstance(first, list) and first:
        return shlex.join([Path(str(first[0])).name, *map(str, first[1:])])
    return first if isinstance(first, str) else f"loratune run {shlex.quote(str(record.paths.spec))}"


def base_model(record: StudyRecord) -> str:
    """Hub id or folder."""
    return str(record.spec.get("model", {}).get("name_or_path", "?"))


def _plain(item: Any) -> str:
    return ", ".join(f"{name} {version}" for name, version in item.items()) if isinstance(item, dict) else show(item)


def _model(model: dict[str, Any]) -> str:
    name = str(model.pop("name_or_path", "?"))
    extras = {key: item for key, item in model.items() if item not in (None, False, "auto")}
    return f"{name} ({show(extras)})" if extras else name


def _sources(given: Any) -> str:
    parts = []
    for source in given or ():
        drawn = f" ({show(source['count'])} examples)" if source.get("count") else ""
        parts.append(f"{source.get('path', '?')}{drawn}")
    return "; ".join(parts)


def _validation(data: dict[str, Any]) -> str:
    if data.get("validation"):
        return _sources(data["validation"])
    if data.get("validation_fraction"):
        return f"{100 * data['validation_fraction']:.3g} % of the training sources, held out"
    held = data.get("validation_count") or sum(source.get("validation_count") or 0 for source in data.get("train") or ())
    return f"{held} examples held out of the training sources" if held else "held out of the training sources"


def _training(record: StudyRecord, training: dict[str, Any], trial: Trial | None) -> str:
    """Hyperparameters as the trial was trained with, whether searched or not; the description's constants may be of no trial."""
    shown = ("epochs", "batch_size", "lr_scheduler_type", "warmup_ratio", "weight_decay", "target_modules", "use_rslora", "engine")
    kept = f", keeping the lowest of {training.get('validations')} validations" if training.get("keep") == "best" else ""
    if trial is not None:
        training = training | {name: value for name in shown if (value := setting(trial, name)) is not None}
    else:
        training = {name: value for name, value in training.items() if name not in searched(record)}
    return show({label(name): training[name] for name in shown if name in training}) + kept


def _budget(budget: dict[str, Any]) -> str:
    limits = ((f"{budget['trials']} trials",) if "trials" in budget else ()) + tuple(
        f"{show(budget[name])} {unit}"
        for name, unit in (
            ("full_runs", "full runs"),
            ("max_tokens", "training tokens"),
            ("max_hours", "hours"),
            ("max_device_hours", "device-hours"),
            ("max_cost", str(budget.get("currency") or "in cost")),
        )
        if budget.get(name)
    )
    return " or ".join(limits) or "–"
