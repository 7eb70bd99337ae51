"""Sentences a second and memory of predictions, side by side with transformers' pipeline over PEFT's adapters.

    python benchmarks/predict.py [--only SST-2] [--pairs 3]

Both sides answer the same sentences, from one adapter and from three of one base: ours as `python -m lora_nlu.predict`
does, from the file to the table; the peer with `pipeline("text-classification")` over a PEFT model, at the fastest of
the batch sizes 1, 8 and 32, three adapters by `set_adapter` before each batch. In bf16 ours holds weights in it
(`--bf16`), and the peer runs under torch's autocast; a processor without bf16 products has no such rows. The base has
RoBERTa-base's shape and random weights; sentences have the lengths of a task's. Every measurement is a process of its
own; its loading does not count, its peak memory is of the complete process.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from common import argument_parser, draw_lengths, machine, spread, write_results
from startup import WORDS, write_model

BATCHES = (1, 8, 32)  # of the peer
WORKS = [("SST-2", "sst2", 256), ("RTE", "rte", 64)]  # name, lengths of a task's inputs, sentences
ADAPTERS = (1, 3)
LORA_R, LORA_ALPHA, LABELS = 8, 16, ("negative", "positive")
HEADER = """| work | adapters | precision | ours, sentences/s | peer, sentences/s (batch) | \
times as fast (least to most) | ours, peak MB | peer, peak MB |
|---|---|---|---|---|---|---|---|"""


def write_adapters(folder: Path, count: int) -> None:
    """Adapters in PEFT's format of the model in `folder`, with random numbers."""
    import torch

    from lora_nlu import RobertaForSequenceClassification, mark_trainable, save_adapter
    from lora_nlu.models.loading import load_config

    config = load_config(str(folder / "model"))
    config.update({"num_labels": len(LABELS), "apply_lora": True, "lora_r": LORA_R, "lora_alpha": LORA_ALPHA})
    model = RobertaForSequenceClassification.from_pretrained(folder / "model", config=config)
    mark_trainable(model)
    for i in range(count):
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.02)
        metadata = {"base_model": str(folder / "model"), "labels": [*LABELS]}
        save_adapter(model, folder / f"adapter{i}", metadata)


def write_sentences(path: Path, task: str, count: int) -> None:
    """Sentences of as many words as a task's inputs have tokens beside the two at their ends."""
    lengths = draw_lengths(task, count, seed=0)
    lines = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(max(n - 2, 1))) for i, n in enumerate(lengths)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ours(sentences: Path, folders: list[Path], bf16: bool) -> dict[str, Any]:
    """Seconds of the second of two passes over the sentences."""
    from lora_nlu.adapters.loading import load_sources, read_source
    from lora_nlu.data.texts import Texts
    from lora_nlu.predict import write_answers

    predictors, _ = load_sources([read_source(str(folder)) for folder in folders], bf16=bf16)
    with open(os.devnull, "w") as sink:
        for _ in range(2):
            texts, start = Texts(sentences), time.perf_counter()
            write_answers(sink, texts, predictors, [512] * len(predictors), "tsv")
            seconds = time.perf_counter() - start
    return {"seconds": seconds}


def peer(sentences: Path, folders: list[Path], bf16: bool) -> dict[str, Any]:
    """Seconds at the batch size that is fastest on some of the sentences."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    base = sentences.parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
    peft_model = PeftModel.from_pretrained(model, folders[0], adapter_name=folders[0].name)
    for folder in folders[1:]:
        peft_model.load_adapter(folder, adapter_name=folder.name)
    pipe = pipeline("text-classification", model=peft_model, tokenizer=AutoTokenizer.from_pretrained(base), top_k=None)
    lines = sentences.read_text(encoding="utf-8").splitlines()

    def seconds(lines: list[str], size: int) -> float:
        start = time.perf_counter()
        if len(folders) == 1:
            pipe(lines, batch_size=size)
        else:
            for i in range(0, len(lines), size):
                for folder in folders:
                    peft_model.set_adapter(folder.name)
                    pipe(lines[i : i + size], batch_size=size)
        return time.perf_counter() - start

    some = lines[: max(BATCHES)]
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        seconds(some, BATCHES[-1])  # not counted: memory is still being taken from the system
        best = min(BATCHES, key=lambda size: seconds(some, size))
        return {"seconds": seconds(lines, best), "batch": best}


def measured(side: str, sentences: Path, count: int, bf16: bool) -> dict[str, Any]:
    """What a side prints in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--sentences", str(sentences), "--adapters", str(count)]
    command += ["--bf16"] * bf16
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, sentences: Path, rows: int, adapters: int, precision: str, pairs: int) -> dict[str, Any]:
    mine, theirs = [], []
    for _ in range(pairs):
        mine.append(measured("ours", sentences, adapters, precision == "bf16"))
        theirs.append(measured("peer", sentences, adapters, precision == "bf16"))
    import torch

    return {
        "name": name,
        "adapters": adapters,
        "precision": precision,
        "times_as_fast": spread([b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=True)]),
        "ours_sentences_per_second": spread([rows / a["seconds"] for a in mine]),
        "peer_sentences_per_second": spread([rows / b["seconds"] for b in theirs]),
        "peer_batch": [b["batch"] for b in theirs],
        "ours_peak_mb": spread([a["peak_mb"] for a in mine]),
        "peer_peak_mb": spread([b["peak_mb"] for b in theirs]),
        "machine": machine(torch.get_num_threads(), precision),
    }


def row(result: dict[str, Any]) -> str:
    rates = [f"{result[f'{side}_sentences_per_second']['median']:.0f}" for side in ("ours", "peer")]
    peaks = [f"{result[f'{side}_peak_mb']['median']:.0f}" for side in ("ours", "peer")]
    ratio = "{median:.2f} ({min:.2f} to {max:.2f})".format(**result["times_as_fast"])
    batches = "/".join(map(str, sorted({*result["peer_batch"]})))
    cells = [result["name"], str(result["adapters"]), result["precision"]]
    cells += [rates[0], f"{rates[1]} ({batches})", ratio, *peaks]
    return f"| {' | '.join(cells)} |"


def answer(args: argparse.Namespace) -> None:
    """Be one side: print what it measured as JSON."""
    folders = [args.sentences.parent / f"adapter{i}" for i in range(args.adapters)]
    result = {"ours": ours, "peer": peer}[args.side](args.sentences, folders, args.bf16)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(result))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "peer"], help="be this side, on the files beside --sentences")
    parser.add_argument("--sentences", type=Path)
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--bf16", action="store_true", help="of --side")
    args = parser.parse_args()
    if args.side:
        answer(args)
        return
    from lora_nlu.ops.frozen import has_bf16_products

    works = [work for work in WORKS if args.only in work[0]]
    kinds = [*product(ADAPTERS, ["fp32", "bf16"] if has_bf16_products() else ["fp32"])]
    sizes: dict[str, int] = {}
    if args.smoke:
        works, args.pairs, kinds = [("SST-2", "sst2", 8)], 1, [kinds[0], kinds[-1]]
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    print(HEADER)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", **sizes)
        write_adapters(folder, max(ADAPTERS))
        for title, task, count in works:
            write_sentences(folder / "sentences.txt", task, count)
            for adapters, precision in kinds:
                results.append(compare(title, folder / "sentences.txt", count, adapters, precision, args.pairs))
                print(row(results[-1]), flush=True)
    write_results(args, "predict", results)


if __name__ == "__main__":
    main()
