"""The launch scripts: each is the published recipe, and starts it with the Python and the settings of the user."""

import csv
import dataclasses
import functools
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
from lora_nlu.errors import UsageError
from lora_nlu.methods.marking import mark_trainable
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification
from lora_nlu.training import launch
from lora_nlu.training.parsing import parse_arguments

ROOT = Path(__file__).parents[1]
PROGRAM = "examples/text-classification/run_glue.py"
KINDS = {"roberta_*.sh": 16, "deberta_*.sh": 8, "mnli.*.sh": 2, "adapter_*.sh": 2}  # the reference's
BASELINE_SCRIPTS = ["bitfit_roberta_base.sh", "full_roberta_base.sh"]
FOLLOW_UP_SCRIPTS = ["adalora_deberta_v3_base.sh", "lora_deberta_v3_base.sh", "lora_roberta_large_no_mnli.sh"]
FOLLOW_UP_SCRIPTS += ["loraplus_roberta_base.sh", "vera_roberta_base.sh", "vera_roberta_large.sh"]
OTHERS = {"compare_methods.sh", "demo.sh", "help.sh", "install.sh", "launch.sh", "one_run.sh", "run_seeds.sh"}
OTHERS |= {"sweep_ranks.sh", "test.sh"}
RENAMED = {"num_gpus": "tuned_for_gpus", "evaluation_strategy": "eval_strategy"}
RENAMED |= {"use_deterministic_algorithms": "full_determinism"}
METHODS = {"apply_lora": "LoRA", "apply_adapter": "adapters", "apply_bitfit": "BitFit"}  # and as a headline has it


