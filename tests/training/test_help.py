"""What --help prints: every flag of ours once, on one page, before torch and transformers are imported."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from lora_nlu.training.arguments import DataArguments, OurRunArguments, model_arguments
from lora_nlu.training.help import TRANSFORMERS_FLAGS, help_text
from lora_nlu.training.parsing import RunArguments, parse_arguments

RUN_GLUE = Path(__file__).parents[2] / "examples" / "text-classification" / "run_glue.py"
OURS = {item.name: item for group in (model_arguments(), DataArguments, OurRunArguments) for item in fields(group)}


def flags_of(text: str) -> list[str]:
    """The flags that the lines of a help text are about."""
    return re.findall(r"^  --(\w+)", text, re.M)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_one_page_of_our_flags_and_transformers_most_used_printed_without_importing_torch(flag):
    code = f"import runpy, sys; sys.argv = ['run_glue.py', '--task_name', 'rte', {flag!r}]\n"
    code += f"try: runpy.run_path({str(RUN_GLUE)!r}, run_name='__main__')\n"
    code += "finally: print({'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "set()\n"
    lines = done.stdout.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    shown = flags_of(done.stdout)
    ignored = {name for name, item in OURS.items() if item.metadata["help"].startswith("Ignored")}
    assert sorted(shown) == sorted({*OURS} - ignored | {name.split()[0][2:] for name in TRANSFORMERS_FLAGS})
    for name in OURS:
        for choice in OURS[name].metadata.get("choices") or ():
            assert choice in done.stdout


def test_the_flags_that_help_explains_in_its_own_words_are_transformers_with_the_defaults_that_it_names():
    theirs = {item.name: item.default for item in fields(TrainingArguments)}
    for flag, meaning in TRANSFORMERS_FLAGS.items():
        default = theirs[flag.split()[0][2:]]
        if named := re.search(r"default: ([\w.-]+)", meaning):
            assert type(default)(named[1]) == default, flag


def test_help_all_has_every_flag_once(capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--help_all"], {})
    assert not end.value.code
    shown = flags_of(text := capsys.readouterr().out)
    ignored = {name for name, item in OURS.items() if item.metadata["help"].startswith("Ignored")}
    every = {item.name for item in fields(RunArguments)} | {*OURS}
    assert sorted(shown) == sorted(every - ignored)
    assert max(map(len, text.splitlines())) <= 100


def test_the_commands_of_the_examples_are_accepted():
    examples = help_text().partition("examples:")[2].partition("\n\n")[0].replace("\\\n", " ")
    commands = re.findall(r"^  run_glue.py (.*)$", examples, re.M)
    assert len(commands) == 3
    for command in commands:
        parse_arguments(command.split(), {})


def test_another_python_is_told_in_a_line_to_activate_the_environment_or_to_make_it(tmp_path):
    program = tmp_path / "examples" / "text-classification" / "run_glue.py"
    program.parent.mkdir(parents=True)
    program.write_text(RUN_GLUE.read_text())

    def error() -> str:
        command = [sys.executable, "-S", str(program), "--do_eval"]  # -S: no site-packages, as in another Python
        done = subprocess.run(command, capture_output=True, text=True, env={}, cwd=tmp_path)
        assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
        return done.stderr.removeprefix(f"run_glue.py: error: {sys.executable} has no lora_nlu. Do this first: ")

    assert error().startswith("bash scripts/demo.sh, which makes .venv")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert error() == "source .venv/bin/activate\n"
