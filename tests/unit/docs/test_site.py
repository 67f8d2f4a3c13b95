"""The site's pages are those of docs/, and the tutorial's lines of Python do what it says."""

import re
from pathlib import Path

import pytest
import yaml

from shared.sae import SAE, SAEConfig
from tests.cli import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = {path.name for path in DOCS.glob("*.md")}


def named(part: object) -> set[str]:
    """Pages in a piece of the site's table of contents."""
    if isinstance(part, str):
        return {part}
    parts = part.values() if isinstance(part, dict) else part
    return set().union(*map(named, parts))  # type: ignore[call-overload]


def test_every_page_is_in_the_table_of_contents_and_in_the_index() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    assert named(site["nav"]) == PAGES
    table = set(re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", (DOCS / "README.md").read_text(), re.MULTILINE))
    assert table == PAGES - {"README.md"}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", (DOCS / page).read_text()):
        assert not target or (DOCS / target).exists(), target
        assert ".." not in target, f"{target}: the site holds docs/ alone"


def test_the_tutorial_changes_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SAE(SAEConfig(d_model=128, d_latent=256, k=8)).save_pretrained(tmp_path / "runs/demo/sae")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "tutorial.md").read_text(), re.DOTALL)
    exec(compile(block, "tutorial.md", "exec"), {})
    assert "def read(self, path):" in capsys.readouterr().out
