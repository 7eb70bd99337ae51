"""From a script's flags to a command: the same examples per step on any devices, and machines that find each other."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_nlu.errors import UsageError
from lora_nlu.training import launch
from lora_nlu.training.launch import Command, Script

ROOT = Path(__file__).parents[2]
BATCH, ACCUMULATION = launch.BATCH, launch.ACCUMULATION
MAIN = "import os, sys; from lora_nlu.training import launch; launch.main(sys.argv[1:], os.environ)"
# what srun sets for the second of two machines
SRUN = {"SLURM_JOB_ID": "64711", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "2"}
SRUN |= {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[01-02]"}
SEVERAL = {"nnodes": "2", "node_rank": "1", "master_addr": "first", "devices": "4"}


def plan(*flags: str, tuned_for: object = 8, batch: int = 16, **settings: str | None) -> Command:
    """The command of a script of 8 x 16 examples per step, with more flags and these settings."""
    script = Script("/repository", "python", "sst2", str(tuned_for), ["--do_train", BATCH, str(batch), *flags])
    settings = {"devices": "8", **settings}
    return launch.plan(script, {name: value for name, value in settings.items() if value is not None})


def refusal(*flags: str, **settings: object) -> str:
    with pytest.raises(UsageError) as error:
        plan(*flags, **settings)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def torchrun(command: Command) -> list[str]:
    """The launcher's options; none where the program starts without one."""
    assert command.program[0] == "python" and command.program[-1] == f"/repository/{launch.PROGRAM}"
    assert len(command.program) == 2 or command.program[1:3] == ["-c", launch.TORCHRUN]
    return command.program[3:-1]


def processes(command: Command) -> int:
    """Processes the command starts, on all machines."""
    options = dict(word.split("=") for word in torchrun(command) if "=" in word)
    return int(options.get("--nnodes", 1)) * int(options.get("--nproc_per_node", 1))


def per_step(command: Command) -> tuple[int, int]:
    """Batch per device and accumulation."""
    values = (launch.last_value(command.flags, flag) for flag in (BATCH, ACCUMULATION))
    batch, accumulation = (1 if value is None else int(value) for value in values)
    return batch, accumulation


# ---------------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "words, value",
    [
        ([], None),
        (["--seed", "3"], "3"),
        (["--seed=3"], "3"),
        (["--seed", "3", "--seed=4"], "4"),
        (["--seed=4", "--seed", "3", "--x"], "3"),
        (["--seeds", "3"], None),
        (["--x", "seed"], None),
        (["--seed"], ""),
    ],
)
def test_a_flags_value_is_the_one_argparse_reads(words, value):
    assert launch.last_value(words, "--seed") == value


def test_a_flag_is_removed_with_its_value_however_it_is_written():
    for written in (["--a_b", "1"], ["--a-b", "1"], ["--a_b=1"], ["--a_b"], ["--a_b", "1", "2"]):
        assert launch.without(["--x", "1", *written, "--y", *written], "--a_b") == ["--x", "1", "--y"]
    assert launch.without(["--a_bc", "1"], "--a_b") == ["--a_bc", "1"]


def test_extra_flags_stay_last_so_that_they_win():
    extra = ["--max_steps", "20", "--run_name", "it's a $HOME \\ test"]
    assert plan(*extra).flags[-4:] == extra


def test_the_folders_come_first():
    assert plan().flags[:2] == ["--output_dir", "/repository/output/sst2"]
    flags = plan(output_dir="my run", GLUE_DIR="my glue").flags
    assert flags[:4] == ["--output_dir", "my run", "--glue_dir", "my glue"]


@pytest.mark.parametrize("setting", ["tuned_for_gpus", "devices", "nnodes", "node_rank", "master_port"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "08", "9999999999", "a[$(touch oops)]", "1\n"])
def test_a_number_that_is_none_is_refused_by_name(setting, value):
    several = {"nnodes": "2", "node_rank": "0", "master_addr": "first"}
    if setting == "tuned_for_gpus":
        setting, several = "tuned_for", several | {"tuned_for": value}
    assert f"='{value}' is not a whole number" in (message := refusal(**{**several, setting: value}))
    assert message.startswith(setting)


@pytest.mark.parametrize("flag", [BATCH, ACCUMULATION])
@pytest.mark.parametrize("value", ["0", "x", "016", ""])
def test_a_batch_or_an_accumulation_that_is_no_number_is_refused_by_its_flag(flag, value):
    assert refusal(flag, value) == f"{flag}='{value}' is not a whole number, 1 or more."


