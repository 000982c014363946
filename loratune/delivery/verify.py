"""Before an adapter is handed over: plain PEFT loads it, and it is what the study measured. Once for each adapter's content."""

import contextlib
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

from loratune.errors import StorageError
from loratune.executors.devices import seen_as
from loratune.record import StudyRecord, Trial
from loratune.record.paths import ADAPTER_FILES, RunPaths
from loratune.record.reader import TRAINED_ANEW, WRITTEN_ANEW, outcome_of
from loratune.system.files import parsed, write_atomically
from loratune.work import Outcome, Recipe, State


def as_measured(record: StudyRecord, trial: Trial, adapter: Path) -> None:
    """Load `adapter`, a PEFT folder of the trial's, as its user will, and compare weights and loss with what was trained.

    Takes the loading of the base model and some forward passes, on the study's device; nothing where the same content was checked
    before. Raises ModelError, naming weights or losses, when it is another adapter in plain PEFT.
    """
    recipe, outcome = record.base_model, _outcome(adapter)
    digest = _digest(record, trial, adapter, outcome)
    known = _known(record.paths.reloaded)  # digest -> loss in plain PEFT, on a few examples
    if digest in known:
        return
    from loratune.delivery import reload  # torch

    known[digest] = reload.check_adapter(
        adapter,
        recipe,
        trial.hyperparameters,
        data=prepared_data(record),
        recorded=outcome.validation_loss if outcome is not None else None,
        exact=recipe.dtype in ("float32", "float64") or (recipe.dtype == "auto" and outcome is not None and " CPU" in outcome.device),
        device=_device(record),
    )
    with contextlib.suppress(StorageError):  # somebody else's study, read only: it is checked anew the next time
        write_atomically(record.paths.reloaded, json.dumps(known, indent=1) + "\n")


def prepared_data(record: StudyRecord) -> Path | None:
    """The folder of the study's prepared data; None where no worker was ever told of one."""
    path = record.paths.recipe
    return Path(parsed(path, Recipe.from_json, WRITTEN_ANEW).data) if path.is_file() else None


def _outcome(adapter: Path) -> Outcome | None:
    """What the run said when it wrote the adapter; None for one that does not lie with its run."""
    files = sorted(RunPaths(adapter.parent).outcomes.glob("*.json"))
    found = [parsed(path, outcome_of, TRAINED_ANEW) for path in files]
    return next((outcome for outcome in reversed(found) if outcome.state is State.COMPLETED), None)


def _digest(record: StudyRecord, trial: Trial, adapter: Path, outcome: Outcome | None) -> str:
    """Of everything that the answer depends on."""
    facts = [record.spec["model"], trial.hyperparameters.to_json(), outcome.validation_loss if outcome else None]
    libraries = [version(name) for name in ("peft", "transformers")]
    digest = hashlib.sha256(json.dumps([facts, libraries], sort_keys=True).encode())
    for name in ADAPTER_FILES:
        digest.update((adapter / name).read_bytes())
    return digest.hexdigest()


def _known(path: Path) -> dict[str, float]:
    """Earlier checks; none where the file is missing or damaged: they are made again."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _device(record: StudyRecord) -> str:
    """Where to load the model: the first device that the study may use."""
    given = record.spec.get("executor", {})
    if given.get("device") == "cpu":
        return "cpu"
    return seen_as(given["devices"][0]) if given.get("devices") else "auto"
