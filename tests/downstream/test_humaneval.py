"""HumanEval: the protocol's text and cut, and all 164 reference programs in the sandbox."""

import gzip
import json
from pathlib import Path

import pytest

from loratune.downstream.sandbox.runner import run_programs
from loratune.downstream.tasks.benchmarks import build_benchmark
from loratune.downstream.tasks.humaneval import HumanEval, HumanEvalFenced, completion, job
from loratune.errors import DataError

PROBLEM = {
    "task_id": "T/0",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(f): assert f(1) == 1",
}


@pytest.fixture(scope="module")
def benchmark(shared_data: Path) -> HumanEval:
    return HumanEval(shared_data / "humaneval", weaker=True)


def test_every_reference_program_passes(benchmark: HumanEval) -> None:
    items = benchmark.items()
    assert len({item.id for item in items}) == 164
    verdicts = benchmark.score(items, [item.targets[0] for item in items])
    assert [(item.id, verdict.why) for item, verdict in zip(items, verdicts, strict=True) if verdict.score != 1] == []


def test_every_empty_program_fails(benchmark: HumanEval) -> None:
    items = benchmark.items()
    results = run_programs([job(item, "    pass") for item in items], weaker=True)
    assert {ran.kind for ran in results} == {"failed"}


@pytest.mark.parametrize(("number", "begins", "ends"), [
    (0, "from typing import List\n\n\ndef has_close_elements(", "    True\n    \"\"\"\n"),
    (1, "from typing import List\n\n\ndef separate_paren_groups(", "    ['()', '(())', '(()())']\n    \"\"\"\n"),
    (2, "\n\ndef truncate_number(number: float) -> float:\n", "    0.5\n    \"\"\"\n"),
])  # fmt: skip
def test_golden_prompts(benchmark: HumanEval, number: int, begins: str, ends: str) -> None:
    item = benchmark.items()[number]
    instruction = "Please complete the following Python code without providing any additional tasks such as testing or explanations\n"
    assert item.id == f"HumanEval/{number}"
    assert item.prompt.startswith(instruction + begins)
    assert item.prompt.endswith(ends)
    assert item.prompt[: item.shared] == instruction


@pytest.mark.parametrize(("answer", "kept"), [
    ("\n\n    return 1\n\nprint(2)", "    return 1"),
    ("   return 1\n    x", "    return 1\n    x"),  # three spaces: one more
    ("    a\n \n    b", "    a\n  \n    b"),  # a line of spaces is not blank
    ("\n\n", ""),
])  # fmt: skip
def test_the_cut_is_the_protocols(answer: str, kept: str) -> None:
    assert completion(answer) == kept


def test_decided_at_the_first_blank_line(benchmark: HumanEval) -> None:
    item = benchmark.items()[0]
    assert not benchmark.decided(item, "\n\n    return 1\n")
    assert benchmark.decided(item, "\n\n    return 1\n\n")


PLAIN = "    return x"
FENCED = [
    "```python\n    return x\n```",
    "Here it is:\n\n```python\ndef f(x):\n    y = x\n\n    return y\n```\n\nIt returns x.",
    "```\n    return x",  # cut at the length limit
    "1. So:\n\n   ```py\n   def f(x):\n       return x\n   ```",
    "~~~\n    return x\n~~~",
]


@pytest.fixture
def both(tmp_path: Path) -> tuple[HumanEval, HumanEvalFenced]:
    described = {**PROBLEM, "prompt": 'def f(x):\n    """x itself."""\n'}  # as all of the benchmark are
    (tmp_path / "HumanEval.jsonl").write_text(json.dumps(described))
    published, fenced = build_benchmark("humaneval", tmp_path, weaker=True), build_benchmark("humaneval_fenced", tmp_path, weaker=True)
    assert isinstance(published, HumanEval)
    assert isinstance(fenced, HumanEvalFenced)
    return published, fenced


def test_an_answer_within_fences_fails_in_the_protocol_and_passes_without_them(both: tuple[HumanEval, HumanEvalFenced]) -> None:
    published, fenced = both
    items = published.items() * len(FENCED)
    assert [verdict.score for verdict in published.score(items, FENCED)] == [0] * len(FENCED)
    assert [verdict.score for verdict in fenced.score(items, FENCED)] == [1] * len(FENCED)
    for benchmark in both:  # what has no fence is cut as ever
        assert [verdict.score for verdict in benchmark.score(items[:2], [PLAIN, "    y = 2\n\n    return x"])] == [1, 0]


def test_the_two_are_never_one_column_and_say_what_they_do(both: tuple[HumanEval, HumanEvalFenced]) -> None:
    published, fenced = both
    assert (published.name, fenced.name) == ("humaneval", "humaneval_fenced")
    assert len({published.version, fenced.version}) == 2
    assert "``` fences fails" in published.protocol
    assert fenced.protocol.startswith("Not the published protocol")


def test_a_fenced_answer_is_decided_at_the_end_of_its_block(both: tuple[HumanEval, HumanEvalFenced]) -> None:
    fenced = both[1]
    item = fenced.items()[0]
    assert not fenced.decided(item, "So:\n\n```python\n    return x\n\n")
    assert not fenced.decided(item, "    return x\n\n")
    assert fenced.decided(item, "So:\n\n```python\n    return x\n```")


def test_same_data_packed_or_not_is_the_same_version(tmp_path: Path) -> None:
    text = json.dumps(PROBLEM) + "\n"
    (tmp_path / "HumanEval.jsonl").write_text(text)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert HumanEval(tmp_path).version == HumanEval(tmp_path / "x.jsonl.gz").version


@pytest.mark.parametrize(("text", "says"), [
    ("", "holds no problem"),
    ("{", "line 1: not JSON"),
    (json.dumps(PROBLEM) + "\n[]", "line 2: needs the text field 'task_id'"),
    (json.dumps({**PROBLEM, "test": 3}), "line 1: needs the text field 'test'"),
    (f"{json.dumps(PROBLEM)}\n\n{json.dumps(PROBLEM)}", "line 3: task_id 'T/0' stands there twice"),
])  # fmt: skip
def test_bad_data_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "HumanEval.jsonl").write_text(text)
    with pytest.raises(DataError, match=says):
        HumanEval(tmp_path)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz"):
        HumanEval(tmp_path)
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot read"):
        HumanEval(tmp_path)
