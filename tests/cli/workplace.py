"""Instruction data and a study description of seconds, for the tests of the command line."""

import json
from pathlib import Path

TOPICS = ("cat", "dog", "tree", "river", "house", "song", "boat", "bird", "lamp", "stone", "cloud", "road")


def rows(count: int = 24) -> list[dict[str, str]]:
    """Instruction data in Alpaca form; no two questions are the same."""
    return [
        {"instruction": f"Tell me {number} things of a {TOPICS[number % 12]}.", "input": "", "output": f"The {TOPICS[number % 12]} is big."}
        for number in range(count)
    ]


def write_rows(path: Path, content: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def tiny(model: Path, data: Path) -> dict[str, object]:
    """A study of seconds: three trials of three steps."""
    return {
        "model": str(model),
        "data": {"train": [str(data)], "validation_count": 6, "max_length": 96},
        "training": {"batch_size": 6, "epochs": 1},
        "search_space": {"lora_r": [2, 4], "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}},
        "sampler": "nomad",
        "executor": "inline",
        "budget": {"trials": 3},
    }