@pytest.mark.parametrize("value", ["0", ""])
def test_a_recipe_for_no_gpus_is_refused(value):
    assert f"tuned_for_gpus='{value}'" in refusal(tuned_for=value)


# ------------------------------------------------------------------------------------------------ the examples per step


@pytest.mark.parametrize("devices, nnodes", itertools.product(("0", "1", "2", "4", "8"), ("1", "2")))
@pytest.mark.parametrize("tuned_for, batch", [(8, 16), (2, 32), (8, 6), (1, 16), (8, 4)])
def test_a_step_has_the_same_number_of_examples_on_any_devices_and_machines(devices, nnodes, tuned_for, batch):
    command = plan(tuned_for=tuned_for, batch=batch, nnodes=nnodes, devices=devices, node_rank="0", master_addr="first")
    assert command.flags.count(BATCH) == 1
    assert processes(command) == int(nnodes) * max(1, int(devices))
    each, accumulation = per_step(command)
    assert processes(command) * each * accumulation == tuned_for * batch
    share = each * accumulation
    assert each == max(n for n in range(1, batch + 1) if share % n == 0)  # as few passes as there can be


def test_shares_are_the_fewest_equal_passes_or_none():
    for examples, batch, count in itertools.product(range(1, 40), range(1, 12), range(1, 12)):
        equal = [(b, a) for b in range(1, batch + 1) for a in range(1, examples + 1) if count * b * a == examples]
        assert launch.share(examples, batch, count) == (min(equal, key=lambda pair: pair[1]) if equal else None)


@pytest.mark.parametrize(
    "settings, batch, accumulation, where",
    [
        ({"devices": "0"}, 16, 8, "the CPU"),
        ({"devices": "1"}, 16, 8, "1 device"),
        ({"devices": "2"}, 16, 4, "2 devices"),
        ({"devices": "8"}, 16, 1, ""),
        ({"devices": "16"}, 8, 1, "16 devices"),
        ({"devices": "128"}, 1, 1, "128 devices"),
        ({"devices": "4", "nnodes": "2"}, 16, 1, ""),
        ({"devices": "8", "nnodes": "2"}, 8, 1, "16 devices of 2 machines"),
        ({"devices": "1", "nnodes": "2"}, 16, 4, "2 devices of 2 machines"),
        ({"devices": "0", "nnodes": "4"}, 16, 2, "the CPUs of 4 machines"),
        ({"devices": "6", "tuned_for": 9}, 12, 2, "6 devices"),
        ({"devices": "8", "tuned_for": 2, "batch": 32}, 8, 1, "8 devices"),
        ({"devices": "1", "tuned_for": 1}, 16, 1, ""),
    ],
)
def test_a_line_says_how_the_examples_of_a_step_are_made_up(settings, batch, accumulation, where):
    command = plan(**{"nnodes": "1", "node_rank": "0", "master_addr": "first", **settings})
    tuned_for, published = settings.get("tuned_for", 8), settings.get("batch", 16)
    made_up = f" {BATCH} {batch}" * (batch != published) + f" {ACCUMULATION} {accumulation}" * (accumulation > 1)
    note = f"{tuned_for} x {published} = {tuned_for * published} examples a step"
    assert command.notes == [note + f", made up on {where} with{made_up}" * bool(made_up)]
    assert per_step(command) == (batch, accumulation)


def ways_to_write(flag: str, value: str) -> list[list[str]]:
    """Ways to write a flag that run_glue.py reads."""
    return [[flag, value], [f"{flag}={value}"], [f"--{flag[2:].replace('_', '-')}", value]]


@pytest.mark.parametrize("written", ways_to_write(BATCH, "4"))
@pytest.mark.parametrize("devices, batch, accumulation", [("1", 4, 8), ("8", 4, 1), ("16", 2, 1)])
def test_a_users_batch_is_that_of_each_of_tuned_for_gpus(written, devices, batch, accumulation):
    command = plan(*written, "--seed", "3", devices=devices)
    assert command.notes[0].startswith("8 x 4 = 32 examples a step")
    assert command.flags[-2:] == ["--seed", "3"] and per_step(command) == (batch, accumulation)
    assert sum(launch.is_flag(word, BATCH) for word in command.flags) == (1 if devices == "16" else 2)


