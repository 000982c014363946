"""HumanEval: write the body of a Python function from its signature and docstring; scored by running its tests.

Protocol (Instruct-Eval, declare-lab/instruct-eval at 33b8f90, human_eval/main.py; tests as in openai/human-eval):
no examples; one instruction line, then the function's head; one sample at temperature 0.1, at most 512 new tokens; of
the answer, lines indented by an odd number of spaces get one more (LLaMA's tokenizer swallows a leading one), newlines
at its start are dropped, and it ends at the first blank line; pass@1 = share of the 164 programs that pass within 3 s.
The cut is the protocol's: it also cuts right answers that hold a blank line (34 of the 164 reference solutions), and an answer
within ``` fences, as chat models write it, is no program and fails. `humaneval_fenced` takes such an answer out of its fences; it
is a benchmark of its own, so that scores of the two never stand in one column.

Data: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374; MIT licence.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.downstream.sandbox.runner import Limits, ProgramTest, run_programs
from loratune.downstream.tasks.base import Benchmark, Item, Verdict
from loratune.errors import DataError

INSTRUCTION = "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
PLACES = ("HumanEval.jsonl.gz", "HumanEval.jsonl", "data/HumanEval.jsonl.gz", "humaneval/HumanEval.jsonl.gz")
# A block that the length limit cut has no end; then all that was written counts.
_BLOCK = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>```+|~~~+)[^\n`]*\n(?P<code>.*?)(?P<end>^[ \t]*(?P=fence)[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")


class HumanEval(Benchmark):
    """The 164 problems in `folder`: the release's HumanEval.jsonl.gz or unpacked .jsonl, its repository, or the file itself.

    weaker: accept the sandbox's weaker walls where namespaces are missing. Raises DataError.
    """

    name = "humaneval"
    title = "HumanEval"
    chance = 0.0
    max_new_tokens = 512
    temperature = 0.1
    runs_code = True
    protocol = "The answer ends at its first blank line; an answer within ``` fences fails (humaneval_fenced takes it out of them)."

    def __init__(self, data: Path | None, *, weaker: bool = False) -> None:
        if data is None:
            wanted = "HumanEval.jsonl.gz of github.com/openai/human-eval"
            raise DataError(f"{self.name} is read from a folder: give --data FOLDER with {wanted}.")
        self._file = _find(data)
        self._problems, digest = _read(self._file)
        self._weaker = weaker
        self.version = f"instruct-eval, data {digest[:12]}"

    def items(self) -> list[Item]:
        """Items with facts `head` (what the program begins with), `entry_point` and `test`.

        The target is the reference solution without its blank lines, so that it survives the protocol's cut.
        """
        return [
            Item(
                id=problem["task_id"],
                prompt=INSTRUCTION + problem["prompt"],
                shared=len(INSTRUCTION),
                targets=("\n".join(line for line in problem["canonical_solution"].split("\n") if line),),
                facts={"head": problem["prompt"], "entry_point": problem["entry_point"], "test": problem["test"]},
            )
            for problem in self._problems
        ]

    def score(self, items: Sequence[Item], answers: Sequence[str]) -> list[Verdict]:
        """1 when the program passes its tests in the sandbox. Raises SandboxError when it cannot be set up."""
        jobs = [job(item, self.completion(answer)) for item, answer in zip(items, answers, strict=True)]
        results = run_programs(jobs, limits=Limits(timeout=3.0), weaker=self._weaker)
        return [Verdict(score=float(ran.kind == "ok"), why="" if ran.kind == "ok" else f"{ran.kind}: {ran.why}") for ran in results]

    def decided(self, item: Item, text: str) -> bool:
        """After the first blank line nothing counts."""
        return "\n\n" in text.lstrip("\n")

    def completion(self, answer: str) -> str:
        """What of a model's answer is appended to the function's head."""
        return completion(answer)


class HumanEvalFenced(HumanEval):
    """HumanEval, but of an answer with a fenced block, what is in the first block counts, blank lines included."""

    name = "humaneval_fenced"
    title = "HumanEval, fences stripped"
    protocol = (
        "Not the published protocol: of an answer with ``` fences the first fenced block counts, whole; "
        "any other answer ends at its first blank line."
    )

    def __init__(self, data: Path | None, *, weaker: bool = False) -> None:
        super().__init__(data, weaker=weaker)
        self.version += ", fences stripped"

    def decided(self, item: Item, text: str) -> bool:
        """After the first block nothing counts; before it, talk and blank lines may come."""
        block = _BLOCK.search(text)
        return block is not None and bool(block["end"])

    def completion(self, answer: str) -> str:
        block = _BLOCK.search(answer)
        if block is None:
            return completion(answer)
        indent = block["indent"]  # of a block within a list
        return "\n".join(line.removeprefix(indent) for line in block["code"].split("\n")).strip("\n")


def completion(answer: str) -> str:
    """What of a model's answer is appended to the function's head."""
    lines = [" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in answer.split("\n")]
    return "\n".join(lines).lstrip("\n").partition("\n\n")[0]


def job(item: Item, body: str) -> ProgramTest:
    """The program that `body` completes, and its tests.

    The tests run behind the head of the problem (some use its imports and helper functions) with the function replaced
    by the program's, in another process: helpers that the program redefines do not reach them.
    """
    head, name = item.facts["head"], item.facts["entry_point"]
    return ProgramTest(program=head + body, entry_point=name, tests=f"{head}\n{name} = candidate\n{item.facts['test']}\ncheck({name})\n")


def _find(folder: Path) -> Path:
    found = next((path for path in (folder, *(folder / place for place in PLACES)) if path.is_file()), None)
    if found is None:
        raise DataError(
            f"no HumanEval data at {folder}; needed: a folder with {PLACES[0]} from "
            "https://github.com/openai/human-eval/tree/master/data, or that file itself"
        )
    return found


def _read(file: Path) -> tuple[list[dict[str, Any]], str]:
    """The problems, and the SHA-256 of the unpacked file."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
        lines = data.decode().split("\n")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}. Download it again from https://github.com/openai/human-eval") from error
    problems: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            problem = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from error
        for field in FIELDS:
            if not isinstance(problem, dict) or not isinstance(problem.get(field), str):
                raise DataError(f"{file}, line {number}: needs the text field {field!r}; a HumanEval problem has {', '.join(FIELDS)}")
        if problem["task_id"] in problems:
            raise DataError(f"{file}, line {number}: task_id {problem['task_id']!r} stands there twice")
        problems[problem["task_id"]] = problem
    if not problems:
        raise DataError(f"{file} holds no problem")
    return list(problems.values()), hashlib.sha256(data).hexdigest()
