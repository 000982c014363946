"""The user's own metrics at work: their functions found, tried before the first trial, and called with a trial's answers.

scoring/own.json        what the study began with: each function's fingerprint, the ids of the questions
scoring/measured.jsonl  each trial's values, for a function that changes

A function that changed and gives every trial measured so far the same value is taken; another one would be compared with what it
never measured, and is refused.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from loratune.downstream.results.scores import describe_model, read_results
from loratune.downstream.tasks.base import Item
from loratune.downstream.tasks.generated import AnswerSet
from loratune.errors import EvaluationError, SpecError, StorageError
from loratune.spec.own_metrics import OwnMetric
from loratune.system.files import parsed, write_atomically
from loratune.system.jsonl import append_lines, read_lines
from loratune.system.names import nearest

Function = Callable[[list[dict[str, str]]], Any]
_TRIED = 4  # reference answers
_PLAIN = (int, float, str, bytes, bool, tuple, frozenset, type(None))  # constants whose value is a part of a function


def answer_set(metric: OwnMetric) -> AnswerSet:
    return AnswerSet(data=metric.data, examples=metric.examples, max_new_tokens=metric.max_new_tokens)


def functions_of(metrics: Sequence[OwnMetric]) -> dict[str, Function]:
    """The metrics' functions by name, imported. Raises one SpecError for all that are not there."""
    found, mistakes = {}, []
    for place, metric in enumerate(metrics):
        try:
            found[metric.name] = _imported(metric.function)
        except ValueError as error:
            mistakes.append(f"metrics.{place}.function: {error}")
        if metric.data is not None and not Path(metric.data).expanduser().exists():
            mistakes.append(f"metrics.{place}.data: there is no file {metric.data}")
    if mistakes:
        raise SpecError("\n".join(mistakes))
    return found


class OwnMetrics:
    """A study's own metrics. folder: its `scoring`; items: of each answer set, by its name."""

    def __init__(self, metrics: Sequence[OwnMetric], folder: Path, items: Mapping[str, Sequence[Item]]) -> None:
        """Try the functions on reference answers. Raises SpecError, and StorageError where functions or questions changed meanwhile."""
        self._metrics, self._folder, self._items = metrics, folder, items
        self._functions = functions_of(metrics)
        mistakes = []
        for place, metric in enumerate(metrics):
            some = items[answer_set(metric).name][:_TRIED]
            try:
                self._call(metric, {item.id: item.facts["reference"] for item in some}, some)
            except ValueError as error:
                mistakes.append(f"metrics.{place}.function: {error}, with {len(some)} reference answers as answers")
        if mistakes:
            raise SpecError("\n".join(mistakes))
        self._keep_faith()

    def measure(self, model: str) -> dict[str, float]:
        """The metrics of a model whose answers are all there; empty where they are not. Raises EvaluationError."""
        answers, found = self._answers(model), {}
        for metric in self._metrics:
            given, items = answers.get(answer_set(metric).name, {}), self._items[answer_set(metric).name]
            if any(item.id not in given for item in items):
                return {}
            try:
                found[metric.name] = self._call(metric, given, items)
            except ValueError as error:
                raise EvaluationError(
                    f"metrics: {metric.name}: {error}, with {len(items)} answers of {describe_model(model)}. Mend the function and give "
                    "the same command again: the answers are kept, and it may change as long as it gives the trials before the same values."
                ) from error
        append_lines(self._folder / "measured.jsonl", [{"model": model, "metric": name, "value": value} for name, value in found.items()])
        return found

    def _answers(self, model: str) -> dict[str, dict[str, str]]:
        return {result.benchmark: result.answers for result in read_results(self._folder) if result.model == model}

    def _call(self, metric: OwnMetric, answers: Mapping[str, str], items: Sequence[Item]) -> float:
        """Raises ValueError with what went wrong."""
        records = [
            {"prompt": item.facts["prompt"], "reference": item.facts["reference"], "answer": answers[item.id].strip()} for item in items
        ]
        try:
            value = self._functions[metric.name](records)
        except Exception as error:  # whatever a user's function raises
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ValueError(f"{metric.function} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})") from error
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{metric.function} returned {value!r:.80}; needed: a finite number")
        return number

    def _keep_faith(self) -> None:
        """See that the metrics are those that earlier trials were measured by, and write down what they are."""
        path, now = self._folder / "own.json", self._now()
        remedy = "Remove it, if neither the metrics' functions nor their data changed since the study began."
        began = parsed(path, json.loads, remedy) if path.is_file() else now
        measured = read_lines(self._folder / "measured.jsonl")
        if measured and began["items"] != now["items"]:
            changed = ", ".join(name for name in now["items"] if began["items"].get(name) != now["items"][name])
            raise StorageError(f"{path}: the questions of {changed} have changed. Restore the data, or begin a new study.")
        for metric in self._metrics:
            if measured and began["functions"].get(metric.name) != now["functions"][metric.name]:
                self._remeasure(metric, {line["model"]: line["value"] for line in measured if line["metric"] == metric.name})
        if began != now or not path.is_file():
            write_atomically(path, json.dumps(now, indent=1))

    def _remeasure(self, metric: OwnMetric, before: Mapping[str, float]) -> None:
        items = self._items[answer_set(metric).name]
        for model, value in before.items():
            try:
                again = self._call(metric, self._answers(model)[answer_set(metric).name], items)
            except (ValueError, KeyError) as error:
                again, why = math.nan, f"cannot be measured again ({error})"
            else:
                why = f"would be {again:.6g}"
            if not math.isclose(again, value, rel_tol=1e-9, abs_tol=1e-12):
                raise StorageError(
                    f"metrics: {metric.function} changed since the study in {self._folder.parent} began: {metric.name} of "
                    f"{describe_model(model)} was {value:.6g}, and {why}. "
                    "Restore the function, or begin a new study with another --output.folder."
                )

    def _now(self) -> dict[str, Any]:
        return {
            "functions": {name: fingerprint(function) for name, function in self._functions.items()},
            "items": {name: [item.id for item in items] for name, items in self._items.items()},
        }


