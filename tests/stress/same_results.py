"""Train, resume, evaluate and predict with two commits, and compare what they write, bit for bit.

    OMP_NUM_THREADS=1 nice python tests/stress/same_results.py record before.json --source ../old
    OMP_NUM_THREADS=1 nice python tests/stress/same_results.py record after.json
    python tests/stress/same_results.py compare before.json after.json

`record` runs the run_glue.py of a checkout (default: this one), by its command line alone, on synthetic data. A case is
a tiny RoBERTa or DeBERTa-V2, a method and an objective. It trains 20 steps, evaluates and predicts; the same command
resumes a copy that was cut off after step 10; a new call evaluates and predicts from the output folder; adapters of the
`plain` objective are converted to every form that can hold them. A report on all runs gives one more table.

Compared are the exit codes, which files there are, and the SHA-256 of each: weights, configs, tokenizers, optimizer,
scheduler and random states, predictions. Files that also hold times are compared value by value without these: losses
and gradient norms of every step, metrics, the run's settings. A key that only the second record has is a note, no
difference. Not compared: times, memory, versions, the text of model cards (README.md), what is printed, and
training_args.bin, a pickle that names the module of our class; run.json has those settings.

`compare` lists every difference and ends with 1 if there is one. Records are of one machine: another rounds otherwise.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODELS = ("roberta", "deberta")
LORA = ["--apply_lora", "--lora_r", "4", "--lora_alpha", "8"]
EVERYWHERE = ["--lora_target_modules", "query,key,value,dense,intermediate,output", "--lora_dropout", "0.1"]
METHODS = {
    "lora": LORA,
    "lora everywhere": [*LORA, *EVERYWHERE],
    "bitfit": ["--apply_bitfit"],
    "houlsby": ["--apply_adapter", "--adapter_type", "houlsby", "--adapter_size", "8"],
    "pfeiffer": ["--apply_adapter", "--adapter_type", "pfeiffer", "--adapter_size", "8"],
    "head": ["--head_only"],
    "full": [],
}
OBJECTIVES = {
    "plain": [],
    "rdrop": ["--reg_loss_wgt", "1.5"],
    "cutoff": ["--reg_loss_wgt", "1.5", "--masking_prob", "0.3"],
}
RTE = ["--task_name", "rte", "--glue_dir", "glue"]
OWN = ["--train_file", "own/train.csv", "--validation_file", "own/validation.csv", "--test_file", "own/test.csv"]
BEST = ["--load_best_model_at_end", "--label_smoothing_factor", "0.1", "--lr_scheduler_type", "cosine"]
# beside the product of the tables above, in which every run is on RTE
OTHERS = {
    "lora on mnli": [*LORA, "--task_name", "mnli", "--glue_dir", "glue"],
    "lora from mnli": [*LORA, *RTE, "--lora_path", "runs/{model} lora on mnli/trained"],
    "lora on stsb, rdrop": [*LORA, "--task_name", "stsb", "--glue_dir", "glue", *OBJECTIVES["rdrop"]],
    "lora on own files": [*LORA, *OWN],
    "lora in layer 1 and biases": [*LORA, *RTE, "--lora_layers", "1", "--apply_bitfit"],
    "lora, best checkpoint": [*LORA, *RTE, *BEST, "--weight_decay", "0.1", "--warmup_steps", "3"],
    "lora by length, accumulated": [
        *LORA, *RTE, "--train_sampling_strategy", "group_by_length", "--gradient_accumulation_steps", "2"
    ],
    "lora, checkpointed and padded": [
        *LORA, *RTE, "--gradient_checkpointing", "--pad_to_max_length", "--weight_decay", "0.2"
    ],
    "lora in bf16": [*LORA, *RTE, "--bf16"],
}  # fmt: skip
STEPS = ["--do_train", "--max_steps", "20", "--save_steps", "10", "--logging_steps", "1", "--learning_rate", "5e-3"]
STEPS += ["--eval_strategy", "steps", "--eval_steps", "10"]
COMMON = ["--do_eval", "--do_predict", "--max_seq_length", "64", "--cache_dir", "cache", "--disable_tqdm", "true"]
# values that differ between two runs of one commit, or between any two commits
VARYING = re.compile(r"runtime|per_second|preparation_time|elapsed_s|seconds|peak_(gpu_)?memory|versions")
VALUES = re.compile(
    r"run\.json|run_metadata\.json|trainer_state\.json|\w+_results\.json"
)  # files that have such values


def cases(model: str) -> dict[str, list[str]]:
    """Flags of each case of a model, by name; a case that starts from another's folder comes after it."""
    flags = {
        f"{model} {method}, {objective}": [*RTE, *METHODS[method], *OBJECTIVES[objective]]
        for method in METHODS
        for objective in OBJECTIVES
    }
    others = OTHERS | (
        {"lora on the relative query": [*LORA, *RTE, "--lora_relative_query"]} if model == "deberta" else {}
    )
    return flags | {f"{model} {name}": [flag.format(model=model) for flag in others[name]] for name in others}


