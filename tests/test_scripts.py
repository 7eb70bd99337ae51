"""The launch scripts: each is the published recipe, on any number of devices, as a command that can be pasted."""

import csv
import dataclasses
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig

from lora_nlu.data.tasks import TASKS
from lora_nlu.methods.table import mark_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.training.parsing import parse_arguments

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
SETTINGS = ["num_gpus", "devices", "output_dir", "GLUE_DIR", "MNLI_LORA", "PYTHON", "DRY_RUN"]  # as launch.sh has them
SETTINGS += ["nnodes", "node_rank", "master_addr", "master_port", "torchrun_options"]
# what srun sets for the second of two machines
SRUN = {"SLURM_JOB_ID": "64711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[01-02]"}

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script from another folder, dry unless told otherwise; returns the finished process."""
    read = {*SETTINGS, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    for name in [name for name in os.environ if name in read or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()

    def run(script: Path | str, *flags: str, **settings: str | None) -> subprocess.CompletedProcess:
        env = {**os.environ, "DRY_RUN": "1", "devices": "8", "MNLI_LORA": "none", **settings}
        env = {name: value for name, value in env.items() if value is not None}
        path = ROOT / "scripts" / script
        command = ["bash", str(path), *flags]
        return subprocess.run(command, env=env, cwd=elsewhere, capture_output=True, text=True, timeout=120)

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


def torchrun(words: list[str]) -> list[str]:
    """The launcher's options; none where the program starts without one."""
    program = next(i for i, word in enumerate(words) if word.endswith(PROGRAM))
    assert words[1:program] == [] or words[1:3] == ["-m", "torch.distributed.run"]
    return words[3:program]


def processes(words: list[str]) -> int:
    """Processes the command starts, on all machines."""
    options = dict(word.split("=") for word in torchrun(words) if "=" in word)
    return int(options.get("--nnodes", 1)) * int(options.get("--nproc_per_node", 1))


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

    done = run(script, devices=num_gpus)
    flags = flags_of(done)
    for name, value in NOT_HYPERPARAMETERS.items():
        given = flags.pop(name)
        assert value is None or given == value
    assert flags == recipe
    assert processes(command(done)) == int(num_gpus)
    batch = int(recipe["per_device_train_batch_size"])
    assert done.stderr == f"{script.stem}: {num_gpus} x {batch} = {int(num_gpus) * batch} examples a step\n"
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


@each_script
def test_the_real_parser_reads_every_flag_of_a_script(script, run):
    recipe = RECIPES[script.name].copy()
    parsed: dict = {}
    for group in parse_arguments(program_flags(command(run(script, devices="1"))), {}):
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


MACHINES = [("1", "0"), ("1", "1"), ("1", "2"), ("1", "4"), ("1", "8"), ("2", "0"), ("2", "4"), ("2", "8")]


