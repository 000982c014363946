"""Studies to report on, written to disk through `loratune.record` and read back, as the driver does."""

import csv
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loratune.record import COMPLETE, StudyRecord, Trial, open_record, read
from loratune.work import CurvePoint, Hyperparameters, Outcome, State

RANKS = (4, 8, 16, 32, 64, 128, 256, 512)
DROPOUTS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
TOKENS = 1_000_000  # of a full run
DEFAULT = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "learning_rate": 1e-5}


@dataclass
class Point:
    """A trial to be: what varies, and what becomes of it."""

    params: dict[str, Any]
    value: float | None
    state: str = COMPLETE
    message: str = ""
    runs: tuple[tuple[str, tuple[float, ...]], ...] = ()  # (run, validation losses, evenly spread); () = one at the end
    hyperparameters: dict[str, Any] = field(default_factory=dict)


def spec_of(name: str = "a-study", **changes: Any) -> dict[str, Any]:
    """A study's description as `spec.yaml` holds it; a change `sampler={...}` replaces the fields it names."""
    spec: dict[str, Any] = {
        "name": name,
        "seed": 0,
        "model": {"name_or_path": "meta-llama/Llama-2-7b-hf", "revision": None, "dtype": "auto", "load_in_4bit": False},
        "data": {"train": [{"path": "alpaca.json", "count": None}, {"path": "dolly.jsonl", "count": 900}], "validation_fraction": 0.2},
        "training": {"epochs": 2.0, "batch_size": 128, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "target_modules": "qv"},
        "search_space": {
            "lora_r": {"type": "ordinal", "values": list(RANKS), "default": 8},
            "lora_alpha": {"type": "int", "low": 1, "high": 64, "default": 32},
            "lora_dropout": {"type": "ordinal", "values": list(DROPOUTS), "default": 0.1},
            "learning_rate": {"type": "float", "low": 1e-6, "high": 1e-3, "log": True, "default": 1e-5},
        },
        "sampler": {"name": "nomad", "defaults_first": True, "options": {}},
        "schedule": {"name": "full"},
        "budget": {"trials": 100, "max_hours": None},
        "output": {"folder": None, "keep_adapters": "best"},
    }
    for part, change in changes.items():
        spec[part] = {**spec[part], **change} if isinstance(change, dict) and part != "search_space" else change
    return spec


def write_study(folder: Path, points: Sequence[Point], spec: dict[str, Any], base: float | None = 1.9) -> StudyRecord:
    """Write a study's folder through its Record and read it back."""
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), encoding="utf-8")
    with open_record(folder) as record:
        packages = {"torch": "2.13.0", "peft": "0.21.2"}
        environment = {"python": "3.11.9", "packages": packages, "host": "node-17.example", "gpus": ["NVIDIA A100-SXM4-80GB"]}
        command = ["/usr/local/bin/loratune", "run", "my spec.yaml"]
        record.session({"number": 1, "seconds": 3600.0, "command": command, "environment": environment})
        for number, point in enumerate(points):
            fields = {name: value for name, value in point.params.items() if name != "alpha_ratio"} | point.hyperparameters
            runs = point.runs or ((("main", (point.value,)),) if point.value is not None else ())
            for run, losses in runs:
                steps = range(1, len(losses) + 1)
                curve = [
                    CurvePoint(step=10 * k, tokens=TOKENS * k // len(losses), train_loss=losses[k - 1], validation_loss=losses[k - 1])
                    for k in steps
                ]
                if number == 0 and base is not None and run == runs[0][0]:
                    curve.insert(0, CurvePoint(step=0, tokens=0, train_loss=None, validation_loss=base))
                record.keep(
                    Outcome(
                        key=f"{number:04d}/{run}/{10 * len(losses):07d}",
                        state=State.COMPLETED,
                        validation_loss=losses[-1],
                        curve=tuple(curve),
                        tokens=TOKENS,
                        train_seconds=100.0,
                        validation_seconds=20.0,
                        devices=2,
                    )
                )
            record.trial(
                Trial(
                    number=number,
                    hyperparameters=Hyperparameters(**fields),
                    params=point.params,
                    state=point.state,
                    value=point.value,
                    message=point.message,
                )
            )
    return read(folder)


def published(shared_data: Path, sampler: str) -> list[Point]:
    """The published study's points as trials: `nomad` (100) or `nni_tpe` (50); the first is no default."""
    file = {"nomad": "nomad_llama2_7b_100_evaluations.csv", "nni_tpe": "nni_tpe_llama2_7b_50_evaluations.csv"}[sampler]
    with (shared_data / "published" / file).open() as lines:
        rows = [[float(cell) for cell in row] for row in list(csv.reader(lines))[1:]]
    return [
        Point(
            params={
                "lora_r": RANKS[round(rank) - 1] if sampler == "nomad" else round(rank),
                "lora_alpha": int(alpha),
                "lora_dropout": DROPOUTS[round(dropout) - 1],
                "learning_rate": 10**exponent,
            },
            value=loss,
        )
        for rank, dropout, alpha, exponent, loss in rows
    ]


def spread(number: int, seed: int = 0) -> list[Point]:
    """The default and `number` - 1 random configurations with a loss that depends on the learning rate."""
    rng = random.Random(seed)
    points = [Point(params=DEFAULT, value=1.1672)]
    while len(points) < number:
        rate = 10 ** rng.uniform(-6, -3)
        params = {
            "lora_r": rng.choice(RANKS),
            "lora_alpha": rng.randint(1, 64),
            "lora_dropout": rng.choice(DROPOUTS),
            "learning_rate": rate,
        }
        points.append(Point(params=params, value=0.96 + 0.05 * (math.log10(rate) + 3.5) ** 2 + rng.gauss(0, 0.005)))
    return points
