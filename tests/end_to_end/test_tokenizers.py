"""Checkpoints whose tokenizer is not RoBERTa's own: BERT's, and those that transformers has in Python alone."""

import json
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from runs import LORA, NOUNS, VERBS, Outcome
from test_run_glue import read, scores, succeeded
from transformers import AutoTokenizer, RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

from lora_nlu.adapters.__main__ import main as convert
from lora_nlu.data.examples import Examples
from lora_nlu.data.tokenization import tokenize
from lora_nlu.models.tokenizer import load_tokenizer, tokenizer_fingerprint

RUN = ["--max_seq_length", "48", "--learning_rate", "1e-2", "--save_strategy", "no"]
WORDS = [*NOUNS, *VERBS, "the", "and", "surely", "never"]


def write_base(folder: Path, tokenizer_class: str, vocab_size: int, **settings) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = RobertaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=66,
        initializer_range=0.2,
        **shape | {"type_vocab_size": 1} | settings,
    )
    torch.manual_seed(0)
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_words(tmp_path_factory) -> Path:
    """A RoBERTa with one token type and padding token 1; the tokenizer is BERT's, whose padding token is 0."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return write_base(folder, "BertTokenizer", len(vocabulary))


def write_python(folder: Path, tokenizer_class: str) -> Path:
    """A tokenizer by characters and a few merges, in the files that fairseq's have."""
    subwords = [*(f"{c}@@" for c in string.ascii_lowercase), *string.ascii_lowercase, "th@@", "the", "cat"]
    (folder / "vocab.txt").write_text("".join(f"{piece} 1\n" for piece in subwords))
    (folder / "bpe.codes").write_text("t h 10\nth e</w> 9\nc a 8\nca t</w> 7\n")
    return write_base(folder, tokenizer_class, len(subwords) + 5)