@each_script
def test_a_step_has_the_published_number_of_examples_on_any_number_of_devices_and_machines(script, run):
    recipe = RECIPES[script.name]
    published = int(recipe["per_device_train_batch_size"])
    for nnodes, devices in MACHINES:
        done = run(script, nnodes=nnodes, devices=devices, node_rank="0", master_addr="first")
        flags, words = flags_of(done), command(done)
        assert words.count("--per_device_train_batch_size") == 1
        batch, accumulation = (
            int(flags.get(name, 1)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        assert processes(words) == int(nnodes) * max(1, int(devices))
        assert processes(words) * batch * accumulation == int(recipe["num_gpus"]) * published
        share = batch * accumulation
        assert batch == max(n for n in range(1, published + 1) if share % n == 0)  # as few passes as there can be


@pytest.mark.parametrize(
    "script, machines, batch, accumulation, where",
    [
        ("mnli", {"devices": "0"}, 16, 8, "the CPU"),
        ("mnli", {"devices": "1"}, 16, 8, "1 device"),
        ("mnli", {"devices": "2"}, 16, 4, "2 devices"),
        ("mnli", {"devices": "8"}, 16, 1, ""),
        ("mnli", {"devices": "16"}, 8, 1, "16 devices"),
        ("mnli", {"devices": "128"}, 1, 1, "128 devices"),
        ("mnli", {"devices": "4", "nnodes": "2"}, 16, 1, ""),
        ("mnli", {"devices": "8", "nnodes": "2"}, 8, 1, "16 devices of 2 machines"),
        ("mnli", {"devices": "1", "nnodes": "2"}, 16, 4, "2 devices of 2 machines"),
        ("mnli", {"devices": "0", "nnodes": "4"}, 16, 2, "the CPUs of 4 machines"),
        ("qqp", {"devices": "6", "num_gpus": "9"}, 12, 2, "6 devices"),
        ("cola", {"devices": "8"}, 8, 1, "8 devices"),
    ],
)
def test_another_number_of_devices_makes_up_the_batch_and_says_so(run, script, machines, batch, accumulation, where):
    done = run(f"roberta_base_{script}.sh", node_rank="0", master_addr="first", **{"nnodes": "1", **machines})
    recipe = RECIPES[f"roberta_base_{script}.sh"]
    num_gpus, published = machines.get("num_gpus", recipe["num_gpus"]), recipe["per_device_train_batch_size"]
    made = f" --per_device_train_batch_size {batch}" * (batch != int(published))
    made += f" --gradient_accumulation_steps {accumulation}" * (accumulation > 1)
    said = f"roberta_base_{script}: {num_gpus} x {published} = {int(num_gpus) * int(published)} examples a step"
    assert done.stderr == said + f", made up on {where} with{made}" * bool(made) + "\n"
    flags = flags_of(done)
    assert flags["per_device_train_batch_size"] == str(batch)
    assert flags.get("gradient_accumulation_steps") == (str(accumulation) if accumulation > 1 else None)


@pytest.mark.parametrize("written", [["--fp16"], ["--fp16", "True"], ["--fp16=true"], []])
def test_without_a_gpu_fp16_is_dropped_and_said_and_nothing_else_is(run, written):
    on_cpu = run("deberta_v2_xxlarge_rte.sh", *written, "--seed", "3", devices="0")
    assert on_cpu.stderr.splitlines()[-1] == "deberta_v2_xxlarge_rte: no GPU: --fp16 is dropped, computing in fp32"
    flags = flags_of(run("deberta_v2_xxlarge_rte.sh", "--seed", "3", devices="1"))
    assert flags.pop("fp16") == "" and flags_of(on_cpu) == flags
    kept = run("roberta_base_rte.sh", "--fp16_full_eval", "--bf16", "true", devices="0")
    assert command(kept)[-3:] == ["--fp16_full_eval", "--bf16", "true"] and "dropped" not in kept.stderr


def test_another_num_gpus_is_another_recipe(run):
    done = run("roberta_base_mnli.sh", num_gpus="1", devices="1")
    assert processes(command(done)) == 1
    assert "gradient_accumulation_steps" not in flags_of(done)
    assert done.stderr == "roberta_base_mnli: 1 x 16 = 16 examples a step\n"


def as_written(name: str, value: str) -> list[list[str]]:
    """The ways to write a flag that run_glue.py reads."""
    return [[f"--{name}", value], [f"--{name}={value}"], [f"--{name.replace('_', '-')}", value]]


@pytest.mark.parametrize("written", as_written("per_device_train_batch_size", "4"))
@pytest.mark.parametrize("devices, batch, accumulation", [("1", "4", "8"), ("8", "4", None), ("16", "2", None)])
def test_a_users_batch_is_that_of_each_of_num_gpus_as_the_scripts_is(run, written, devices, batch, accumulation):
    done = run("roberta_base_mnli.sh", *written, "--seed", "3", devices=devices)
    assert done.stderr.startswith("roberta_base_mnli: 8 x 4 = 32 examples a step")
    assert command(done)[-2:] == ["--seed", "3"]
    flags = {name.replace("-", "_"): value for name, value in flags_of(done).items()}
    assert flags["per_device_train_batch_size"] == batch
    assert flags.get("gradient_accumulation_steps") == accumulation
    assert sum("train" in word and "batch" in word for word in command(done)) == (1 if devices == "16" else 2)


@pytest.mark.parametrize("written", as_written("gradient_accumulation_steps", "2"))
@pytest.mark.parametrize("devices, examples", [("1", 32), ("3", 96), ("16", 512)])
def test_a_users_accumulation_wins_whatever_becomes_of_the_batch(run, written, devices, examples):
    done = run("roberta_base_mnli.sh", *written, devices=devices)
    assert f"{devices} x 16 x 2 = {examples} examples a step" in done.stderr
    assert command(done)[-len(written) :] == written and done.stdout.count("accumulation") == 1
    assert flags_of(done)["per_device_train_batch_size"] == "16"


@pytest.mark.parametrize(
    "given, said, remedy, works",
    [
        ({"devices": "3"}, "3 devices cannot", "Use 2 of them: devices=2,", {"devices": "2"}),
        ({"devices": "48"}, "48 devices cannot", "devices=32", {"devices": "32"}),
        ({"devices": "200"}, "200 devices cannot", "devices=128", {"devices": "128"}),
        (
            {"devices": "5", "nnodes": "2"},
            "10 devices of 2 machines",
            "Use 4 of them on each: devices=4,",
            {"devices": "4"},
        ),
        ({"devices": "4", "nnodes": "3"}, "12 devices of 3 machines", "nnodes=2.", {"nnodes": "2"}),
        ({"devices": "0", "nnodes": "5"}, "the CPUs of 5 machines", "nnodes=4.", {"nnodes": "4"}),
    ],
)
def test_devices_that_cannot_share_a_step_equally_are_refused_naming_how_many_can(run, given, said, remedy, works):
    given = {"nnodes": "1", "node_rank": "0", "master_addr": "first", **given}
    message = refusal(run("roberta_base_mnli.sh", **given))
    count = int(given["nnodes"]) * max(1, int(given["devices"]))
    for words in (said, "8 x 16", remedy, f"num_gpus={count}"):
        assert words in message
    assert ("CUDA_VISIBLE_DEVICES" in message) == ("devices" in works)
    assert "= 128 examples" in run("roberta_base_mnli.sh", **{**given, **works}).stderr
    assert f"{count} x 16 = {count * 16} examples" in run("roberta_base_mnli.sh", **given, num_gpus=str(count)).stderr


@pytest.mark.parametrize("setting", ["num_gpus", "devices", "nnodes", "node_rank", "master_port"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "08", "9999999999", "a[$(touch oops)]"])
def test_a_number_that_is_none_is_refused_by_name(run, setting, value, tmp_path):
    several = {"nnodes": "2", "node_rank": "0", "master_addr": "first"}
    assert f"{setting}='{value}'" in refusal(run("roberta_base_mnli.sh", **{**several, setting: value}))
    assert not list(tmp_path.rglob("oops"))


@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
@pytest.mark.parametrize("value", ["0", "x", "016"])
def test_a_batch_or_an_accumulation_that_cannot_be_counted_with_is_refused_by_its_flag(run, name, value):
    assert f"--{name}='{value}'" in refusal(run("roberta_base_mnli.sh", f"--{name}", value))


def test_no_gpus_is_not_a_recipe(run):
    assert "num_gpus='0'" in refusal(run("roberta_base_mnli.sh", num_gpus="0"))


@pytest.mark.parametrize(
    "visible, devices, kept",
    [(None, "1", "0"), ("2,3", "1", "2"), ("3,2,1,0", "1", "3"), (None, "0", ""), ("2,3", "0", "")],
)
@pytest.mark.parametrize("options", ["", "--max_restarts=3"])
def test_a_lone_process_sees_one_gpu_and_so_never_multiplies_the_batch(run, visible, devices, kept, options):
    done = run("roberta_base_mnli.sh", devices=devices, CUDA_VISIBLE_DEVICES=visible, torchrun_options=options)
    assert f" CUDA_VISIBLE_DEVICES={kept} " in done.stdout


def test_several_processes_see_the_gpus_the_user_chose(run):
    assert "CUDA_VISIBLE_DEVICES" not in run("roberta_base_mnli.sh", CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7").stdout


@pytest.mark.parametrize(
    "devices, user, set_to", [("2", None, "1"), ("2", "3", "3"), ("1", None, "unset"), ("0", "3", "3")]
)
def test_several_processes_on_a_machine_have_a_cpu_thread_each_unless_the_user_says_otherwise(
    run, tmp_path, devices, user, set_to
):
    show = tmp_path / "show"
    show.write_text('#!/bin/sh\necho "threads ${OMP_NUM_THREADS-unset}"\n')
    show.chmod(0o755)
    done = run("roberta_base_mnli.sh", devices=devices, OMP_NUM_THREADS=user, PYTHON=str(show), DRY_RUN=None)
    assert done.stdout.splitlines()[-1] == f"threads {set_to}"
    assert (" OMP_NUM_THREADS=1 " in done.stdout) == (set_to == "1")


def test_all_devices_are_counted_and_used_when_their_number_is_not_given(run, tmp_path):
    for there, batch, accumulation in (("4", "16", "2"), ("16", "8", None)):
        done = run("roberta_base_mnli.sh", devices=None, PYTHON=str(fake_python(tmp_path, there)))
        assert processes(command(done)) == int(there)
        flags = flags_of(done)
        assert flags["per_device_train_batch_size"] == batch
        assert flags.get("gradient_accumulation_steps") == accumulation


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


@pytest.mark.parametrize("devices", ["1", "2", "16"])
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


# ----------------------------------------------------------------------------------------------------- several machines

SEVERAL = {"nnodes": "2", "node_rank": "1", "master_addr": "first", "devices": "4"}


def test_one_machine_has_a_rendezvous_on_a_free_port_and_a_lone_process_none(run):
    assert torchrun(command(run("roberta_base_mnli.sh", devices="2"))) == ["--standalone", "--nproc_per_node=2"]
    for devices in "01":
        assert torchrun(command(run("roberta_base_mnli.sh", devices=devices))) == []


@pytest.mark.parametrize("devices, started", [("0", 1), ("1", 1), ("4", 4)])
@pytest.mark.parametrize("port, used", [(None, "29500"), ("1234", "1234")])
def test_each_of_several_machines_is_told_its_number_and_the_first_ones_address(run, devices, started, port, used):
    done = run("roberta_base_mnli.sh", **{**SEVERAL, "devices": devices, "master_port": port})
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=first", f"--master_port={used}"]
    assert torchrun(command(done)) == [*where, f"--nproc_per_node={started}"]
    assert ("CUDA_VISIBLE_DEVICES= " in done.stdout) == (devices == "0")
    assert ("CUDA_VISIBLE_DEVICES" in done.stdout) == (devices == "0")


@pytest.mark.parametrize("missing", ["node_rank", "master_addr"])
def test_several_machines_without_a_number_or_an_address_are_refused_saying_what_to_set(run, missing):
    message = refusal(run("roberta_base_mnli.sh", **{**SEVERAL, missing: None}))
    assert "nnodes=2" in message and "node_rank=<0 on the first" in message and "master_addr=<name" in message


def test_a_machine_beyond_the_last_is_refused(run):
    assert "node_rank=2: with nnodes=2 it goes from 0 to 1." in refusal(
        run("roberta_base_mnli.sh", **{**SEVERAL, "node_rank": "2"})
    )


@pytest.mark.parametrize("name", ["node_rank", "master_addr"])
def test_a_machine_that_is_not_told_how_many_there_are_does_not_train_alone(run, name):
    assert "Set nnodes=" in refusal(run("roberta_base_mnli.sh", **{name: "0"}))


def test_torchrun_options_are_split_at_spaces_and_used_for_a_lone_process_too(run):
    options = "--max_restarts=3   --log_dir *"
    for devices, started in (("0", 1), ("1", 1), ("4", 4)):
        words = torchrun(command(run("roberta_base_mnli.sh", devices=devices, torchrun_options=options)))
        assert words == ["--standalone", f"--nproc_per_node={started}", "--max_restarts=3", "--log_dir", "*"]
    words = torchrun(command(run("roberta_base_mnli.sh", **SEVERAL, torchrun_options=options)))
    assert words[-3:] == ["--max_restarts=3", "--log_dir", "*"] and "--node_rank=1" in words


@pytest.mark.parametrize(
    "options",
    [
        "--rdzv_backend=c10d --rdzv_endpoint=a:1",
        "--rdzv-backend=c10d --rdzv-endpoint=a:1",
        "--rdzv_backend c10d",
        "--max_restarts=3 --rdzv-endpoint a:1",
    ],
)
def test_a_rendezvous_of_the_users_own_replaces_ours(run, options):
    given = {"nnodes": "2", "devices": "4", "torchrun_options": options}
    for settings in (given, {**given, **SRUN, "SLURM_STEP_NODELIST": "a[1-2]b[1-2]"}):
        words = torchrun(command(run("roberta_base_mnli.sh", **settings)))
        assert words == ["--nnodes=2", "--nproc_per_node=4", *options.split()]
    alone = torchrun(command(run("roberta_base_mnli.sh", devices="1", torchrun_options=options)))
    assert alone == ["--nnodes=1", "--nproc_per_node=1", *options.split()]


@pytest.mark.parametrize("option", ["--nnodes=2", "--nproc_per_node 4", "--nproc-per-node=4"])
def test_torchrun_options_that_would_change_the_batch_unseen_are_refused(run, option):
    message = refusal(run("roberta_base_mnli.sh", torchrun_options=f"--max_restarts=3 {option}"))
    assert re.split("[ =]", option)[0] in message and "nnodes=<" in message and "devices=<" in message


# Stands for run_glue.py
MEET = """
import os
import torch.distributed as dist

dist.init_process_group("gloo")
met = [None] * dist.get_world_size()
dist.all_gather_object(met, os.environ["GROUP_RANK"] + os.environ["LOCAL_RANK"])
print("met", *met)
dist.destroy_process_group()  # else it may abort at its end, and the other machine wait for it for 300 s
"""


def test_two_machines_commands_find_each_other(run, copy):
    (copy / PROGRAM).parent.mkdir(parents=True)
    (copy / PROGRAM).write_text(MEET)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"nnodes": "2", "master_addr": "127.0.0.1", "master_port": port, "devices": "0"}

    def machine(rank: str) -> subprocess.CompletedProcess:
        script = copy / "scripts" / "roberta_base_mnli.sh"
        return run(script, **here, node_rank=rank, PYTHON=sys.executable, OMP_NUM_THREADS="1", DRY_RUN=None)

    with ThreadPoolExecutor() as pool:
        done = [*pool.map(machine, "01")]
    ends = [(one.returncode, one.stdout.splitlines()[-1]) for one in done]
    assert ends == 2 * [(0, "met 00 10")], [one.stderr for one in done]


# -------------------------------------------------------------------------------------------------------------- SLURM


def test_srun_says_where_the_machines_are(run):
    words = torchrun(command(run("roberta_base_mnli.sh", **SRUN, devices="8")))
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=node01", "--master_port=24711"]
    assert words == [*where, "--nproc_per_node=8"]


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("node[01-03,07]", "node01"),
        ("node[3,5]", "node3"),
        ("node[09-11]", "node09"),
        ("a,b", "a"),
        ("gpu-1", "gpu-1"),
        ("gpu-[1-2]", "gpu-1"),
        ("rack_1.gpu-[001-002],login", "rack_1.gpu-001"),
        ("gpu[1-2],cpu[1-2]", "gpu1"),
        ("login,gpu[1-2]", "login"),
    ],
)
def test_the_first_machine_of_slurms_list_is_the_meeting_point(run, nodes, first):
    words = torchrun(command(run("roberta_base_mnli.sh", **{**SRUN, "SLURM_STEP_NODELIST": nodes})))
    assert f"--master_addr={first}" in words


