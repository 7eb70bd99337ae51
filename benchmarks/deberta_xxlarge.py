"""DeBERTa-v2-xxlarge's shape on one machine: does it load, train with LoRA and save, in how much memory and time?

    python benchmarks/deberta_xxlarge.py --glue_dir GLUE --work FOLDER [--only "safetensors, rte"]

Writes random weights in the published layout (fp16 `pytorch_model.bin`, and the same as safetensors), 1.57 billion
parameters in 3.1 GB each, with a SentencePiece tokenizer, into FOLDER, and removes them at the end; then run_glue.py,
as a user starts it, takes a few steps of 4 examples in fp32 and in bf16 on pairs of RTE's lengths and of MNLI's
(RTE's, cut to MNLI's mean), with and without gradient checkpointing, and writes the adapter. Prints a Markdown table.
Memory is read 50 times a second from /proc, until training starts and after it: the process's own (RssAnon), and the
highest sum with the pages of the weights file that are mapped, which the system may drop at any time (VmHWM).
"""

import json
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from common import XXLARGE, argument_parser, machine, write_results
from safetensors.torch import save_file
from transformers import DebertaV2Config

from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model
from lora_nlu.training.file_list import RUN

ROOT = Path(__file__).resolve().parent.parent
RUN_GLUE = ROOT / "examples" / "text-classification" / "run_glue.py"
STEPS, WARM = 6, 2  # steps a run takes, and how many of them are not timed
GIB = 2**30
SMALL = {"vocab_size": 16000, "hidden_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 512}  # of --smoke
RUNS = [  # file of the weights, lengths, gradient checkpointing, precision
    ("bin", "rte", False, "fp32"),
    ("bin", "rte", False, "bf16"),
    ("safetensors", "rte", False, "fp32"),
    ("safetensors", "rte", False, "bf16"),
    ("bin", "rte", True, "fp32"),
    ("bin", "rte", True, "bf16"),
    ("bin", "mnli", False, "fp32"),
    ("bin", "mnli", False, "bf16"),
]


def write_model(folder: Path, text: str, safe: bool, shape: dict[str, Any]) -> None:
    """config.json, tokenizer and random weights as the Hub's microsoft/deberta-v2-xxlarge lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    special = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=min(16000, shape["vocab_size"]),
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **special,
    )
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    config = DebertaV2Config(**shape)
    with torch.device("meta"):
        shapes = {f"deberta.{name}": p.shape for name, p in DebertaV2Model(config).named_parameters()}
    size = shape["hidden_size"]
    shapes |= {"lm_predictions.lm_head.dense.weight": torch.Size([size, size])}  # published, unused here
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        noise = (0.02 * torch.randn(shape, generator=generator)).half()
        state[name] = noise + 1 if name.endswith("LayerNorm.weight") else noise
    if safe:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("dtype", None)  # the published config doesn't know it, and says model_type alone
    (folder / "config.json").write_text(json.dumps(settings))


def write_pairs(path: Path, pairs: list[list[str]]) -> None:
    lines = ["sentence1\tsentence2\tlabel", *("\t".join(row) for row in pairs)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class MemoryReader(threading.Thread):
    """Reads the memory of a process, in bytes, while it runs: its peaks before a file appears and after."""

    def __init__(self, pid: int, started: Path) -> None:
        super().__init__(daemon=True)
        self.path, self.started = Path(f"/proc/{pid}/status"), started
        self.loading, self.training = {"own": 0, "with_file": 0}, {"own": 0, "with_file": 0}

    def run(self) -> None:
        while True:
            try:
                fields = dict(line.split(":", 1) for line in self.path.read_text().splitlines())
                own, mapped = (1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
            except (OSError, KeyError):  # it has ended
                return
            peaks = self.training if self.started.exists() else self.loading
            peaks["own"], peaks["with_file"] = max(peaks["own"], own), max(peaks["with_file"], own + mapped)
            time.sleep(0.02)


def measure(model: Path, pairs: Path, output: Path, *flags: str) -> dict[str, float]:
    """One run of run_glue.py: seconds a step, real tokens a step, peak memory, seconds until the first step."""
    command = [sys.executable, str(RUN_GLUE), "--model_name_or_path", str(model), "--train_file", str(pairs)]
    command += ["--do_train", "--apply_lora", "--lora_r", "16", "--lora_alpha", "32", "--max_seq_length", "320"]
    command += ["--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--learning_rate", "1e-4"]
    command += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--seed", "0"]
    command += ["--output_dir", str(output), "--cache_dir", str(output.parent / "cache")]
    shutil.rmtree(output, ignore_errors=True)
    start, ends = time.perf_counter(), []
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        memory = MemoryReader(process.pid, output / RUN)
        memory.start()
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:
                ends.append(time.perf_counter())
    memory.join()
    if process.returncode:
        raise SystemExit(f"run_glue.py ended with {process.returncode}")
    state = json.loads((output / "trainer_state.json").read_text())
    return {
        "first_step_s": ends[0] - start,
        "step_s": (ends[-1] - ends[WARM - 1]) / (STEPS - WARM),
        "tokens": state["num_input_tokens_seen"] / STEPS,
        "loading_own_gib": memory.loading["own"] / GIB,
        "loading_gib": memory.loading["with_file"] / GIB,
        "training_own_gib": memory.training["own"] / GIB,
        "training_gib": memory.training["with_file"] / GIB,
        "adapter_mb": (output / "adapter_model.safetensors").stat().st_size / 1e6,
    }


def matmul_gflops(rows: int, seconds: float = 4.0) -> float:
    """The machine's own rate for [rows, H] x [H, 4 H], the largest product of a layer."""
    size = XXLARGE["hidden_size"]
    x, weight = torch.randn(rows, size), torch.randn(4 * size, size)  # type: ignore[call-overload]
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        x @ weight.t()
        count += 1
    return count * 8 * rows * size * size / (time.perf_counter() - start) / 1e9  # type: ignore[operator]


def pairs_of_rte(glue: Path | None) -> list[list[str]]:
    """RTE's training pairs and labels, shuffled; of --smoke, words at random."""
    drawn = random.Random(0)
    if glue is None:
        words = ["".join(drawn.choices("abcdefgh", k=5)) for _ in range(300)]
        labels = ["entailment", "not_entailment"]
        return [[" ".join(drawn.choices(words, k=n)) for n in (30, 12)] + [labels[i % 2]] for i in range(200)]
    lines = (glue / "RTE" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rte = [line.split("\t")[1:] for line in lines]
    drawn.shuffle(rte)
    return rte


HEADER = """| weights, lengths, precision | tokens a step | s a step | to the first step, s | \
loading, own memory at most, GiB | with the mapped file | training, own memory at most, GiB | with the mapped file |
|---|---|---|---|---|---|---|---|"""


def row(name: str, result: dict[str, float]) -> str:
    memory = [f"{result[key]:.2f}" for key in ("loading_own_gib", "loading_gib", "training_own_gib", "training_gib")]
    cells = [name, f"{result['tokens']:.0f}", f"{result['step_s']:.2f}", f"{result['first_step_s']:.0f}", *memory]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--glue_dir", type=Path, help="folder that holds RTE; not for --smoke")
    parser.add_argument("--work", type=Path, required=True, help="room for 3.1 GB of weights in each layout")
    args = parser.parse_args()
    if not (args.smoke or args.glue_dir):
        parser.error("--glue_dir is missing.")
    shape, runs = XXLARGE | (SMALL if args.smoke else {}), {}
    for layout, lengths, checkpointing, precision in RUNS[2:4] if args.smoke else RUNS:
        name = f"{layout}, {lengths}, {'gradient checkpointing, ' * checkpointing}{precision}"
        if args.only in name:
            flags = ["--gradient_checkpointing"] * checkpointing + ["--bf16"] * (precision == "bf16")
            runs[name] = (layout, lengths, flags)
    rte = pairs_of_rte(None if args.smoke else args.glue_dir)
    mnli = [[" ".join(row[0].split()[:22]), " ".join(row[1].split()[:11]), row[2]] for row in rte]
    args.work.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("rte", rte), ("mnli", mnli)):
        write_pairs(args.work / f"{name}.tsv", pairs)
    text = "\n".join(sentence for row in rte for sentence in row[:2])
    results = {}
    try:
        for layout in dict.fromkeys(layout for layout, _, _ in runs.values()):
            write_model(args.work / layout, text, layout == "safetensors", shape)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
        print(HEADER)
        for name, (layout, lengths, flags) in runs.items():
            files = args.work / layout, args.work / f"{lengths}.tsv", args.work / "output"
            results[name] = measure(*files, *flags)
            print(row(name, results[name]), flush=True)
    finally:
        for layout in ("bin", "safetensors"):
            shutil.rmtree(args.work / layout, ignore_errors=True)
    print(f"The adapter is {results[name]['adapter_mb']:.1f} MB.")
    for rows in (160, 320):
        print(f"Matmul rate for {rows} rows: {matmul_gflops(rows, 0.1 if args.smoke else 4.0):.0f} GFLOP/s")
    of_machine = machine(torch.get_num_threads(), "fp32 and bf16")
    write_results(args, "deberta_xxlarge", {"runs": results, "machine": of_machine})


if __name__ == "__main__":
    main()
