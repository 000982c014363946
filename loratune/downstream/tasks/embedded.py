"""Benchmarks of the demo model: the same small world as its instructions, from the held-out part.

Each item was held out by its key (`tools/make_demo/tasks.py`), so in every wording. They show an evaluation working in
minutes; they say nothing about other models.

`demo_choice`  the likeliest of four answers; the wrong ones are drawn from the same kind of words
`demo_match`   the model writes; right is exactly the answer
`demo_code`    the model writes a Python function; right is one that gives what it should, tried in the sandbox
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

from loratune.data.prompts import alpaca_prompt
from loratune.demo import held_out_file
from loratune.downstream.sandbox.runner import ProgramTest, run_programs
from loratune.downstream.tasks.base import Benchmark, ChoiceBenchmark, Item, Verdict

# Kinds with one right answer among very many; the others (a letter, a number of words, the bigger of two) can be guessed.
_MATCHED = (
    *("copy", "reverse", "sort_words", "sort_numbers", "capitals", "pick", "opposite", "category", "odd_one", "knowledge"),
    *("describe", "plural", "follow", "read"),
)


@functools.cache
def _held_out() -> dict[str, list[dict[str, Any]]]:
    """The held-out instructions by kind of task, in the file's order."""
    found: dict[str, list[dict[str, Any]]] = {}
    with held_out_file().open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            found.setdefault(record["task"], []).append(record)
    return found


def _prompt(record: dict[str, Any]) -> str:
    return alpaca_prompt(record["instruction"], record["input"])


class _Demo(Benchmark):
    def texts(self, item: Item) -> tuple[str, ...]:
        """The instruction with its input, without Alpaca's template."""
        return (item.prompt.partition("### Instruction:\n")[2].removesuffix("### Response:").replace("### Input:\n", ""),)


class DemoChoice(_Demo, ChoiceBenchmark):
    """One of four by log-likelihood."""

    name, title = "demo_choice", "Demo: choice"
    version = "demo/1"
    chance = 0.25

    def items(self) -> list[Item]:
        return [
            Item(
                id=f"{kind}/{number}",
                group=kind,
                prompt=_prompt(record),
                choices=tuple(f" {word}" for word in record["choices"]),
                targets=(f" {record['output']}",),
            )
            for kind in ("opposite", "category", "plural", "knowledge")
            for number, record in enumerate(_held_out()[kind])
            if "choices" in record
        ]


class DemoMatch(_Demo):
    """The exact answer, white space at its ends aside; the mean over the kinds of task."""

    name, title = "demo_match", "Demo: match"
    version = "demo/1"
    chance = 0.0
    max_new_tokens = 40
    mean_over_groups = True

    def items(self) -> list[Item]:
        return [
            Item(id=f"{kind}/{number}", group=kind, prompt=_prompt(record), targets=(record["output"],))
            for kind in _MATCHED
            for number, record in enumerate(_held_out()[kind])
        ]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        return [Verdict(score=float(answer.strip() in item.targets)) for item, answer in zip(items, answers, strict=True)]

    def decided(self, item: Item, text: str) -> bool:
        begun = text.strip()
        return not begun.endswith("\ufffd") and not any(target.startswith(begun) for target in item.targets)


class DemoCode(_Demo):
    """A function of one line that agrees with the right one on some values, types included."""

    name, title = "demo_code", "Demo: code"
    version = "demo/1"
    protocol = "The whole answer is run as it stands; a program within ``` fences does not run and counts as wrong."
    chance = 0.0
    max_new_tokens = 48
    runs_code = True

    def __init__(self, *, weaker: bool = False) -> None:
        """weaker: accept the sandbox's weaker walls where namespaces are missing."""
        self._weaker = weaker

    def items(self) -> list[Item]:
        found = []
        for number, record in enumerate(_held_out()["program"]):
            name, test = _test(record["output"])
            facts = {"entry_point": name, "test": test}
            found.append(Item(id=f"program/{number}", prompt=_prompt(record), targets=(record["output"],), facts=facts))
        return found

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """1 when the program passes its test in the sandbox. Raises SandboxError when it cannot be set up."""
        jobs = [
            ProgramTest(program=answer.strip(), entry_point=item.facts["entry_point"], tests=item.facts["test"])
            for item, answer in zip(items, answers, strict=True)
        ]
        runs = run_programs(jobs, weaker=self._weaker)
        return [Verdict(score=float(run.kind == "ok"), why="" if run.kind == "ok" else f"{run.kind}: {run.why}") for run in runs]


def _test(reference: str) -> tuple[str, str]:
    """The name of the function `def NAME(PARAMETERS): ...`, and a test that compares `candidate` with it."""
    name, _, rest = reference.removeprefix("def ").partition("(")
    some = (-7, 0, 1, 4, 19)
    pair = "," in rest.partition(")")[0]
    arguments = [(x, y) for x in some for y in some] if pair else [(x,) for x in range(-25, 26)]
    return name, (
        f"def expected({rest}\n\n"
        f"for given in {arguments!r}:\n"
        "    wanted, got = expected(*given), candidate(*given)\n"
        "    assert type(wanted) is type(got) and wanted == got, (given, wanted, got)\n"
    )
