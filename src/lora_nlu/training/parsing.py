"""A command line, or a JSON file of flags, to three groups of flags; the group of training, with transformers' own."""

import difflib
import json
from collections.abc import MutableMapping
from dataclasses import InitVar, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available

from lora_nlu.errors import UsageError, UserError
from lora_nlu.files import read_json
from lora_nlu.labels import label_number
from lora_nlu.training.arguments import DataArguments, ModelArguments, OurRunArguments, model_arguments
from lora_nlu.training.checks import check_arguments
from lora_nlu.training.help import help_text
from lora_nlu.training.launch import hide_tokens
from lora_nlu.training.legacy_flags import translate
from lora_nlu.training.processes import say


@dataclass
class RunArguments(OurRunArguments, TrainingArguments):
    """The flags of the run: transformers' TrainingArguments, and ours.

    environ: the environment variables of the launcher, which say how many processes there are; TensorBoard's folder is
    written into it, because transformers reads it there. Without it the run is a single process.
    """

    environ: InitVar[MutableMapping[str, str] | None] = None

    def __post_init__(self, environ: MutableMapping[str, str] | None) -> None:  # type: ignore[override]
        environ = {} if environ is None else environ
        self._set_device()
        self._set_logging(environ)
        self._set_backend(environ)
        restarts = [environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
        if self.overwrite_output_dir and restarts != ["0", "0"]:
            print("run_glue.py: restarted: --overwrite_output_dir is ignored, the run resumes.", flush=True)
            self.overwrite_output_dir = False
        self.best_metric_flags = self.metric_for_best_model, self.greater_is_better  # transformers fills in its own
        super().__post_init__()
        # On a CPU without sharding the model holds its frozen weights in bf16 itself (trainer.py), without autocast
        self.bf16_in_model = self.use_cpu and not (self.is_sharded or self.torch_compile)
        if self.bf16 and self.bf16_in_model:
            self.mixed_precision = "no"
        if self.fsdp and self.fsdp_plugin_args["fsdp_version"] != 2:
            raise ValueError("--fsdp_config: version 1 is not supported, and torch drops it. Use version 2.")
        self._n_gpu = min(self.n_gpu, 1)  # one process would use all GPUs that it sees and multiply the batch

    def __getstate__(self) -> dict[str, Any]:
        """Without the access token: transformers pickles this object into training_args.bin, and uploads it."""
        return vars(self) | {"hub_token": None}

    def _set_device(self) -> None:
        if not torch.accelerator.is_available():
            # Under a launcher, transformers would otherwise train one separate model in each process.
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise ValueError(f"--bf16: {torch.cuda.get_device_name()} does not support it. Remove it, or use --fp16.")
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained parameter gets a gradient in every step

    def _set_logging(self, environ: MutableMapping[str, str]) -> None:
        if self.include_num_input_tokens_seen in ("no", False):
            self.include_num_input_tokens_seen = "non_padding"
        if self.logging_dir:
            environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
            if self.report_to == "none" and is_tensorboard_available():
                self.report_to = "tensorboard"

    def _set_backend(self, environ: MutableMapping[str, str]) -> None:
        """Check and complete --fsdp and --deepspeed, before transformers starts what they name."""
        for name in ("fsdp_config", "deepspeed"):
            value = getattr(self, name)
            if isinstance(value, str) and not value.lstrip().startswith("{") and not Path(value).is_file():
                raise ValueError(f"--{name} {value}: no such file. The files of this repository are in configs/.")
        if self.deepspeed and not find_spec("deepspeed"):
            raise ValueError("--deepspeed: the package is not installed. Install it: pip install deepspeed")
        if self.deepspeed and "RANK" not in environ:
            raise ValueError("--deepspeed: a launcher must start its processes, even one: torchrun --nproc_per_node=1.")
        if str(self.fsdp).lower() in ("true", "false"):  # transformers takes the bare flag or its older words
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        if self.fsdp and environ.get("WORLD_SIZE", "1") == "1":  # the same command works on one device
            print("run_glue.py: --fsdp is ignored: there is one process, and nothing to shard.", flush=True)
            self.fsdp = self.fsdp_config = None
        of_accelerate = [environ.get(f"ACCELERATE_USE_{backend}", "") for backend in ("FSDP", "DEEPSPEED")]
        self.is_sharded = bool(self.fsdp or self.deepspeed or "true" in map(str.lower, of_accelerate))


class Flags(NamedTuple):
    """The three groups of flags of run_glue.py."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments


def parse_arguments(argv: list[str], environ: MutableMapping[str, str]) -> Flags:
    """Flags, or one JSON file of them, to the three groups; environ: as in `RunArguments`. Raises UsageError."""
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _from_json(Path(argv[0]))
    if {"--help_all", "--help-all"} & {*argv}:
        print(help_text(fields(RunArguments)))
        raise SystemExit(0)
    argv, notes = translate(argv)
    kinds: Any = (model_arguments(), DataArguments, RunArguments)
    parser = _Parser(kinds, allow_abbrev=False, add_help=False)
    try:
        values, unknown = parser.parse_known_args(argv)
        of_kinds = [{f.name: getattr(values, f.name) for f in fields(kind) if f.init} for kind in kinds]
        of_kinds[2]["environ"] = environ
        flags = Flags(*(kind(**of_kind) for kind, of_kind in zip(kinds, of_kinds, strict=True)))
    except (ValueError, ImportError) as e:
        raise UsageError("\n".join(str(e).strip().splitlines()[:3])) from e
    if unknown:
        near = difflib.get_close_matches(unknown[0], parser._option_string_actions, n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise UsageError(f"unknown flag {hide_tokens(unknown)[0]}.{hint}")
    args = flags.run
    if not flags.model.use_fast_tokenizer:
        notes.append("--use_fast_tokenizer false is ignored: the fast tokenizer is used wherever there is one.")
    if args.logging_nan_inf_filter:
        notes.append("--logging_nan_inf_filter is ignored: training stops at a loss that is not finite.")
        args.logging_nan_inf_filter = False
    if args.enable_jit_checkpoint:
        notes.append("--enable_jit_checkpoint is ignored: SIGTERM and SIGUSR1 save a checkpoint in any case.")
        args.enable_jit_checkpoint = False
    if args.batch_eval_metrics:
        notes.append("--batch_eval_metrics is ignored: metrics are always computed over all examples at once.")
        args.batch_eval_metrics = False
    if args.logging_dir and not is_tensorboard_available():
        notes.append(f"--logging_dir {args.logging_dir}: nothing is written there, tensorboard is not installed.")
    say(args, *(f"run_glue.py: {note}" for note in notes))
    check_arguments(*flags)
    return flags


class _Parser(HfArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", int, _integer)  # Python's int and float read 1_0 as 10, and other scripts' digits
        self.register("type", float, label_number)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _integer(text: str) -> int:
    label_number(text)
    return int(text)


def _from_json(path: Path) -> list[str]:
    """The flags of a JSON object: a list is several values, null or a list of none a flag left out."""
    try:
        settings = read_json(path)
    except UserError as e:
        raise UsageError(str(e)) from e
    argv = []
    for name, value in settings.items():
        if value not in (None, []):
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            argv += [f"--{name}", *map(str, values)]
    return argv