def read_recipes(file: str) -> list[dict[str, str]]:
    """The lines of a table: flags and values ("yes" for a flag without one), and script, tuned_for_gpus, source."""
    with open(Path(__file__).parent / file, newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    recipes = [{RENAMED.get(name, name): value for name, value in row.items() if value} for row in rows]
    return [recipe | ({"apply_lora": "yes"} if "lora_r" in recipe else {}) for recipe in recipes]


# by the name of the output folder; `words` are the script and, where it takes one, the task
PUBLISHED = {recipe["script"].removesuffix(".sh"): recipe for recipe in read_recipes("hyperparameters.tsv")}
BASELINES, FOLLOW_UPS = (
    {f"{Path(recipe['script']).stem}_{recipe['task_name']}": recipe for recipe in read_recipes(file)}
    for file in ("baselines.tsv", "follow_ups.tsv")
)
RECIPES = PUBLISHED | BASELINES | FOLLOW_UPS
PAPER = {recipe["script"]: recipe for recipe in read_recipes("../scripts/paper_recipes.tsv")}  # by script
SHARED = ROOT.parent / "shared"  # the tables that ours were copied from, beside a development checkout
WORDS = {
    name: [recipe.pop("script"), *[recipe["task_name"]] * (name not in PUBLISHED)] for name, recipe in RECIPES.items()
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
SETTINGS = ["tuned_for_gpus", "devices", "output_dir", "GLUE_DIR", "MNLI_LORA", "PYTHON", "DRY_RUN"]  # of launch.sh
SETTINGS += ["recipe", "nnodes", "node_rank", "master_addr", "master_port", "torchrun_options"]
# what srun sets for the second of two machines
SRUN = {"SLURM_JOB_ID": "64711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[01-02]"}

each_recipe = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a script from another folder, dry by default; returns the finished process."""
    read = {*SETTINGS, "num_gpus", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    for name in [name for name in os.environ if name in read or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()

    def run(script: Path | str, *flags: str, **settings: str | None) -> subprocess.CompletedProcess:
        env = {**os.environ, "DRY_RUN": "1", "devices": "8", "MNLI_LORA": "none", "PYTHON": sys.executable, **settings}
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
    """A `python` that counts so many devices, runs launch.py, and prints the arguments of any other program."""
    folder.mkdir(exist_ok=True)
    fake = folder / "fake python"
    answers = f'*device_count*) echo {devices} ;; *launch*) exec {shlex.quote(sys.executable)} "$@" ;;'
    fake.write_text(f'#!/bin/sh\ncase "$2" in {answers} *) printf "%s\\n" "$@" ;; esac\n')
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
    assert words[1:program] == [] or words[1:3] == ["-c", launch.TORCHRUN]
    return words[3:program]


def processes(words: list[str]) -> int:
    """Processes the command starts, on all machines."""
    options = dict(word.split("=") for word in torchrun(words) if "=" in word)
    return int(options.get("--nnodes", 1)) * int(options.get("--nproc_per_node", 1))


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 3
    return done.stderr


def test_there_are_the_references_28_scripts_and_2_over_8_tasks():
    scripts = ROOT / "scripts"
    assert {kind: len([*scripts.glob(kind)]) for kind in KINDS} == KINDS and sum(KINDS.values()) == 28
    published = {path.name for kind in KINDS for path in scripts.glob(kind)}
    assert published | OTHERS == {path.name for path in scripts.glob("*.sh")}
    assert sorted(published) == sorted(f"{name}.sh" for name in PUBLISHED)
    expected = {"baselines": BASELINE_SCRIPTS, "follow_ups": FOLLOW_UP_SCRIPTS}
    assert {folder: sorted(path.name for path in (scripts / folder).iterdir()) for folder in expected} == expected
    with_task = {f"{folder}/{name}" for folder, names in expected.items() for name in names}
    assert {words[0] for words in WORDS.values()} == published | with_task
    assert [sum(method in recipe for recipe in RECIPES.values()) for method in METHODS] == [26 + len(FOLLOW_UPS), 2, 8]


def test_the_baselines_are_full_fine_tuning_and_bitfit_of_each_glue_task():
    tasks = sorted(recipe["task_name"] for recipe in BASELINES.values())
    assert tasks == sorted(2 * [name for name in TASKS if name not in ("wnli", "ax")])
    for name, recipe in BASELINES.items():
        assert name.startswith("bitfit_" if "apply_bitfit" in recipe else "full_")


@pytest.mark.parametrize("script", BASELINE_SCRIPTS)
@pytest.mark.parametrize("words", [[], ["wnli"], ["--max_steps", "20"]])
def test_a_baseline_needs_one_of_its_tasks(run, script, words):
    message = refusal(run(f"baselines/{script}", *words))
    assert f"not '{words[0] if words else ''}': cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb." in message


@each_recipe
def test_a_script_passes_exactly_the_published_hyperparameters(name, run):
    recipe = {flag: "" if value == "yes" else value for flag, value in RECIPES[name].items() if flag != "source"}
    tuned_for_gpus = recipe.pop("tuned_for_gpus")
    starts_from_mnli = recipe.pop("lora_path", None) is not None  # the published names of that file disagree

    done = run(*WORDS[name], devices=tuned_for_gpus)
    flags = flags_of(done)
    assert flags.pop("output_dir") == str(ROOT / "output" / name)  # of its own, inside the repository
    assert flags.pop("do_train") == flags.pop("do_eval") == ""
    assert flags == recipe
    assert processes(command(done)) == int(tuned_for_gpus)
    batch = batch_of(name)
    assert done.stderr == f"{name}: {tuned_for_gpus} x {batch} = {int(tuned_for_gpus) * batch} examples a step\n"
    assert ("needs_mnli" in text_of(name)) == starts_from_mnli


@functools.cache
def script_of(name: str, scripts: Path = ROOT / "scripts") -> launch.Script:
    """A script as run_seeds.sh reads it, without starting it."""
    path, *task = WORDS[name]
    return launch.read_script([str(scripts / path), *task], {**os.environ, "PYTHON": sys.executable})


def text_of(name: str) -> str:
    return (ROOT / "scripts" / WORDS[name][0]).read_text()


@each_recipe
def test_the_comments_of_a_script_match_its_flags(name):
    recipe, text = RECIPES[name], text_of(name)
    task = TASKS[recipe["task_name"]]
    tuned_for_gpus, batch = int(recipe["tuned_for_gpus"]), batch_of(name)
    rows = rf"{task.rows['train']:,} (training )?{'pairs' if len(task.text) == 2 else 'sentences'}"
    assert f"tuned for {tuned_for_gpus} GPU{'s' * (tuned_for_gpus > 1)}\n" in text
    if name not in PUBLISHED:  # a row a task
        assert len(re.findall(rf"^  {task.name}\) .*;; # +{rows}(: |$)", text, re.M)) == 1
    else:
        assert f"({rows.replace('(training )?', 'training ')})" in text
        examples = f"{tuned_for_gpus * batch} (pairs|sentences) a step"
        assert re.search(rf"size {batch} +# x tuned_for_gpus={tuned_for_gpus}: {examples}", text)
        assert not re.search(r"(ro|de)berta_\w+", text.replace(name, "").replace(mnli_of(name), ""))
    assert ("R-Drop" in text or "utoff" in text) == ("reg_loss_wgt" in recipe)
    headline = text.splitlines()[1]
    assert [flag for flag, word in METHODS.items() if f" {word} " in headline] == [m for m in METHODS if m in recipe]
    assert all(source in text for source in recipe.get("source", "").split(", "))


@pytest.mark.parametrize("words", {tuple(words[:1]): None for words in WORDS.values()}, ids=lambda words: words[0])
def test_a_scripts_comment_has_its_recipe_and_a_quick_try_in_a_folder_of_its_own(words, tmp_path):
    head = (ROOT / "scripts" / words[0]).read_text().partition("\ntuned_for_gpus")[0].replace(" \\\n#    ", "")
    recipe, attempt = re.findall(r"^#   ((?:\w+=\w+ )?bash .*?)   (?:the .*recipe, tuned for|a quick try)", head, re.M)
    settings = {**os.environ, "DRY_RUN": "1", "devices": "1", "PYTHON": sys.executable, "PWD": str(tmp_path)}
    folders = []
    for text in (recipe, attempt):
        script = f"cd {shlex.quote(str(tmp_path))}; {text.replace('scripts/', f'{shlex.quote(str(ROOT))}/scripts/')}"
        done = subprocess.run(["bash", "-c", script], env=settings, capture_output=True, text=True)
        flags = program_flags(command(done))
        parse_arguments(flags, {})
        folders.append(launch.last_value(flags, "--output_dir"))
        starts_from_mnli = "needs_mnli" in text_of(next(name for name in WORDS if WORDS[name][0] == words[0]))
        assert (launch.NO_MNLI in done.stderr) == (starts_from_mnli and text is recipe)  # the try needs none
    name = Path(words[0]).stem
    assert Path(folders[0]).parent == ROOT / "output" and Path(folders[0]).name.startswith(name)
    assert folders[1] == "output/try"


HELP = {"demo.sh": "The main job", "test.sh": "Makes or reuses .venv", "run_seeds.sh": "--grid FLAG VALUE"}
HELP |= {"sweep_ranks.sh": "The paper's table of ranks", "roberta_base_mnli.sh": "RoBERTa-base + LoRA on MNLI"}
HELP |= {"baselines/full_roberta_base.sh": "full fine-tuning"}


@pytest.mark.parametrize("script", HELP)
@pytest.mark.parametrize("words", [["--help"], ["rte", "-h"]], ids=["--help", "-h"])
def test_help_of_a_script_is_its_comment_and_needs_no_python(script, words, run, tmp_path):
    """PYTHON and PATH have no Python, so nothing can be installed or started."""
    (tmp_path / "bin").mkdir()
    for program in ("awk", "bash", "basename", "dirname"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program))
    done = run(script, *words, PYTHON="no-python", PATH=str(tmp_path / "bin"))
    assert done.returncode == 0 and done.stderr == ""
    assert HELP[script] in done.stdout and not re.search("^#|shellcheck|usr/bin", done.stdout, re.M)
    assert ("GLUE_DIR=" in done.stdout) == (script not in ("demo.sh", "test.sh", "sweep_ranks.sh"))
    assert all(line in (ROOT / "scripts" / script).read_text() for line in done.stdout.splitlines()[:4])


@pytest.mark.parametrize("name", [name for name in RECIPES if {"apply_adapter", "apply_bitfit"} & {*RECIPES[name]}])
def test_the_parameters_a_comment_counts_are_those_that_train_in_the_encoder(name):
    recipe = RECIPES[name]
    size = LARGE if recipe["model_name_or_path"] == "roberta-large" else {}  # RobertaConfig's own is base
    method = {flag: True for flag in METHODS if flag in recipe}
    if "apply_adapter" in recipe:
        method |= {"adapter_type": recipe["adapter_type"], "adapter_size": int(recipe["adapter_size"])}
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**size, **method))
    mark_trainable(model)
    trained = sum(p.numel() for p in model.base_model.parameters() if p.requires_grad)
    assert f" {trained:,} " in text_of(name)


def batch_of(name: str) -> int:
    return int(RECIPES[name].get("per_device_train_batch_size", launch.DEFAULT_BATCH))


def mnli_of(name: str) -> str:
    return f"{name.rpartition('_')[0]}_mnli"


@each_recipe
def test_the_real_parser_reads_every_flag_of_a_script(name):
    """That the script prints this plan's flags is proved by the test of its hyperparameters."""
    recipe = RECIPES[name].copy()
    parsed: dict = {}
    planned = launch.plan(script_of(name), {"devices": "1", "MNLI_LORA": "none"})
    for group in parse_arguments(planned.flags, {}):
        parsed |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    assert parsed["do_train"] is True and parsed["do_eval"] is True
    assert parsed["gradient_accumulation_steps"] == int(recipe.pop("tuned_for_gpus"))
    for name in (*METHODS, "fp16", "full_determinism"):
        assert parsed[name] is (recipe.pop(name, None) == "yes"), name
    if "warmup_ratio" in recipe:
        recipe["warmup_steps"] = recipe.pop("warmup_ratio")  # where transformers 5 has it, as a share
    for name, value in recipe.items():
        if name not in ("source", "lora_path"):
            assert parsed[name] == (float(value) if re.fullmatch(r"[\d.e-]+", value) else value), name


# ------------------------------------------------------------------------------------------------- the paper's recipe


def papers_recipe(name: str) -> dict[str, str]:
    """The flags of a published script with the values of the paper's table in their place."""
    recipe = PUBLISHED[name] | {flag: value for flag, value in PAPER[name].items() if flag != "script"}
    return {flag: value for flag, value in recipe.items() if flag not in ("warmup_steps", "lora_path")}


@pytest.mark.parametrize("name", PAPER)
def test_recipe_paper_runs_a_script_with_the_hyperparameters_of_the_papers_table(name, run):
    recipe = {flag: "" if value == "yes" else value for flag, value in papers_recipe(name).items()}
    done = run(f"{name}.sh", "--seed", "3", devices=recipe.pop("tuned_for_gpus"), recipe="paper")
    words, flags = program_flags(command(done)), flags_of(done)
    assert flags.pop("output_dir") == str(ROOT / "output" / f"{name}_paper")
    assert flags.pop("do_train") == flags.pop("do_eval") == ""
    assert flags == recipe | {"seed": "3"}  # the user's flags still win
    assert all(words.count(f"--{flag}") == 1 for flag in recipe if flag != "seed")
    parsed: dict = {}
    for group in parse_arguments(words, {}):
        parsed |= {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
    assert parsed["lora_alpha"] == float(recipe["lora_alpha"])
    assert parsed["warmup_steps"] == float(recipe["warmup_ratio"])  # where transformers 5 has it, as a share


def test_the_table_of_the_papers_recipes_has_the_24_scripts_and_the_papers_values():
    assert sorted(PAPER) == sorted(name for name in PUBLISHED if name.startswith(("roberta", "deberta")))
    if not SHARED.is_dir():
        pytest.skip("the table that it was copied from is not here")
    columns = {
        "batch_per_gpu": "per_device_train_batch_size", "epochs": "num_train_epochs", "r_or_bottleneck": "lora_r",
        "alpha": "lora_alpha",
    }  # fmt: skip
    with (SHARED / "paper_hyperparameters.tsv").open(newline="") as table:
        rows = [row for row in csv.DictReader(table, delimiter="\t") if row.pop("row") == "LoRA"]
    for row in rows:
        own = PAPER[f"{row.pop('model').replace('-', '_')}_{row.pop('task')}"]
        values = {columns.get(name, name): value for name, value in row.items() if value}
        assert values == {flag: value for flag, value in own.items() if flag not in ("script", "apply_lora")}
    assert len(rows) == 24


@pytest.mark.parametrize("name", PAPER)
def test_a_script_names_what_the_papers_table_has_otherwise(name):
    lines = [line for line in text_of(name).splitlines() if "recipe=paper" in line]
    differing = {flag: value for flag, value in papers_recipe(name).items() if PUBLISHED[name].get(flag) != value}
    assert len(lines) == bool(differing)
    for line in lines:
        text = line.partition(";")[0].removesuffix(".")
        values = [f"{100 * float(value):g}%" if flag == "warmup_ratio" else value for flag, value in differing.items()]
        assert text.startswith("# The paper's table, which recipe=paper runs, has ")
        assert sorted(re.findall(r"\b\d[\d.e-]*%?", text)) == sorted(values)


def test_a_paper_run_starts_from_the_mnli_run_of_the_same_recipe(run, copy):
    script, mnli = copy / "scripts" / "roberta_base_rte.sh", copy / "output" / "roberta_base_mnli_paper"
    message = refusal(run(script, MNLI_LORA=None, DRY_RUN=None, recipe="paper"))
    assert str(mnli) in message and "'recipe=paper bash scripts/roberta_base_mnli.sh'" in message
    mnli.mkdir(parents=True)
    (mnli / "adapter_model.safetensors").touch()
    assert flags_of(run(script, MNLI_LORA=None, recipe="paper"))["lora_path"] == str(mnli)


def test_another_recipe_or_a_script_that_the_papers_table_lacks_is_refused(run):
    assert "recipe='papers': 'paper' is the only one." in refusal(run("roberta_base_rte.sh", recipe="papers"))
    for words in (["mnli.rdrop.sh"], ["baselines/full_roberta_base.sh", "rte"]):
        message = refusal(run(*words, recipe="paper"))
        assert "paper_recipes.tsv has no line for this script. Leave recipe=paper out." in message
    assert flags_of(run("roberta_base_cola.sh", recipe=""))["lora_alpha"] == "16"


# --------------------------------------------------------------------------------------------------------- follow-ups


def test_the_follow_ups_settings_are_those_of_their_sources():
    if not SHARED.is_dir():
        pytest.skip("the tables that they were copied from are not here")
    with (SHARED / "adalora_deberta_v3_base.tsv").open(newline="") as table:
        rows = [*csv.DictReader(table, delimiter="\t")]
    names = {"lr": "learning_rate", "epochs": "num_train_epochs", "batch": "per_device_train_batch_size"}
    names |= {"reg_orth": "reg_orth_coef", "warmup_ratio": "warmup_steps"}
    own = ("task", "lora_r", "target_rank", "reg_orth", "init_warmup", "final_warmup", "mask_interval", "lora_alpha")
    for row in rows:
        task = row["task"]
        adalora, lora = (FOLLOW_UPS[f"{name}_deberta_v3_base_{task}"] for name in ("adalora", "lora"))
        values = {name: value for name, value in row.items() if value and name != "task"}
        assert {name: adalora[names.get(name, name)] for name in values} == values
        assert all(lora[names.get(name, name)] == value for name, value in values.items() if name not in own)
        assert int(lora["lora_r"]) == int(row["target_rank"])
        assert float(lora["lora_alpha"]) == pytest.approx(float(row["lora_alpha"]) / int(row["lora_r"]), rel=1e-5)
    with (SHARED / "paper_hyperparameters.tsv").open(newline="") as table:
        daggers = [row for row in csv.DictReader(table, delimiter="\t") if "no MNLI" in row["row"]]
    names |= {"batch_per_gpu": names["batch"], "r_or_bottleneck": "lora_r", "alpha": "lora_alpha"}
    names |= {"warmup_ratio": "warmup_ratio", "model": "model_name_or_path", "task": "task_name"}
    for row in daggers:
        recipe = FOLLOW_UPS[f"lora_roberta_large_no_mnli_{row['task']}"]
        values = {name: value for name, value in row.items() if value and name != "row"}
        assert {name: recipe[names.get(name, name)] for name in values} == values
    assert len(rows) == len(daggers) == 8


@pytest.mark.parametrize("script", FOLLOW_UP_SCRIPTS)
@pytest.mark.parametrize("words", [[], ["wnli"], ["--max_steps", "20"]])
def test_a_follow_up_needs_one_of_its_tasks(run, script, words):
    tasks = sorted(name.rpartition("_")[2] for name in FOLLOW_UPS if name.startswith(Path(script).stem))
    message = refusal(run(f"follow_ups/{script}", *words))
    assert f"not '{words[0] if words else ''}': {', '.join(tasks[:-1])} or {tasks[-1]}." in message


def test_the_output_folder_may_be_set(run):
    assert flags_of(run("roberta_base_rte.sh", output_dir="my run/1"))["output_dir"] == "my run/1"


def test_extra_flags_come_last_so_that_they_win(run):
    extra = ["--max_steps", "20", "--learning_rate", "1e-3", "--run_name", "it's a $HOME \\ test"]
    assert command(run("roberta_base_mnli.sh", *extra))[-6:] == extra


def test_glue_dir_is_passed_on_unchanged(run):
    assert flags_of(run("roberta_base_mnli.sh", GLUE_DIR="my data/glue"))["glue_dir"] == "my data/glue"


MACHINES = [("1", "0"), ("1", "1"), ("1", "4"), ("1", "8"), ("2", "0"), ("2", "8")]


@pytest.mark.parametrize("name", [name for name in RECIPES if launch.BATCH[2:] in RECIPES[name]])  # VeRA's is not given
def test_a_step_has_the_published_number_of_examples_on_any_number_of_devices_and_machines(name):
    recipe = RECIPES[name]
    published = batch_of(name)
    script = script_of(name)
    assert script.name == name and script.tuned_for_gpus == recipe["tuned_for_gpus"]
    for nnodes, devices in MACHINES:
        settings = {"nnodes": nnodes, "devices": devices, "node_rank": "0", "master_addr": "first", "MNLI_LORA": "none"}
        planned = launch.plan(script, settings)
        values = (launch.last_value(planned.flags, flag) for flag in (launch.BATCH, launch.ACCUMULATION))
        batch, accumulation = (int(value or 1) for value in values)
        assert processes(planned.program) * batch * accumulation == int(recipe["tuned_for_gpus"]) * published


@pytest.mark.parametrize("set_by_user", ["tuned_for_gpus", "num_gpus"])
def test_another_tuned_for_gpus_is_another_recipe_and_its_old_name_works_with_a_line(run, set_by_user):
    done = run("roberta_base_mnli.sh", devices="1", **{set_by_user: "2"})
    assert flags_of(done)["gradient_accumulation_steps"] == "2"
    line = "roberta_base_mnli: num_gpus is now called tuned_for_gpus; tuned_for_gpus=2 is used\n" * (
        set_by_user == "num_gpus"
    )
    assert done.stderr.startswith(f"{line}roberta_base_mnli: 2 x 16 = 32 examples a step")
    assert run("roberta_base_mnli.sh", devices="1", num_gpus="2", tuned_for_gpus="4").stdout.count("steps 4 ") == 1
    assert run("roberta_base_mnli.sh", num_gpus="").stderr == "roberta_base_mnli: 8 x 16 = 128 examples a step\n"


def test_a_script_of_a_user_that_sets_num_gpus_works(run, tmp_path):
    lines = ["num_gpus=${num_gpus:-1}", f"source {shlex.quote(str(ROOT / 'scripts' / 'launch.sh'))}"]
    lines += ["args=(--per_device_train_batch_size 8)", 'launch "${args[@]}" "$@"']
    (tmp_path / "mine.sh").write_text("\n".join(lines))
    for own, gpus in ({}, 1), ({"num_gpus": "4"}, 4), ({"tuned_for_gpus": "2"}, 2):
        assert f"mine: {gpus} x 8 = " in run(tmp_path / "mine.sh", devices="1", **own).stderr


def test_a_script_that_is_tuned_for_no_gpus_is_refused(run, tmp_path):
    assert "tuned_for_gpus='0'" in refusal(run("roberta_base_mnli.sh", tuned_for_gpus="0"))
    (tmp_path / "mine.sh").write_text(f"source {shlex.quote(str(ROOT / 'scripts' / 'launch.sh'))}\nlaunch --seed 0\n")
    assert "mine: tuned_for_gpus='' is not a whole number" in refusal(run(tmp_path / "mine.sh"))


@pytest.mark.parametrize(
    "devices, user, set_to", [("2", None, "1"), ("2", "3", "3"), ("1", None, "unset"), ("0", "3", "3")]
)
def test_several_processes_on_a_machine_have_a_cpu_thread_each_unless_the_user_sets_another_number(
    run, tmp_path, devices, user, set_to
):
    show = tmp_path / "show"
    launcher = f'exec {shlex.quote(sys.executable)} "$@"'
    show.write_text(f'#!/bin/sh\ncase "$2" in *launch*) {launcher};; esac\necho "threads ${{OMP_NUM_THREADS-unset}}"\n')
    show.chmod(0o755)
    done = run("roberta_base_mnli.sh", devices=devices, OMP_NUM_THREADS=user, PYTHON=str(show), DRY_RUN=None)
    assert done.stdout.splitlines()[-1] == f"threads {set_to}"
    assert (" OMP_NUM_THREADS=1 " in done.stdout) == (set_to == "1")


def test_all_devices_are_counted_and_used_when_devices_is_not_set(run, tmp_path):
    for there, batch, accumulation in (("4", "16", "2"), ("16", "8", None)):
        done = run("roberta_base_mnli.sh", devices=None, PYTHON=str(fake_python(tmp_path, there)))
        assert processes(command(done)) == int(there)
        flags = flags_of(done)
        assert flags["per_device_train_batch_size"] == batch
        assert flags.get("gradient_accumulation_steps") == accumulation


def test_a_python_that_cannot_count_devices_is_named(run, tmp_path):
    fake = fake_python(tmp_path, "; exit 1")
    message = refusal(run("roberta_base_mnli.sh", devices=None, PYTHON=str(fake)))
    assert f"'{fake}'" in message and "PYTHON=" in message and "devices=<number>" in message


@pytest.mark.parametrize("script", ["roberta_base_mnli.sh", "run_seeds.sh"])
def test_a_python_without_the_packages_is_named_with_what_to_do(run, script):
    for python in ("false", "no such python"):
        message = refusal(run(script, PYTHON=python))
        assert f"'{python}'" in message and "PYTHON=" in message
        assert f"pip install -c '{ROOT}/constraints.txt' -e '{ROOT}'" in message


def test_the_environment_in_use_gives_the_python_else_the_repositorys_own(run, copy, tmp_path):
    for name in ("python", "python3", "my python"):
        fake_python(tmp_path / "bin").rename(tmp_path / "bin" / name)
    script = copy / "scripts" / "roberta_base_mnli.sh"
    bare = {"PYTHON": None, "VIRTUAL_ENV": None, "CONDA_PREFIX": None, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    assert command(run(script, **bare))[0] == "python3"
    (copy / ".venv" / "bin").mkdir(parents=True)
    fake_python(copy).rename(copy / ".venv" / "bin" / "python")
    assert command(run(script, **bare))[0] == str(copy / ".venv" / "bin" / "python")
    assert command(run(script, **{**bare, "VIRTUAL_ENV": "/some"}))[0] == "python"
    assert command(run(script, **{**bare, "CONDA_PREFIX": "/some"}))[0] == "python"
    assert command(run(script, **{**bare, "PYTHON": "my python"}))[0] == "my python"


def test_a_file_in_the_current_folder_is_never_imported(run, tmp_path):
    for name in ("json", "dataclasses", "lora_nlu"):
        (tmp_path / "else where" / f"{name}.py").write_text("raise SystemExit('imported')")
    assert command(run("roberta_base_mnli.sh", devices="1"))


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


# ----------------------------------------------------------------------------------------------------- several machines


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


def test_the_example_of_a_slurm_job_starts_a_script_once_on_each_machine(run, tmp_path):
    example = ROOT / "scripts" / "slurm.sbatch"
    lines = example.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    options = [line.split()[1] for line in lines[:first_command] if line.startswith("#SBATCH")]
    assert len(options) == example.read_text().count("#SBATCH")  # sbatch reads none after a command
    assert "--nodes=2" in options and "--ntasks-per-node=1" in options

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


@pytest.mark.parametrize("words", [["baselines/full_roberta_base.sh", "rte"]])
def test_the_example_of_a_slurm_job_takes_a_script_with_a_task(run, tmp_path, words):
    (tmp_path / "srun").write_text('#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(ROOT / "scripts" / "slurm.sbatch", str(ROOT / "scripts" / words[0]), *words[1:], PATH=path, devices="1")
    assert flags_of(done)["task_name"] == "rte"


@pytest.mark.parametrize("where", ["output_dir", "--output_dir", "default"])
@pytest.mark.parametrize(
    "record, queued",
    [('{"interrupted": {"step": 3}}', True), ('{"trained": true}', False), (None, False)],
    ids=["interrupted", "trained", "as before"],
)
def test_the_example_of_a_slurm_job_is_queued_again_if_the_run_recorded_that_it_was_interrupted(
    record, queued, where, run, copy, tmp_path
):
    """What is recorded of an earlier job does not count: a run that can't start would be queued for ever."""
    script = copy / "scripts" / "roberta_base_rte.sh"
    folder = copy / "output" / "roberta_base_rte" if where == "default" else tmp_path / "o"
    settings = {"output_dir": str(folder)} if where == "output_dir" else {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text('{"interrupted": {"step": 2}}')
    write = f"echo '{record}' > '{folder}/run.json'; " if record else ""
    for name, program in {"srun": f"{write}exit 9", "scontrol": f'echo "$@" > "{tmp_path}/requeued"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / name).chmod(0o755)
    flags = ["--output_dir", str(folder)] if where == "--output_dir" else []
    settings |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    done = run(copy / "scripts" / "slurm.sbatch", str(script), *flags, **settings)
    assert done.returncode == 9, done.stderr
    assert (tmp_path / "requeued").exists() == queued
    assert not queued or (tmp_path / "requeued").read_text() == "requeue 77\n"


# ----------------------------------------------------------------------------------------------------------- the rest


def test_the_settings_at_the_head_of_launch_sh_are_those_it_reads():
    text = (ROOT / "scripts" / "launch.sh").read_text()
    head, body = text.split("set -euo pipefail\n")
    assert sorted(re.findall(r"^#   (\w+)=", head, re.MULTILINE)) == sorted(SETTINGS)
    body += (ROOT / "src" / "lora_nlu" / "training" / "launch.py").read_text()
    assert all(f"${{{name}:-}}" in body or f'"{name}"' in body for name in SETTINGS)
    assert len(text.splitlines()) < 50


STARTS_FROM_MNLI = [name for name in RECIPES if "lora_path" in RECIPES[name]]


@pytest.mark.parametrize("name", STARTS_FROM_MNLI)
def test_mrpc_rte_and_stsb_start_from_the_mnli_adapter_of_their_size(name, copy):
    assert len(STARTS_FROM_MNLI) == 9
    script, mnli = script_of(name, copy / "scripts"), copy / "output" / mnli_of(name)

    with pytest.raises(UsageError) as error:
        launch.plan(script, {"devices": "1"})
    for words in (str(mnli), f"bash scripts/{mnli.name}.sh", "MNLI_LORA=<", "MNLI_LORA=none"):
        assert words in str(error.value)
    mnli.mkdir(parents=True)
    (mnli / "adapter_model.safetensors").touch()
    assert launch.last_value(launch.plan(script, {"devices": "1"}).flags, "--lora_path") == str(mnli)
    assert "--lora_path" not in launch.plan(script, {"devices": "1", "MNLI_LORA": "none"}).flags


def test_a_script_that_starts_from_an_mnli_adapter_is_refused_without_it(run, copy):
    """Of the nine that the test above reads, one as a user starts it."""
    script, mnli = copy / "scripts" / "roberta_base_rte.sh", copy / "output" / "roberta_base_mnli"
    assert f"bash scripts/{mnli.name}.sh" in refusal(run(script, MNLI_LORA=None, DRY_RUN=None))
    mnli.mkdir(parents=True)
    (mnli / "adapter_model.safetensors").touch()
    assert flags_of(run(script, MNLI_LORA=None))["lora_path"] == str(mnli)
    assert "lora_path" not in flags_of(run(script, MNLI_LORA="none"))


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
