"""What the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "results")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_is_there(document):
    there = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert sorted(name for name in named if f"def {name}(" not in there) == []
    assert named or document.name != "reliability.md"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_is_there(document):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_listed_difference_from_transformers_and_pefts_tests_is_documented_with_its_reason():
    page = (ROOT / "docs" / "drop_in.md").read_text()
    for line in (ROOT / "tests" / "foreign" / "differences.tsv").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, reason = line.split("\t")
            assert f"| `{pattern}` | {reason} |" in page
