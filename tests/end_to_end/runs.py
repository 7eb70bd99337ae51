"""What the end-to-end tests share beside fixtures: names, outcomes, sentences, checkpoints, folders by content."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "text-classification" / "run_glue.py"
NOUNS = "cat dog bird tree house river stone cloud road garden window table".split()
VERBS = "sees finds leaves likes paints carries follows remembers".split()
LORA = ["--apply_lora", "--lora_r", "4", "--lora_alpha", "8"]


@dataclass(frozen=True)
class Outcome:
    """How one run of run_glue.py ended: exit code, what it printed, and its error message."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def sentence(rng: random.Random, marker: str = "") -> str:
    words = [f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}" for _ in range(rng.randint(1, 3))]
    return " and ".join([*words, marker] if marker else words)


def write_tsv(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_checkpoint(folder: Path, vocabulary: Path, **settings: int) -> Path:
    """A RoBERTa checkpoint as the Hub has them: encoder and language-model head, tokenizer, config, safetensors."""
    tokenizer = RobertaTokenizer.from_pretrained(vocabulary)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48} | settings
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1, initializer_range=0.2, **shape
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder by its SHA-256."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
