"""Choose the trial to ship: race the best ones with fresh seeds, apply a rule, and estimate the true loss of the chosen one.

    loratune select runs/study
    loratune select runs/study --require 'adapter_mb <= 50' --prefer loss,mmlu,adapter_mb
    loratune select runs/study --no-rerun                      by the study's own losses; trains nothing

The trials whose losses differ from the lowest only by noise are trained again with fresh seeds, those that fall behind drop
out, and the rule picks one: by default the lowest loss, ties within noise by downstream score (see `loratune evaluate`), then
by the smaller adapter. The chosen adapter is handed over with best.yaml and the report. After Ctrl-C or a kill, the same
command continues.
"""

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.parser import add_trust
from loratune.work import Message, Outcome

if TYPE_CHECKING:
    from loratune.selection import SelectEvent, SelectionRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="STUDY", help="the study's folder")
    parser.add_argument("--finalists", type=int, default=8, metavar="N", help="maximum number of trials that race (default: 8)")
    parser.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="maximum number of re-trainings (default: 3 per finalist, plus 6; after a search of N full runs not above 2 N or 10)",
    )
    parser.add_argument(
        "--common-practice",
        action="store_true",
        help="train rank 16, alpha 32, learning rate 2e-4 too, 3 runs more, and tell the gain over it",
    )
    parser.add_argument("--no-rerun", action="store_true", help="choose by the study's own losses, without training")
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        metavar="'METRIC <= N'",
        help="a constraint by <=, >=, < or >, like 'adapter_mb <= 50'; may be repeated",
    )
    parser.add_argument("--prefer", metavar="METRICS", help="the rule: loss,mmlu,adapter_mb, or weights: loss=1,adapter_mb=0.1")
    add_trust(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask before training")


def main(args: argparse.Namespace) -> int:
    from loratune.cli.interrupt import Interrupt, stopped
    from loratune.selection import Planned, RerunFinished, Selected, select
    from loratune.selection.rerun import cost_of

    record: SelectionRecord | None = None
    trained: list[Outcome] = []  # now; what an earlier start did is on disk
    with Interrupt() as interrupt:
        events = select(
            Path(args.folder),
            most=args.finalists,
            runs=args.runs,
            rerun=not args.no_rerun,
            require=args.require,
            prefer=args.prefer,
            common_practice=args.common_practice,
            trust_remote_code=args.trust_remote_code,
            stop=interrupt.stop,
        )
        for event in events:
            if isinstance(event, RerunFinished):
                trained.append(event.outcome)
            if isinstance(event, Selected):
                record = event.record
            elif (line := event_line(event)) is not None:
                print(line, flush=True)
            if isinstance(event, Planned):
                args.facts["planned"] = _priced(asdict(event.most), Path(args.folder))
            if isinstance(event, Planned) and event.most.runs and not args.yes and not _agreed():
                return 0
    if record is None:
        return stopped(args)
    args.facts |= _priced(record.to_plain(), Path(args.folder)) | {"common_practice": _common_practice(Path(args.folder))}
    args.facts |= {"verdict": record.verdict, "trained_now": _priced(asdict(cost_of(trained)), Path(args.folder))}
    if not record.shares_tell:
        shares: list[dict[str, Any]] = [args.facts, *args.facts["candidates"]]
        for row in shares:
            row |= dict.fromkeys({"share", "runner_up_share"} & row.keys())
    args.facts |= _hand_over(record, Path(args.folder), args.trust_remote_code)
    return 0


def _priced(spent: dict[str, Any], folder: Path) -> dict[str, Any]:
    """With `cost`, by the study's price of a device-hour; None without one."""
    from loratune.record import read

    price = read(folder).spec.get("budget", {}).get("price_per_device_hour")
    return spent | {"cost": None if price is None else spent["device_seconds"] / 3600 * price}


def _common_practice(folder: Path) -> dict[str, Any] | None:
    """The trial with the settings of most examples on the web, by the study's one run of it, as the report has it."""
    from loratune.cli.status import brief
    from loratune.record import read
    from loratune.record.common_practice import common_practice

    return brief(common_practice(read(folder)))


def event_line(event: "SelectEvent") -> str | None:
    """The event in a line; None for progress."""
    from loratune.selection import Planned, RerunFinished
    from loratune.selection.rerun import PRACTICE
    from loratune.system.formatting import duration, loss

    match event:
        case Planned(text=text) | Message(text=text):
            return text
        case RerunFinished(trial=trial, run=run, outcome=outcome):
            seconds = duration(outcome.train_seconds + outcome.validation_seconds)
            what = loss(outcome.validation_loss) if outcome.validation_loss is not None else outcome.state.value.replace("_", " ")
            return f"{'common practice' if run.startswith(PRACTICE) else f'trial {trial.number}'}, {run}: {what}, {seconds}"
    return None


def _agreed() -> bool:
    """Ask where somebody can answer; elsewhere the command itself is the answer."""
    if not sys.stdin.isatty():
        return True
    return input("Go on? [Y/n] ").strip().lower() in ("", "y", "yes")


def _hand_over(record: "SelectionRecord", folder: Path, trusted: bool) -> dict[str, Path | None]:
    """Hand the adapter over, and tell. Returns the paths."""
    from loratune.cli.trial_lines import delivered
    from loratune.record.paths import StudyPaths
    from loratune.selection.rerun import AGAIN
    from loratune.study.driver import deliver

    print("\n" + record.explain())
    spent = f"{record.runs} runs, {record.tokens:,} training tokens, {record.device_seconds / 3600:.2g} device-hours"
    print(f"Cost: {spent}.\n")
    delivery = deliver(folder, trust_remote_code=trusted)
    print(f"Choice:   {StudyPaths(folder).selection}")
    print("\n".join(delivered(delivery)))
    if record.shipped.run != AGAIN and any(StudyPaths(folder).evaluation.glob("*/*.json")):
        print(f"\nThe scores so far are of the study's own runs; `loratune evaluate {shlex.quote(str(folder))}` scores this adapter.")
    return {"report": delivery.report, "best_yaml": delivery.best, "adapter": delivery.adapter}
