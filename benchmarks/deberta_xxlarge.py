"""DeBERTa-v2-xxlarge's shape on one machine: does it load, train with LoRA and save, in how much memory and time?

    python benchmarks/deberta_xxlarge.py --glue_dir GLUE --work FOLDER

Writes random weights in the published layout (fp16 `pytorch_model.bin`, and the same as safetensors), 1.57 billion
parameters in 3.1 GB each, with a SentencePiece tokenizer, into FOLDER; then run_glue.py, as a user starts it, takes a
few steps of 4 examples in fp32 on pairs of RTE's lengths and of MNLI's (RTE's, cut to MNLI's mean), with and without
gradient checkpointing, and writes the adapter. Prints a Markdown table; peak memory is the process's own.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from common import XXLARGE
from safetensors.torch import save_file
from transformers import DebertaV2Config

from lora_nlu.models.modeling_deberta_v2 import DebertaV2Model

ROOT = Path(__file__).resolve().parent.parent
RUN_GLUE = ROOT / "examples" / "text-classification" / "run_glue.py"
STEPS, WARM = 6, 2  # steps a run takes, and how many of them are not timed


def write_model(folder: Path, text: str, safe: bool) -> None:
    """config.json, tokenizer and random weights as the Hub's microsoft/deberta-v2-xxlarge lays them out."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    special = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "spm"),
        vocab_size=16000,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        **special,
    )
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    config = DebertaV2Config(**XXLARGE)
    with torch.device("meta"):
        shapes = {f"deberta.{name}": p.shape for name, p in DebertaV2Model(config).named_parameters()}
    size = XXLARGE["hidden_size"]
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


def measure(model: Path, pairs: Path, output: Path, *flags: str) -> dict[str, float]:
    """One run of run_glue.py: seconds a step, real tokens a step, peak memory, seconds until the first step."""
    command = [sys.executable, str(RUN_GLUE), "--model_name_or_path", str(model), "--train_file", str(pairs)]
    command += ["--do_train", "--apply_lora", "--lora_r", "16", "--lora_alpha", "32", "--max_seq_length", "320"]
    command += ["--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--learning_rate", "1e-4"]
    command += ["--logging_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--seed", "0"]
    command += ["--output_dir", str(output), "--overwrite_output_dir", "--cache_dir", str(output.parent / "cache")]
    start, ends, said = time.perf_counter(), [], []
    with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if "'loss'" in line:
                ends.append(time.perf_counter())
    if process.returncode:
        raise SystemExit(f"run_glue.py ended with {process.returncode}")
    state = json.loads((output / "trainer_state.json").read_text())
    return {
        "first_step_s": ends[0] - start,
        "step_s": (ends[-1] - ends[WARM - 1]) / (STEPS - WARM),
        "tokens": state["num_input_tokens_seen"] / STEPS,
        "peak_gib": float(re.search(r"peak memory +([\d.]+) GiB", "".join(said)).group(1)),  # type: ignore[union-attr]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", type=Path, required=True, help="folder that holds RTE")
    parser.add_argument("--work", type=Path, required=True, help="room for 6.5 GB of weights")
    args = parser.parse_args()
    lines = (args.glue_dir / "RTE" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rte = [line.split("\t")[1:] for line in lines]
    random.Random(0).shuffle(rte)
    mnli = [[" ".join(row[0].split()[:22]), " ".join(row[1].split()[:11]), row[2]] for row in rte]
    for name, pairs in (("rte", rte), ("mnli", mnli)):
        args.work.mkdir(parents=True, exist_ok=True)
        write_pairs(args.work / f"{name}.tsv", pairs)
    text = "\n".join(sentence for row in rte for sentence in row[:2])
    for layout in ("bin", "safetensors"):
        if not (args.work / layout / "config.json").exists():
            write_model(args.work / layout, text, layout == "safetensors")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32")
    print(
        "| weights | lengths | gradient checkpointing | tokens a step | s a step | to the first step, s | peak, GiB |"
    )
    print("|---|---|---|---|---|---|---|")
    for layout, lengths, checkpointing in (
        ("bin", "rte", False),
        ("safetensors", "rte", False),
        ("bin", "rte", True),
        ("bin", "mnli", False),
    ):
        flags = ["--gradient_checkpointing"] if checkpointing else []
        got = measure(args.work / layout, args.work / f"{lengths}.tsv", args.work / "output", *flags)
        print(
            f"| {layout}, fp16 | {lengths} | {'yes' if checkpointing else 'no'} | {got['tokens']:.0f} | "
            f"{got['step_s']:.1f} | {got['first_step_s']:.0f} | {got['peak_gib']:.1f} |",
            flush=True,
        )
    print(f"The adapter is {got['adapter_mb']:.1f} MB.")
    for rows in (160, 320):
        print(f"Matmul rate for {rows} rows: {matmul_gflops(rows):.0f} GFLOP/s")


if __name__ == "__main__":
    main()
