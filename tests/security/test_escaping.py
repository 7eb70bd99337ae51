"""Text from untrusted files in the files that the program writes: it stays text, on its own line."""

import csv
import io

import pytest
import yaml

from lora_nlu.errors import printable
from lora_nlu.escaping import csv_cell, latex_text, markdown_text, tsv_cell, yaml_scalar

NASTY = [
    "a\nb", "a\r\nb", "a\tb", "a\x1b[2Jb", "a\x85b", "a\u2028b", "a\u202eb", "a\x00b", "a\x7fb", "\ud800", "\x9b31m",
    "a\nlicense: mit", "---\nbase_model: evil", "a: b # c", "{{x}}", "null", "yes", "1e5", "~", "'", '"', "\\", "",
    "<script>alert(1)</script>", "<!-- written by lora-nlu -->", "[x](http://evil.example)", "![](//evil.example)",
    "https://evil.example", "www.evil.example", "`rm -rf`", "$\\href{http://evil}{x}$", "a|b", "\\|", "&lt;", "*x*",
    r"\input{/etc/passwd}", r"\write18{id}", "%", "^^5cinput", "a_b", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1",
    "=cmd|' /C calc'!A0", "grün", "日本", "👍🏽", "not_entailment",
]  # fmt: skip


@pytest.mark.parametrize("text", NASTY, ids=ascii)
@pytest.mark.parametrize("escape", [printable, yaml_scalar, markdown_text, latex_text, csv_cell])
def test_escaped_text_is_one_line_of_characters_that_can_be_seen(escape, text):
    assert escape(text).isprintable()


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_yaml_scalar_is_read_back_as_the_text(text):
    assert yaml.safe_load(f"base_model: {yaml_scalar(text)}\n") == {"base_model": printable(text)}


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_markdown_text_starts_no_element_and_no_cell(text):
    escaped = markdown_text(text)
    assert not {*"<>[]`*~$"} & {*escaped} and "://" not in escaped and "www." not in escaped
    assert "|" not in escaped.replace("\\|", "") and "\\" not in escaped.replace("\\|", "")


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_latex_text_has_no_command_but_the_escapes(text):
    escaped = latex_text(text)
    for written in ("textbackslash{}", "textasciitilde{}", "textasciicircum{}", *"&%$#_{}"):
        escaped = escaped.replace(f"\\{written}", "")
    assert not {*"\\&%$#_{}~^"} & {*escaped}


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_tsv_cell_ends_neither_the_cell_nor_the_line_and_keeps_everything_that_can_be_seen(text):
    cell = tsv_cell(text)
    assert len(f"0\t{cell}\n".splitlines()) == 1 and cell.count("\t") == 0
    assert cell == text or not text.isprintable()


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_a_csv_cell_is_no_formula(text):
    file = io.StringIO()
    csv.writer(file).writerow([csv_cell(text)])
    [[cell]] = csv.reader(io.StringIO(file.getvalue()))
    assert not cell.startswith((*"=+-@＝＋－＠\t\r",))
    assert cell.removeprefix("'") in (printable(text), printable(text).removeprefix("'"))


def test_a_number_in_csv_stays_a_number():
    assert [csv_cell(value) for value in (-1.5, 2, None)] == [-1.5, 2, None]


def test_ordinary_text_is_written_as_it_is():
    for text in ("roberta-base", "not_entailment", "output/seeds/rte (2)", "grün, 日本", "LoRA r=8 on query"):
        assert {escape(text) for escape in (printable, markdown_text, tsv_cell, csv_cell)} == {text}
    assert latex_text("94.8 ± 0.2 & 1%") == r"94.8 $\pm$ 0.2 \& 1\%"