@pytest.mark.parametrize("nodes", ["rack[1-2]n[1-2]", "node[1-2]-ib", "node[a-b]", "", None])
def test_a_list_of_machines_that_is_not_understood_is_refused_until_the_first_is_named(run, nodes):
    srun = {**SRUN, "SLURM_STEP_NODELIST": nodes}
    message = refusal(run("roberta_base_mnli.sh", **srun))
    assert f"'{nodes or ''}'" in message and "master_addr=<" in message
    assert "--master_addr=mine" in torchrun(command(run("roberta_base_mnli.sh", **srun, master_addr="mine")))


@pytest.mark.parametrize("name, value", [("node_rank", "0"), ("master_addr", "mine"), ("master_port", "1234")])
@pytest.mark.parametrize("nnodes", [None, "2"])
def test_what_a_user_sets_goes_before_what_srun_says_one_by_one(run, name, value, nnodes):
    where = {"node_rank": "1", "master_addr": "node01", "master_port": "24711", name: value}
    words = torchrun(command(run("roberta_base_mnli.sh", **SRUN, nnodes=nnodes, **{name: value})))
    assert words[:4] == ["--nnodes=2", *(f"--{key}={where[key]}" for key in where)]


def test_a_user_may_take_fewer_machines_or_others_than_srun_has(run):
    assert torchrun(command(run("roberta_base_mnli.sh", **SRUN, nnodes="1", devices="1"))) == []
    refusal(run("roberta_base_mnli.sh", **SRUN, nnodes="4"))  # srun's numbers are not those of the four
    words = torchrun(command(run("roberta_base_mnli.sh", **SRUN, nnodes="4", node_rank="3", master_addr="mine")))
    assert words[:4] == ["--nnodes=4", "--node_rank=3", "--master_addr=mine", "--master_port=29500"]