# ----------------------------------------------------------------------------------------------- in a model's process


def call(path: Path | str, *argv: object) -> int:
    """The exit code of a file or a module run as a program in this process; its messages go to stderr if it fails."""
    out = io.StringIO()
    sys.argv = [str(path), *map(str, argv)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            run = runpy.run_path if isinstance(path, Path) else runpy.run_module
            run(str(path), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except Exception:
            traceback.print_exc()
            code = 70
    if code:
        print("FAILED:", *sys.argv, out.getvalue()[-3000:], sep="\n", file=sys.stderr)
    return code


def run_case(script: Path, model: str, flags: list[str], seed: int, folder: Path) -> list[int]:
    """Train, resume, evaluate and convert into `folder`; returns the exit codes, 70 if resuming gave other weights."""
    import runs

    command = [*COMMON, *flags, *STEPS, "--seed", seed, "--model_name_or_path", f"models/{model}", "--output_dir"]
    codes = [call(script, *command, folder / "trained")]
    if codes[0]:
        return codes
    resumed = runs.cut_off(folder / "trained", folder / "resumed", after=10)
    codes.append(call(script, *command, resumed))
    weights = [sorted(path.glob("*model.safetensors")) for path in (folder / "trained", resumed)]
    if [digest(path) for path in weights[0]] != [digest(path) for path in weights[1]]:
        codes.append(70)
    method = json.loads((folder / "trained" / "run.json").read_text())["method"]["name"]
    path_flag = {"lora": "--lora_path", "full": "--model_name_or_path"}.get(method, "--adapter_path")
    base = [] if method == "full" else ["--model_name_or_path", f"models/{model}"]
    data = (
        OWN if "--train_file" in flags else ["--task_name", flags[flags.index("--task_name") + 1], "--glue_dir", "glue"]
    )
    codes.append(
        call(script, *COMMON, *data, *base, path_flag, folder / "trained", "--output_dir", folder / "evaluated")
    )
    if folder.name.endswith("plain") and method != "full":
        forms = ("peft", "bin", "merged") if folder.name.endswith("lora, plain") else ("peft",)
        for form in forms:
            to = folder / ("published.bin" if form == "bin" else form)
            codes.append(call("lora_nlu.adapters", "convert", folder / "trained", to, "--to", form))
    return codes


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_varying(value: Any) -> Any:
    """JSON without the keys that `VARYING` names."""
    if isinstance(value, dict):
        return {key: without_varying(x) for key, x in value.items() if not VARYING.search(key)}
    return [without_varying(x) for x in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Every file under a folder: its SHA-256, or its values without those that vary."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name in ("README.md", "training_args.bin"):
            found[name] = "not compared"
        elif path.name == "files.json":  # lengths, also of files that contain times
            found[name] = sorted(json.loads(path.read_text()))
        elif VALUES.fullmatch(path.name):
            found[name] = without_varying(json.loads(path.read_text()))
        else:
            found[name] = digest(path)
    return found


def run_model(source: Path, model: str, names: list[str], seed: int) -> dict[str, Any]:
    """All cases of one model in this process and folder, each by its exit codes and files."""
    sys.path.append(str(ROOT / "tests" / "end_to_end"))
    import runs
    import torch

    import lora_nlu

    if not Path(str(lora_nlu.__file__)).is_relative_to(source / "src"):
        raise SystemExit(f"{lora_nlu.__file__} was imported, not {source / 'src'}.")
    torch.set_num_threads(1)
    runs.write_models(Path("models"), runs.write_glue(Path("glue")))
    Path("own").mkdir()
    for split, rows in (("train", 48), ("validation", 24), ("test", 10)):
        lines = Path("glue", "STS-B", "train.tsv").read_text().splitlines()[1 : rows + 1]
        table = [(line.split("\t")[8], f"class {len(line) % 3}") for line in lines]
        with Path("own", f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *table])
    script, found = source / "examples" / "text-classification" / "run_glue.py", {}
    for name in names:
        begun, folder = time.monotonic(), Path("runs", name)
        codes = run_case(script, model, cases(model)[name], seed, folder)
        found[name] = {"exit codes": codes, "files": contents(folder)}
        print(f"{name}: exit codes {codes}, {time.monotonic() - begun:.1f} s", flush=True)
    codes = [call("lora_nlu.report", *sorted(Path("runs").glob("*/trained")), "--out", "report")]
    rows = [] if any(codes) else [*csv.DictReader(Path("report", "report.csv").open())]
    found[f"{model} report"] = {"exit codes": codes, "files": {"report.csv": without_varying(rows)}}
    return found


# ------------------------------------------------------------------------------------------------------ record, compare


def git(source: Path, *argv: str) -> str:
    return subprocess.run(["git", "-C", str(source), *argv], capture_output=True, text=True).stdout.strip()


def record(source: Path, pattern: str, seed: int, work: Path) -> dict[str, Any]:
    """Run all cases whose name has the pattern, one process a model, with a copy of `source` as it is now."""
    copied = work / "source"
    for part in ("src", "examples"):
        shutil.copytree(source / part, copied / part)
    settings = {"PYTHONPATH": str(copied / "src"), "HF_HOME": str(work / "home"), "HF_HUB_OFFLINE": "1"}
    settings |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    dropped = ("HF_", "TRANSFORMERS_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | settings
    packages = ("torch", "transformers", "accelerate", "datasets", "numpy")
    result: dict[str, Any] = {
        "commit": git(source, "rev-parse", "HEAD"),
        "changed files": git(source, "status", "--porcelain").splitlines(),
        "seed": seed,
        "environment": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "cases": {},
    }
    for model in MODELS:
        names = [name for name in cases(model) if re.search(pattern, name)]
        folder = work / model
        if names:
            folder.mkdir(parents=True)
            arguments = json.dumps([str(copied), model, names, seed])
            subprocess.run([sys.executable, __file__, "run", arguments], cwd=folder, env=env, check=True)
            result["cases"] |= json.loads((folder / "record.json").read_text())
    return result


def differences(one: Any, other: Any, place: str = "") -> tuple[list[str], list[str]]:
    """Where the second of two JSON values differs from the first, and the keys that only the second has."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{place}/{key}: only in the first" for key in one if key not in other]
        new = [f"{place}/{key}" for key in other if key not in one]
        pairs = [(one[key], other[key], f"{place}/{key}") for key in one if key in other]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found, new = [], []
        pairs = [(x, y, f"{place}/{i}") for i, (x, y) in enumerate(zip(one, other, strict=True))]
    else:
        equal = json.dumps(one) == json.dumps(other)
        return ([] if equal else [f"{place}: {one!r:.100} and {other!r:.100}"]), []
    for x, y, where in pairs:
        more, keys = differences(x, y, where)
        found += more
        new += keys
    return found, new


def compare(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Differences of two records, and notes on keys that only the second has. A file too many is a difference."""
    found, new = [], []
    for key in ("seed", "environment"):
        found += differences(one[key], other[key], key)[0]
    found += [f"{name}: only in one record" for name in one["cases"].keys() ^ other["cases"].keys()]
    for name in (name for name in one["cases"] if name in other["cases"]):
        files = [record["cases"][name]["files"] for record in (one, other)]
        found += [f"{name}/files/{path}: only in the second" for path in files[1] if path not in files[0]]
        more, keys = differences(one["cases"][name], other["cases"][name], name)
        found += more
        new += [key for key in keys if key.removeprefix(f"{name}/files/") not in files[1]]
    return found, new


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorded = commands.add_parser("record", help="run all cases with one checkout, and write what they gave")
    recorded.add_argument("file", type=Path, help="the record to write, JSON")
    recorded.add_argument("--source", type=Path, default=ROOT, help="the checkout; default: this one")
    recorded.add_argument("--cases", default="", help="a regular expression: only cases whose name has it")
    recorded.add_argument("--seed", type=int, default=0)
    recorded.add_argument("--work", type=Path, help="an empty folder for all runs, kept; default: a temporary one")
    compared = commands.add_parser("compare", help="list what differs between two records")
    compared.add_argument("records", type=Path, nargs=2, metavar="RECORD")
    commands.add_parser("run").add_argument("arguments", help="what `record` starts a process with")
    args = parser.parse_args()
    if args.command == "run":
        source, *rest = json.loads(args.arguments)
        Path("record.json").write_text(json.dumps(run_model(Path(source), *rest)))
        return 0
    if args.command == "record":
        begun, work = time.monotonic(), args.work or Path(tempfile.mkdtemp(prefix="lora-nlu-record-"))
        result = record(args.source.resolve(), args.cases, args.seed, work.resolve())
        args.file.write_text(json.dumps(result, indent=1))
        if not args.work:
            shutil.rmtree(work)
        failed = [name for name, case in result["cases"].items() if any(case["exit codes"])]
        state = f"{len(result['changed files'])} changed files" if result["changed files"] else "no changed files"
        print(
            f"{result['commit']} with {state}: {len(result['cases'])} cases, {time.monotonic() - begun:.0f} s, "
            f"{len(failed)} failures"
        )
        return 1 if failed or not result["cases"] else 0
    one, other = (json.loads(path.read_text()) for path in args.records)
    found, new = compare(one, other)
    print(*(f"DIFFERS: {line}" for line in found), *(f"new: {line}" for line in new), sep="\n")
    print(f"{one['commit']} and {other['commit']}: {len(one['cases'])} cases, {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
