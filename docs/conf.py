"""Sphinx: the documentation site. `make docs` builds it into site/; the pages need no network.

Three pages are made from the code when the site is built: a line `{{name}}` of reference/*.md is replaced by what the function
`name` below returns.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["COLUMNS"] = "100"  # width of the commands' help

project = "loratune"
author = "The loratune authors"
html_theme = "furo"
html_title = "loratune"
html_show_sphinx = False
html_copy_source = False
extensions = ["myst_nb", "sphinx.ext.autodoc"]  # myst_nb: MyST pages and notebooks
nb_execution_mode = "off"  # tests/test_docs_notebook.py executes it
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["example-report.html"]
suppress_warnings = ["misc.highlighting_failure"]  # the tutorial's outputs are no code
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_mock_imports = ["nni"]
autodoc_preserve_defaults = True


def commands() -> str:
    """Every command's help, and the exit codes."""
    from loratune import errors
    from loratune.cli import COMMANDS, module_of
    from loratune.cli.parser import Parser

    pages = []
    for name in COMMANDS:
        module = module_of(name)
        parser = Parser(prog=f"loratune {name}", description=module.__doc__)
        module.add_arguments(parser)
        pages.append(f"## loratune {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
    codes = {
        0: "done",
        1: "`doctor`: something that is needed is missing",
        2: "the command line is wrong, or SpecError",
        70: "a bug in loratune: a traceback",
        130: "interrupted, by Ctrl-C or SIGTERM",
    }
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.LoratuneError):
            codes.setdefault(kind.exit_code, f"{kind.__name__}: {' '.join((kind.__doc__ or '').split())}")
    rows = [f"| {code} | {meaning} |" for code, meaning in sorted(codes.items())]
    return "\n".join([*pages, "## Exit codes", "", "| code | meaning |", "|---|---|", *rows, ""])


def description() -> str:
    """The commented description that `loratune init` writes."""
    from loratune.spec.commented import template

    return f"```yaml\n{template().rstrip()}\n```\n"


def prior() -> str:
    """The constants behind the first guess, with their sources."""
    table = json.loads((ROOT / "loratune/samplers/prior.json").read_text())
    rows = []
    for name, entry in table.items():
        if isinstance(entry, dict) and "source" in entry:
            values = ", ".join(f"{key} {value}" for key, value in entry.items() if key not in ("source", "about"))
            rows.append(f"| `{name}` | {values} | {entry['source']} |")
    return "\n".join([table["about"], "", "| constant | values | source |", "|---|---|---|", *rows, ""])


def fill(app: Any, page: str, source: list[str]) -> None:
    for make in (commands, description, prior):
        marker = "{{" + make.__name__ + "}}"
        if marker in source[0]:
            source[0] = source[0].replace(marker, make())


def markup(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our plain docstrings as reStructuredText: `code`; "name: meaning" as a list; what is set out by spaces stays as it is."""
    made: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        part = paragraph.split("\n")
        argument = r"(\w+(?:(?:, | \.\.\. )\w+)*): (?=\S)"
        if re.match(argument, part[0]):
            part = [re.sub(rf"^{argument}", r"\n* **\1**: ", line) if line[:1] != " " else "  " + line.strip() for line in part]
            part = ["\n" + line if line and line[0] not in " \n" else line for line in part]  # prose behind the list
            part = "\n".join(part).split("\n")
        elif any(line.startswith(" ") for line in part):
            made += ["::", "", *["    " + line for line in part], ""]
            continue
        made += [re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", line) for line in part] + [""]
    lines[:] = made


def setup(app: Any) -> None:
    app.connect("source-read", fill)
    app.connect("autodoc-process-docstring", markup)