@pytest.mark.parametrize("machines", ["1", "2"])
def test_several_tasks_on_a_machine_are_refused_unless_each_is_a_run_of_its_own(run, machines):
    srun = {**SRUN, "SLURM_STEP_NUM_NODES": machines, "SLURM_STEP_NUM_TASKS": "16"}
    message = refusal(run("roberta_base_mnli.sh", **srun))
    assert f"16 tasks on {machines} " in message and "--ntasks-per-node=1" in message and "nnodes=1" in message
    assert torchrun(command(run("roberta_base_mnli.sh", **srun, nnodes="1", devices="1"))) == []


def test_a_job_of_several_machines_without_srun_uses_one_and_says_so(run):
    job = {name: value for name, value in SRUN.items() if "STEP" not in name}
    done = run("roberta_base_mnli.sh", **job)
    assert torchrun(command(done))[0] == "--standalone"
    said = "SLURM gave 2 machines, this uses one: start it with srun (scripts/slurm.sbatch)"
    assert done.stderr.splitlines()[0] == f"roberta_base_mnli: {said}" and len(done.stderr.splitlines()) == 2
    for chosen in ({"nnodes": "1"}, {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}):
        done = run("roberta_base_mnli.sh", **job, **chosen)
        assert torchrun(command(done))[0] == "--standalone" and said not in done.stderr


