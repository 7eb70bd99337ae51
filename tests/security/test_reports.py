"""Run records that somebody else wrote: what they name stays text in every file of a report."""

import csv
import json

import pytest
from report.run_folders import write_run

from lora_nlu.report.__main__ import main

NASTY = "x\n\\input{x}\n## a | <script>\x1b[2J=1"


@pytest.fixture
def files(tmp_path, capsys) -> dict[str, str]:
    """The report's files on two runs with such names, and what the program prints."""
    for seed in (0, 1):
        folder = write_run(tmp_path / "runs" / f"=1+1\n\\input{{x}}{seed}", "rte", seed, method={"name": NASTY})
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps(run | {"base_model": f"/models/={NASTY}"}))
    write_run(tmp_path / "runs" / "left\nout", "other\x1b[2J")
    assert main(["runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    screen = capsys.readouterr().out
    return {path.suffix: path.read_text() for path in (tmp_path / "out").glob("report.*")} | {"screen": screen}


def test_names_in_run_records_start_no_line_and_no_command_in_a_report(files):
    assert {*files} == {".md", ".tex", ".csv", "screen"}
    for name, text in files.items():
        assert all(line.isprintable() for line in text.split("\n")), name
        assert not any(line.startswith(("\\input", "## a", "out")) for line in text.split("\n")), name
    assert "\\input" not in "".join(line for line in files[".tex"].split("\n") if not line.startswith("%"))
    assert "<script>" not in files[".md"] and "textbackslash{}n" in files[".tex"]


def test_names_in_run_records_are_no_formulas_in_csv(files):
    rows = [*csv.DictReader(files[".csv"].splitlines())]
    assert len(rows) == 2
    for row in rows:
        assert row["model"].startswith("'=x\\n")
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())
