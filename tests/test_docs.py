"""The documents name the tests that show what they claim; those tests are there."""

import re
from pathlib import Path

import pytest
from adapter_types import CASES

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def names_in_tests() -> set[str]:
    sources = [file.read_text() for file in (ROOT / "tests").rglob("*") if file.suffix in (".py", ".c", ".cpp")]
    return {name for source in sources for name in re.findall(r"\b(test_\w+)\(", source)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_every_test_that_is_named_exists(document: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert named <= names_in_tests()


def test_adapter_table_has_a_row_for_every_case() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", (ROOT / "docs/adapters.md").read_text(), re.M)
    assert sorted(name for name in rows if name in CASES) == sorted(CASES)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_relative_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
