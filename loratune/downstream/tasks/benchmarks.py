"""Names -> benchmarks, and whether they may run here. Each is imported when it is asked for.

A new benchmark is a file of this folder, its line here, and nothing else.
"""

import difflib
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.downstream.tasks.base import Benchmark
from loratune.errors import DataError, EvaluationError

_PLACES = {  # name -> file, class
    "mmlu": ("mmlu", "Mmlu"),
    "mmlu_loglikelihood": ("mmlu", "MmluLoglikelihood"),
    "bbh": ("bbh", "Bbh"),
    "drop": ("drop", "DropBenchmark"),
    "humaneval": ("humaneval", "HumanEval"),
    "humaneval_fenced": ("humaneval", "HumanEvalFenced"),  # an answer within ``` is taken out of them
    "demo_choice": ("embedded", "DemoChoice"),
    "demo_match": ("embedded", "DemoMatch"),
    "demo_code": ("embedded", "DemoCode"),
}
PUBLISHED = ("mmlu", "bbh", "drop", "humaneval")  # the four of the published study
EMBEDDED = ("demo_choice", "demo_match", "demo_code")
NAMES = tuple(_PLACES)
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness


def build_benchmark(name: str, data: Path | None = None, *, weaker: bool = False) -> Benchmark:
    """The benchmark called `name`, its data from the folder `data`, else from the hub.

    weaker: for those that run code, accept the sandbox's weaker walls where namespaces are missing.

    Raises EvaluationError for an unknown name, with the near ones, and DataError for data that are not there.
    """
    if name not in _PLACES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(NAMES)};"
        raise EvaluationError(f"there is no benchmark {name!r}; {hint} A task of lm-evaluation-harness is named {HARNESS}TASK.")
    file, kind = _PLACES[name]
    make: Any = getattr(importlib.import_module(f"loratune.downstream.tasks.{file}"), kind)
    if file == "humaneval" and data is None:
        raise DataError(f"{name} is read from a folder: give --data FOLDER with HumanEval.jsonl.gz of github.com/openai/human-eval.")
    places = () if name in EMBEDDED else (data,)
    return make(*places, weaker=weaker) if make.runs_code else make(*places)


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