@pytest.fixture(scope="module", params=["BertweetTokenizer", "PhobertTokenizer"])
def in_python(request, tmp_path_factory) -> Path:
    return write_python(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def run(call, glue, tmp_path) -> Callable[..., tuple[Path, Outcome]]:
    """Full fine-tuning on RTE's pairs, or what other flags say; the output folder and how it ended."""

    def start(base: Path, name: str, *flags: object) -> tuple[Path, Outcome]:
        examples = ["--model_name_or_path", base, "--task_name", "rte", "--glue_dir", glue]
        return tmp_path / name, succeeded(call(*examples, *RUN, *flags, "--output_dir", tmp_path / name))

    return start


def test_a_roberta_with_one_token_type_takes_pairs_of_a_bert_tokenizer_without_types_and_says_so(run, bert_words):
    trained, outcome = run(bert_words, "o", "--do_train", "--max_steps", 4, "--do_eval", "--do_predict")
    assert outcome.out.count("token_type_ids are left out: the model has only one token type.") == 1
    _, again = run(trained, "again", "--do_eval", "--do_predict")
    assert scores(trained.parent / "again" / "eval_results.json") == scores(trained / "eval_results.json")
    assert "left out" in again.out


def test_the_model_trained_with_another_padding_token_is_transformers_own(run, bert_words, glue):
    """While training, transformers wrote the tokenizer's padding token into the config: positions then moved."""
    trained, _ = run(bert_words, "o", "--do_train", "--max_steps", 4, "--do_eval")
    assert read(trained / "config.json")["pad_token_id"] == 1
    tokenizer, model = AutoTokenizer.from_pretrained(trained), RobertaForSequenceClassification.from_pretrained(trained)
    rows = [line.split("\t") for line in (glue / "RTE" / "dev.tsv").read_text().splitlines()[1:]]
    losses = []
    for _, one, two, label in rows:
        ids = tokenizer(one, two, truncation=True, max_length=48, return_token_type_ids=False, return_tensors="pt")
        with torch.no_grad():
            losses.append(model.eval()(**ids, labels=torch.tensor([model.config.label2id[label]])).loss.item())
    assert read(trained / "eval_results.json")["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.parametrize(("types", "kept"), [(1, False), (2, True)])
def test_token_types_are_left_out_only_where_the_model_has_one(bert_words, types, kept):
    config = RobertaConfig(vocab_size=99, max_position_embeddings=66, type_vocab_size=types)
    tokenizer, notes = load_tokenizer(str(bert_words), config)
    assert ("token_type_ids" in tokenizer("the cat", "the dog")) == kept and bool(notes) != kept


def test_a_tokenizer_in_python_trains_evaluates_and_is_saved_as_it_was(run, in_python):
    """transformers' own way of saving BertweetTokenizer loses half of its merges."""
    trained, outcome = run(in_python, "o", "--do_train", "--max_steps", 4, "--do_eval", "--do_predict")
    assert "overflowing tokens" not in outcome.out
    for name in ("vocab.txt", "bpe.codes"):
        assert (trained / name).read_bytes() == (in_python / name).read_bytes()
    again, _ = run(trained, "again", "--do_eval", "--do_predict")
    assert scores(again / "eval_results.json") == scores(trained / "eval_results.json")
    predictions = "predict_results_rte.tsv"
    assert (again / predictions).read_bytes() == (trained / predictions).read_bytes()


def test_tokens_of_a_tokenizer_in_python_are_its_own_and_kept_by_its_files(in_python, tmp_path):
    config = RobertaConfig(vocab_size=99, max_position_embeddings=66, type_vocab_size=1)
    texts = ["the cat and the dog", "never surely"]
    for n, codes in enumerate(
        ["t h 10\nth e</w> 9\nc a 8\nca t</w> 7\n", "c a 8\n", "t h 10\nth e</w> 9\nc a 8\nca t</w> 7\n"]
    ):
        base = tmp_path / str(n)
        base.mkdir()
        for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
            (base / name).write_bytes((in_python / name).read_bytes())
        (base / "bpe.codes").write_text(codes)
        tokenizer, notes = load_tokenizer(str(base), config)
        examples = Examples(
            {"train": Dataset.from_dict({"text": texts, "text_pair": texts[::-1], "label": [0, 1]})}, ("a", "b")
        )
        got = tokenize(examples, tokenizer, 64, str(tmp_path / "cache"))[0]["train"]
        want = AutoTokenizer.from_pretrained(base)(texts, texts[::-1])
        assert got["input_ids"][:] == want["input_ids"]
        assert {*got.column_names} == {"label", "input_ids", "attention_mask"}
        assert not notes


def test_a_tokenizer_in_python_without_its_files_is_refused_by_name(call, glue, tmp_path):
    base = write_python(tmp_path, "PhobertTokenizer")
    (base / "bpe.codes").unlink()
    flags = ["--model_name_or_path", base, "--task_name", "rte", "--glue_dir", glue, "--do_train"]
    outcome = call(*flags, "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and f"No tokenizer in {base}" in outcome.err and "--tokenizer_name" in outcome.err


def test_emojis_that_are_not_normalised_are_reported(tmp_path, monkeypatch):
    base = write_python(tmp_path, "BertweetTokenizer")
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "BertweetTokenizer", "normalization": true}')
    monkeypatch.setitem(sys.modules, "emoji", None)
    _, notes = load_tokenizer(
        str(base),
        SimpleNamespace(
            vocab_size=99, type_vocab_size=1, model_type="roberta", max_position_embeddings=66, pad_token_id=1
        ),
    )
    assert len(notes) == 1 and "pip install emoji" in notes[0]


# ------------------------------------------------------------------------------------------- another tokenizer


def swapped(base: Path, folder: Path) -> Path:
    """The same tokenizer but for two words, which have each other's number."""
    lines = (base / "vocab.txt").read_text().split("\n")
    cat, dog = lines.index("cat"), lines.index("dog")
    lines[cat], lines[dog] = lines[dog], lines[cat]
    (folder / "vocab.txt").write_text("\n".join(lines))
    return folder


def cased(base: Path, folder: Path) -> Path:
    """The same vocabulary, and words with a capital are not in it."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"do_lower_case": False}))
    return folder


@pytest.mark.parametrize("method", [LORA, ["--apply_bitfit"], []], ids=["lora", "bitfit", "full"])
@pytest.mark.parametrize("change", [swapped, cased])
def test_what_was_trained_with_another_tokenizer_is_refused(change, method, call, run, bert_words, glue, tmp_path):
    trained, _ = run(bert_words, "o", *method, "--do_train", "--max_steps", 2, "--do_eval")
    other = change(bert_words, Path(shutil.copytree(bert_words, tmp_path / "other")))
    flags = ["--task_name", "rte", "--glue_dir", glue, *RUN]
    start = ["--model_name_or_path", trained]
    if method:
        path_flag = "--lora_path" if method == LORA else "--adapter_path"
        start = ["--model_name_or_path", bert_words, path_flag, trained]
    for work in (["--do_eval"], ["--do_predict"], ["--do_train", "--max_steps", 1]):
        outcome = call(*flags, *start, "--tokenizer_name", other, *work, "--output_dir", tmp_path / "e")
        assert outcome.code == 1 and f"{trained}: was trained with another tokenizer" in outcome.err, outcome.err
        assert "as --tokenizer_name" in outcome.err and not (tmp_path / "e" / "eval_results.json").exists()
    succeeded(call(*flags, *start, "--tokenizer_name", bert_words, "--do_eval", "--output_dir", tmp_path / "e"))
    assert scores(tmp_path / "e" / "eval_results.json") == scores(trained / "eval_results.json")
    for name in ("run.json", "run_metadata.json"):  # as an older version wrote them
        if (trained / name).is_file():
            record = read(trained / name)
            assert record.pop("tokenizer_fingerprint")
            (trained / name).write_text(json.dumps(record))
    succeeded(call(*flags, *start, "--tokenizer_name", other, "--do_eval", "--output_dir", tmp_path / "e"))


@pytest.mark.parametrize("change", [swapped, cased])
def test_a_run_is_not_taken_up_with_another_tokenizer(change, call, run, bert_words, glue, tmp_path):
    flags = [*LORA, "--do_train", "--max_steps", 2]
    trained, _ = run(bert_words, "o", *flags, "--save_strategy", "steps", "--save_steps", 1)
    other = change(bert_words, Path(shutil.copytree(bert_words, tmp_path / "other")))
    again = ["--model_name_or_path", bert_words, "--task_name", "rte", "--glue_dir", glue, *RUN, *flags]
    again += ["--tokenizer_name", other, "--output_dir", trained]
    for finished in (True, False):
        record = read(trained / "run.json")
        (trained / "run.json").write_text(json.dumps({k: v for k, v in record.items() if finished or k != "trained"}))
        outcome = call(*again)
        assert outcome.code == 1 and "tokenizer_fingerprint" in outcome.err, outcome.err


def test_no_merged_model_gets_another_tokenizer_than_its_adapter_was_trained_with(run, bert_words, tmp_path, capsys):
    other = swapped(bert_words, Path(shutil.copytree(bert_words, tmp_path / "other")))
    trained, _ = run(bert_words, "o", *LORA, "--tokenizer_name", other, "--do_train", "--max_steps", 2)
    merge = ["convert", str(trained), str(tmp_path / "merged"), "--to", "merged"]
    assert convert(merge) == 1 and not (tmp_path / "merged").exists()
    assert "was trained with another tokenizer" in capsys.readouterr().err
    assert convert([*merge, "--base", str(other)]) == 0


def test_a_tokenizer_is_identified_by_its_tokens_and_what_it_makes_of_a_text(bert_words, in_python, tmp_path):
    found = []
    for base in (bert_words, in_python):
        config = RobertaConfig(vocab_size=99, max_position_embeddings=66, type_vocab_size=1)
        tokenizer, _ = load_tokenizer(str(base), config)
        found.append(tokenizer_fingerprint(tokenizer))
        tokenizer.save_pretrained(tmp_path / base.name)
        assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / base.name), config)[0]) == found[-1]
    assert len({*found}) == 2
    merges = tmp_path / in_python.name / "bpe.codes"
    merges.write_text(merges.read_text().replace("t h 10\n", ""))
    assert tokenizer_fingerprint(load_tokenizer(str(merges.parent), config)[0]) != found[1]
