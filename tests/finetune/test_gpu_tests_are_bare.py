"""The tests that need a GPU run on a machine that has no more than torch, Transformers, PEFT and pytest."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import importlib.machinery, sys
absent = {"optuna", "pydantic", "datasets", "PyNomad", "nni", "hypothesis", "cmaes", "matplotlib", "pandas", "pytest_timeout", "xdist"}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow  # imports torch and Transformers
def test_the_gpu_tests_can_be_collected() -> None:
    """And nothing else is complained of: an option of a plugin that is absent, a warning's class."""
    command = [sys.executable, "-c", BARE, "-q", "-p", "no:cacheprovider", "--collect-only", "tests/finetune/test_packed_gpu.py"]
    environment = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests collected" in done.stdout
    assert "WARNING" not in (done.stdout + done.stderr).upper().replace("WARNINGS.WARN", "")
