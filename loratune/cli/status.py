"""Show what a study is doing, and its best trials so far. Reads only; works while the study runs."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import StorageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from loratune.record import StudyRecord, Trial

_LAST = 10  # trials in the table of the latest ones
_BEST = 5
_QUIET = 60.0  # seconds without news of training, beyond which the text says so


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="the study's folder (default: the newest under runs/)")


def main(args: argparse.Namespace) -> int:
    from loratune.record import read

    folder = Path(args.folder) if args.folder else newest_study(Path("runs"))
    record = read(folder)
    if args.json:
        args.facts = facts(record)
    else:
        _print(record)
    return 0


def newest_study(runs: Path) -> Path:
    """The study under `runs` that was written last. Raises StorageError when there is none."""
    studies = [path.parent for path in runs.glob("*/spec.yaml")]
    if not studies:
        raise StorageError(f"no study under {runs}/ here. Name its folder: loratune status FOLDER. `loratune run` makes one.")
    return max(studies, key=_written)


def _written(folder: Path) -> float:
    from loratune.record.paths import StudyPaths

    return max((path.stat().st_mtime for path in (StudyPaths(folder).progress, StudyPaths(folder).spec) if path.exists()), default=0.0)


def facts(record: "StudyRecord") -> dict[str, Any]:
    """The study in plain numbers and texts; losses in nats per response token, times in seconds, scores in [0, 1]."""
    from loratune.cli.activity import StudyState, activity
    from loratune.cli.status_scores import score_summary
    from loratune.cli.trial_lines import shown_state
    from loratune.record.common_practice import common_practice
    from loratune.record.nodes import by_node

    progress, at_work = record.progress, activity(record.folder, record.progress, spent=record.budget_spent)
    running, searching = at_work.held, at_work.state is StudyState.RUNNING and at_work.command == "run"
    states = [shown_state(trial, running) for trial in record.trials]
    budget: dict[str, Any] = record.spec.get("budget", {})
    price = budget.get("price_per_device_hour")
    return {
        "name": record.name,
        "folder": str(record.folder),
        "state": str(at_work.state),
        "command": at_work.command,
        "running": running,
        "finished": not running and record.budget_spent,
        "pid": at_work.pid,
        "host": at_work.host,
        "nodes": progress.get("nodes") if searching else None,
        "devices": progress.get("devices") if searching else None,
        "idle_devices": progress.get("idle_devices") if searching else None,
        "by_node": [asdict(share) for share in by_node(record.trials)],
        "seconds_since_update": at_work.silent,
        "seconds_since_progress": time.time() - progress["heard"] if searching and "heard" in progress else None,
        "trials": {state: states.count(state) for state in dict.fromkeys(states)},
        "budget_trials": budget.get("trials"),
        "full_runs": progress.get("full_runs", 0.0),
        "budget_full_runs": budget.get("full_runs"),
        "left_to_find": progress.get("left_to_find"),
        "in_training": progress.get("running", []) if searching or at_work.state is StudyState.NO_HEARTBEAT else [],
        "best": brief(record.best, active=running),
        "front": _front(record),
        "shipped": _shipped(record),
        "default": brief(record.default, active=running),
        "common_practice": brief(common_practice(record), active=running),
        "base_loss": record.base_loss,
        "scores": score_summary(record),
        "tokens": record.tokens,
        "tokens_per_second": progress.get("tokens_per_second") if searching else None,
        "device_seconds": record.device_seconds,
        "cost": None if price is None else record.device_seconds / 3600 * price,
        "spent": progress["spent"]
        if running and isinstance(progress.get("spent"), dict)
        else {"device_seconds": record.spent_device_seconds, "cost": record.cost},
        "budget_max_cost": budget.get("max_cost"),
        "currency": record.currency,
        "wall_seconds": max(record.wall_seconds, progress.get("wall_seconds", 0.0)),
        "seconds_left": progress.get("seconds_left") if searching else None,
    }


def brief(trial: "Trial | None", *, active: bool = True) -> dict[str, Any] | None:
    """A trial in the facts. In a study that is not `active`, none is running."""
    from loratune.cli.trial_lines import shown_state

    if trial is None:
        return None
    state = shown_state(trial, active)
    return {"trial": trial.number, "state": state, "value": trial.value, "scores": trial.scores, "params": trial.params}


def _front(record: "StudyRecord") -> list[dict[str, Any]]:
    """With several objectives, the trials that no other beats in all of them."""
    names = list(record.objectives)
    trials = record.front if len(names) > 1 else []
    return [{"trial": t.number, "values": dict(zip(names, t.values, strict=True)), "params": t.params} for t in trials]


def _shipped(record: "StudyRecord") -> dict[str, Any] | None:
    """What `loratune select` hands over: a trial, and which of its runs."""
    from loratune.record.adapters import shipped_run

    chosen = shipped_run(record)
    return None if chosen is None else {"trial": chosen[0], "run": chosen[1]}


def _print(record: "StudyRecord") -> None:
    from rich.console import Console
    from rich.text import Text

    from loratune.cli import live_tables
    from loratune.cli.status_scores import score_table
    from loratune.cli.trial_lines import counts, totals
    from loratune.record import FAILED, INFEASIBLE

    console = Console(highlight=False)
    now = facts(record)
    console.print(Text(f"{record.name}  {_state(now)}", style="bold"), soft_wrap=True)
    of = f" of {now['budget_trials']}" if now["budget_full_runs"] is None and now["budget_trials"] is not None else ""
    console.print(
        f"{len(record.trials)}{of} trial{'s' * (len(record.trials) != 1 or bool(of))} begun: {counts(record.trials, active=now['running'])}"
    )
    console.print(" · ".join(totals(now)))
    if now["idle_devices"]:
        console.print(Text(now["idle_devices"]), soft_wrap=True)
    trained = [trial for trial in record.trials if trial.outcomes or trial.state == INFEASIBLE]
    if now["in_training"]:
        console.print()
        console.print(live_tables.running_table(now["in_training"], record.trials))
    if trained:
        console.print("\nlatest trials")
        console.print(live_tables.trial_table(trained[-_LAST:], record.best))
    if len(trained) > _LAST:
        console.print("\nbest trials")
        console.print(live_tables.trial_table(record.ranking[:_BEST], record.best))
    if now["front"]:
        console.print(f"\nfront of {len(now['front'])}: no trial is better in every objective")
        console.print(_front_table(now["front"]))
    if now["by_node"]:
        console.print("\nnodes")
        console.print(_node_table(now["by_node"]))
    console.print()
    for line in live_tables.standing_lines(record):
        console.print(line, soft_wrap=True)
    if now["scores"]:
        console.print("\nscores in %")
        console.print(score_table(now["scores"]))
        if now["shipped"]:
            _print_shipped(console, now)
    for path in (record.paths.report, record.paths.adapter):
        if now["finished"] and path.exists():
            console.print(Text(f"{path.stem:<8} {path}"), soft_wrap=True)
    failed = [trial for trial in record.trials if trial.state == FAILED and trial.message]
    if failed:
        console.print(Text(f"trial {failed[-1].number} failed: {failed[-1].message}", style="red"))


def _print_shipped(console: "Console", now: dict[str, Any]) -> None:
    """The scores of the adapter that is handed over, on a line of their own, and a note on whose scores the table has."""
    from rich.text import Text

    from loratune.downstream.results.scores import describe_model, model_name, shipped_note

    name = model_name(now["shipped"]["trial"], now["shipped"]["run"])
    own = [f"{entry['title']} {100 * entry['shipped']:.1f}" for entry in now["scores"] if entry["shipped"] is not None]
    if own:
        console.print(Text(f"handed over, {describe_model(name)}: {', '.join(own)}", style="bold green"), soft_wrap=True)
    console.print(Text(shipped_note(name, bool(own))), soft_wrap=True)


def _front_table(front: list[dict[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table

    from loratune.cli.trial_lines import params

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("trial", *front[0]["values"]):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("")
    for row in front:
        loss, *others = row["values"].values()
        table.add_row(str(row["trial"]), f"{loss:.4f}", *(f"{value:.4g}" for value in others), params(row["params"]))
    return table


def _node_table(shares: list[dict[str, Any]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("node")
    for name in ("trials", "device-hours", "attempts lost"):
        table.add_column(name, justify="right")
    for share in shares:
        table.add_row(share["node"], str(len(share["trials"])), f"{share['device_seconds'] / 3600:.2f}", str(share["lost"]))
    return table


def _state(now: dict[str, Any]) -> str:
    from loratune.cli.activity import StudyState
    from loratune.system.formatting import duration, plural

    silent = "" if now["seconds_since_update"] is None else duration(now["seconds_since_update"])
    who = f"process {now['pid']} on {now['host']}"
    match now["state"]:
        case StudyState.STARTING:
            return f"starting ({who}, begun {silent} ago)"
        case StudyState.RUNNING:
            heard = f", last heartbeat {silent} ago"
            if now["seconds_since_progress"] is not None and now["seconds_since_progress"] > _QUIET:
                heard += f", nothing from training for {duration(now['seconds_since_progress'])}"
            nodes, devices = now["nodes"], now["devices"]
            where = "" if nodes is None else f", {plural(devices, 'device')} on {plural(nodes, 'node')}"
            return f"{'selecting' if now['command'] == 'select' else 'running'} ({who}{heard}{where})"
        case StudyState.GONE:
            return f"killed: {who} is gone, its workers end; to continue: loratune {now['command']} {now['folder']}"
        case StudyState.NO_HEARTBEAT:
            return f"no heartbeat for {silent}: {who} is stuck, or waits; nothing is lost when it is killed: kill -9 {now['pid']}"
        case StudyState.FINISHED:
            paused, more = now["trials"].get("interrupted", 0), f"a larger one continues: loratune run {now['folder']}"
            return f"the budget is spent, {plural(paused, 'trial')} paused; {more}" if paused else "finished"
    return f"stopped; to continue: loratune run {now['folder']}"
