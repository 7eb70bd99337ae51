"""From a launch script's flags to the command that trains with them, on whatever devices and machines there are.

`scripts/launch.sh` calls `main` and documents the settings that a user can make; `scripts/run_seeds.py` calls
`read_script` and `plan`. Nothing here imports torch: without `devices=` a child process counts the accelerators.
"""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lora_nlu.errors import UsageError
from lora_nlu.ops.processor import has_fast_bf16

PROGRAM = "examples/text-classification/run_glue.py"
BATCH, ACCUMULATION = "--per_device_train_batch_size", "--gradient_accumulation_steps"
DEFAULT_BATCH = 8  # transformers' default
RECIPE_SUFFIX = "_paper"  # of the output folder of a script that runs the paper's recipe
NO_MNLI = "the MNLI adapter that it starts from is missing"
# With -c and -m Python would import what lies in the current folder; PYTHONSAFEPATH needs 3.11
SAFE_PATH = "import sys; sys.path = [p for p in sys.path if p]; "
COUNT = SAFE_PATH + "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"
TORCHRUN = SAFE_PATH + "from lora_nlu.training.torchrun import main; sys.exit(main())"


@dataclass(frozen=True)
class Script:
    """What a launch script passes on."""

    root: str  # the repository
    python: str
    name: str  # begins every message, and is the name of the output folder
    tuned_for_gpus: str  # GPUs that the hyperparameters are for, as text: `plan` checks it
    flags: list[str]  # for run_glue.py: the script's, then the user's


@dataclass(frozen=True)
class Command:
    """What to start; `str` gives text to paste into a shell, one flag a line and no access token."""

    environment: dict[str, str]  # variables to set for it
    program: list[str]  # Python, the launcher if one is needed, run_glue.py
    flags: list[str]
    notes: list[str]  # lines for the user

    def __str__(self) -> str:
        text = " ".join(f"{name}={value and shlex.quote(value)}" for name, value in self.environment.items())
        return " \\\n  ".join([text, *map(shlex.join, [self.program, *flags_with_values(hide_tokens(self.flags))])])


def plan(script: Script, settings: Mapping[str, str]) -> Command:
    """The command that trains a script's recipe on the devices of all machines, with its number of examples per step.

    settings: environment variables, those that launch.sh documents and SLURM's. Raises UsageError if they do not fit.
    """
    environment = {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "TOKENIZERS_PARALLELISM": "true"}
    notes: list[str] = []
    root = Path(script.root)
    flags = start_from_mnli(script.flags, root, settings.get("MNLI_LORA"), notes if is_dry_run(settings) else None)
    tuned_for_gpus = whole_number("tuned_for_gpus", script.tuned_for_gpus, 1)
    options = torchrun_options(settings)
    nnodes, rendezvous = find_machines(settings, options, notes)
    setting = settings.get("devices")
    devices = whole_number("devices", setting, 0) if setting else count_devices(script.python)
    local = devices or 1  # the CPU is one process
    processes = nnodes * local

    flags, batch_flags, note = share_step(flags, tuned_for_gpus, nnodes, devices)
    notes.append(note)
    if devices == 0 and (fp32_flags := without(flags, "--fp16")) != flags:  # a CPU only emulates it, slowly
        is_off = str(last_value(flags, "--fp16")).lower() in ("false", "no", "0")
        is_sharded = last_value(flags, "--fsdp") or last_value(flags, "--deepspeed")
        flags = fp32_flags
        if is_off or is_sharded or last_value(flags, "--bf16") is not None or not has_fast_bf16():
            notes.append("no GPU: --fp16 is dropped, computing in fp32")
        else:
            flags = [*flags, "--bf16"]
            notes.append("no GPU: --fp16 is replaced by --bf16, which is faster on this processor")
    if devices == 0 or processes == 1:
        # a single process that saw several GPUs would spread over them (DataParallel) and multiply the batch
        visible = settings.get("CUDA_VISIBLE_DEVICES", "0") if devices else ""
        environment["CUDA_VISIBLE_DEVICES"] = visible.partition(",")[0]
    program = [script.python]
    if processes > 1 or options or last_value(flags, "--deepspeed"):  # DeepSpeed needs a launcher for one process too
        program += ["-c", TORCHRUN, *rendezvous, f"--nproc_per_node={local}", *options]
        if local > 1 and not settings.get("OMP_NUM_THREADS"):  # torchrun would set the same, under a banner
            environment["OMP_NUM_THREADS"] = "1"
    folders = ["--output_dir", default_folder(script, settings)]
    if settings.get("GLUE_DIR"):
        folders += ["--glue_dir", settings["GLUE_DIR"]]
    return Command(environment, [*program, str(root / PROGRAM)], [*folders, *batch_flags, *flags], notes)


