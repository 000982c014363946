"""The documentation builds without a warning (broken links are warnings), and its pages load nothing from the network."""

import re
from pathlib import Path

import pytest

from loratune.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    application = pytest.importorskip("sphinx.application", reason="Sphinx is not installed: pip install 'loratune[docs]'")
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    folder = tmp_path_factory.mktemp("site")
    built = application.Sphinx(ROOT / "docs", ROOT / "docs", folder, folder / ".doctrees", "html", status=None, warningiserror=True)
    built.build()
    assert built.statuscode == 0
    return folder


def test_every_page_is_reached_and_needs_no_network(site: Path) -> None:
    home = (site / "index.html").read_text()
    pages = [path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_downloads" not in path.parts]
    assert len(pages) >= 20
    for page in pages:
        if page not in ("index.html", "py-modindex.html", "genindex.html", "search.html"):
            assert f'href="{page}"' in home, page
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', (site / page).read_text())
        assert not loaded, page


def test_the_reference_is_of_this_code(site: Path) -> None:
    commands = (site / "reference" / "commands.html").read_text()
    assert all(f"loratune {command}" in commands for command in COMMANDS)
    assert "learning_rate" in (site / "reference" / "study.html").read_text()
    assert "{{" not in commands + (site / "reference" / "prior.html").read_text()
