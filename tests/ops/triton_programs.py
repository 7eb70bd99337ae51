"""The kernels of packed_attention.py without a GPU, each in a process of its own: Triton reads its settings on import.

python triton_programs.py interpret [all]   errors against float64, by case, as JSON
python triton_programs.py compile [all]     bytes of shared memory, by kernel and card, as JSON

Exits with 1 if an error is over its bound, or a kernel does not fit the 99 KiB of every card from Ampere on.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

os.environ["TRITON_INTERPRET"] = str(int("interpret" in sys.argv))
IS_COMPLETE = "all" in sys.argv
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "tests"), str(ROOT / "benchmarks")]
import gpu_attention  # noqa: E402
from gpu_attention import BOTH, Equal, equal  # noqa: E402
from helpers import CLASSIFIERS, ragged_batch, randomise_, tiny_config, tiny_deberta_config  # noqa: E402

from lora_nlu.methods.marking import mark_only_lora_as_trainable  # noqa: E402
from lora_nlu.ops import kernels, packed_attention  # noqa: E402
from lora_nlu.ops.packing import PackedBatch  # noqa: E402

LENGTHS = [5, 40, 33, 1]


def error(x: Tensor, true: Tensor) -> float:
    return ((x.double() - true).norm() / true.norm()).item()


def step(model: Any, batch: dict[str, Any], is_on: bool) -> list[Tensor]:
    """Loss and gradients, with the functions on or off."""
    kernels.packed_attention = lambda: packed_attention if is_on else None  # type: ignore[assignment]
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def of_model(config: Any, fixed_size: bool, **settings: Any) -> float:
    """The largest error of loss and gradients of a LoRA classifier in fp32, and that it ran with the functions."""
    config.update({"apply_lora": True, "lora_r": 4, "lora_alpha": 8, **settings})
    model = randomise_(CLASSIFIERS[config.model_type][0](config)).train()
    mark_only_lora_as_trainable(model)
    batch: dict[str, Any] = ragged_batch(LENGTHS) | {"labels": torch.arange(len(LENGTHS)) % 3}
    if fixed_size:
        batch["packed"] = PackedBatch.of_size(batch["attention_mask"], 96)
    calls = []
    attend = packed_attention.attend
    packed_attention.attend = lambda *args: calls.append(1) or attend(*args)  # type: ignore
    found = step(model, batch, True)
    packed_attention.attend = attend
    assert len(calls) == config.num_hidden_layers, calls
    true = step(copy.deepcopy(model).double(), batch, False)
    assert len(found) == len(true) > 5
    return max(error(x, y) for x, y in zip(found, true, strict=True) if y.norm() > 1e-9)


def interpreted() -> dict[str, Any]:
    rows = [Equal("fp32", 24, tables, 0.3, lengths=LENGTHS) for tables in ("", "c2p", "p2c")]
    rows += [Equal("fp32", 32, BOTH, 0.0, lengths=LENGTHS), Equal("fp32", 24, BOTH, 0.3, True, LENGTHS)]
    rows += [Equal(dtype, 32, BOTH, 0.3, lengths=LENGTHS) for dtype in ("bf16", "fp16")]
    if IS_COMPLETE:
        rows = [
            Equal(dtype, size, tables, p, first, LENGTHS)
            for dtype in gpu_attention.PRECISIONS
            for size in (24, 32)
            for tables in ("", "c2p", "p2c", BOTH)
            for p in (0.0, 0.3)
            for first in (False, True)
        ]
    results: dict[str, Any] = {row.name: equal(row, torch.device("cpu")) for row in rows}
    long = {"max_position_embeddings": 80}
    results["RoBERTa, fixed size"] = of_model(tiny_config(**long), True)
    results["DeBERTa, two views"] = of_model(tiny_deberta_config(**long), False, reg_loss_wgt=1.0)
    if IS_COMPLETE:
        results["RoBERTa"] = of_model(tiny_config(**long), False)
        results["DeBERTa, fixed size"] = of_model(tiny_deberta_config(**long), True)
    return results


def compiled() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for cards that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    integers = {"query_starts": "*i32", "key_starts": "*i32", "view_of": "*i32", "seed": "*i64", "heads": "i32",
                "longest": "i32", "threshold": "i32", "scale": "fp32", "lse": "*fp32", "delta": "*fp32"}  # fmt: skip
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(bf16, 64), (bf16, 128), (fp16, 64), (fp32, 64), (fp32, 128)]
    kernels_of_file = ("_forward", "_query_gradient", "_key_and_value_gradient")
    results = {}
    for dtype, size in cases if IS_COMPLETE else cases[:1]:
        for has_table in (False, True):
            sizes = packed_attention.blocks(size, dtype, has_table)
            options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
            constants = {**sizes, "HAS_KEY": has_table, "HAS_QUERY": has_table, "DROPS": True}
            if not has_table:
                constants |= dict.fromkeys(("relative_key", "relative_query"))
            for name in kernels_of_file:
                function = getattr(packed_attention, name)
                types = dict.fromkeys(function.arg_names, f"*{names[dtype]}") | integers
                types |= dict.fromkeys(constants, "constexpr")
                signature = {argument: types[argument] for argument in function.arg_names}
                for capability in (80, 90) if IS_COMPLETE else (90 if has_table else 80,):
                    aligned = {
                        (n,): [["tt.divisibility", 16]] for n, kind in enumerate(signature.values()) if kind[0] == "*"
                    }
                    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
                    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                    results[f"{name}, {dtype}, {size}, tables {has_table}, sm_{capability}"] = done.metadata.shared
    return results


def is_right(found: Any) -> bool:
    """Of an attention's row, a model's error, or a kernel's bytes of shared memory."""
    if isinstance(found, dict):
        return found["ok"] and found["query"] > 0
    return found < 1e-5 if isinstance(found, float) else 0 < found <= 99 * 1024


if __name__ == "__main__":
    torch.set_num_threads(1)
    gpu_attention.REPEATS = 1
    results = interpreted() if "interpret" in sys.argv else compiled()
    print(json.dumps(results, indent=1))
    sys.exit(not all(map(is_right, results.values())))