def default_folder(script: Script, settings: Mapping[str, str]) -> str:
    """The output folder, unless the script's flags have another."""
    return settings.get("output_dir") or str(Path(script.root, "output", script.name))


def flags_with_values(words: list[str]) -> list[list[str]]:
    """The words of a command line in lists, each a flag and its values."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def hide_tokens(words: list[str]) -> list[str]:
    """The words of a command line to print or record, the access tokens in it replaced by HIDDEN."""
    shown = []
    for flag, *values in flags_with_values(words):
        name, equals, _ = flag.partition("=")
        is_token = name.startswith("--") and name.endswith("token")
        shown += [name + "=HIDDEN" * bool(equals), *("HIDDEN" for _ in values)] if is_token else [flag, *values]
    return shown


def is_flag(word: str, *flags: str) -> bool:
    """Whether run_glue.py and torchrun read `word` as one of the flags, also as --a-flag or --a_flag=value."""
    return word.startswith("--") and "--" + word[2:].partition("=")[0].replace("-", "_") in flags


def last_value(words: list[str], flag: str) -> str | None:
    """The value of a flag as argparse reads it, the last of several; None without the flag."""
    value = None
    for word, following in zip(words, [*words[1:], ""], strict=False):
        if is_flag(word, flag):
            value = word.partition("=")[2] if "=" in word else following
    return value


def without(words: list[str], flag: str) -> list[str]:
    """The words except a flag and its value."""
    return [word for group in flags_with_values(words) if not is_flag(group[0], flag) for word in group]


def whole_number(name: str, text: str | int, least: int) -> int:
    if not re.fullmatch("0|[1-9][0-9]{0,5}", str(text)) or int(str(text)) < least:
        raise UsageError(f"{name}='{text}' is not a whole number, {least} or more.")
    return int(str(text))


def with_recipe(script: Script, recipe: str | None) -> Script:
    """The script with the hyperparameters of the paper's tables where `recipe` is "paper"; None or "" is its own.

    They are in scripts/paper_recipes.tsv: a line for each script, flags by column; an empty field leaves the script's.
    """
    if not recipe:
        return script
    if recipe != "paper":
        raise UsageError(f"recipe='{recipe}': 'paper' is the only one. Leave it out for the script's hyperparameters.")
    table = Path(script.root, "scripts", "paper_recipes.tsv")
    with table.open(newline="", encoding="utf-8") as lines:
        rows = {row.pop("script"): row for row in csv.DictReader(lines, delimiter="\t")}
    if script.name not in rows:
        raise UsageError(f"recipe=paper: {table} has no line for this script. Leave recipe=paper out.")
    groups = flags_with_values(script.flags)  # the script's own, then the user's, which still win
    for name, value in rows[script.name].items():
        names = [f"--{name}"] + ["--warmup_steps"] * (name == "warmup_ratio")
        if value and (own := [group for group in groups if is_flag(group[0], *names)]):
            own[0][:] = [f"--{name}", value]
        elif value:
            groups.insert(0, [f"--{name}", value])
    for group in groups:
        if is_flag(group[0], "--needs_mnli"):
            group[1] += RECIPE_SUFFIX
    flags = [word for group in groups for word in group]
    return replace(script, name=script.name + RECIPE_SUFFIX, flags=flags)


def is_dry_run(settings: Mapping[str, str]) -> bool:
    """Whether the command is only printed."""
    return (settings.get("DRY_RUN") or "0") != "0"


def start_from_mnli(flags: list[str], root: Path, adapter: str | None, dry_notes: list[str] | None = None) -> list[str]:
    """Replace `--needs_mnli SCRIPT` by `--lora_path` with MNLI_LORA (`adapter`), by default what SCRIPT trained.

    Raises UsageError if there is no such adapter. In a dry run, which passes `dry_notes`, it is a line of these.
    """
    if not (mnli_script := last_value(flags, "--needs_mnli")):
        return flags
    i = flags.index("--needs_mnli")
    adapter = adapter or str(root / "output" / mnli_script)
    if adapter == "none" or last_value(flags, "--lora_path"):
        return flags[:i] + flags[i + 2 :]
    if not Path(adapter).is_file() and not Path(adapter, "adapter_model.safetensors").is_file():
        setting = "recipe=paper " * mnli_script.endswith(RECIPE_SUFFIX)
        command = f"{setting}bash scripts/{mnli_script.removesuffix(RECIPE_SUFFIX)}.sh"
        if dry_notes is None:
            raise UsageError(
                f"starts from an MNLI adapter, and there is none at {adapter}.\n"
                f"Train it with '{command}', or point to one with MNLI_LORA=<published .bin file or "
                "adapter folder>.\nMNLI_LORA=none starts from the plain pretrained model instead."
            )
        dry_notes.append(f"{NO_MNLI}: {adapter}; '{command}' trains it")
    return [*flags[:i], "--lora_path", adapter, *flags[i + 2 :]]


def count_devices(python: str) -> int:
    """Number of accelerators that torch sees, counted in a child process."""
    try:
        return int(subprocess.run([python, "-c", COUNT], stdout=subprocess.PIPE, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"cannot count the accelerators: '{python}' does not run, or has no torch 2.6 or newer (see above).\n"
            "Activate the project's environment or set PYTHON=<its python>; devices=<number> skips the count."
        ) from error


def torchrun_options(settings: Mapping[str, str]) -> list[str]:
    """The user's own options for torch.distributed.run."""
    options = settings.get("torchrun_options", "").split()
    for word in options:
        if is_flag(word, "--nnodes", "--nproc_per_node"):
            raise UsageError(
                f"torchrun_options: {word.partition('=')[0]} there would change the examples per step unnoticed.\n"
                "Set nnodes=<machines> and devices=<accelerators of each> instead."
            )
    return options


