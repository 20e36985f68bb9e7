"""The documents: their links lead somewhere, and every setting is described."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from federated.settings import RunSettings
from federated.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "base_images/README.md"]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_sections_that_exist(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not section or section in anchors(target), link


@pytest.mark.parametrize("name", [field.name for field in fields(RunSettings)])
def test_setting_is_described_with_its_default(name):
    default = RunSettings.__dataclass_fields__[name].default
    row = re.search(rf"^\| `--{name}` \| (.*?) \|", (ROOT / "docs/settings.md").read_text(), re.M)
    assert row, name
    shown = row[1].strip("`")
    assert shown == str(default) or float(shown) == float(default)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategy_is_described(name):
    assert f"`{name}`" in (ROOT / "docs/strategies.md").read_text()


def test_readme_is_a_landing_page_with_a_command_near_its_top():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 220
    assert "    ./run_local.sh" in lines[:30]