@pytest.mark.parametrize("written", ways_to_write(ACCUMULATION, "2"))
@pytest.mark.parametrize("devices, examples", [("1", 32), ("3", 96), ("16", 512)])
def test_a_users_accumulation_wins_whatever_becomes_of_the_number_of_examples(written, devices, examples):
    command = plan(*written, devices=devices)
    assert command.notes[0].startswith(f"{devices} x 16 x 2 = {examples} examples a step, made up on ")
    assert command.flags[-len(written) :] == written and per_step(command) == (16, 2)
    assert sum(launch.is_flag(word, ACCUMULATION) for word in command.flags) == 1
    assert plan(ACCUMULATION, "1").notes == ["8 x 16 x 1 = 128 examples a step"]


def test_a_script_without_a_batch_has_transformers_default():
    script = Script("/repository", "python", "mine", "4", ["--do_train"])
    assert launch.plan(script, {"devices": "1"}).notes[0].startswith("4 x 8 = 32 examples a step")


@pytest.mark.parametrize(
    "settings, expected_message, remedy, works",
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
def test_devices_that_cannot_share_a_step_equally_are_refused_naming_how_many_can(
    settings, expected_message, remedy, works
):
    settings = {"nnodes": "1", "node_rank": "0", "master_addr": "first", **settings}
    message = refusal(**settings)
    count = int(settings["nnodes"]) * max(1, int(settings["devices"]))
    for words in (expected_message, "8 x 16", remedy, f"tuned_for_gpus={count}"):
        assert words in message
    assert ("CUDA_VISIBLE_DEVICES" in message) == ("devices" in works)
    assert "= 128 examples" in plan(**{**settings, **works}).notes[0]
    assert f"{count} x 16 = {count * 16} examples" in plan(**settings, tuned_for=count).notes[0]


@pytest.mark.parametrize("written", [["--fp16"], ["--fp16", "True"], ["--fp16=true"]])
def test_without_a_gpu_or_fast_bf16_fp16_is_dropped_with_a_line_and_nothing_else_is(written, monkeypatch):
    monkeypatch.setattr(launch, "has_fast_bf16", lambda: False)
    on_cpu, plain = plan(*written, "--seed", "3", devices="0"), plan("--seed", "3", devices="0")
    assert on_cpu.notes == [*plain.notes, "no GPU: --fp16 is dropped, computing in fp32"]
    assert on_cpu.flags == plain.flags
    assert plan(*written, devices="1").flags[-len(written) :] == written
    kept = plan("--fp16_full_eval", "--bf16", "true", devices="0")
    assert kept.flags[-3:] == ["--fp16_full_eval", "--bf16", "true"] and len(kept.notes) == 1


@pytest.mark.parametrize("written", [["--fp16"], ["--fp16", "True"], ["--fp16=true"]])
def test_a_processor_that_is_faster_in_bf16_gets_it_in_place_of_fp16(written, monkeypatch):
    monkeypatch.setattr(launch, "has_fast_bf16", lambda: True)
    on_cpu, plain = plan(*written, "--seed", "3", devices="0"), plan("--seed", "3", devices="0")
    assert on_cpu.flags == [*plain.flags, "--bf16"] and "--fp16 is replaced by --bf16" in on_cpu.notes[-1]
    for more in (["--fp16", "false"], ["--bf16"], ["--bf16", "false"], ["--fsdp", "full_shard"], ["--deepspeed=x"]):
        flags = plan(*written, *more, devices="0").flags
        assert "--fp16" not in flags and flags.count("--bf16") == more.count("--bf16")


# --------------------------------------------------------------------------------------------- processes on one machine


@pytest.mark.parametrize(
    "visible, devices, kept",
    [(None, "1", "0"), ("2,3", "1", "2"), ("3,2,1,0", "1", "3"), (None, "0", ""), ("2,3", "0", ""), ("", "1", "")],
)
@pytest.mark.parametrize("options", ["", "--max_restarts=3"])
def test_a_single_process_sees_one_gpu_and_so_never_multiplies_the_batch(visible, devices, kept, options):
    command = plan(devices=devices, CUDA_VISIBLE_DEVICES=visible, torchrun_options=options)
    assert command.environment["CUDA_VISIBLE_DEVICES"] == kept
    assert f" CUDA_VISIBLE_DEVICES={kept} " in str(command)


def test_several_processes_see_the_gpus_the_user_chose():
    assert "CUDA_VISIBLE_DEVICES" not in plan(CUDA_VISIBLE_DEVICES="0,1,2,3,4,5,6,7").environment


def test_one_machine_has_a_rendezvous_on_a_free_port_and_a_single_process_none():
    assert torchrun(plan(devices="2")) == ["--standalone", "--nproc_per_node=2"]
    for devices in "01":
        assert torchrun(plan(devices=devices)) == []


@pytest.mark.parametrize("flags", [["--deepspeed", "ds.json"], ["--deepspeed=ds.json"]])
def test_deepspeed_has_a_launcher_for_a_single_process_too(flags):
    assert torchrun(plan(*flags, devices="1")) == ["--standalone", "--nproc_per_node=1"]


@pytest.mark.parametrize("devices, user, threads", [("2", None, "1"), ("2", "3", None), ("1", None, None)])
def test_several_processes_on_a_machine_have_a_cpu_thread_each_unless_the_user_set_their_number(devices, user, threads):
    assert plan(devices=devices, OMP_NUM_THREADS=user).environment.get("OMP_NUM_THREADS") == threads


def test_devices_are_counted_by_a_child_process(tmp_path):
    python = tmp_path / "python"
    script = Script("/repository", str(python), "sst2", "8", [BATCH, "16"])
    for answer, count in (("echo 4", 4), ("echo 16", 16)):
        python.write_text(f"#!/bin/sh\n{answer}\n")
        python.chmod(0o755)
        assert f"--nproc_per_node={count}" in launch.plan(script, {}).program
    for answer in ("exit 1", "echo many", "true"):
        python.write_text(f"#!/bin/sh\n{answer}\n")
        with pytest.raises(UsageError, match=r"cannot count the accelerators(.|\n)*devices=<number>"):
            launch.plan(script, {})
    assert launch.count_devices(sys.executable) >= 0


def test_code_in_the_current_folder_is_run_neither_by_the_count_nor_by_the_launcher(tmp_path, monkeypatch):
    for module in ("torch.py", "argparse.py", "subprocess.py"):
        (tmp_path / module).write_text("raise SystemExit('code of the current folder')")
    monkeypatch.chdir(tmp_path)
    assert launch.count_devices(sys.executable) >= 0
    program = [sys.executable, *plan(devices="2").program[1:3], "--help"]
    assert "--nproc" in subprocess.run(program, capture_output=True, text=True, check=True).stdout


def test_a_plan_for_named_devices_and_the_program_import_neither_torch_nor_the_other_libraries():
    program = """
import sys
from lora_nlu.training import launch
launch.main(["/repository", "python", "sst2", "8", "--do_train"], {"devices": "2", "DRY_RUN": "1"})
print({"torch", "transformers", "datasets", "numpy"} & {*sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--nproc_per_node=2" in done.stdout and done.stdout.endswith("\nset()\n")


# ----------------------------------------------------------------------------------------------------- several machines


@pytest.mark.parametrize("devices, started", [("0", 1), ("1", 1), ("4", 4)])
@pytest.mark.parametrize("port, used", [(None, "29500"), ("1234", "1234")])
def test_each_of_several_machines_gets_its_number_and_the_first_ones_address(devices, started, port, used):
    command = plan(**{**SEVERAL, "devices": devices, "master_port": port})
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=first", f"--master_port={used}"]
    assert torchrun(command) == [*where, f"--nproc_per_node={started}"]
    assert command.environment.get("CUDA_VISIBLE_DEVICES") == ("" if devices == "0" else None)


@pytest.mark.parametrize("missing", ["node_rank", "master_addr"])
def test_several_machines_without_a_number_or_an_address_are_refused_with_what_to_set(missing):
    message = refusal(**{**SEVERAL, missing: None})
    assert "nnodes=2" in message and "node_rank=<0 on the first" in message and "master_addr=<name" in message


def test_a_machine_beyond_the_last_is_refused():
    assert refusal(**{**SEVERAL, "node_rank": "2"}) == "node_rank=2: with nnodes=2 it goes from 0 to 1."


@pytest.mark.parametrize("name", ["node_rank", "master_addr"])
def test_a_machine_that_does_not_know_how_many_there_are_does_not_train_alone(name):
    assert "Set nnodes=" in refusal(**{name: "0"})


def test_torchrun_options_are_split_at_spaces_and_used_for_a_single_process_too():
    options = "--max_restarts=3   --log_dir *"
    for devices, started in (("0", 1), ("1", 1), ("4", 4)):
        words = torchrun(plan(devices=devices, torchrun_options=options))
        assert words == ["--standalone", f"--nproc_per_node={started}", "--max_restarts=3", "--log_dir", "*"]
    words = torchrun(plan(**SEVERAL, torchrun_options=options))
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
def test_a_rendezvous_of_the_users_own_replaces_ours(options):
    several = {"nnodes": "2", "devices": "4", "torchrun_options": options}
    for settings in (several, {**several, **SRUN, "SLURM_STEP_NODELIST": "a[1-2]b[1-2]"}):
        assert torchrun(plan(**settings)) == ["--nnodes=2", "--nproc_per_node=4", *options.split()]
    alone = torchrun(plan(devices="1", torchrun_options=options))
    assert alone == ["--nnodes=1", "--nproc_per_node=1", *options.split()]


@pytest.mark.parametrize("option", ["--nnodes=2", "--nproc_per_node 4", "--nproc-per-node=4"])
def test_torchrun_options_that_would_change_the_batch_unnoticed_are_refused(option):
    message = refusal(torchrun_options=f"--max_restarts=3 {option}")
    assert f"{option.replace(' ', '=').partition('=')[0]} " in message
    assert "nnodes=<" in message and "devices=<" in message


# -------------------------------------------------------------------------------------------------------------- SLURM


def test_the_machines_addresses_are_read_from_sruns_variables():
    where = ["--nnodes=2", "--node_rank=1", "--master_addr=node01", "--master_port=24711"]
    assert torchrun(plan(**SRUN)) == [*where, "--nproc_per_node=8"]


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
def test_the_first_machine_of_slurms_list_is_the_meeting_point(nodes, first):
    assert f"--master_addr={first}" in torchrun(plan(**{**SRUN, "SLURM_STEP_NODELIST": nodes}))


@pytest.mark.parametrize("nodes", ["rack[1-2]n[1-2]", "node[1-2]-ib", "node[a-b]", "", None])
def test_a_list_of_machines_that_is_not_understood_is_refused_until_the_first_is_named(nodes):
    srun = {**SRUN, "SLURM_STEP_NODELIST": nodes}
    message = refusal(**srun)
    assert f"'{nodes or ''}'" in message and "master_addr=<" in message
    assert "--master_addr=mine" in torchrun(plan(**srun, master_addr="mine"))


@pytest.mark.parametrize("name, value", [("node_rank", "0"), ("master_addr", "mine"), ("master_port", "1234")])
@pytest.mark.parametrize("nnodes", [None, "2"])
def test_a_users_setting_goes_before_what_srun_sets_one_by_one(name, value, nnodes):
    where = {"node_rank": "1", "master_addr": "node01", "master_port": "24711", name: value}
    words = torchrun(plan(**SRUN, nnodes=nnodes, **{name: value}))
    assert words[:4] == ["--nnodes=2", *(f"--{key}={where[key]}" for key in where)]


def test_a_user_may_choose_fewer_machines_or_others_than_sruns():
    assert torchrun(plan(**SRUN, nnodes="1", devices="1")) == []
    refusal(**SRUN, nnodes="4")  # srun's numbers are not those of the four
    words = torchrun(plan(**SRUN, nnodes="4", node_rank="3", master_addr="mine"))
    assert words[:4] == ["--nnodes=4", "--node_rank=3", "--master_addr=mine", "--master_port=29500"]


@pytest.mark.parametrize("machines", ["1", "2"])
def test_several_tasks_on_a_machine_are_refused_unless_each_is_a_run_of_its_own(machines):
    srun = {**SRUN, "SLURM_STEP_NUM_NODES": machines, "SLURM_STEP_NUM_TASKS": "16"}
    message = refusal(**srun)
    assert f"16 tasks on {machines} " in message and "--ntasks-per-node=1" in message and "nnodes=1" in message
    assert torchrun(plan(**srun, nnodes="1", devices="1")) == []


def test_a_job_of_several_machines_without_srun_uses_one_with_a_line():
    job = {name: value for name, value in SRUN.items() if "STEP" not in name}
    command = plan(**job)
    assert torchrun(command)[0] == "--standalone"
    line = "SLURM gave 2 machines, this uses one: start it with srun (scripts/slurm.sbatch)"
    assert command.notes == [line, "8 x 16 = 128 examples a step"]
    for chosen in ({"nnodes": "1"}, {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}):
        command = plan(**job, **chosen)
        assert torchrun(command)[0] == "--standalone" and line not in command.notes


# ------------------------------------------------------------------------------------------------- the MNLI adapter


NEEDS = ["--needs_mnli", "roberta_base_mnli"]


def test_a_run_starts_from_what_the_mnli_script_trained(tmp_path):
    mnli = tmp_path / "output" / "roberta_base_mnli"
    with pytest.raises(UsageError) as error:
        launch.start_from_mnli(NEEDS, tmp_path, None)
    for words in (str(mnli), "bash scripts/roberta_base_mnli.sh", "MNLI_LORA=<", "MNLI_LORA=none"):
        assert words in str(error.value)
    mnli.mkdir(parents=True)
    with pytest.raises(UsageError):  # a run that has not finished leaves a folder without an adapter
        launch.start_from_mnli(NEEDS, tmp_path, None)
    (mnli / "adapter_model.safetensors").touch()
    flags = launch.start_from_mnli(["--seed", "0", *NEEDS, "--max_steps", "5"], tmp_path, None)
    assert flags == ["--seed", "0", "--lora_path", str(mnli), "--max_steps", "5"]


def test_a_dry_run_shows_the_command_though_the_mnli_adapter_is_missing_and_says_so(tmp_path):
    script = Script(str(tmp_path), "python", "rte", "8", NEEDS)
    mnli = str(tmp_path / "output" / "roberta_base_mnli")
    command = launch.plan(script, {"devices": "8", "DRY_RUN": "1"})
    assert launch.last_value(command.flags, "--lora_path") == mnli
    assert f"{launch.NO_MNLI}: {mnli}; 'bash scripts/roberta_base_mnli.sh' trains it" in command.notes
    with pytest.raises(UsageError, match="there is none at"):
        launch.plan(script, {"devices": "8", "DRY_RUN": "0"})


def test_the_users_adapter_may_be_a_file_a_folder_or_none(tmp_path):
    file = tmp_path / "my lora.bin"
    with pytest.raises(UsageError, match="my lora.bin"):
        launch.start_from_mnli(NEEDS, tmp_path, str(file))
    file.touch()
    assert launch.start_from_mnli(NEEDS, tmp_path, str(file)) == ["--lora_path", str(file)]
    with pytest.raises(UsageError, match="there is none at"):
        launch.start_from_mnli(NEEDS, tmp_path, str(tmp_path))
    (tmp_path / "adapter_model.safetensors").touch()
    assert launch.start_from_mnli(NEEDS, tmp_path, str(tmp_path)) == ["--lora_path", str(tmp_path)]
    assert launch.start_from_mnli([*NEEDS, "--x"], tmp_path, "none") == ["--x"]
    for own in (["--lora_path", "mine.bin"], ["--lora-path=mine.bin"]):
        assert launch.start_from_mnli([*NEEDS, *own], tmp_path, None) == own
    assert launch.start_from_mnli(["--seed", "0"], tmp_path, None) == ["--seed", "0"]


# ------------------------------------------------------------------------------------------------- what it prints


def test_a_command_prints_one_flag_a_line_and_a_shell_reads_the_same_words():
    extra = ("--run_name", "it's a $HOME \\ test\nof two lines", "--max_steps", "-1", "--empty", "", "--glob", "*")
    command = plan(*extra, GLUE_DIR="my data", CUDA_VISIBLE_DEVICES="GPU 1,2", devices="1")
    lines = str(plan("--max_steps", "20", devices="1")).splitlines()
    assert all(line.endswith(" \\") for line in lines[:-1]) and lines[-1] == "  --max_steps 20"
    assert all(line.split()[0].startswith("--") and line.count("--") == 1 for line in lines[2:])
    words = shlex.split(str(command).replace(" \\\n ", " "))
    assignments = [f"{name}={value}" for name, value in command.environment.items()]
    assert words == [*assignments, *command.program, *command.flags]
    shown = subprocess.run(
        ["bash", "-c", str(command).replace("python /repository", "printf '%s\\0' /repository")],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert shown.split("\0")[1:-1] == command.flags


def test_a_printed_command_hides_access_tokens():
    tokens = ("--hub_token", "hf_a", "--token=hf_b", "--use-auth-token", "hf_c")
    command = plan(*tokens, devices="1")
    shown = str(command).split(" \\\n  ")
    assert shown[-3:] == ["--hub_token HIDDEN", "--token=HIDDEN", "--use-auth-token HIDDEN"]
    assert "hf_" not in str(command) and command.flags[-5:] == [*tokens]


@pytest.fixture
def start(tmp_path):
    """Start the program as launch.sh does; the Python it would run prints its settings and arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "hash seed $PYTHONHASHSEED, threads $OMP_NUM_THREADS:" "$@"\n')
    python.chmod(0o755)

    def start(*flags: str, **settings: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", MAIN, "/repository", str(python), "sst2", "2", *flags]
        names = {"devices", "DRY_RUN", "OMP_NUM_THREADS", "output_dir", "GLUE_DIR", "torchrun_options", "nnodes"}
        environment = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("SLURM_")}
        return subprocess.run(command, env=environment | settings, capture_output=True, text=True)

    return start


def test_the_program_prints_the_command_then_becomes_it(start):
    done = start(BATCH, "8", devices="2")
    assert done.returncode == 0 and done.stderr == "sst2: 2 x 8 = 16 examples a step\n"
    printed, _, ran = done.stdout.rpartition("hash seed 0, threads 1: ")
    assert " ".join(shlex.split(printed.replace("\\\n", ""))[5:]) == ran.strip()
    for dry_run in ("1", "yes"):
        assert start(BATCH, "8", devices="2", DRY_RUN=dry_run).stdout == printed
    for run in ("0", ""):
        assert start(BATCH, "8", devices="2", DRY_RUN=run).stdout == done.stdout


def test_a_refusal_ends_with_status_2_and_runs_nothing(start):
    done = start(BATCH, "8", devices="3")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("sst2: 3 devices cannot share")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_ends_it_without_a_traceback_and_stays_ignored_in_the_background(tmp_path, ignored):
    python = tmp_path / "python"  # which counts devices for a while
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/counting\nsleep {1 if ignored else 60}\necho 2\n")
    python.chmod(0o755)
    command = [sys.executable, "-c", MAIN, "/repository", str(python), "sst2", "2", BATCH, "8"]
    with subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"" if ignored else 'exec "$@"', "sh", *command],
        env={**os.environ, "DRY_RUN": "1", "devices": ""}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        while not (tmp_path / "counting").exists():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == (0 if ignored else -signal.SIGINT) and "Traceback" not in errors
    assert ("--nproc_per_node=2" in output) == ignored