def find_machines(settings: Mapping[str, str], options: list[str], notes: list[str]) -> tuple[int, list[str]]:
    """Number of machines, and options by which their processes find each other, from the user's settings or srun's."""
    # srun sets SLURM_STEP_*; sbatch alone does not
    setting, srun_nodes = settings.get("nnodes"), settings.get("SLURM_STEP_NUM_NODES")
    rank, address, port = (settings.get(name) for name in ("node_rank", "master_addr", "master_port"))
    tasks = int(settings.get("SLURM_STEP_NUM_TASKS") or 1)
    if setting != "1" and tasks > int(srun_nodes or 1):
        raise UsageError(
            f"srun starts {tasks} tasks on {srun_nodes or 1} machine(s), and each would start a process per GPU.\n"
            "Start one task a machine: --ntasks-per-node=1, as scripts/slurm.sbatch does.\n"
            "If each task is a run of its own, set nnodes=1."
        )
    if not setting and not srun_nodes:
        if rank or address:
            raise UsageError(
                "node_rank or master_addr is set, and nnodes is not.\n"
                "Set nnodes=<number of machines> too, the same on all."
            )
        if (nodes := settings.get("SLURM_JOB_NUM_NODES") or "1") != "1":
            notes.append(f"SLURM gave {nodes} machines, this uses one: start it with srun (scripts/slurm.sbatch)")
    nnodes = whole_number("nnodes", setting or srun_nodes or 1, 1)
    if any(is_flag(word, "--rdzv_backend", "--rdzv_endpoint") for word in options):
        return nnodes, [f"--nnodes={nnodes}"]
    if nnodes == 1:
        return nnodes, ["--standalone"]  # a free port, so that two runs do not collide

    if str(nnodes) == srun_nodes:
        nodes = settings.get("SLURM_STEP_NODELIST", "")
        # the first of node[01-03,07] is node01
        first = re.fullmatch(r"([\w.-]+)(?:\[(\d+)[-,\d]*])?(,.*)?", nodes, re.ASCII)
        rank, address = rank or settings.get("SLURM_NODEID"), address or (first and first[1] + (first[2] or ""))
        if not address:
            raise UsageError(
                f"cannot tell the first of SLURM's machines '{nodes}'.\n"
                "Set master_addr=<its name or address>, the same on all."
            )
        # a port of the job's own, so that two jobs that share a machine do not collide
        port = port or str(20000 + int(settings.get("SLURM_JOB_ID") or 0) % 20000)
    if not rank or not address:
        raise UsageError(
            f"nnodes={nnodes} machines find each other with node_rank and master_addr.\n"
            "Set node_rank=<0 on the first machine, 1 on the next, ...>\n"
            "and master_addr=<name or address of the first>, the same on all."
        )
    if whole_number("node_rank", rank, 0) >= nnodes:
        raise UsageError(f"node_rank={rank}: with nnodes={nnodes} it goes from 0 to {nnodes - 1}.")
    port = str(whole_number("master_port", port or 29500, 1))  # torch's default
    return nnodes, [f"--nnodes={nnodes}", f"--node_rank={rank}", f"--master_addr={address}", f"--master_port={port}"]


