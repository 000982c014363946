"""`loratune.search` with callbacks: what is called, in which order, also when the study goes on."""

from pathlib import Path
from typing import Any

import loratune
from loratune import demo


class Told(loratune.Callback):
    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def on_trial_begin(self, trial: Any) -> None:
        self.calls.append(("begin", trial.number))

    def on_validation(self, trial: Any, outcome: Any) -> None:
        self.calls.append(("validation", outcome.validation_loss))

    def on_trial_end(self, trial: Any) -> None:
        self.calls.append(("end", trial.value))

    def on_message(self, text: str) -> None:
        self.calls.append(("message", text))


def test_callbacks_hear_each_trial_once_and_again_from_the_disk(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    train, validation = demo.data_files()
    base = {
        "model": str(demo.model_folder()),
        "data": {"train": str(train), "validation": str(validation), "train_count": 16, "validation_count": 8, "max_length": 96},
        "training": {"epochs": 1, "batch_size": 8},
        "search_space": {"lora_r": [2, 4], "learning_rate": [1e-3, 2e-3]},
        "sampler": "random",
        "executor": "inline",
        "budget": {"trials": 2},
        "output": {"folder": str(tmp_path / "study")},
    }
    spec = loratune.StudySpec.load(base=base)
    told = Told()
    record = loratune.search(spec, told)
    heard = [call for call in told.calls if call[0] != "message"]
    losses = [trial.value for trial in record.trials]
    assert heard == [step for n, value in enumerate(losses) for step in (("begin", n), ("validation", value), ("end", value))]
    assert any("train" in text for name, text in told.calls if name == "message")
    again = Told()
    assert loratune.search(spec, [again]).best == record.best
    assert [call for call in again.calls if call[0] != "message"] == heard
