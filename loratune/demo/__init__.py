"""The embedded demo: a tiny pretrained Llama, instruction data, and a study of them that needs no network.

How they were made, and their honest limits: `README.md` in this folder.
"""

from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
DEMO_RUNS = 4
"""Full runs of `loratune run --demo`: three find the learning rate (1.116), a fourth that the model wants alpha / r 1 (1.097)."""


def model_folder() -> Path:
    """The base model and its tokenizer, in Hugging Face format."""
    return _HERE / "model"


def data_files() -> tuple[Path, Path]:
    """The instruction data in Alpaca form, one JSON object per line: training and validation."""
    return _HERE / "train.jsonl", _HERE / "validation.jsonl"


def held_out_file() -> Path:
    """What the demo's benchmarks ask: instructions that neither data file holds in any wording, some with four `choices`."""
    return _HERE / "held_out.jsonl"


def questions_file() -> Path:
    """Forty held-out instructions for a blind comparison."""
    return _HERE / "questions.jsonl"


def study() -> dict[str, Any]:
    """The demo study, in the sections of a study's YAML file: full runs by the bracket search, after some short ones."""
    train, validation = data_files()
    return {
        "name": "demo",
        "model": {"name_or_path": str(model_folder())},
        "data": {
            "train": [{"path": str(train)}],
            "validation": [{"path": str(validation)}],
            "train_count": 800,  # of the 2,000: a trial takes seconds
            "prompt": "alpaca",
            "max_length": 128,
        },
        "training": {
            "epochs": 1,
            "batch_size": 8,  # small: many steps of few examples teach so small a model more than few of many
            "micro_batch_size": 8,
            "validation_batch_size": 64,
            "target_modules": "all-linear",
            "validations": 3,
        },
        "executor": {"name": "local", "workers": 2},
    }
