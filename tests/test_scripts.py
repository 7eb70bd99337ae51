"""The launch scripts: each is the published recipe, on any number of devices, as a command that can be pasted."""

import csv
import dataclasses
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig

from lora_nlu.methods import mark_trainable
from lora_nlu.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.tasks import TASKS

ROOT = Path(__file__).parents[1]
PROGRAM = "examples/text-classification/run_glue.py"
KINDS = {"roberta_*.sh": 16, "deberta_*.sh": 8, "mnli.*.sh": 2, "adapter_*.sh": 2, "full_*.sh": 8, "bitfit_*.sh": 8}
OTHERS = {"demo.sh", "install.sh", "launch.sh", "run_seeds.sh", "sweep_ranks.sh", "test.sh"}
SCRIPTS = sorted(path for pattern in KINDS for path in (ROOT / "scripts").glob(pattern))
RENAMED = {"evaluation_strategy": "eval_strategy", "use_deterministic_algorithms": "full_determinism"}
METHODS = {"apply_lora": "LoRA", "apply_adapter": "adapters", "apply_bitfit": "BitFit"}  # and as a headline has it


def read_recipes(file: str) -> dict[str, dict[str, str]]:
    """Script: its flags and their values, "yes" for a flag without one; also num_gpus and, if named, source."""
    with open(Path(__file__).with_name(file), newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    recipes = {row.pop("script"): {RENAMED.get(name, name): row[name] for name in row if row[name]} for row in rows}
    return {name: recipe | ({"apply_lora": "yes"} if "lora_r" in recipe else {}) for name, recipe in recipes.items()}


BASELINES = read_recipes("baselines.tsv")
RECIPES = read_recipes("hyperparameters.tsv") | BASELINES
NOT_HYPERPARAMETERS = {"output_dir": None, "do_train": "", "do_eval": ""}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SETTINGS = ("num_gpus", "devices", "output_dir", "GLUE_DIR", "MNLI_LORA", "PYTHON", "DRY_RUN", "CUDA_VISIBLE_DEVICES")

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script from another folder, dry unless told otherwise; returns the finished process."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()

    def run(script: Path | str, *flags: str, **settings: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "DRY_RUN": "1", "devices": "8", "MNLI_LORA": "none", **settings}
        env = {name: value for name, value in env.items() if value is not None}
        path = ROOT / "scripts" / script
        return subprocess.run(["bash", str(path), *flags], env=env, cwd=elsewhere, capture_output=True, text=True)

    return run


@pytest.fixture
def copy(tmp_path) -> Path:
    """The scripts in a repository of their own, with a space in its path and no results yet."""
    shutil.copytree(ROOT / "scripts", tmp_path / "a copy" / "scripts")
    return tmp_path / "a copy"


def fake_python(folder: Path, devices: str = "4") -> Path:
    """A `python` that counts so many devices and otherwise prints its arguments, one a line."""
    fake = folder / "fake python"
    fake.write_text(f'#!/bin/sh\nif [ "$1" = -c ]; then echo {devices}; else printf "%s\\n" "$@"; fi\n')
    fake.chmod(0o755)
    return fake


def command(done: subprocess.CompletedProcess) -> list[str]:
    """The words of the printed command, as a shell reads them, without the variables set before it."""
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout.replace("\\\n", " "))
    while re.match(r"\w+=", words[0]):
        del words[0]
    return words


def program_flags(words: list[str]) -> list[str]:
    return words[next(i for i, word in enumerate(words) if word.endswith(PROGRAM)) + 1 :]


def flags_of(done: subprocess.CompletedProcess) -> dict[str, str]:
    """Flag: value, "" for one without a value; the last of several wins."""
    flags, name = {}, ""
    for word in program_flags(command(done)):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            flags[name] = value
        else:
            flags[name] = word
    return flags


def processes(words: list[str]) -> int:
    """Processes the command starts; a single one starts without a launcher."""
    if "torch.distributed.run" not in words:
        assert words[1].endswith(PROGRAM)
        return 1
    return int(next(word for word in words if word.startswith("--nproc_per_node=")).split("=")[1])


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3
    return done.stderr


