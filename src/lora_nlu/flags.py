"""A command line, or a JSON file of flags, to dataclasses; what transformers 5 renamed or dropped is translated."""

import difflib
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from lora_nlu.errors import UsageError, UserError
from lora_nlu.files import read_json
from lora_nlu.lora import TARGETS

# old name: new flag that takes the same value
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "use_deterministic_algorithms": "full_determinism",
    "torchdynamo": "torch_compile_backend",
    "use_auth_token": "token",
    "max_val_samples": "max_eval_samples",
}
# old switch: what to say instead when it is on
SWITCHES = {
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
    "include_inputs_for_metrics": ["--include_for_metrics", "inputs"],
    "adafactor": ["--optim", "adafactor"],
    "evaluate_during_training": ["--eval_strategy", "steps"],
}
# old name: why it is not needed; the value is dropped with it
DROPPED = {
    "local_rank": "the launcher's environment says it",
    "save_safetensors": "files are always safetensors",
    "fp16_opt_level": "apex is gone; --fp16 and --bf16 are torch's own",
    "fp16_backend": "apex is gone; --fp16 and --bf16 are torch's own",
    "half_precision_backend": "apex is gone; --fp16 and --bf16 are torch's own",
    "sharded_ddp": "fairscale is gone; --fsdp shards",
    "tpu_num_cores": "the launcher says it",
    "past_index": "no model here uses it",
    "mp_parameters": "SageMaker's model parallelism is gone",
    "use_legacy_prediction_loop": "there is one loop",
    "jit_mode_eval": "use --torch_compile",
    "ray_scope": "there is no hyperparameter search here",
}
_TRUE, _FALSE = {"true", "yes", "1", "t", "y"}, {"false", "no", "0", "f", "n"}


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(argv: list[str], groups: Any) -> tuple[tuple[Any, ...], list[str]]:
    """Read flags, or the JSON file that is the only argument, into one object of each dataclass of `groups`.

    Returns them and a line for each old flag that was translated. Raises UsageError; an unknown flag names near ones.
    """
    if len(argv) == 1 and argv[0].endswith(".json"):
        argv = _from_json(Path(argv[0]))
    argv, notes = translate(argv)
    parser = _Parser(groups, allow_abbrev=False)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, ImportError) as e:
        raise UsageError("\n".join(str(e).strip().splitlines()[:3])) from e
    if rest:
        near = difflib.get_close_matches(rest[0], parser._option_string_actions, n=3)
        raise UsageError(f"unknown flag {rest[0]}." + (f" Did you mean {' or '.join(near)}?" if near else ""))
    return tuple(parsed), notes


def _from_json(path: Path) -> list[str]:
    """The flags of a JSON object: a list is several values, null a flag left out."""
    try:
        settings = read_json(path)
    except UserError as e:
        raise UsageError(str(e)) from e
    argv = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            argv += [f"--{name}", *map(str, values)]
    return argv


def parse_targets(text: str | None) -> list[str] | None:
    """`query,value` to names of `lora.TARGETS`, in their order; `query_proj` is `query`. Raises UsageError."""
    if text is None:
        return None
    names = [name.strip().removesuffix("_proj") for name in text.split(",")]
    if unknown := [name for name in names if name not in TARGETS]:
        raise UsageError(f"--lora_target_modules {text}: {unknown[0]!r} is none of {', '.join(TARGETS)}.")
    return [name for name in TARGETS if name in names]


def parse_layers(text: str | None, count: int) -> list[int] | None:
    """`0-3,11` to the numbers of those of `count` encoder layers, from 0. Raises UsageError."""
    if text is None:
        return None
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"--lora_layers {text}: give numbers and ranges from 0, such as 0-3,{count - 1}.")
        numbers |= set(range(int(first), int(last if dash else first) + 1))
    if not numbers or max(numbers) >= count:
        raise UsageError(f"--lora_layers {text}: the model has {count} layers, 0 to {count - 1}.")
    return sorted(numbers)


def check_compiler(backend: str | None, on_cpu: bool) -> None:
    """torch.compile must know its backend, and find the compiler that it would start. Raises UsageError."""
    if backend and backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends())
        raise UsageError(f"--torch_compile_backend {backend}: unknown. Choose from: {known}.")
    if backend == "inductor" and on_cpu and not shutil.which("g++"):
        raise UsageError("--torch_compile: needs a C++ compiler on a CPU, and there is no g++. Leave the flag out.")


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """Translate a command line; returns it in today's flags, and a line for each translation made.

    Raises UsageError for a `--warmup_ratio` that is no fraction.
    """
    groups: list[tuple[str, list[str]]] = []  # (name, its tokens as written), in order
    for token in argv:
        if token.startswith("--") and len(token) > 2:
            groups.append((token[2:].partition("=")[0].replace("-", "_"), [token]))
        elif groups:
            groups[-1][1].append(token)
        else:
            groups.append(("", [token]))
    steps = [values[0] for name, tokens in groups if name == "warmup_steps" and (values := _values(tokens))]
    warmup_steps_win = bool(steps) and steps[-1] not in ("0", "0.0")
    translated: list[str] = []
    notes: list[str] = []
    for name, tokens in groups:
        old = " ".join(tokens)
        values = _values(tokens)
        if name == "use_auth_token" and (not values or values[0].lower() in _TRUE | _FALSE):
            new = []  # was a switch: the token of `hf auth login`, which is used anyway
        elif name in RENAMED:
            new = [f"--{RENAMED[name]}", *values]
        elif name in SWITCHES:
            new = [] if values and values[0].lower() in _FALSE else SWITCHES[name]
        elif name in DROPPED:
            notes.append(f"{old}: dropped, {DROPPED[name]}.")
            continue
        elif name == "warmup_ratio":
            new = _warmup(values, warmup_steps_win)
        elif name == "optim" and values == ["adamw_hf"]:
            new = ["--optim", "adamw_torch"]
        elif name == "warmup_steps" and not warmup_steps_win and any(n == "warmup_ratio" for n, _ in groups):
            continue  # 0 leaves the word to the ratio
        else:
            translated += tokens
            continue
        notes.append(f"{old} is now {' '.join(new)}." if new else f"{old}: dropped, it changes nothing.")
        translated += new
    return translated, notes


def _values(tokens: list[str]) -> list[str]:
    """The values of `--x y z`, `--x=y` or `--x`."""
    _, equals, value = tokens[0].partition("=")
    return [value, *tokens[1:]] if equals else tokens[1:]


def _warmup(values: list[str], warmup_steps_win: bool) -> list[str]:
    """A ratio is today a `--warmup_steps` below 1; steps, where given too, go before it."""
    try:
        ratio = float(values[0])
    except (IndexError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--warmup_ratio {' '.join(values)}: must be a fraction of all steps, from 0 to below 1.")
    return [] if warmup_steps_win else ["--warmup_steps", values[0]]
