"""The Triton kernels of packed_attention.py without a GPU: interpreted against float64, and compiled for two cards.

The interpreter runs one block after another, so it shows wrong numbers, but neither races nor speed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ragged_batch, tiny_config

import lora_nlu.ops
from lora_nlu.models import RobertaForSequenceClassification
from lora_nlu.ops import kernels
from lora_nlu.ops.packing import PackedBatch, lengths_of

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (it is for Linux alone)"
)


@needs_triton
@pytest.mark.parametrize("mode, count", [("interpret", 9), ("compile", 6)])
def test_the_kernels_are_right_in_the_interpreter_and_compile_for_cards(mode, count):
    """A part of what `test.sh --all` runs: context, gradients, dropout's mask, whole models; shared memory."""
    program = Path(__file__).with_name("triton_programs.py")
    done = subprocess.run([sys.executable, program, mode], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    assert len(json.loads(done.stdout)) == count


@needs_triton
def test_dropout_by_its_definition_has_the_rate_and_no_pattern():
    from lora_nlu.ops.packed_attention import kept

    keeps = kept(2**40 + 1, 2000, 3, 101, kernels.threshold(0.1)).double()  # [Q, A, S]
    assert abs(keeps.mean() - 0.9) < 4 * (0.09 / keeps.numel()) ** 0.5
    for axis in range(3):  # neighbours by query, head and key are independent
        first, second = keeps.narrow(axis, 0, keeps.shape[axis] - 1), keeps.narrow(axis, 1, keeps.shape[axis] - 1)
        covariance = ((first - 0.9) * (second - 0.9)).mean()
        assert abs(covariance) < 5 * 0.09 / first.numel() ** 0.5
    other = kept(2**40 + 2, 2000, 3, 101, kernels.threshold(0.1)).double()
    assert abs(((keeps - 0.9) * (other - 0.9)).mean()) < 5 * 0.09 / keeps.numel() ** 0.5


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("first_tokens", [False, True])
@pytest.mark.parametrize("lengths", [[3, 1, 5, 5, 1, 3], [4, 4], [2, 7, 2, 2]])
def test_a_plan_on_the_device_has_the_starts_of_the_one_on_the_cpu(lengths, first_tokens, views):
    mask = ragged_batch(lengths)["attention_mask"]
    packed = PackedBatch.from_mask(mask, *mask.shape, mask.device)
    found = packed.starts_on_device(first_tokens, views)
    assert [x.dtype for x in found] == 3 * [torch.int32]
    expected = packed.starts(first_tokens, views)
    if sorted(lengths[: len(lengths) // 2]) != sorted(lengths[len(lengths) // 2 :]) and views == 2:
        found, expected = found[:2], expected[:2]  # views are two equal halves
    assert all(torch.equal(x.long(), y) for x, y in zip(found, expected, strict=True))


def test_a_plan_on_the_device_reads_no_value():
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    device = torch.device("meta")
    plans = [
        PackedBatch.from_mask(mask.to(device), *mask.shape, device, lengths=lengths_of(mask)),
        PackedBatch.of_size(mask.to(device), 12),
    ]
    for plan in plans:
        assert [len(x) for x in plan.starts_on_device(False, 2)] == [4, 4, 3]


def test_a_plan_of_fixed_size_leaves_padding_out():
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    plan = PackedBatch.of_size(mask, 12)
    queries, keys, _ = plan.starts_on_device(False, 1)
    assert keys.tolist() == queries.tolist() == [0, 3, 4, 9]
    assert plan.starts_on_device(True, 1)[0].tolist() == [0, 1, 2, 3]


def test_wrong_lengths_do_not_lead_out_of_the_rows():
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    plan = PackedBatch.from_mask(mask, *mask.shape, mask.device, lengths=[1, 1, 1])
    starts = plan.starts_on_device(False, 1)
    assert all(int(x.max()) <= len(plan.slots) and (x.diff() >= 0).all() for x in starts[:2])


@needs_triton
def test_tensors_that_do_not_belong_together_are_refused_before_a_kernel_reads_them(monkeypatch):
    from lora_nlu.ops import packed_attention

    monkeypatch.setattr(kernels, "packed_attention", lambda: packed_attention)
    monkeypatch.setattr(packed_attention, "can_attend", lambda *args: True)
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    packed = PackedBatch.from_mask(mask, *mask.shape, mask.device)
    elsewhere = PackedBatch.from_mask(mask.to("meta"), *mask.shape, torch.device("meta"), lengths=[3, 1, 5])
    rows = torch.randn(9, 16)
    cases = [
        ("key", (rows, rows[:, :8], rows, packed), None),
        ("value", (rows, rows, rows[:5], packed), None),
        ("starts", (rows, rows, rows, elsewhere), None),
        ("relative table", (rows, rows, rows, packed), torch.randn(1, 3, 16)),
    ]
    for name, arguments, table in cases:
        with pytest.raises(ValueError, match=name):
            kernels.attention(*arguments, 2, 0.25, 0.0, table)


@needs_triton
def test_rows_of_no_sequence_are_not_left_to_torch_which_would_not_write_them(monkeypatch):
    """Their gradients would be whatever the memory was, and be added to those of the weights."""
    from torch.nn.attention import varlen

    from lora_nlu.ops import packed_attention

    calls = []
    monkeypatch.setattr(kernels, "packed_attention", lambda: packed_attention)
    monkeypatch.setattr(packed_attention, "can_attend", lambda *args: True)
    monkeypatch.setattr(packed_attention, "has_torch_kernel", lambda *args: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, *args: calls.append("torch") or query)
    ours = SimpleNamespace(apply=lambda query, *args: calls.append("ours") or query)
    monkeypatch.setattr(packed_attention, "_Attention", ours)
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    for plan in (PackedBatch.from_mask(mask, *mask.shape, mask.device), PackedBatch.of_size(mask, 12)):
        rows = torch.randn(len(plan.slots), 16)
        kernels.attention(rows, rows, rows, plan, 2, 8**-0.5, 0.0)
    assert calls == ["torch", "ours"]


@needs_triton
def test_torch_attends_without_dropout_in_half_precision_on_a_card_that_can(monkeypatch):
    """torch's function has no CPU: what it would get is checked against its signature and computed plainly."""
    import inspect

    from torch.nn.attention import varlen

    from lora_nlu.ops import packed_attention

    signature = inspect.signature(varlen.varlen_attn)

    def checked(*args, **kwargs):
        given = SimpleNamespace(**signature.bind(*args, **kwargs).arguments)
        starts = (given.cu_seq_q, given.cu_seq_k)
        assert all(x.dtype is torch.int32 for x in starts) and given.query.shape[1:] == (2, 8)
        assert [int(x.diff().max()) for x in starts] == [given.max_q, given.max_k]
        out = []
        for a, b, m, n in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
            q, k, v = (x.transpose(0, 1) for x in (given.query[a:b], given.key[m:n], given.value[m:n]))
            out.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(varlen, "varlen_attn", checked)
    monkeypatch.setattr(packed_attention, "has_torch_kernel", lambda *args: True)
    mask = ragged_batch([3, 1, 5])["attention_mask"]
    packed = PackedBatch.from_mask(mask, *mask.shape, mask.device)
    key, value = torch.randn(2, 9, 16)
    for first_tokens in (False, True):
        query = torch.randn(3 if first_tokens else 9, 16)
        starts = packed.starts_on_device(first_tokens, 1)
        found = packed_attention.attend(query, key, value, starts, 5, 2, 8**-0.5, 0)
        expected = kernels.torch_attention(
            query, key, value, ((None, None), packed.starts(first_tokens, 1), 5, 2, 8**-0.5, 0.0, 0)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "setting, reason",
    [
        ("1", "has no effect without Triton 3.4 (pip install triton)"),
        pytest.param("1", "has no effect without a GPU", marks=needs_triton),
        ("false", "is 1 or 0, not 'false'; it is taken for 0"),
    ],
)
def test_a_line_says_why_the_setting_has_no_effect(setting, reason, monkeypatch, caplog):
    if "Triton" in reason:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, "lora_nlu.ops.packed_attention", raising=False)
        monkeypatch.delattr(lora_nlu.ops, "packed_attention", raising=False)
    model = RobertaForSequenceClassification(tiny_config()).eval()
    batch = ragged_batch([3, 5])
    found = []
    try:
        for value in (setting, "0"):
            monkeypatch.setenv("LORA_NLU_PACKED_ATTENTION", value)
            kernels.packed_attention.cache_clear()
            found += [model(**batch).logits, model(**batch).logits]
    finally:
        kernels.packed_attention.cache_clear()
    assert caplog.text.count("LORA_NLU_PACKED_ATTENTION") == 1 and reason in caplog.text
    assert all(torch.equal(found[0], logits) for logits in found)
