"""The package folder for the OptunaHub registry, by its conventions (github.com/optuna/optunahub-registry, CONTRIBUTING and template)."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

import optuna
import pytest
import yaml

from loratune.samplers import NomadSampler

FOLDER = Path(__file__).parents[2] / "tools" / "optunahub" / "nomad"


def loaded() -> ModuleType:
    """As `optunahub.load_local_module` loads it, which is not among our dependencies."""
    name = "optunahub_registry.package.samplers.nomad"
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def quadratic(trial: optuna.Trial) -> float:
    return (trial.suggest_float("x", -5, 5) - 1) ** 2 + (trial.suggest_int("n", -5, 5) + 2) ** 2


def test_the_folder_loads_and_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optunahub_registry.package.samplers.nomad", None)
    module = loaded()
    assert module.__all__ == ["NomadSampler"]
    study = optuna.create_study(sampler=module.NomadSampler(seed=1))
    study.optimize(quadratic, n_trials=10)
    assert len(study.trials) == 10
    assert study.best_value < min(study.trials[0].value or 0.0, 10.0)
    study.sampler.close()  # type: ignore[attr-defined]


def test_the_folder_follows_the_registrys_conventions() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert {path.name for path in FOLDER.iterdir() if path.is_file()} == {
        "LICENSE",
        "README.md",
        "__init__.py",
        "example.py",
        "requirements.txt",
    }
    front = yaml.safe_load(readme.split("---\n")[1])
    assert set(front) == {"author", "title", "description", "tags", "optuna_versions", "license"}
    assert "sampler" in front["tags"]
    assert all(isinstance(version, str) for version in front["optuna_versions"])
    assert front["license"] == "MIT License"
    assert re.findall(r"^## (.*)$", readme, re.MULTILINE) == ["Abstract", "APIs", "Installation", "Example", "Others"]
    assert not re.search(r"<[a-z/][^>]*>", readme), "HTML tags are removed there"
    assert (FOLDER / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The loratune authors")
    named = re.search(r"`NomadSampler\(\*, (.*)\)`", readme)
    assert named is not None
    taken = [name for name in inspect.signature(NomadSampler).parameters if name != "self"]
    assert [part.split("=")[0] for part in named[1].split(", ")] == taken
