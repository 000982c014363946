"""Names -> benchmarks, and whether they may run here. Which there are is declared in `loratune/plugs/builtin.py`."""

from collections.abc import Sequence
from pathlib import Path

from loratune.downstream.tasks.base import Benchmark
from loratune.errors import EvaluationError
from loratune.plugs import BENCHMARKS
from loratune.system.names import nearest

PUBLISHED = ("mmlu", "bbh", "drop", "humaneval")  # the four of the published study
EMBEDDED = ("demo_choice", "demo_match", "demo_code")
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness


def build_benchmark(name: str, data: Path | None = None, *, weaker: bool = False) -> Benchmark:
    """The benchmark called `name`, its data from the folder `data`, else from the hub.

    weaker: for those that run code, accept the sandbox's weaker walls where namespaces are missing.

    Raises EvaluationError for an unknown name, with the near ones, and DataError for data that are not there.
    """
    if name not in BENCHMARKS:
        hint = nearest(name.lower(), BENCHMARKS.names, most=3) or f"; allowed: {', '.join(BENCHMARKS.names)}."
        raise EvaluationError(f"there is no benchmark {name!r}{hint} A task of lm-evaluation-harness is named {HARNESS}TASK.")
    return BENCHMARKS.make(name, Benchmark, {"data": data, "weaker": weaker})


def may_run(own: Sequence[Benchmark], foreign: Sequence[str], tasks: Path | None, *, allow: bool, weaker: bool) -> None:
    """Refuse `own` benchmarks, and `foreign` tasks of lm-evaluation-harness, that cannot or may not run.

    Raises EvaluationError, and MissingExtraError where the harness is not installed.
    """
    running = [benchmark.name for benchmark in own if benchmark.runs_code]
    if running and not allow:
        raise EvaluationError(
            f"{', '.join(running)} runs programs that the models write. They run in a sandbox (loratune.downstream.sandbox.runner says "
            "what it does not cover); allow it with --allow-code-execution, or leave the benchmark out."
        )
    if running and not weaker:
        from loratune.downstream.sandbox.runner import namespaces_missing

        if missing := namespaces_missing():
            raise EvaluationError(
                f"{', '.join(running)}: programs cannot be isolated by namespaces here ({missing}). Run where user namespaces are allowed, "
                "or accept the weaker walls that loratune.downstream.sandbox.runner describes with --weaker-sandbox."
            )
    if foreign:
        from loratune.downstream.tasks import harness

        harness.require_harness()
        harness.check_tasks(foreign, tasks)
