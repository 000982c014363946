"""Results on disk: appended line by line, torn lines forgiven, other identities put aside; and what is said of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loratune.downstream.results.findings import finding_lines, findings
from loratune.downstream.results.scores import Result, ResultWriter, adapter_fingerprint, by_model, read_results, sole_evaluation
from loratune.downstream.tasks.base import Item, constant_scores
from loratune.errors import StorageError

IDENTITY = {"benchmark": "b", "adapter": "aa", "version": "1", "seed": 0}


def line(number: int, score: float = 1.0, group: str = "g") -> dict[str, Any]:
    return {"id": str(number), "group": group, "answer": f"a\u2028{number}", "score": score, "why": ""}


def written(folder: Path, count: int = 3) -> ResultWriter:
    writer = ResultWriter(folder, "0001", "b", IDENTITY)
    writer.describe({"title": "B", "chance": 0.5, "items": 4})
    writer.add([line(n, n % 2) for n in range(count)], 2.0)
    return writer


def test_appends_and_reads(tmp_path: Path) -> None:
    written(tmp_path)
    again = ResultWriter(tmp_path, "0001", "b", IDENTITY)
    assert again.done == {"0", "1", "2"}
    (result,) = read_results(tmp_path)
    assert (result.model, result.benchmark, result.done, result.chance) == ("0001", "b", False, 0.5)
    assert result.scores == {"0": 0.0, "1": 1.0, "2": 0.0}
    assert result.answers["2"] == "a\u20282"
    again.add([line(3)], 1.0)
    again.describe({"title": "B", "chance": 0.5, "items": 4})
    (result,) = read_results(tmp_path)
    assert result.done
    assert by_model([result])["0001"]["b"].score.value == 0.5


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_torn_last_line(tmp_path: Path, kept: int) -> None:
    """A kill in the middle of a write: whatever part of the last line is there, its item is answered again."""
    written(tmp_path)
    file = tmp_path / "0001" / "b.jsonl"
    whole = file.read_bytes()
    last = json.dumps(line(3)).encode()
    file.write_bytes(whole + last[:kept])
    (result,) = read_results(tmp_path)
    assert set(result.scores) == {"0", "1", "2"}
    writer = ResultWriter(tmp_path, "0001", "b", IDENTITY)
    assert writer.done == {"0", "1", "2"}
    writer.add([line(3)], 1.0)
    assert file.read_bytes() == whole + json.dumps(line(3), ensure_ascii=False).encode() + b"\n"


def test_damaged_middle(tmp_path: Path) -> None:
    written(tmp_path)
    file = tmp_path / "0001" / "b.jsonl"
    file.write_text("{broken\n" + file.read_text())
    with pytest.raises(StorageError, match=r"b\.jsonl, line 1 is damaged"):
        read_results(tmp_path)


@pytest.mark.parametrize("change", [{"adapter": "bb"}, {"version": "2"}, {"seed": 1}])
def test_another_identity_is_put_aside(tmp_path: Path, change: dict[str, Any]) -> None:
    written(tmp_path)
    before = (tmp_path / "0001" / "b.jsonl").read_text()
    writer = ResultWriter(tmp_path, "0001", "b", IDENTITY | change)
    assert not writer.done
    assert (tmp_path / "0001" / "b.jsonl.1.bak").read_text() == before
    assert not read_results(tmp_path)


def test_fingerprint(tmp_path: Path) -> None:
    assert adapter_fingerprint(None) is None
    with pytest.raises(StorageError, match=r"adapter_config\.json"):
        adapter_fingerprint(tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text(name)
    first = adapter_fingerprint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("changed")
    assert adapter_fingerprint(tmp_path) != first


def made(model: str, share: float, items: int = 400, chance: float = 0.25, constant: tuple[float, float] | None = None) -> Result:
    scores = {str(n): float(n < share * items) for n in range(items)}
    facts = {"title": "B", "chance": chance, "items": items, "constant": constant}
    return Result(model=model, benchmark="b", facts=facts, scores=scores, groups=dict.fromkeys(scores, ""))


def test_findings_of_a_clear_case() -> None:
    names = [f"{n:04d}" for n in range(1, 11)]
    losses = {name: 1 + 0.1 * n for n, name in enumerate(names)} | {"0000": 3.0, "base": 5.0}
    results = [made(name, 0.9 - 0.03 * n) for n, name in enumerate(names)] + [made("0000", 0.4), made("base", 0.25)]
    (found,) = findings(results, losses, names, "0000")
    assert found.best is not None
    assert (found.best.n, round(found.best.max, 3), round(found.best.min, 3)) == (10, 0.9, 0.63)
    said = " ".join(found.sentences)
    assert "11 of 12 models are above chance" in said
    assert "scores higher than the default: +50.0 points" in said
    assert "lower validation loss goes with a higher B score" in said
    text = "\n".join(finding_lines(results, losses, names, "0000"))
    assert "anded over" not in text
    assert (
        text.index("best, trial 1") < text.index("default, trial 0") < text.index("base model, untuned") < text.index("mean of the 10 best")
    )


def test_findings_at_chance() -> None:
    names = [f"{n:04d}" for n in range(1, 8)]
    losses = {name: 1 + 0.1 * n for n, name in enumerate(names)}
    results = [made(name, 0.25 + 0.005 * (n % 3)) for n, name in enumerate(names)] + [made("0000", 0.25), made("base", 0.25)]
    (found,) = findings(results, losses | {"0000": 3.0}, names, "0000")
    said = " ".join(found.sentences)
    assert "No model is above chance (25.0 %)" in said
    assert "data cannot tell" in said or "little" in said
    below = findings([made("0000", 0.05), made("base", 0.1)], {}, [], "0000")[0].sentences
    assert below[0].startswith("Every model is below chance (25.0 %)")
    assert finding_lines([], {}, [], None) == ["Nothing has been scored yet."]


def test_findings_where_always_the_same_letter_is_off_chance() -> None:
    """MMLU's letters are not equally often right: 22.9 % of A, 26.9 % of D."""
    letters = [Item(id=str(n), prompt="", choices=("A", "B"), targets=("A" if n < 23 else "B",)) for n in range(100)]
    assert constant_scores(letters) == (0.23, 0.77)
    assert constant_scores([*letters, Item(id="x", prompt="", choices=("C", "D"), targets=("C",))]) is None
    assert constant_scores([Item(id="x", prompt="", targets=("C",))]) is None
    for share in (0.235, 0.27):
        results = [made(name, share, items=14_000, constant=(0.229, 0.269)) for name in ("0000", "base")]
        (said, *_) = findings(results, {}, [], "0000")[0].sentences
        assert said.startswith("No model is above chance (25.0 %; choosing the same for every item scores 22.9 to 26.9 %): ")


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    with sole_evaluation(tmp_path / "evaluation"):
        pass
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "evaluation" / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(StorageError, match="is being written by another evaluation"), sole_evaluation(tmp_path / "evaluation"):
        pass
    other.kill()
    other.communicate()
    with sole_evaluation(tmp_path / "evaluation"):
        pass
