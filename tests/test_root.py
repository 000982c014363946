"""`import loratune`: light, and its names are there."""

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_is_light_and_names_come_when_used() -> None:
    code = """
import sys, loratune
print(sorted({"torch", "optuna", "pydantic", "numpy", "yaml"} & set(sys.modules)))
assert set(loratune.__all__) <= set(dir(loratune))
print(loratune.StudySpec.__name__, loratune.read.__name__, loratune.samplers.NomadSampler.__name__)
print(callable(loratune.tune), loratune.__version__)
print(all(getattr(loratune, name) is not None for name in loratune.__all__), "torch" in sys.modules)
"""
    from importlib.metadata import version

    assert run(code).splitlines() == ["[]", "StudySpec read NomadSampler", f"True {version('loratune')}", "True False"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert run("import loratune\ntry:\n    loratune.tuna\nexcept AttributeError as error:\n    print(error)") == (
        "module 'loratune' has no attribute 'tuna'"
    )
