"""docs/notebook.ipynb is executed in a kernel and shows what it shows; `python tests/test_docs_notebook.py` writes what it showed into it.

Compared are the words, as in tests/test_tutorial.py. Of a cell tagged `varies`, which depends on close decisions, that it shows something.
"""

import ast
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

import loratune

PAGE = Path(__file__).resolve().parent.parent / "docs" / "notebook.ipynb"
NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell: Any) -> list[str]:
    """What a cell shows, a text per form: printed, plain, HTML."""
    forms = [sorted(output["data"].items()) if "data" in output else [("", output["text"])] for output in cell["outputs"]]
    return ["".join(text) for output in forms for _, text in output]


def test_it_compiles_shows_results_and_names_what_there_is() -> None:
    cells = code_cells(json.loads(PAGE.read_text()))
    used = set()
    for cell in cells:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                name = ast.unparse(node)
                if name.startswith("loratune."):
                    used.add(name)
    assert {"loratune.StudySpec.load", "loratune.search", "loratune.select", "loratune.export", "loratune.demo.data_files"} <= used
    for name in used:
        found: Any = loratune
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    assert sum(bool(shown(cell)) for cell in cells) == len(cells) - 1  # the description shows nothing
    assert any("<svg" in text for cell in cells for text in shown(cell))
    assert not re.search(r"(?<![\w.<])/(?:home|root|tmp|work|Users)/", PAGE.read_text())
    assert not any(output.get("name") == "stderr" or output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def executed(folder: Path) -> Any:
    """The notebook, run by a kernel of its own in `folder`."""
    import nbformat
    from nbclient import NotebookClient

    for name, place in (("LORATUNE_CACHE", "cache"), ("JUPYTER_RUNTIME_DIR", "runtime"), ("IPYTHONDIR", "ipython")):
        os.environ[name] = str(folder / place)
    notebook = nbformat.read(PAGE, as_version=4)
    work = folder / "work"
    work.mkdir()
    place = {"metadata": {"path": str(work)}}
    return NotebookClient(
        notebook, timeout=250, kernel_name="python3", record_timing=False, coalesce_streams=True, resources=place
    ).execute()


def words(text: str) -> str:
    return " ".join(NUMBER.sub("#", text).split())


@pytest.mark.slow
def test_it_shows_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'loratune[dev]'")
    for name in ("LORATUNE_CACHE", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
    ran, committed = code_cells(executed(tmp_path)), code_cells(json.loads(PAGE.read_text()))
    assert len(ran) == len(committed)
    for now, before in zip(ran, committed, strict=True):
        if "varies" in before["metadata"].get("tags", []):
            assert all(text.strip() for text in shown(now))
        else:
            now["outputs"] = [output for output in now["outputs"] if output.get("name") != "stderr"]
            assert [words(text) for text in shown(now)] == [words(text) for text in shown(before)]
    assert (tmp_path / "work" / "my-adapter" / "adapter_model.safetensors").is_file()


def write() -> None:
    """Execute it, and keep what it showed, without what is written to stderr and without the machine's versions."""
    import nbformat

    with tempfile.TemporaryDirectory() as folder:
        notebook = executed(Path(folder))
    for cell in code_cells(notebook):
        cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    notebook["metadata"]["language_info"] = {"name": "python"}
    nbformat.write(notebook, PAGE)


if __name__ == "__main__":
    write()
