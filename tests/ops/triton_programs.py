"""What test_packed_attention.py runs in processes of their own, as TRITON_INTERPRET is read when Triton is imported.

TRITON_INTERPRET=1 python triton_programs.py interpret    relative errors against float64, by case, as JSON
python triton_programs.py compile                         bytes of shared memory, by kernel and card, as JSON
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from helpers import CLASSIFIERS, ragged_batch, randomise_, tiny_config, tiny_deberta_config  # noqa: E402

from lora_nlu.methods.marking import mark_only_lora_as_trainable  # noqa: E402
from lora_nlu.ops import kernels, packed_attention  # noqa: E402
from lora_nlu.ops.packing import PackedBatch  # noqa: E402

LENGTHS, LONGEST, HEADS, VIEWS = [5, 40, 33, 1], 43, 2, 2
SEED = 2**40 + 12345  # more than 32 bits


def plain(
    inputs: list[Tensor], tables: list[Tensor | None], starts: list[list[int]], scale: float, kept: Tensor | None
) -> Tensor:
    """Attention sequence by sequence; kept [Q, A, S]: what each probability is multiplied by."""
    contexts = []
    query, key, value = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in inputs)  # [A, N, D]
    for (a, b), (m, n), view in zip(*[zip(x, x[1:], strict=False) for x in starts[:2]], starts[2], strict=True):
        q, k, v = query[:, a:b], key[:, m:n], value[:, m:n]
        scores = q @ k.mT
        distance = torch.arange(b - a)[:, None] - torch.arange(n - m)  # i - j
        for table, of_query in zip(tables, (False, True), strict=True):
            if table is not None:  # relative keys are sorted by descending distance, relative queries by ascending
                rows = table[view, LONGEST - 1 + (distance if of_query else -distance)].unflatten(-1, (HEADS, -1))
                scores = scores + torch.einsum(
                    "ajd,ijad->aij" if of_query else "aid,ijad->aij", k if of_query else q, rows
                )
        probs = (scale * scores).softmax(-1)
        if kept is not None:
            probs = probs * kept[a:b, :, : n - m].transpose(0, 1)
        contexts.append((probs @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


def error(x: Tensor, true: Tensor) -> float:
    return ((x.double() - true).norm() / true.norm()).item()


def of_function(
    dtype: torch.dtype, size: int, has_table: tuple[bool, bool], drops: bool, one_query: bool
) -> list[float]:
    """Errors of the context and of the gradients of query, key and value."""
    torch.manual_seed(0)
    keys = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    starts = [list(range(len(keys))) if one_query else keys, keys, [0, 1, 0, 1]]
    shapes = [(starts[0][-1], HEADS * size), *2 * [(keys[-1], HEADS * size)]]
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    tables = [torch.randn(VIEWS, 2 * LONGEST - 1, HEADS * size).to(dtype) if has else None for has in has_table]
    grad, scale, threshold = torch.randn(shapes[0]).to(dtype), 0.7 * size**-0.5, kernels.threshold(0.3) * drops
    randint, torch.randint = torch.randint, lambda *_, **__: torch.tensor([SEED])
    tensors: Any = tuple(torch.tensor(x, dtype=torch.int32) for x in starts)
    out = packed_attention.attend(*inputs, tensors, LONGEST, HEADS, scale, threshold, *tables)
    torch.randint = randint
    out.backward(grad)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    kept = None
    if drops:
        kept = packed_attention.kept(SEED, shapes[0][0], HEADS, LONGEST, threshold) / (1 - threshold / 65536)
    true = plain(exact, [None if x is None else x.double() for x in tables], starts, scale, kept)
    true.backward(grad.double())
    return [error(out, true), *(error(x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]


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
    results: dict[str, Any] = {}
    for dtype in packed_attention.DTYPES:
        for has_table in ((False, False), (True, True), (True, False), (False, True)):
            for drops, one_query in ((False, False), (True, False), (True, True)):
                if dtype is not torch.float32 and (one_query or not drops or sum(has_table) == 1):
                    continue  # the same code on other numbers
                if sum(has_table) == 1 and not drops:
                    continue
                size = 24 if drops else 32
                name = f"{dtype}, tables {has_table}, dropout {drops}, first tokens {one_query}"
                results[name] = of_function(dtype, size, has_table, drops, one_query)
    long = {"max_position_embeddings": 80}
    for fixed_size in (False, True):
        results[f"RoBERTa, fixed size {fixed_size}"] = of_model(tiny_config(**long), fixed_size)
        results[f"DeBERTa, fixed size {fixed_size}"] = of_model(tiny_deberta_config(**long), fixed_size)
    views = {"reg_loss_wgt": 1.0}
    results["DeBERTa, two views"] = of_model(tiny_deberta_config(**long), False, **views)
    return results


def compiled() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for cards that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    integers = {"query_starts": "*i32", "key_starts": "*i32", "view_of": "*i32", "seed": "*i64", "heads": "i32",
                "longest": "i32", "threshold": "i32", "scale": "fp32", "lse": "*fp32", "delta": "*fp32"}  # fmt: skip
    cases = [
        (torch.bfloat16, 64),
        (torch.bfloat16, 128),
        (torch.float16, 64),
        (torch.float32, 64),
        (torch.float32, 128),
    ]
    kernels_of_file = ("_forward", "_query_gradient", "_key_and_value_gradient")
    results = {}
    for dtype, size in cases if "all" in sys.argv else cases[:1]:
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
                for capability in (80, 90):
                    source = ASTSource(fn=function, signature=signature, constexprs=constants)
                    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
                    results[f"{name}, {dtype}, {size}, tables {has_table}, sm_{capability}"] = done.metadata.shared
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(interpreted() if sys.argv[1] == "interpret" else compiled(), indent=1))
