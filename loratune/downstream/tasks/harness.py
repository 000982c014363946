"""Any task of lm-evaluation-harness (`pip install 'loratune[eval]'`), by its own name, in the same table of results.

The harness writes the prompts, cuts them and judges; the model that it is given is our frozen base with one adapter
hooked in, which has passed the adapter check.
"""

import contextlib
import functools
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.downstream.answering.adapter_stack import Adapters
from loratune.errors import DataError, EvaluationError, MissingExtraError
from loratune.finetune.model import BaseModel, autocast
from loratune.system.names import nearest


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """One model's results on a task: a line per document, as `scores.ResultWriter.add` takes them, and what they mean."""

    lines: list[dict[str, Any]]
    metric: str
    version: str
    chance: float | None  # of choosing among the options; None where the model writes


def require_harness() -> None:
    """Raises MissingExtraError when the harness is not installed."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("lm-evaluation-harness", "eval", str(error)) from error


def check_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """See that the harness knows the tasks, those below `folder` included. Raises EvaluationError naming near ones."""
    known = _manager(folder, tasks).all_tasks
    for task in tasks:
        if task not in known:
            hint = nearest(task, known, most=3) or "; `lm-eval ls tasks` lists them."
            raise EvaluationError(f"lm-evaluation-harness has no task {task!r}{hint}")


def run_task(
    task: str, base: BaseModel, adapters: Adapters, place: int, *, folder: Path | None, limit: int | None, allow_code: bool, seed: int
) -> HarnessResult:
    """Score the model at `place` on `task`, its first metric per document. limit: the first so many documents of each subtask.

    Raises DataError when the task's data cannot be had, EvaluationError for a task without a score per document.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with adapters.use([place]), torch.inference_mode(), autocast(base), _quiet():
            model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=16, device=str(base.device))
            found: Any = simple_evaluate(
                model,
                tasks=[task],
                task_manager=_manager(folder, [task]),
                limit=limit,
                bootstrap_iters=0,
                confirm_run_unsafe_code=allow_code,
                random_seed=seed,
            )
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise DataError(f"lm_eval task {task}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    lines, chances, metrics, versions = [], [], [], []
    for subtask, samples in found["samples"].items():
        config = found["configs"][subtask]
        metric = _metric(config, samples, subtask)
        metrics.append(metric)
        versions.append(f"{subtask} {found['versions'].get(subtask)}")
        first = samples[0].get("filter")
        for sample in samples:
            if sample.get("filter") != first:  # the same answers, read in another way
                continue
            if config["output_type"] == "multiple_choice":
                chances.append(1 / len(sample["arguments"]))
            answer = str(sample.get("filtered_resps", ""))[:2000]
            name = f"{subtask}/{sample['doc_id']}"
            lines.append({"id": name, "group": subtask, "answer": answer, "score": float(sample[metric]), "why": ""})
    return HarnessResult(
        lines=lines,
        metric=", ".join(sorted(set(metrics))),
        version="; ".join(versions[:3]) + (" ..." if len(versions) > 3 else ""),
        chance=sum(chances) / len(chances) if len(chances) == len(lines) else None,
    )


def _metric(config: dict[str, Any], samples: list[dict[str, Any]], task: str) -> str:
    """The first metric that is a number for each document and of which more is better."""
    for entry in config["metric_list"]:
        name = str(entry["metric"])
        if samples and isinstance(samples[0].get(name), int | float) and entry.get("higher_is_better", True):
            return name
    names = [str(entry["metric"]) for entry in config["metric_list"]]
    raise EvaluationError(f"lm_eval task {task}: none of its metrics ({', '.join(names)}) gives each document a score to be compared.")


def _manager(folder: Path | None, tasks: Sequence[str]) -> Any:
    """The harness's list of tasks. Its own thousands take half a minute to read, and are left out where `folder` has all of `tasks`."""
    if folder is not None and not folder.is_dir():
        raise DataError(f"there is no folder {folder} of task descriptions.")
    if folder is not None:
        own = _listed(folder, defaults=False)
        if set(tasks) <= set(own.all_tasks):
            return own
    return _listed(folder, defaults=True)


@functools.cache
def _listed(folder: Path | None, *, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder else None, include_defaults=defaults)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's own progress bars and log off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