def test_a_reader_that_closes_early_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", MAIN, "/repository", "python", "sst2", "2", BATCH, "8"]
    environment = {**os.environ, "devices": "2", "DRY_RUN": "1"}
    done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == -signal.SIGPIPE and done.stderr == "sst2: 2 x 8 = 16 examples a step\n"


# ------------------------------------------------------------------------------------------------- reading a script


def test_a_script_is_read_without_starting_it(tmp_path):
    script = tmp_path / "my script.sh"
    script.write_text(
        f"echo a line of its own\ntuned_for_gpus=${{tuned_for_gpus:-4}}\nsource '{ROOT}/scripts/launch.sh'\n"
        'args=(--seed "two words")\nneeds_mnli roberta_base_mnli\nlaunch "${args[@]}" "$@"\n'
    )
    environment = {**os.environ, "PYTHON": sys.executable}
    read = launch.read_script([str(script), "rte"], environment)
    flags = ["--seed", "two words", "--needs_mnli", "roberta_base_mnli", "rte"]
    assert read == Script(str(ROOT), sys.executable, "my script", "4", flags)
    assert launch.read_script([str(script)], environment | {"tuned_for_gpus": "2"}).tuned_for_gpus == "2"


@pytest.mark.parametrize(
    "text, message",
    [
        ("exit 3", "ends with status 3"),
        ("echo Too bad. >&2; exit 2", "^Too bad.$"),
        ("true", "is no launch script"),
        ("echo 3", "is no launch script"),
    ],
)
def test_a_script_that_does_not_launch_is_refused_with_its_own_message_if_it_prints_one(tmp_path, text, message):
    (tmp_path / "other.sh").write_text(text)
    with pytest.raises(UsageError, match=message):
        launch.read_script([str(tmp_path / "other.sh")], os.environ)