def share(examples: int, batch: int, processes: int) -> tuple[int, int] | None:
    """Batch per process (at most `batch`) and smallest accumulation for so many examples a step; None if unequal."""
    per_process, remainder = divmod(examples, processes)
    if remainder:
        return None
    accumulation = next(n for n in range(-(-per_process // batch), per_process + 1) if per_process % n == 0)
    return per_process // accumulation, accumulation


def share_step(flags: list[str], tuned_for_gpus: int, nnodes: int, devices: int) -> tuple[list[str], list[str], str]:
    """The flags that stay, those to add so that a step has tuned_for_gpus x batch examples, and a line to print."""
    processes = nnodes * (devices or 1)
    hardware = "the CPU" if devices == 0 else "1 device" if processes == 1 else f"{processes} devices"
    if nnodes > 1:
        hardware = f"{hardware if devices else 'the CPUs'} of {nnodes} machines"
    batch_text = last_value(flags, BATCH)
    batch = whole_number(BATCH, DEFAULT_BATCH if batch_text is None else batch_text, 1)
    added: list[str] = []
    if (accumulation := last_value(flags, ACCUMULATION)) is not None:
        passes = whole_number(ACCUMULATION, accumulation, 1)
        note = f"{processes} x {batch} x {passes} = {processes * batch * passes} examples a step"
        shown_flags = [ACCUMULATION, str(passes)] if passes > 1 else []
    else:
        examples = tuned_for_gpus * batch
        if (shares := share(examples, batch, processes)) is None:
            if device_counts := [n for n in range(1, devices + 1) if examples % (nnodes * n) == 0]:
                n, on_each = device_counts[-1], " on each" * (nnodes > 1)
                remedy = f"Use {n} of them{on_each}: devices={n}, or name {n} in CUDA_VISIBLE_DEVICES."
            else:
                n = max(n for n in range(1, nnodes + 1) if examples % n == 0)
                remedy = f"Use {n} of the machines: nnodes={n}."
            raise UsageError(
                f"{hardware} cannot share the {tuned_for_gpus} x {batch} examples a step of "
                f"tuned_for_gpus={tuned_for_gpus} equally.\n{remedy}\n"
                f"Or train another recipe, with {processes} x {batch} examples a step: tuned_for_gpus={processes}."
            )
        note = f"{tuned_for_gpus} x {batch} = {examples} examples a step"
        if shares[0] != batch:
            flags, added = without(flags, BATCH), [BATCH, str(shares[0])]
        if shares[1] > 1:
            added += [ACCUMULATION, str(shares[1])]
        shown_flags = added
    return flags, added, note + f", made up on {hardware} with {' '.join(shown_flags)}" * bool(shown_flags)


def read_script(command: list[str], settings: Mapping[str, str]) -> Script:
    """What `bash COMMAND...` would launch. Raises UsageError with its message if it ends with an error."""
    environment = {**settings, "DRY_RUN": "json"}
    done = subprocess.run(["bash", *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UsageError(done.stderr.strip() or f"{command[0]}: ends with status {done.returncode}.")
    try:
        return Script(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, TypeError, ValueError) as error:
        raise UsageError(f"{command[0]}: is no launch script, it does not end with launch.sh's `launch`.") from error


def main(argv: list[str], environment: Mapping[str, str]) -> None:
    """Print the command of a script, whose fields are argv, then run it in place of this program."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end without a traceback, as a shell does: before `| head`
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # and at Ctrl-C
    root, python, name, tuned_for_gpus, *flags = argv
    script, dry_run = Script(root, python, name, tuned_for_gpus, flags), environment.get("DRY_RUN")
    try:
        script = with_recipe(script, environment.get("recipe"))
        if dry_run == "json":  # for read_script
            print(json.dumps(asdict(script)))
            return
        if dry_run == "output_dir":  # for slurm.sbatch
            print(last_value(flags, "--output_dir") or default_folder(script, environment))
            return
        command = plan(script, environment)
    except UsageError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    for note in command.notes:
        print(f"{name}: {note}", file=sys.stderr)
    print(command, flush=True)
    if not is_dry_run(environment):
        os.execvpe(python, [*command.program, *command.flags], {**environment, **command.environment})
