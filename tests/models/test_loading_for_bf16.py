"""Loading a checkpoint in fp16 for a model that will hold its weights in bf16: same numbers, no copy in fp32."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import DebertaV2Config, RobertaConfig

from lora_nlu.models.loading import MODELS, load_config, load_model
from lora_nlu.ops.frozen import plain

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 60,
    "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "roberta": RobertaConfig(**SIZES),
    "deberta-v2": DebertaV2Config(**SIZES, relative_attention=True, pos_att_type="p2c|c2p", share_att_key=False),
}


def write_checkpoint(folder: Path, config: Any, safe: bool, dtype: torch.dtype = torch.float16) -> None:
    torch.manual_seed(0)
    model = MODELS[config.model_type](copy.deepcopy(config))
    state = {name: x.to(dtype) for name, x in model.state_dict().items() if x.is_floating_point()}
    config.save_pretrained(folder)
    if safe:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")


def load(folder: Path, for_bf16: bool, **settings: Any) -> Any:
    config = load_config(str(folder))
    vars(config).update(settings)
    torch.manual_seed(1)
    return load_model(str(folder), config, needs_head=False, for_bf16=for_bf16)[0]


LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}


@pytest.mark.parametrize("kind", [*CONFIGS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_held_model_has_the_same_bits_as_after_loading_in_fp32(kind, dtype, safe, variant, tmp_path):
    write_checkpoint(tmp_path, CONFIGS[kind], safe, dtype)
    settings = LORA | {"lora_variant": variant}
    model, expected = load(tmp_path, True, **settings), load(tmp_path, False, **settings)
    frozen = [name for name, p in model.named_parameters() if p.dtype is dtype]
    assert len(frozen) == 2 * (6 if kind == "roberta" else 8)
    assert {p.dtype for name, p in model.named_parameters() if name not in frozen} == {torch.float32}
    assert model.hold_in_bf16(trains=True) == expected.hold_in_bf16(trains=True) == len(frozen)
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert x.dtype is y.dtype and torch.equal(plain(x), plain(y)) and x.requires_grad == y.requires_grad, name


def test_weights_that_are_not_held_become_fp32(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["roberta"], safe=True)
    model, expected = load(tmp_path, True, **LORA), load(tmp_path, False, **LORA)
    (tmp_path / "model.safetensors").unlink()  # nothing could give the weights back
    assert model.hold_in_bf16(trains=True) == 0
    for (name, x), y in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert x.dtype is torch.float32 and torch.equal(x, y), name


def test_what_trains_completely_or_starts_from_the_weights_or_is_stored_in_fp32_is_loaded_in_fp32(tmp_path):
    write_checkpoint(tmp_path, CONFIGS["roberta"], safe=True)
    pissa = load(tmp_path, True, **LORA, lora_variant="pissa")
    assert {p.dtype for p in pissa.parameters()} == {torch.float32}
    assert {p.dtype for p in load(tmp_path, True).parameters()} == {torch.float32}
    write_checkpoint(tmp_path, CONFIGS["roberta"], safe=True, dtype=torch.float32)
    assert {p.dtype for p in load(tmp_path, True, **LORA).parameters()} == {torch.float32}


PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from lora_nlu.models.loading import load_config, load_model

def own():
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])

def load(folder):
    config = load_config(folder)
    vars(config).update(apply_lora=True, lora_r=4, lora_alpha=8)
    model, _ = load_model(folder, config, needs_head=False, for_bf16=True)
    model.hold_in_bf16(trains=True)
    return model

load(sys.argv[1])  # libraries and thread pools
before, peak, ended = own(), 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, own())
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[2])
ended.set()
thread.join()
linear = sum(p.numel() for p in model.parameters() if p.is_mkldnn)
print(json.dumps({"peak": peak - before, "linear": linear}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process on Linux")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_loading_takes_no_memory_for_a_copy_in_fp32(safe, tmp_path):
    large = DebertaV2Config(**SIZES | {"hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 2048})
    write_checkpoint(tmp_path / "small", DebertaV2Config(**SIZES), safe)
    write_checkpoint(tmp_path / "large", large, safe)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "small"), str(tmp_path / "large")]
    memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert memory["linear"] > 50e6
    in_bf16, in_fp32 = 2 * memory["linear"], 4 * memory["linear"]
    print(memory)
    assert in_bf16 * 0.9 < memory["peak"] < 0.7 * in_fp32
