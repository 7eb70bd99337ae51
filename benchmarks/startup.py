"""Seconds from the command to the end of the first training step, side by side with transformers + PEFT.

    python benchmarks/startup.py [--pairs 5]

Both sides are commands as a person types them, on the same files: a checkpoint of RoBERTa-base's shape with random
weights and 64 sentence pairs in a CSV. Ours is run_glue.py; the peer is `peer` below, written as the documentation of
transformers, datasets and PEFT has it. The step has ended when its loss is printed. One run of each comes first and is
not counted: it fills the file system's, Python's and datasets' caches, and compiles our kernels if they are not there.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HERE, RESULTS, machine, spread

RUN_GLUE = HERE.parent / "examples" / "text-classification" / "run_glue.py"
WORDS = (
    "cat dog bird tree house river stone cloud road garden sees finds likes paints carries follows the a and".split()
)
EXAMPLES, MAX_LENGTH, LORA_R, LORA_ALPHA = 64, 128, 8, 16
TRAINING = {  # the TrainingArguments of both sides
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-4,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 0,
}
HEADER = """| ours, s | peer, s | ours / peer (least to most) |
|---|---|---|"""


def write_pairs(path: Path) -> None:
    rng = random.Random(0)
    rows = ["sentence1,sentence2,label"]
    for i in range(EXAMPLES):
        first, second = (" ".join(rng.choices(WORDS, k=rng.randint(8, 24))) for _ in range(2))
        rows.append(f"{first},{second},{i % 2}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_model(folder: Path, **sizes: int) -> None:
    """Config, weights and tokenizer as the Hub's roberta-base has them: encoder and language-model head."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

    config = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, **sizes
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([" ".join(WORDS)], trainer)
    bpe.model.save(str(folder))
    RobertaTokenizer.from_pretrained(folder).save_pretrained(folder)


def peer(folder: Path) -> None:
    """The other side's whole program, run in a process of its own."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = load_dataset("csv", data_files=str(folder / "train.csv"), split="train")

    def encode(batch: dict) -> dict:
        return tokenizer(batch["sentence1"], batch["sentence2"], truncation=True, max_length=MAX_LENGTH)

    data = data.map(encode, batched=True)
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=2)
    lora = LoraConfig(task_type="SEQ_CLS", r=LORA_R, lora_alpha=LORA_ALPHA, target_modules=["query", "value"])
    args = TrainingArguments(output_dir=str(folder / "peer"), **TRAINING)
    collator = DataCollatorWithPadding(tokenizer)
    Trainer(get_peft_model(base, lora), args, train_dataset=data, data_collator=collator).train()


def commands(folder: Path) -> tuple[list[str], list[str]]:
    """Ours and the peer's."""
    flags = TRAINING | {
        "model_name_or_path": folder / "model",
        "train_file": folder / "train.csv",
        "output_dir": folder / "ours",
        "overwrite_output_dir": True,
        "max_seq_length": MAX_LENGTH,
        "apply_lora": True,
        "lora_r": LORA_R,
        "lora_alpha": LORA_ALPHA,
        "do_train": True,
    }
    ours = [sys.executable, str(RUN_GLUE)]
    for name, value in flags.items():
        ours += [f"--{name}", str(value)]
    return ours, [sys.executable, __file__, "--peer", str(folder)]


def first_step(command: list[str], cache: Path) -> float:
    """Seconds until the command prints a loss; returns when it has ended."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | offline | {"PYTHONUNBUFFERED": "1"}  # the line must come when it is printed
    start, end, said = time.perf_counter(), 0.0, []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if not end and "'loss'" in line:
                end = time.perf_counter()
    if process.returncode or not end:
        raise SystemExit("".join(said))
    return end - start


def measure(pairs: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "train.csv")
        write_model(folder / "model")
        ours, theirs = commands(folder)
        times = [[first_step(command, folder / "cache") for command in (ours, theirs)] for _ in range(1 + pairs)][1:]
    import torch

    return {
        "ours_of_peer": spread([mine / other for mine, other in times]),
        "ours_s": spread([mine for mine, _ in times]),
        "peer_s": spread([other for _, other in times]),
        "machine": machine(torch.get_num_threads()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer", type=Path, help="be the other side, on the files of this folder")
    args = parser.parse_args()
    if args.peer:
        peer(args.peer)
        return
    result = measure(args.pairs)
    ratio, low, high = (result["ours_of_peer"][key] for key in ("median", "min", "max"))
    print(HEADER)
    ours, theirs = (result[key]["median"] for key in ("ours_s", "peer_s"))
    print(f"| {ours:.1f} | {theirs:.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}) |")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
