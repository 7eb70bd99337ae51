"""What the documents name exists: tests, files, headings, flags, messages; their commands are accepted."""

import ast
import glob
import os
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers import tiny_config
from transformers import TrainingArguments

import lora_nlu
from lora_nlu import read_adapter
from lora_nlu.training import parse_arguments
from lora_nlu.training.arguments import DataArguments, model_arguments
from lora_nlu.training.parsing import RunArguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "results")),
]
RUN_GLUE = ROOT / "examples" / "text-classification" / "run_glue.py"
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@every_document
def test_every_test_that_a_document_names_is_there(document):
    there = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", document.read_text()))
    assert sorted(name for name in named if f"def {name}(" not in there) == []
    assert named or document.name != "reliability.md"


def anchors(document: Path) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_every_file_and_heading_that_a_document_links_to_is_there(document):
    for link, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", document.read_text()):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


@every_document
def test_every_path_that_a_document_names_is_there(document):
    folders = "benchmarks|configs|docs|examples|results|scripts|src|tests"
    for path in re.findall(rf"(?<![\w./~-])((?:{folders})/[\w./*-]*\w)(?![\w<*])", document.read_text()):
        assert glob.glob(str(ROOT / path)) or glob.glob(str(document.parent / path)), path


def test_the_readme_is_one_page_and_contributing_half_of_one():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 40


def test_every_page_of_docs_is_in_the_readmes_table_of_links():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")}


def commands() -> list[str]:
    """Lines of bash blocks, continued ones joined, without comments; test_adding_a_method.py runs those of its page."""
    lines = []
    for document in (path for path in DOCUMENTS if path.name != "adding_a_method.md"):
        for block in re.findall(r"^```bash\n(.*?)^```", document.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                lines.append(re.sub(r"\s+#.*", "", line).strip())
    return [line for line in dict.fromkeys(lines) if line and " ..." not in line and not line.startswith("#")]


@pytest.mark.parametrize("command", [line for line in commands() if "run_glue.py" in line])
def test_a_documented_command_of_run_glue_is_accepted_by_its_parser(command):
    parse_arguments(shlex.split(command.partition("run_glue.py")[2]), {})


SCRIPTS = [line for line in commands() if re.match(r"(\w+=\S+ )*bash (scripts|results)/", line)]
PROGRAMS = ("demo.sh", "test.sh")  # have no dry run


@pytest.mark.parametrize("command", [line for line in SCRIPTS if not any(name in line for name in PROGRAMS)])
def test_a_documented_script_starts_dry(command):
    """With DRY_RUN=1, on the CPU unless the command says otherwise, without the Hub and without an MNLI adapter."""
    settings = {"DRY_RUN": "1", "devices": "0", "MNLI_LORA": "none", "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | settings
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run_glue.py" in done.stdout


MODULES = [line for line in commands() if line.startswith("python -m lora_nlu.")]


@pytest.mark.parametrize("command", MODULES)
def test_a_documented_command_of_a_module_is_accepted_and_finds_only_empty_folders(command, tmp_path, monkeypatch):
    """Status 1, what was found is refused; 2 would be the parser's."""
    _, _, module, *arguments = shlex.split(command.replace("<", "'").replace(">", "'"))
    for word in arguments:
        if word.startswith("output/"):
            (tmp_path / word).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(module, run_name="__main__")
    assert end.value.code == 1


def test_enough_commands_are_tested():
    assert len(SCRIPTS) >= 20 and len(MODULES) >= 7 and sum("run_glue.py" in line for line in commands()) >= 5


def test_the_python_of_the_page_on_adapters_trains_lora_and_saves_it(tmp_path, monkeypatch):
    transformers.RobertaModel(tiny_config()).save_pretrained(tmp_path / "roberta-base")
    monkeypatch.chdir(tmp_path)  # where "roberta-base" is a folder
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "adapters.md").read_text(), re.M | re.S)
    (code,) = [block for block in blocks if "save_adapter" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    trained = {name for name, parameter in names["model"].named_parameters() if parameter.requires_grad}
    assert len([name for name in trained if "lora_" in name]) == 2 * 2 * 2  # A and B of query and value in two layers
    assert all("lora_" in name or name.startswith("classifier.") for name in trained)
    assert read_adapter(tmp_path / "my-adapter").labels == ("not_entailment", "entailment")


def test_the_page_on_flags_has_every_flag_of_ours_and_no_other():
    page = (ROOT / "docs" / "flags.md").read_text()
    groups = (model_arguments(), DataArguments, RunArguments)
    ours = {item.name for group in groups for item in fields(group)} - {item.name for item in fields(TrainingArguments)}
    ignored = {"use_fast_tokenizer"}  # of earlier transformers
    assert sorted(ours - ignored - {*re.findall(r"`--(\w+)", page)}) == []
    first_cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `--"))
    every = {item.name for group in groups for item in fields(group)}
    assert sorted({*re.findall(r"--(\w+)", first_cells)} - every) == []


def messages() -> str:
    """Every string of src/ and scripts/, the parts of an f-string joined by `...`."""
    found = []
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found) + (ROOT / "scripts" / "launch.sh").read_text()


def test_every_message_of_the_troubleshooting_page_exists():
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("\n\n")[2].partition("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) >= 10
    strings = messages()
    for text in quoted:
        fixed = [part for part in re.split(r"\.\.\.|\[[\d, ]+\]|lora_A is", text) if part.strip()]
        assert all(part.strip() in strings for part in fixed), text


def test_every_listed_difference_from_transformers_and_pefts_tests_is_documented_with_its_reason():
    page = (ROOT / "docs" / "drop_in.md").read_text()
    for line in (ROOT / "tests" / "foreign" / "differences.tsv").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern, reason = line.split("\t")
            assert f"| `{pattern}` | {reason} |" in page


def test_the_changelogs_first_version_is_the_packages_and_its_moved_modules_are_there():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.+)$", text, re.M)[0] == lora_nlu.__version__
    rows = text.partition("| before, in `lora_nlu` |")[2].partition("\n\n")[0].splitlines()[2:]
    moved = {name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row.split("|")[2])}
    paths = {name: ROOT / "src" / "lora_nlu" / f"{name.replace('.', '/')}.py" for name in moved}
    assert len(paths) > 30 and [name for name, path in paths.items() if not path.exists()] == []
    before = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert len(before) == 23


def test_the_page_on_the_architecture_names_every_module_of_every_package():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("| package | its modules |")[2].partition("\n\n")[0]
    rows = {line.split("|")[1].strip(" `/"): line for line in table.splitlines()[2:]}
    package = ROOT / "src" / "lora_nlu"
    folders = {path.name: path for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert set(rows) == {*folders, "beside them"}
    for name, line in rows.items():
        files = {path.name for path in folders.get(name, package).glob("*.*") if path.name != "py.typed"}
        assert set(re.findall(r"`(\w+\.(?:py|cpp))`", line)) == files - {"__init__.py", "__main__.py"}, name