def fingerprint(function: Function) -> str:
    """SHA-256 of a function's source, with that of the functions and the plain constants of its module that it names, and so on."""
    parts: dict[str, str] = {}
    _gather(inspect.unwrap(function), parts)
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def _gather(found: Any, parts: dict[str, str]) -> None:
    name = getattr(found, "__qualname__", type(found).__qualname__)
    if name in parts:
        return
    try:
        parts[name] = inspect.getsource(found if hasattr(found, "__qualname__") else type(found))
    except (OSError, TypeError):  # not written in Python, or typed into an interpreter
        parts[name] = repr(getattr(getattr(found, "__code__", None), "co_code", type(found)))
    if not isinstance(found, FunctionType):
        return
    for used in _names(found.__code__):
        value = found.__globals__.get(used)
        if isinstance(value, FunctionType | type) and value.__module__ == found.__module__:
            _gather(value, parts)
        elif used in found.__globals__ and isinstance(value, _PLAIN):
            parts[f"{used} ="] = repr(value)


def _names(code: CodeType) -> Iterable[str]:
    yield from code.co_names
    for inner in code.co_consts:  # comprehensions and functions inside
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _imported(address: str) -> Function:
    """Raises ValueError."""
    where, _, name = address.rpartition(":")
    module = _module(where)
    there = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if not hasattr(module, name):
        raise ValueError(f"{where} has no function {name!r}{nearest(name, there) or '; it has ' + (', '.join(there[:10]) or 'none')}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{name} of {where} is {function!r:.60}, needed: a function")
    made: Function = function
    return made


def _module(where: str) -> Any:
    """The module at a dotted name or in a .py file; a file of the current folder comes before what is installed. Raises ValueError."""
    file = Path(where).expanduser() if where.endswith(".py") else Path(where.replace(".", "/") + ".py")
    try:
        if file.is_file():
            return _from_file(file.resolve(), file.stem)
        if where.endswith(".py"):
            raise ValueError(f"there is no file {where}")
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise ValueError(
                f"there is no module {where!r}: neither {file} in the current folder or beside the description, nor an installed one"
            ) from error
        raise ValueError(f"{where} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # whatever a user's module does
        if isinstance(error, ValueError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error


def _from_file(path: Path, name: str) -> Any:
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) and Path(str(known.__file__)).resolve() == path:
        return known
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what it imports from beside it
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    if known is None:
        sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if known is None:
            del sys.modules[name]
        raise
    return module