def test_the_example_of_a_slurm_job_starts_a_script_once_on_each_machine(run, tmp_path):
    example = ROOT / "scripts" / "slurm.sbatch"
    lines = example.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    asked = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert len(asked) == example.read_text().count("#SBATCH")  # sbatch reads none after a command
    assert "--nodes=2" in asked and "--ntasks-per-node=1" in asked

    (tmp_path / "srun").write_text(
        '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do echo "$1" >>srun_flags; shift; done\nexec env '
        + " ".join(f"{name}={shlex.quote(value)}" for name, value in SRUN.items())
        + ' "$@"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    extra = ("--run_name", "two words")
    done = run(example, str(ROOT / "scripts" / "roberta_base_mnli.sh"), *extra, PATH=path, SLURM_CPUS_PER_TASK="4")
    assert torchrun(command(done))[:2] == ["--nnodes=2", "--node_rank=1"] and command(done)[-2:] == [*extra]
    assert (tmp_path / "else where" / "srun_flags").read_text() == "--cpus-per-task=4\n--kill-on-bad-exit=1\n"
    assert "scripts/slurm.sbatch scripts/<script>.sh" in refusal(run(example, PATH=path))


@pytest.mark.parametrize("settings", [{"nnodes": "2"}, SRUN], ids=["nnodes", "srun"])
def test_seeds_do_not_run_over_several_machines(run, settings):
    assert "takes one machine" in refusal(run("run_seeds.sh", "scripts/roberta_base_cola.sh", "1", **settings))


# ----------------------------------------------------------------------------------------------------------- the rest


def test_the_settings_at_the_head_of_launch_sh_are_those_it_reads():
    head, body = (ROOT / "scripts" / "launch.sh").read_text().split("set -euo pipefail\n")
    assert sorted(re.findall(r"^#   (\w+)=", head, re.MULTILINE)) == sorted(SETTINGS)
    assert all(re.search(rf"\${{?{name}\b", body) for name in SETTINGS)


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
