"""The comparison in foreign/run.py, on outcomes written by hand; the foreign tests themselves take minutes."""

import subprocess
import tarfile
from pathlib import Path

import pytest
from foreign import run

PASSED, FAILED, SKIPPED = ["passed", ""], ["failed", "AssertionError"], ["skipped", "reason"]


def test_a_test_that_passes_only_with_transformers_classes_is_a_difference_even_if_skipped_or_missing_with_ours():
    theirs = {"fails": PASSED, "is skipped": PASSED, "is missing": PASSED, "passes": PASSED}
    ours = {"fails": FAILED, "is skipped": SKIPPED, "passes": PASSED}
    assert run.find_differences(theirs, ours) == {
        "fails": FAILED,
        "is skipped": SKIPPED,
        "is missing": ["missing", ""],
    }


@pytest.mark.parametrize("outcome", [FAILED, SKIPPED])
def test_a_test_that_does_not_pass_with_transformers_classes_is_no_difference(outcome):
    assert run.find_differences({"a": outcome}, {"a": FAILED}) == {}


def test_a_difference_that_no_pattern_matches_is_unexpected():
    found = {"peft/test_x.py::test_a[Roberta]": FAILED, "peft/test_x.py::test_b[Roberta]": FAILED}
    assert run.unexpected_and_stale(found, {"peft/*::test_a[[]Roberta]": "reason"}) == (
        list(found),
        ["peft/*::test_a[[]Roberta]"],
    )
    assert run.unexpected_and_stale(found, {"peft/*::test_a[*": "reason"}) == (["peft/test_x.py::test_b[Roberta]"], [])
    assert run.unexpected_and_stale(found, {"peft/*::test_a": "reason"})[0] == list(found)  # the full name


def test_a_listed_difference_that_no_longer_occurs_is_stale():
    assert run.unexpected_and_stale({}, {"peft/*::test_a": "reason"}) == ([], ["peft/*::test_a"])


def test_every_listed_difference_has_a_suite_and_a_reason():
    for pattern, reason in run.read_expected(run.HERE / "differences.tsv").items():
        assert pattern.split("/")[0] in run.ARCHIVES and len(reason.split()) > 5, pattern


def test_the_archives_are_the_tested_versions():
    pins = (run.HERE.parents[1] / "constraints.txt").read_text()
    for release, _ in run.ARCHIVES.values():
        assert release.replace("-", "==") in pins


def test_an_archive_with_a_wrong_hash_is_refused(tmp_path):
    with tarfile.open(tmp_path / "peft-0.21.2.tar.gz", "w:gz"):
        pass
    with pytest.raises(SystemExit, match="sha256 is [0-9a-f]{64}, expected b803"):
        run.unpack_tests("peft", tmp_path)


def test_a_suite_of_which_no_test_ran_is_an_error_and_not_a_success(tmp_path, monkeypatch):
    def pytest_without_tests(command, env, stdout, **_):  # as pytest-xdist ends if a test file can't be imported
        Path(env["FOREIGN_RESULTS"]).write_text("{}")
        stdout.write("ModuleNotFoundError: No module named 'parameterized'")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(run.subprocess, "run", pytest_without_tests)
    with pytest.raises(SystemExit, match="exit code 1:\n.*No module named"):
        run.run_suite("transformers", "ours", tmp_path, 1, "")
