"""The same fine-tuning through run_glue.py and through transformers + PEFT: do both learn equally well?

    python benchmarks/accuracy_against_peft.py --glue_dir GLUE --model ENCODER --out results.json

Runs every task x seed x engine as a process of its own, prints each result and ends with a Markdown table of medians.
A result that is already in the file is not computed again, so an interrupted comparison continues. Both sides use the
same encoder, rank, alpha, head, dropout, batches, schedule and optimizer; random draws (A, head, dropout) differ.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN_GLUE = ROOT / "examples" / "text-classification" / "run_glue.py"
LORA_R, LORA_ALPHA, MAX_LENGTH = 8, 16, 128
# task: batch size, learning rate, epochs
RECIPES = {"cola": (32, 1e-3, 3), "rte": (32, 1e-3, 3), "stsb": (16, 1e-3, 3)}
METRICS = {"cola": "matthews_correlation", "rte": "accuracy", "stsb": "pearson"}
TRAINING = {
    "weight_decay": 0.1,
    "warmup_steps": 0.06,  # a fraction of all steps
    "per_device_eval_batch_size": 32,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def recipe(task: str, seed: int) -> dict:
    """The TrainingArguments both engines get."""
    batch, learning_rate, epochs = RECIPES[task]
    return TRAINING | {
        "per_device_train_batch_size": batch,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "seed": seed,
    }


def read_examples(glue_dir: Path, task: str, split: str) -> list[tuple[str, str | None, float]]:
    """The peer's own reading of the standard files: (text, second text, label)."""
    folder = {"cola": "CoLA", "rte": "RTE", "stsb": "STS-B"}[task]
    lines = (glue_dir / folder / f"{split}.tsv").read_text(encoding="utf-8").rstrip("\n").split("\n")
    rows = [line.split("\t") for line in lines]
    if task == "cola":
        return [(row[3], None, int(row[1])) for row in rows]
    if task == "rte":
        return [(row[1], row[2], ["entailment", "not_entailment"].index(row[3])) for row in rows[1:]]
    return [(row[7], row[8], float(row[9])) for row in rows[1:]]


def run_peer(glue_dir: Path, model_path: str, task: str, seed: int, folder: Path) -> float:
    """Fine-tune and evaluate with transformers' RobertaForSequenceClassification and PEFT's LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, matthews_corrcoef
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    args = TrainingArguments(output_dir=str(folder), **recipe(task, seed))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    data = {}
    for split in ("train", "dev"):
        rows = read_examples(glue_dir, task, split)
        pairs = [row[1] for row in rows] if rows[0][1] is not None else None
        encoded = tokenizer([row[0] for row in rows], pairs, truncation=True, max_length=MAX_LENGTH)
        data[split] = [{k: encoded[k][i] for k in encoded} | {"label": row[2]} for i, row in enumerate(rows)]
    labels = 1 if task == "stsb" else 2
    base = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=labels)
    lora = LoraConfig(task_type="SEQ_CLS", r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=["query", "value"])
    collator = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(get_peft_model(base, lora), args, train_dataset=data["train"], data_collator=collator)
    trainer.train()
    output = trainer.predict(data["dev"])
    if task == "stsb":
        return float(pearsonr(output.predictions.squeeze(-1), output.label_ids)[0])
    score = matthews_corrcoef if task == "cola" else accuracy_score
    return float(score(output.label_ids, output.predictions.argmax(-1)))


def run_ours(glue_dir: Path, model_path: str, task: str, seed: int, folder: Path) -> float:
    """The same through run_glue.py, as a user would start it."""
    flags = recipe(task, seed) | {
        "model_name_or_path": model_path,
        "task_name": task,
        "glue_dir": str(glue_dir),
        "output_dir": str(folder),
        "max_seq_length": MAX_LENGTH,
        "apply_lora": True,
        "lora_r": LORA_R,
        "lora_alpha": LORA_ALPHA,
        "do_train": True,
        "do_eval": True,
    }
    command = [sys.executable, str(RUN_GLUE)]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads((folder / "eval_results.json").read_text())[f"eval_{METRICS[task]}"]


def table(results: dict) -> str:
    lines = ["| task | metric | ours: median (seeds) | transformers + PEFT: median (seeds) | seconds, ours / PEFT |"]
    lines.append("|---|---|---|---|---|")
    for task in RECIPES:
        cells, seconds = [], []
        for engine in ("ours", "peft"):
            runs = [results[key] for key in sorted(results) if key.startswith(f"{engine}/{task}/")]
            if not runs:
                break
            values = [run["score"] for run in runs]
            spread = ", ".join(f"{value:.4f}" for value in values)
            cells.append(f"{statistics.median(values):.4f} ({spread})")
            seconds.append(f"{statistics.median(run['seconds'] for run in runs):.0f}")
        if len(cells) == 2:
            lines.append(f"| {task} | {METRICS[task]} | {cells[0]} | {cells[1]} | {' / '.join(seconds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", type=Path, required=True, help="folder that holds CoLA, RTE and STS-B")
    parser.add_argument("--model", required=True, help="a RoBERTa checkpoint; demo.sh leaves one in .demo/encoder")
    parser.add_argument("--out", type=Path, default=Path("accuracy_against_peft.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", default=["ours", "peft"], choices=["ours", "peft"])
    parser.add_argument("--tasks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args()
    for seed in args.seeds:
        for task in args.tasks:
            for engine in args.engines:
                results = json.loads(args.out.read_text()) if args.out.exists() else {}
                key = f"{engine}/{task}/{seed}"
                if key in results:
                    continue
                run = {"ours": run_ours, "peft": run_peer}[engine]
                with tempfile.TemporaryDirectory() as folder:
                    start = time.perf_counter()
                    score = run(args.glue_dir, args.model, task, seed, Path(folder))
                    results[key] = {"score": score, "seconds": time.perf_counter() - start}
                print(key, json.dumps(results[key]), flush=True)
                partial = args.out.with_suffix(".tmp")
                partial.write_text(json.dumps(results, indent=1, sort_keys=True))
                os.replace(partial, args.out)
    print(table(json.loads(args.out.read_text())))


if __name__ == "__main__":
    main()
