"""What the end-to-end tests share beside fixtures: names, outcomes, data, checkpoints, folders by content."""

import hashlib
import json
import random
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import DebertaV2Config, DebertaV2ForMaskedLM, RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

SCRIPT = Path(__file__).parents[2] / "examples" / "text-classification" / "run_glue.py"
NOUNS = "cat dog bird tree house river stone cloud road garden window table".split()
VERBS = "sees finds leaves likes paints carries follows remembers".split()
TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.2,
}  # fmt: skip
LORA = ["--apply_lora", "--lora_r", "4", "--lora_alpha", "8"]


@dataclass(frozen=True)
class Outcome:
    """How one run of run_glue.py ended: exit code, what it printed, and its error message."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def flags_of_command(printed: str) -> list[str]:
    """The flags of run_glue.py in the command that a script prints."""
    words = shlex.split(printed.replace("\\\n", " "))
    return words[next(i for i, word in enumerate(words) if word.endswith(SCRIPT.name)) + 1 :]


def program(folder: Path, first: str, script: Path = SCRIPT) -> Path:
    """These lines and then what a script of the repository does, as a program of the script's name in `folder`."""
    path = folder / script.name
    path.write_text(f"import os, runpy, sys\n{first}\nrunpy.run_path({str(script)!r}, run_name='__main__')\n")
    return path


def sentence(rng: random.Random, marker: str = "") -> str:
    words = [f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}" for _ in range(rng.randint(1, 3))]
    return " and ".join([*words, marker] if marker else words)


def write_tsv(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows), encoding="utf-8")


def write_glue(folder: Path) -> Path:
    """RTE, CoLA, MNLI, AX and STS-B as the standard download lays them out; one word in the text decides the label."""
    rng = random.Random(0)
    for name, rows in (("train", 48), ("dev", 24), ("test", 10)):
        rte, cola, stsb = [["index", "sentence1", "sentence2", "label"]], [], [list("abcdefg")]
        stsb[0] += ["sentence1", "sentence2", "score"]
        if name == "test":
            cola.append(["index", "sentence"])
            rte[0].pop()
            stsb[0].pop()
        for i in range(rows):
            yes, score = rng.random() < 0.5, rng.randint(0, 5)
            rte.append([i, sentence(rng), sentence(rng, "surely" if yes else "never")])
            cola.append([i, sentence(rng, "well" if yes else "of")])
            stsb.append([i, *"bcdefg", sentence(rng), sentence(rng, "very " * score + "alike")])
            if name != "test":
                rte[-1].append("entailment" if yes else "not_entailment")
                cola[-1] = ["src", int(yes), "" if yes else "*", cola[-1][1]]
                stsb[-1].append(f"{score:.3f}")
        write_tsv(folder / "RTE" / f"{name}.tsv", rte)
        write_tsv(folder / "CoLA" / f"{name}.tsv", cola)
        write_tsv(folder / "STS-B" / f"{name}.tsv", stsb)
    words = {"entailment": "surely", "neutral": "perhaps", "contradiction": "never"}
    for name, rows in (
        ("train", 48),
        ("dev_matched", 24),
        ("dev_mismatched", 18),
        ("test_matched", 7),
        ("test_mismatched", 9),
    ):
        mnli: list[list[object]] = [["index", "sentence1", "sentence2", "label1", "gold_label"]]
        for i in range(rows):
            label = rng.choice([*words])
            mnli.append([i, sentence(rng), sentence(rng, words[label]), label, label])
        if name.startswith("test"):
            mnli = [row[:3] for row in mnli]
        write_tsv(folder / "MNLI" / f"{name}.tsv", mnli)
    ax = [[i, sentence(rng), sentence(rng, rng.choice([*words.values()]))] for i in range(5)]
    write_tsv(folder / "AX" / "test.tsv", [["index", "sentence1", "sentence2"], *ax])
    return folder


def write_vocabulary(folder: Path, glue: Path) -> Path:
    """vocab.json and merges.txt of a byte-level BPE trained on a GLUE folder's text."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(path) for path in sorted(glue.glob("*/train.tsv"))], trainer)
    bpe.model.save(str(folder))
    RobertaConfig().save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path, vocabulary: Path, **settings: float) -> Path:
    """A RoBERTa checkpoint as the Hub has them: encoder and language-model head, tokenizer, config, safetensors."""
    tokenizer = RobertaTokenizer.from_pretrained(vocabulary)
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1, **(TINY | settings)
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_sentencepiece(folder: Path, text: Path, normalization: str = "nmt_nfkc") -> None:
    """spm.model and its settings as Microsoft's checkpoints have them: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3."""
    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spm"),
        vocab_size=150,
        hard_vocab_limit=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        normalization_rule_name=normalization,
        minloglevel=2,
    )
    (folder / "spm.vocab").unlink()
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')


def write_deberta(folder: Path, **settings) -> Path:
    """A checkpoint in v2-xxlarge's style around the tokenizer in `folder`: encoder and masked-language head."""
    config = DebertaV2Config(
        vocab_size=160,
        max_position_embeddings=64,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        pos_att_type="p2c|c2p",
        position_biased_input=False,
        conv_kernel_size=3,
        conv_act="gelu",
        **(TINY | {"share_att_key": True} | settings),
    )
    torch.manual_seed(0)
    DebertaV2ForMaskedLM(config).save_pretrained(folder)
    return folder


def write_models(folder: Path, glue: Path, **settings) -> dict[str, Path]:
    """Both models, with tokenizers of a GLUE folder's text, by name: roberta and deberta."""
    write_checkpoint(folder / "roberta", write_vocabulary(folder / "vocabulary", glue), **settings)
    text = folder / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(glue.glob("*/train.tsv"))))
    write_sentencepiece(folder / "deberta", text)
    write_deberta(folder / "deberta", **settings)
    return {name: folder / name for name in ("roberta", "deberta")}


def cut_off(finished: Path, folder: Path, after: int) -> Path:
    """What a run would have left if it had been cut off after the checkpoint of that step."""
    shutil.copytree(finished, folder)
    for path in folder.glob("*"):
        if path.is_file():
            path.unlink()
        elif path.name != f"checkpoint-{after}":
            shutil.rmtree(path)
    run = json.loads((finished / "run.json").read_text())
    del run["trained"]
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Every file under a folder by its SHA-256."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