def test_there_are_44_scripts_26_recipes_with_lora_2_with_adapters_and_16_baselines():
    assert {kind: len([*(ROOT / "scripts").glob(kind)]) for kind in KINDS} == KINDS
    assert len(SCRIPTS) == sum(KINDS.values()) == 44
    assert {path.name for path in SCRIPTS} | OTHERS == {path.name for path in (ROOT / "scripts").glob("*.sh")}
    assert [path.name for path in SCRIPTS] == sorted(RECIPES)
    assert [sum(method in recipe for recipe in RECIPES.values()) for method in METHODS] == [26, 2, 8]


def test_the_baselines_are_full_fine_tuning_and_bitfit_of_each_glue_task():
    tasks = sorted(recipe["task_name"] for recipe in RECIPES.values() if recipe["model_name_or_path"] == "roberta-base")
    assert tasks == sorted(3 * [name for name in TASKS if name not in ("wnli", "ax")])
    for name, recipe in BASELINES.items():
        method = "bitfit" if "apply_bitfit" in recipe else "full"
        assert name == f"{method}_roberta_base_{recipe['task_name']}.sh"


@each_script
def test_a_script_passes_exactly_the_published_hyperparameters(script, run):
    recipe = {name: "" if value == "yes" else value for name, value in RECIPES[script.name].items() if name != "source"}
    num_gpus = recipe.pop("num_gpus")
    starts_from_mnli = recipe.pop("lora_path", None) is not None  # the published names of that file disagree

    done = run(script)
    flags = flags_of(done)
    for name, value in NOT_HYPERPARAMETERS.items():
        given = flags.pop(name)
        assert value is None or given == value
    assert flags == recipe
    assert processes(command(done)) == int(num_gpus)
    per_step = f"{num_gpus} x {recipe['per_device_train_batch_size']} = "
    assert done.stderr.startswith(f"{script.stem}: {per_step}")
    assert ("needs_mnli" in script.read_text()) == starts_from_mnli


@each_script
def test_the_comments_of_a_script_say_what_it_does(script):
    recipe, text = RECIPES[script.name], script.read_text()
    task = TASKS[recipe["task_name"]]
    num_gpus, batch = int(recipe["num_gpus"]), int(recipe["per_device_train_batch_size"])
    assert f"({task.rows['train']:,} training {'pairs' if len(task.text) == 2 else 'sentences'})" in text
    assert re.search(rf"size {batch} +# x num_gpus={num_gpus}: {num_gpus * batch} (pairs|sentences) a step", text)
    assert f"made for {num_gpus} GPU{'s' * (num_gpus > 1)}\n" in text and f"bash scripts/{script.name}" in text
    assert not re.search(r"(ro|de)berta_\w+", text.replace(script.stem, "").replace(mnli_of(script), ""))
    assert ("R-Drop" in text or "utoff" in text) == ("reg_loss_wgt" in recipe)
    headline = text.splitlines()[1]
    assert [flag for flag, name in METHODS.items() if f" {name} " in headline] == [m for m in METHODS if m in recipe]
    assert all(source in text for source in recipe.get("source", "").split(", "))


@pytest.mark.parametrize("script", [name for name in RECIPES if {"apply_adapter", "apply_bitfit"} & {*RECIPES[name]}])
def test_the_parameters_a_comment_counts_are_those_that_train_in_the_encoder(script):
    recipe = RECIPES[script]
    size = LARGE if recipe["model_name_or_path"] == "roberta-large" else {}  # RobertaConfig's own is base
    method = {name: True for name in METHODS if name in recipe}
    if "apply_adapter" in recipe:
        method |= {"adapter_type": recipe["adapter_type"], "adapter_size": int(recipe["adapter_size"])}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**size, **method))
    mark_trainable(model)
    trained = sum(p.numel() for p in model.base_model.parameters() if p.requires_grad)
    assert f" {trained:,} " in (ROOT / "scripts" / script).read_text()


