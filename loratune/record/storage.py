"""The Optuna storage behind a study: opened, checked, and its errors put into words."""

from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.samplers import BaseSampler

from loratune.errors import StorageError
from loratune.files import text_of
from loratune.masking import unmasked
from loratune.record.trials import objectives_of


def open_study(*, url: str | None, folder: Path, name: str, sampler: BaseSampler) -> optuna.Study:
    """Create or load the Optuna study called `name`.

    Without a `url` it lies in `study.db` (SQLite) in the study's folder. A path that ends in `.log` or
    `.journal` is Optuna's journal file, everything else goes to Optuna's RDB storage. A study found in the
    storage must have been begun by this folder. Its objectives are those of the folder's `spec.yaml`. Raises StorageError.
    """
    spec = folder / "spec.yaml"
    directions: list[Any] = list(objectives_of(yaml.safe_load(text_of(spec)) if spec.exists() else {}).values())
    where = unmasked(url) if url else f"sqlite:///{folder.resolve() / 'study.db'}"
    try:
        storage = _journal(where) if where.endswith((".log", ".journal")) else optuna.storages.RDBStorage(where)
        study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, directions=directions, load_if_exists=True)
        owner = study.user_attrs.get("folder")
        if owner is None:
            study.set_user_attr("folder", str(folder.resolve()))
    except optuna.exceptions.OptunaError as error:
        raise StorageError(f"storage {where}: {error}") from error
    except Exception as error:  # SQLAlchemy and each database driver have errors of their own
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StorageError(f"storage {where}: {reason}. Allowed: an Optuna storage URL such as sqlite:///path/study.db") from error
    started = (folder / "trials").is_dir()
    if owner is not None and not started and study.get_trials(deepcopy=False):
        raise StorageError(
            f"storage {where} already holds a study named {name!r}, begun in {owner}. "
            "Continue it there, or choose another name for this one."
        )
    return study


def _journal(path: str) -> optuna.storages.BaseStorage:
    from optuna.storages.journal import JournalFileBackend

    return optuna.storages.JournalStorage(JournalFileBackend(path))
