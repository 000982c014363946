"""Score a study's adapters on downstream benchmarks: the best ten by validation loss, the default's, and the bare model.

    loratune evaluate runs/demo --allow-code-execution         the demo's own benchmarks
    loratune evaluate runs/study --benchmarks mmlu,bbh --data FOLDER
    loratune evaluate runs/study --benchmarks lm_eval:arc_easy
    loratune evaluate runs/study --benchmarks mmlu --engine vllm      on a GPU, by a vLLM server that is started and ended

Benchmarks: mmlu, mmlu_loglikelihood, bbh, drop, humaneval, humaneval_fenced (an answer within ``` fences, which fails in the
published protocol, is taken out of them), and any task of lm-evaluation-harness as lm_eval:TASK.
After `loratune select` the adapter to ship is scored too, as a separate model if it was trained with another seed.
An address of a vLLM server that runs already is given as --server URL. vLLM is not for every platform: docs/how-to/vllm.md.
Before anything is scored, each adapter is checked to be active. Answers are kept in STUDY/evaluation: after Ctrl-C or a
kill, the same command continues. The study's report, if there is one, is rewritten.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.parser import add_trust

if TYPE_CHECKING:
    from loratune.downstream.events import BenchmarkProgress

TOP = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="STUDY", help="the study's folder")
    parser.add_argument("--benchmarks", metavar="NAMES", help="comma-separated (default: the published four; for the demo, its own)")
    parser.add_argument("--data", metavar="FOLDER", help="the benchmarks' data (default: the Hugging Face hub)")
    parser.add_argument("--tasks", metavar="FOLDER", help="your own lm-evaluation-harness tasks")
    parser.add_argument("--subset", type=int, metavar="N", help="number of items per benchmark, always the same ones")
    parser.add_argument("--top", type=int, default=TOP, metavar="N", help=f"number of trials, by lowest validation loss (default: {TOP})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the study's")
    parser.add_argument("--engine", choices=("loratune", "vllm"), default="loratune", help="who answers (default: loratune)")
    parser.add_argument("--server", metavar="URL", help="a vLLM server that runs; default: --engine vllm starts one and ends it")
    add_trust(parser)
    parser.add_argument("--allow-code-execution", action="store_true", help="run programs that models write, in a sandbox")
    parser.add_argument("--weaker-sandbox", action="store_true", help="accept a sandbox without namespaces where they are missing")


def main(args: argparse.Namespace) -> int:
    from loratune.cli.interrupt import Interrupt, stopped
    from loratune.cli.status_scores import score_summary
    from loratune.downstream.events import BenchmarkProgress
    from loratune.record import read
    from loratune.record.paths import StudyPaths
    from loratune.study.evaluation import Scored, evaluate

    names = None if args.benchmarks is None else [name.strip() for name in args.benchmarks.split(",") if name.strip()]
    scored, line = None, _Line()
    with Interrupt() as interrupt:
        events = evaluate(
            Path(args.folder),
            benchmarks=names,
            top=args.top,
            data=Path(args.data) if args.data else None,
            tasks=Path(args.tasks) if args.tasks else None,
            subset=args.subset,
            device=args.device,
            allow_code_execution=args.allow_code_execution,
            weaker_sandbox=args.weaker_sandbox,
            trust_remote_code=args.trust_remote_code,
            engine=args.engine,
            server=args.server,
            stop=interrupt.stop,
        )
        for event in events:
            if isinstance(event, BenchmarkProgress):
                line.show(event)
                continue
            line.end()
            if isinstance(event, Scored):
                scored = event
            else:
                print(event.text, flush=True)
        line.end()
    if scored is None:
        return stopped(args)
    print(f"\n{scored.text}\n\nEvery answer: {scored.folder}")
    args.facts |= {"folder": scored.folder, "scores": score_summary(read(args.folder, trust_remote_code=args.trust_remote_code))}
    _refresh(StudyPaths(args.folder).report)
    return 0


def _refresh(report: Path) -> None:
    """Rewrite the study's report and the adapter's card, if there are any: they show the scores."""
    if report.is_file():
        from loratune.delivery.handover import refresh_card
        from loratune.record import read
        from loratune.report import write_report

        refresh_card(read(report.parent))
        print(f"Report: {write_report([read(report.parent)], report)}")


class _Line:
    """Progress on one line that is overwritten; where the output is no terminal, a line at each tenth."""

    def __init__(self) -> None:
        self._open, self._tenth = False, -1

    def show(self, event: "BenchmarkProgress") -> None:
        from loratune.cli.trial_lines import clock

        left = f", about {clock(event.seconds_left)} left" if event.seconds_left is not None and event.done < event.total else ""
        text = f"  {event.benchmark}: {event.done:,} of {event.total:,} answers, {clock(event.seconds)}{left}"
        tenth = 10 * event.done // event.total
        if sys.stdout.isatty():
            print(f"\r{text}\x1b[K", end="", flush=True)
            self._open = True
        elif tenth != self._tenth or event.done == event.total:
            print(text, flush=True)
        self._tenth = tenth

    def end(self) -> None:
        if self._open:
            print()
        self._open, self._tenth = False, -1