def mnli_of(script: Path) -> str:
    return f"{script.stem.rpartition('_')[0]}_mnli"


@pytest.fixture(scope="module")
def run_glue():
    spec = importlib.util.spec_from_file_location("run_glue", ROOT / PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@each_script
def test_the_real_parser_reads_every_flag_of_a_script(script, run, run_glue):
    recipe = RECIPES[script.name].copy()
    parsed: dict = {}
    for group in run_glue.parse_args(program_flags(command(run(script, devices="1")))):
        parsed |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    assert parsed["do_train"] is True and parsed["do_eval"] is True
    assert parsed["gradient_accumulation_steps"] == int(recipe.pop("num_gpus"))
    for name in (*METHODS, "fp16", "full_determinism"):
        assert parsed[name] is (recipe.pop(name, None) == "yes"), name
    if "warmup_ratio" in recipe:
        recipe["warmup_steps"] = recipe.pop("warmup_ratio")  # where transformers 5 has it, as a share
    for name, value in recipe.items():
        if name not in ("source", "lora_path"):
            assert parsed[name] == (float(value) if re.fullmatch(r"[\d.e-]+", value) else value), name


def test_every_script_has_an_output_folder_of_its_own_inside_the_repository(run):
    folders = {script.stem: flags_of(run(script))["output_dir"] for script in SCRIPTS}
    assert folders == {name: str(ROOT / "output" / name) for name in folders} and len(folders) == len(SCRIPTS)
    assert flags_of(run("roberta_base_rte.sh", output_dir="my run/1"))["output_dir"] == "my run/1"


def test_extra_flags_come_last_so_that_they_win(run):
    extra = ["--max_steps", "20", "--learning_rate", "1e-3", "--run_name", "it's a $HOME \\ test"]
    assert command(run("roberta_base_mnli.sh", *extra))[-6:] == extra


def test_glue_dir_is_passed_on_as_given(run):
    assert flags_of(run("roberta_base_mnli.sh", GLUE_DIR="my data/glue"))["glue_dir"] == "my data/glue"


@pytest.mark.parametrize(
    "devices, started, accumulation, where",
    [
        ("0", 1, "8", ", made up on the CPU with --gradient_accumulation_steps 8"),
        ("1", 1, "8", ", made up on 1 device with --gradient_accumulation_steps 8"),
        ("2", 2, "4", ", made up on 2 devices with --gradient_accumulation_steps 4"),
        ("8", 8, None, ""),
        ("16", 8, None, ""),
    ],
)
def test_fewer_devices_make_up_the_batch_with_accumulation_and_say_so(run, devices, started, accumulation, where):
    done = run("roberta_base_mnli.sh", devices=devices)
    assert processes(command(done)) == started
    assert flags_of(done).get("gradient_accumulation_steps") == accumulation
    assert done.stderr == f"roberta_base_mnli: 8 x 16 = 128 examples a step{where}\n"


@pytest.mark.parametrize("written", [["--fp16"], ["--fp16", "True"], ["--fp16=true"], []])
def test_without_a_gpu_fp16_is_dropped_and_said_and_nothing_else_is(run, written):
    on_cpu = run("deberta_v2_xxlarge_rte.sh", *written, "--seed", "3", devices="0")
    assert on_cpu.stderr.splitlines()[-1] == "deberta_v2_xxlarge_rte: no GPU: --fp16 is dropped, computing in fp32"
    flags = flags_of(run("deberta_v2_xxlarge_rte.sh", "--seed", "3", devices="1"))
    assert flags.pop("fp16") == "" and flags_of(on_cpu) == flags
    kept = run("roberta_base_rte.sh", "--fp16_full_eval", "--bf16", "true", devices="0")
    assert command(kept)[-3:] == ["--fp16_full_eval", "--bf16", "true"] and "dropped" not in kept.stderr


def test_another_num_gpus_is_another_recipe(run):
    done = run("roberta_base_mnli.sh", num_gpus="1")
    assert processes(command(done)) == 1
    assert "gradient_accumulation_steps" not in flags_of(done)
    assert done.stderr == "roberta_base_mnli: 1 x 16 = 16 examples a step\n"


def test_a_users_batch_and_accumulation_win_and_the_line_counts_with_them(run):
    done = run("roberta_base_mnli.sh", "--per_device_train_batch_size=4", devices="1")
    assert flags_of(done)["per_device_train_batch_size"] == "4"
    assert "8 x 4 = 32 examples a step" in done.stderr
    done = run("roberta_base_mnli.sh", "--gradient_accumulation_steps", "2", devices="1")
    assert command(done).count("--gradient_accumulation_steps") == 1
    assert flags_of(done)["gradient_accumulation_steps"] == "2"
    assert "1 x 16 x 2 = 32 examples a step" in done.stderr


def test_devices_that_cannot_share_a_step_equally_are_refused_with_the_remedy(run):
    message = refusal(run("roberta_base_mnli.sh", devices="3"))
    for words in ("3 devices", "8 x 16", "devices=2", "CUDA_VISIBLE_DEVICES", "num_gpus=3"):
        assert words in message


@pytest.mark.parametrize("setting", ["num_gpus", "devices"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "08", "a[$(touch oops)]"])
def test_a_number_that_is_none_is_refused_by_name(run, setting, value, tmp_path):
    assert f"{setting}='{value}'" in refusal(run("roberta_base_mnli.sh", **{setting: value}))
    assert not list(tmp_path.rglob("oops"))


def test_no_gpus_is_not_a_recipe(run):
    assert "num_gpus='0'" in refusal(run("roberta_base_mnli.sh", num_gpus="0"))


@pytest.mark.parametrize(
    "visible, devices, kept",
    [(None, "1", "0"), ("2,3", "1", "2"), ("3,2,1,0", "8", "3"), (None, "0", "")],
)
def test_a_lone_process_sees_one_gpu_and_so_never_multiplies_the_batch(run, visible, devices, kept):
    done = run("roberta_base_mnli.sh", num_gpus="1", devices=devices, CUDA_VISIBLE_DEVICES=visible)
    assert f" CUDA_VISIBLE_DEVICES={kept} " in done.stdout


def test_several_processes_see_the_gpus_the_user_chose(run):
    assert "CUDA_VISIBLE_DEVICES" not in run("roberta_base_mnli.sh", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7").stdout


def test_devices_are_counted_when_not_given(run, tmp_path):
    done = run("roberta_base_mnli.sh", devices=None, PYTHON=str(fake_python(tmp_path, "4")))
    assert processes(command(done)) == 4
    assert flags_of(done)["gradient_accumulation_steps"] == "2"


def test_a_python_that_cannot_count_devices_is_named(run):
    done = run("roberta_base_mnli.sh", devices=None, PYTHON="false")
    assert "'false'" in refusal(done) and "PYTHON=" in done.stderr


def test_the_environment_in_use_gives_the_python_else_the_repositorys_own(run, copy):
    script = copy / "scripts" / "roberta_base_mnli.sh"
    bare = {"devices": "1", "VIRTUAL_ENV": None, "CONDA_PREFIX": None}
    assert command(run(script, **bare))[0] == "python3"
    (copy / ".venv" / "bin").mkdir(parents=True)
    fake_python(copy).rename(copy / ".venv" / "bin" / "python")
    assert command(run(script, **bare))[0] == str(copy / ".venv" / "bin" / "python")
    assert command(run(script, **{**bare, "VIRTUAL_ENV": "/some"}))[0] == "python"
    assert command(run(script, **{**bare, "CONDA_PREFIX": "/some"}))[0] == "python"
    assert command(run(script, **{**bare, "PYTHON": "my python"}))[0] == "my python"


@pytest.mark.parametrize("devices", ["1", "2"])
def test_the_printed_command_pasted_into_a_shell_is_the_command_that_runs(run, copy, tmp_path, devices):
    settings = {"PYTHON": str(fake_python(tmp_path)), "GLUE_DIR": "my data", "devices": devices}
    extra = ("--run_name", "it's a $HOME \\ test", "--max_steps", "-1", "--empty", "")
    printed = run(copy / "scripts" / "roberta_base_mnli.sh", *extra, **settings)
    assert str(copy / PROGRAM) in command(printed)
    pasted = subprocess.run(["bash", "-c", printed.stdout], capture_output=True, text=True, check=True).stdout
    assert pasted.splitlines() == command(printed)[1:]
    ran = run(copy / "scripts" / "roberta_base_mnli.sh", *extra, **settings, DRY_RUN=None)
    assert ran.stdout == printed.stdout + pasted


def test_the_printed_command_has_one_flag_a_line(run):
    lines = run("roberta_base_mnli.sh", "--max_steps", "20").stdout.splitlines()
    assert all(line.endswith(" \\") for line in lines[:-1]) and lines[-1] == "  --max_steps 20"
    assert all(line.split()[0].startswith("--") and line.count("--") == 1 for line in lines[2:])


STARTS_FROM_MNLI = [script for script in SCRIPTS if "lora_path" in RECIPES[script.name]]


@pytest.mark.parametrize("script", STARTS_FROM_MNLI, ids=lambda path: path.stem)
def test_mrpc_rte_and_stsb_start_from_the_mnli_adapter_of_their_size(script, run, copy, tmp_path):
    assert len(STARTS_FROM_MNLI) == 9
    script, mnli = copy / "scripts" / script.name, copy / "output" / mnli_of(script)

    message = refusal(run(script, MNLI_LORA=None))
    for words in (str(mnli), f"bash scripts/{mnli.name}.sh", "MNLI_LORA=<", "MNLI_LORA=none"):
        assert words in message
    mnli.mkdir(parents=True)
    refusal(run(script, MNLI_LORA=None))  # a run that has not finished leaves a folder without an adapter
    (mnli / "adapter_model.safetensors").touch()
    assert flags_of(run(script, MNLI_LORA=None))["lora_path"] == str(mnli)


def test_mnli_lora_may_be_a_file_a_folder_or_none(run, tmp_path):
    file = tmp_path / "else where" / "my lora.bin"
    refusal(run("roberta_base_rte.sh", MNLI_LORA="my lora.bin"))
    file.touch()
    assert flags_of(run("roberta_base_rte.sh", MNLI_LORA="my lora.bin"))["lora_path"] == "my lora.bin"
    assert str(tmp_path) in refusal(run("roberta_base_rte.sh", MNLI_LORA=str(tmp_path)))
    (tmp_path / "adapter_model.safetensors").touch()
    assert flags_of(run("roberta_base_rte.sh", MNLI_LORA=str(tmp_path)))["lora_path"] == str(tmp_path)
    assert "lora_path" not in flags_of(run("roberta_base_rte.sh", MNLI_LORA="none"))


def test_a_lora_path_among_the_extra_flags_needs_no_mnli_adapter(run, copy):
    done = run(copy / "scripts" / "roberta_base_rte.sh", "--lora_path", "mine.bin", MNLI_LORA=None)
    assert command(done)[-2:] == ["--lora_path", "mine.bin"] and command(done).count("--lora_path") == 1


def test_the_sweep_of_ranks_runs_the_papers_ranks_on_three_sets_of_layers_without_an_mnli_start(run):
    script = str(ROOT / "scripts" / "roberta_base_rte.sh")
    done = run("sweep_ranks.sh", script, "2", "--", "--max_steps", "5", MNLI_LORA=None)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]

    def last(words: list[str], flag: str) -> str:  # the one that wins
        return words[len(words) - words[::-1].index(flag)]

    swept = {
        tuple(last(words, f"--{name}") for name in ("lora_r", "lora_target_modules", "seed")) for words in commands
    }
    sets = ("query", "query,value", "query,key,value,dense")
    assert swept == {(rank, names, seed) for rank in ("1", "2", "4", "8", "64") for names in sets for seed in "01"}
    assert len(commands) == 30
    assert all("--lora_path" not in words and last(words, "--max_steps") == "5" for words in commands)
