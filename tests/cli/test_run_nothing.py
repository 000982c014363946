"""A study that trained nothing to its end has nothing to hand over, and says so to scripts too."""

from pathlib import Path

import yaml
from workplace import rows, tiny, write_rows


def test_the_exit_code_is_not_0_when_no_trial_was_trained(loratune, tinystories: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spec = tiny(tinystories, write_rows(tmp_path / "data.jsonl", rows()))
    spec |= {"constraints": ["validation_loss <= 0.000001"], "budget": {"trials": 2}, "sampler": "random"}
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    for _ in range(2):  # and of the same command again
        answer = loratune("run", tmp_path / "spec.yaml", "--output", tmp_path / "study")
        assert "No trial was trained to its end" in answer.out, answer.err
        assert answer.code == 7
