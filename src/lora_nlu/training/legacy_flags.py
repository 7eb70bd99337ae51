"""The reference's and transformers' earlier flags, translated to today's."""

from lora_nlu.errors import UsageError

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
    groups: list[tuple[str, list[str]]] = []  # a flag's name and its tokens as written, in order
    for token in argv:
        is_flag = token.startswith("--") and len(token) > 2
        if is_flag or not groups:
            groups.append((token[2:].partition("=")[0].replace("-", "_") if is_flag else "", [token]))
        else:
            groups[-1][1].append(token)
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
        elif name == "task_name" and values and values[0] != (task := values[0].lower().replace("-", "")):
            new = ["--task_name", task, *values[1:]]  # papers and the GLUE server write MRPC, SST-2
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
            continue  # with 0 steps the ratio applies
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
    """A ratio is today a `--warmup_steps` below 1; if the command has steps as well, they win."""
    try:
        ratio = float(values[0])
    except (IndexError, ValueError):
        ratio = -1.0
    if not 0 <= ratio < 1:
        raise UsageError(f"--warmup_ratio {' '.join(values)}: must be a fraction of all steps, from 0 to below 1.")
    return [] if warmup_steps_win else ["--warmup_steps", values[0]]
