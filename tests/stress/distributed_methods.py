"""Every method in two processes, under DDP and under FSDP2, against one process: the same losses, weights and scores.

    OMP_NUM_THREADS=1 nice python tests/stress/distributed_methods.py [--cases REGEX] [--work DIR]

A tiny RoBERTa and a tiny DeBERTa-V2 without dropout, whose draws depend on the process, train 12 steps on 45 examples,
8 a step: the sixth step of an epoch has 5 of them. Then they are evaluated and predict. Losses, gradient norms, saved
weights and scores must be equal to 1e-5, predictions to the letter. FSDP2 must refuse what it can't shard.

Adam divides a gradient by its size, and so makes a step of what is only rounding where the exact gradient is 0 (a
RoBERTa key's bias, which softmax ignores). A large epsilon keeps such steps as small as the rounding is.

The last line sums up; exit code 1 if anything differed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from same_results import LORA, METHODS, MODELS, ROOT, call

SCRIPT = ROOT / "examples" / "text-classification" / "run_glue.py"
BACKENDS = {"DDP": [], "FSDP2": ["--fsdp", "--fsdp_config", str(ROOT / "configs" / "fsdp2.json")]}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FLAGS = ["--task_name", "rte", "--glue_dir", "glue", "--cache_dir", "cache", "--max_seq_length", "64"]
FLAGS += [
    "--do_train",
    "--max_steps",
    "12",
    "--max_train_samples",
    "45",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
]
FLAGS += ["--learning_rate", "1e-2", "--adam_epsilon", "1e-3", "--disable_tqdm", "true"]
FLAGS += ["--do_eval", "--do_predict", "--max_eval_samples", "21", "--per_device_eval_batch_size", "8"]
TOLERANCE = 1e-5  # of the largest value of a tensor or list
MOVED = 0.1  # what Adam can move a parameter by in these steps: the scale of one that is smaller


def every_method() -> dict[str, list[str]]:
    """The flags of same_results.py's methods, and of each row of the table that is not one of them."""
    from helpers import flags_of

    from lora_nlu.methods.table import METHODS as TABLE

    return METHODS | {name: flags_of(row) for name, row in TABLE.items() if name not in METHODS}


def chosen(methods: dict[str, list[str]], pattern: str) -> list[tuple[str, str, list[str]]]:
    """Model, method and backends, where `pattern` is found in "MODEL METHOD, BACKEND"."""
    cases = []
    for model in MODELS:
        for method in methods:
            backends = [backend for backend in BACKENDS if re.search(pattern, f"{model} {method}, {backend}")]
            cases += [(model, method, backends)] if backends else []
    return cases


def differences(one: Path, other: Path) -> tuple[list[str], float]:
    """How a run's folder differs from that of one process, and the largest relative difference of a tensor or list."""
    from safetensors.torch import load_file

    found, largest = [], 0.0

    def check(name: str, want: list[float], got: list[float], scale: float) -> None:
        nonlocal largest
        if len(want) != len(got):
            found.append(f"{name}: {len(want)} values and {len(got)}")
            return
        error = max((abs(x - y) for x, y in zip(want, got, strict=True)), default=0.0) / scale
        largest = max(largest, error)
        if not error <= TOLERANCE:
            found.append(f"{name}: differs by {error:.2g} of the largest value")

    logs = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, other)]
    for key in ("loss", "grad_norm"):
        want, got = ([entry[key] for entry in log if key in entry] for log in logs)
        check(key, want, got, max(map(abs, want), default=1.0))
    paths = [next(folder.glob("*model.safetensors")) for folder in (one, other)]
    tensors = [load_file(path) for path in paths]
    if paths[0].name != paths[1].name or tensors[0].keys() != tensors[1].keys():
        found.append(f"weights: {paths[0].name} and {paths[1].name}, or other names in them")
    for name in tensors[0].keys() & tensors[1].keys():
        want, got = (state[name].double().flatten() for state in tensors)
        check(name, want.tolist(), got.tolist(), max(float(want.abs().max()), MOVED))
    scores = [json.loads((folder / "eval_results.json").read_text()) for folder in (one, other)]
    check("eval_loss", [scores[0]["eval_loss"]], [scores[1]["eval_loss"]], scores[0]["eval_loss"])
    for key in ("eval_accuracy", "eval_samples"):
        check(key, [scores[0][key]], [scores[1][key]], 1.0)
    predictions = [(folder / "predict_results_rte.tsv").read_text() for folder in (one, other)]
    if predictions[0] != predictions[1]:
        found.append("other predictions")
    return found, largest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="a regular expression: only cases whose name has it")
    parser.add_argument("--work", type=Path, help="an empty folder for all runs, kept; default: a temporary one")
    args = parser.parse_args()
    begun, work = time.monotonic(), (args.work or Path(tempfile.mkdtemp(prefix="lora-nlu-distributed-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    for name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_"))]:
        del os.environ[name]
    os.environ |= {"HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "end_to_end")]
    import runs
    import torch

    from lora_nlu.methods.table import METHODS as TABLE

    methods = every_method()
    torch.set_num_threads(1)
    runs.write_models(Path("models"), runs.write_glue(Path("glue")), **NO_DROPOUT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]
    count, failures, largest = 0, 0, 0.0
    for model, method, backends in chosen(methods, args.cases):
        flags = [*FLAGS, *methods[method], "--model_name_or_path", f"models/{model}"]
        flags += ["--lora_dropout", "0"] if methods[method][:1] == LORA[:1] else []
        flags += ["--output_dir", f"runs/{model} {method}"]
        if call(SCRIPT, *flags, "--per_device_train_batch_size", 8):
            count, failures = count + len(backends), failures + len(backends)
            continue
        for backend in backends:
            folder = Path(f"{flags[-1]}, {backend}")
            command = [*launcher, *flags[:-1], str(folder), "--per_device_train_batch_size", "4", *BACKENDS[backend]]
            done = subprocess.run(command, capture_output=True, text=True)
            refusal = f"{TABLE[method].label} can't be sharded" if method in TABLE else "no refusal"
            if backend == "FSDP2" and refusal in done.stderr and not TABLE[method].shards:
                count += 1
                print(f"{folder.name}: refused, as it should be", flush=True)
                continue
            found, error = [f"ended with {done.returncode}: {done.stderr[-2000:]}"], 0.0
            if done.returncode == 0 and (method not in TABLE or TABLE[method].shards or backend == "DDP"):
                found, error = differences(Path(flags[-1]), folder)
            count, failures, largest = count + 1, failures + bool(found), max(largest, error)
            print(
                f"{folder.name}: {'FAILED' if found else 'equal'}, largest difference {error:.1e}", *found, sep="\n  "
            )
            sys.stdout.flush()
    if not args.work:
        os.chdir("/")
        shutil.rmtree(work)
    print(
        f"{count} runs in two processes against one, largest difference {largest:.1e}, "
        f"{time.monotonic() - begun:.0f} s, {failures} failures"
    )
    return 1 if failures or not count else 0


if __name__ == "__main__":
    sys.exit(main())
