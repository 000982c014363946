"""What a small study of the embedded model comes to, as hashes: `python tests/golden.py FOLDER` before and after a change of structure.

Two runs of a change that only moves or renames code print the same lines on one machine.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

SMALL = ["--data.train_count", "48", "--data.validation.0.count", "24", "--training.batch_size", "4", "--training.epochs", "1"]
SMALL += ["--training.validations", "2", "--executor.name", "inline"]
STUDIES = {
    "nomad": ["--sampler", "nomad", "--trials", "4"],
    "halving": ["--sampler", "tpe", "--trials", "4", "--schedule.name", "halving", "--schedule.min_resource", "1/3"],
    "hf": ["--sampler", "random", "--trials", "2", "--training.engine", "hf"],
}


def digest(value: Any) -> str:
    return hashlib.sha256(value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights(path: Path) -> str:
    """Of the tensors alone: a file's header may be written in another order."""
    return digest(b"".join(name.encode() + array.tobytes() for name, array in sorted(load_file(path).items())))


def loratune(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "loratune", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def main(folder: Path) -> None:
    from loratune.record import read

    for name, flags in STUDIES.items():
        study = folder / name
        loratune("run", "--demo", "--output", study, *SMALL, *flags)
        loratune("evaluate", study, "--benchmarks", "demo_choice,demo_match", "--subset", "12")
        if name == "nomad":
            loratune("select", study, "--yes", "--finalists", "2", "--runs", "10")
        trials = read(study).trials
        print(name, "trials", digest([(t.number, sorted(t.params.items()), str(t.state), t.value) for t in trials]))
        curves = [[(p.step, p.validation_loss) for p in t.curve] for t in trials]
        print(name, "curves", digest(curves), "best", min(t.value for t in trials if t.value is not None))
        for path in sorted(study.rglob("adapter_model.safetensors")):
            print(name, path.relative_to(study), weights(path))
        for path in sorted((study / "evaluation").rglob("*.jsonl")):
            print(name, path.relative_to(study), digest(sorted(path.read_text().splitlines())))
    selection = json.loads((folder / "nomad" / "selection.json").read_text())
    print("selection", {key: selection[key] for key in ("rule", "lowest", "chosen", "share", "shipped", "runs", "tokens")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
