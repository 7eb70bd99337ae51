"""The reference's and transformers' earlier flags, translated to today's."""

from lora_nlu.errors import UsageError
from lora_nlu.training.launch import flags_with_values, hide_tokens

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
# old switch: the flags that replace it when it is on
SWITCHES = {
    "group_by_length": ["--train_sampling_strategy", "group_by_length"],
    "include_inputs_for_metrics": ["--include_for_metrics", "inputs"],
    "adafactor": ["--optim", "adafactor"],
    "evaluate_during_training": ["--eval_strategy", "steps"],
}
# old name: why it is not needed; its value is dropped too
DROPPED = {
    "local_rank": "the launcher sets it",
    "save_safetensors": "files are always safetensors",
    "fp16_opt_level": "apex is gone; --fp16 and --bf16 are torch's own",
    "fp16_backend": "apex is gone; --fp16 and --bf16 are torch's own",
    "half_precision_backend": "apex is gone; --fp16 and --bf16 are torch's own",
    "sharded_ddp": "fairscale is gone; --fsdp shards",
    "tpu_num_cores": "the launcher sets it",
    "past_index": "no model here uses it",
    "mp_parameters": "SageMaker's model parallelism is gone",
    "use_legacy_prediction_loop": "there is one loop",
    "jit_mode_eval": "use --torch_compile",
    "ray_scope": "there is no hyperparameter search here",
}
_TRUE, _FALSE = {"true", "yes", "1", "t", "y"}, {"false", "no", "0", "f", "n"}


def translate(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line in today's flags, and a line for each flag translated. Raises UsageError for a wrong ratio."""
    flags = flags_with_values(argv)
    groups = [(tokens[0][2:].partition("=")[0].replace("-", "_"), tokens) for tokens in flags]
    last = {name: _values(tokens) for name, tokens in groups}  # the last of a repeated flag counts
    # whether the command has --warmup_steps above 0
    has_steps = bool(last.get("warmup_steps")) and last["warmup_steps"][0] not in ("0", "0.0")
    translated: list[str] = []
    notes: list[str] = []
    for name, tokens in groups:
        old, new = " ".join(hide_tokens(tokens)), _new_tokens(name, _values(tokens), has_steps)
        if name in DROPPED:
            notes.append(f"{old}: dropped, {DROPPED[name]}.")
        elif new is not None:
            notes.append(
                f"{old} is now {' '.join(hide_tokens(new))}." if new else f"{old}: dropped, it changes nothing."
            )
            translated += new
        elif name != "warmup_steps" or has_steps or "warmup_ratio" not in last:  # with 0 steps the ratio applies
            translated += tokens
    return translated, notes


def _new_tokens(name: str, values: list[str], has_steps: bool) -> list[str] | None:
    """What replaces an old flag and its values; [] if they change nothing, None for a flag that is used today."""
    value = values[0].lower() if values else ""
    if name == "use_auth_token" and (not values or value in _TRUE | _FALSE):
        return []  # was a switch: the token of `hf auth login`, which is used anyway
    if name in RENAMED:
        return [f"--{RENAMED[name]}", *values]
    if name in SWITCHES:
        return [] if value in _FALSE else SWITCHES[name]
    if name == "warmup_ratio":
        return _warmup(values, has_steps)
    if name == "optim" and values == ["adamw_hf"]:
        return ["--optim", "adamw_torch"]
    task = value.replace("-", "")  # papers and the GLUE server write MRPC, SST-2
    return ["--task_name", task, *values[1:]] if name == "task_name" and values and values[0] != task else None


def _values(tokens: list[str]) -> list[str]:
    """The values of `--x y z`, `--x=y` or `--x`."""
    _, equals, value = tokens[0].partition("=")
    return [value, *tokens[1:]] if equals else tokens[1:]


def _warmup(values: list[str], has_steps: bool) -> list[str]:
    """--warmup_steps below 1, which is a ratio; nothing if the command has steps as well: those count."""
    try:
        ratio = float(values[0])
    except (IndexError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--warmup_ratio {' '.join(values)}: must be a fraction of all steps, from 0 to below 1.")
    return [] if has_steps else ["--warmup_steps", values[0]]
