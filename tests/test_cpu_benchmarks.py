"""The benchmarks that compare steps and memory on a CPU: their code runs here on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_nlu.methods.table import METHODS
from lora_nlu.ops.frozen import has_bf16_products

ROOT = Path(__file__).parents[1]
BF16 = has_bf16_products()


def smoke(name: str, output: Path, *flags: str) -> tuple[list[str], Any]:
    """The rows that a benchmark prints, and its JSON file."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--smoke", "--output", str(output), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=output)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in tables}) == 1, done.stdout  # a header and rows of as many cells
    (written,) = output.glob("*.json")
    return tables[1:], json.loads(written.read_text())


def test_the_step_of_another_source_tree_and_bf16_are_measured_beside_fp32_and_the_peers(tmp_path):
    rows, (result,) = smoke("train_step", tmp_path, "--earlier", str(ROOT), *["--bf16"] * BF16)
    assert len(rows) == 1 and rows[0].startswith("| RTE B16 |")
    assert (tmp_path / f"train{'_bf16' * BF16}.json").exists()
    rates = [result[f"{kind}_matmul_gflops"]["median"] for kind in ("torch", "onednn", "packed", "fastest")]
    assert max(rates[:3]) == pytest.approx(rates[3])
    assert result["share_of_fastest_matmul"]["median"] <= result["share_of_torch_matmul"]["median"]
    seconds = {name.removesuffix("_s"): figure["median"] for name, figure in result.items() if name.endswith("_s")}
    ratios = {"times_as_fast": ("peer", "ours"), "fp32_by_earlier": ("earlier", "ours")}
    if BF16:
        ratios |= {"bf16_by_fp32": ("ours", "ours_bf16"), "bf16_by_peer_bf16": ("peer_bf16", "ours_bf16")}
        ratios |= {"bf16_by_peer_fp32": ("peer", "ours_bf16"), "bf16_by_earlier": ("earlier", "ours_bf16")}
        assert 0 < result["share_of_bf16_matmul"]["median"] < 1
    assert {*seconds} == {side for pair in ratios.values() for side in pair}
    for name, (slow, fast) in ratios.items():
        assert result[name]["median"] == pytest.approx(seconds[slow] / seconds[fast])


def test_an_evaluation_is_measured_beside_the_peer(tmp_path):
    rows, (result,) = smoke("eval", tmp_path)
    assert len(rows) == 1 and (tmp_path / "evaluate.json").exists()
    seconds = [result[f"{side}_s"]["median"] for side in ("peer", "ours")]
    assert result["times_as_fast"]["median"] == pytest.approx(seconds[0] / seconds[1])


def test_the_memory_of_weights_and_of_a_step_is_measured_in_both_precisions(tmp_path):
    rows, (result,) = smoke("memory", tmp_path)
    assert len(rows) == 1
    for side in ("ours", "ours_bf16", "peer"):
        assert result[f"{side}_weights_mb"]["median"] > 10  # embeddings of 50,265 words by 64 in fp32


def test_predictions_from_one_adapter_and_from_three_are_measured(tmp_path):
    rows, results = smoke("predict", tmp_path)
    kinds = [(1, "fp32"), (3, "bf16" if has_bf16_products() else "fp32")]
    assert [(result["adapters"], result["precision"]) for result in results] == kinds and len(rows) == 2
    for result in results:
        assert min(result[f"{side}_peak_mb"]["median"] for side in ("ours", "peer")) > 100
        rates = [result[f"{side}_sentences_per_second"]["median"] for side in ("ours", "peer")]
        assert result["times_as_fast"]["median"] == pytest.approx(rates[0] / rates[1])


def test_every_variant_has_its_rows(tmp_path):
    rows, results = smoke("variants", tmp_path)
    variants = ["LoRA+"] + [
        row.label for row in METHODS.values() if row.chosen_by.get("lora_variant", "lora") != "lora"
    ]
    assert len(rows) == len(results) >= 2 * len(variants)  # two works
    for label in variants:
        of_variant = [result for result in results if result["name"].startswith(f"{label}, ")]
        assert {result["precision"] for result in of_variant} == ({"fp32", "bf16"} if BF16 else {"fp32"})
        assert all({"lora_s", "variant_s", "peft_lora_s", "peft_variant_s"} <= result.keys() for result in of_variant)


def test_the_largest_model_is_written_trained_and_removed(tmp_path):
    rows, result = smoke("deberta_xxlarge", tmp_path, "--work", str(tmp_path / "work"))
    assert len(rows) == 2 and not (tmp_path / "work" / "safetensors").exists()
    for run in result["runs"].values():
        assert 0.1 < run["training_own_gib"] <= run["training_gib"] < 8 and run["loading_own_gib"] > 0.1
        assert run["step_s"] > 0
