"""Tokenised tables: ids, cache, digest, and tokenizers that do not fit."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from data_files import own, refusal, write
from datasets import Dataset, Value, concatenate_datasets
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaTokenizer,
)

from lora_nlu.data.examples import Examples, choose_rows
from lora_nlu.data.tokenization import digest, token_count
from lora_nlu.data.tokenization import tokenize as tokenize_and_say
from lora_nlu.data.user_files import load_files


def tokenize(*arguments: object, **settings: object) -> dict[str, Dataset]:
    return tokenize_and_say(*arguments, **settings)[0]


WORDS = "the cat sat on a mat while dogs ran far away from it".split()


def texts(rows: int, pairs: bool = False, seed: int = 0) -> Examples:
    """Sentences of 1 to 12 words of the vocabulary, label = row % 2."""
    sentences = [" ".join(WORDS[(seed + i * k) % len(WORDS)] for k in range(1, 2 + i % 12)) for i in range(rows)]
    columns = {"text": sentences, "label": [i % 2 for i in range(rows)]}
    if pairs:
        columns["text_pair"] = sentences[::-1]
    return Examples({"train": Dataset.from_dict(columns)}, ("0", "1"))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory) -> RobertaTokenizer:
    """Byte-level BPE, `<s> a </s></s> b </s>`, no token types."""
    folder = tmp_path_factory.mktemp("roberta")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    bpe.model.save(str(folder))
    return RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def deberta() -> DebertaV2Tokenizer:
    """Unigram, `[CLS] a [SEP] b [SEP]`, token types 0 and 1."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80,
        special_tokens=["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
        unk_token="[UNK]",
        show_progress=False,
    )
    unigram.train_from_iterator([" ".join(WORDS)] * 5, trainer)
    vocabulary = json.loads(unigram.to_str())["model"]["vocab"]
    return DebertaV2Tokenizer(vocab=[tuple(piece) for piece in vocabulary])


def cache_files(folder: Path) -> dict[str, int]:
    """Time of last change, in ns, by file name."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


@pytest.mark.parametrize("family", ["roberta", "deberta"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("max_length", [7, 64])
def test_ids_are_those_of_the_tokenizer_called_on_each_example(tmp_path, request, family, pairs, max_length):
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(family)
    examples = texts(30, pairs)
    encoded = tokenize(examples, tokenizer, max_length, str(tmp_path))["train"]
    assert len(encoded) == 30
    for got, row in zip(encoded, examples.splits["train"], strict=True):
        want = tokenizer(row["text"], row.get("text_pair"), truncation=True, max_length=max_length)
        assert got == {**want, "label": row["label"]}
    assert ("token_type_ids" in encoded.column_names) == (family == "deberta")
    lengths = [len(row) for row in encoded["input_ids"]]
    assert max(lengths) == 7 if max_length == 7 else len(set(lengths)) > 3  # truncated to it; else unpadded
    assert token_count(encoded) == sum(lengths)


def test_token_types_distinguish_the_second_text_from_the_first(tmp_path, deberta):
    row = tokenize(texts(4, pairs=True), deberta, 64, str(tmp_path))["train"][1]
    end_of_first = row["input_ids"].index(deberta.sep_token_id)
    assert row["token_type_ids"] == [int(i > end_of_first) for i in range(len(row["input_ids"]))]


def test_what_the_tokenizer_did_before_changes_neither_ids_nor_cache(tmp_path, roberta):
    first = tokenize(texts(20), roberta, 64, str(tmp_path))["train"]
    before = cache_files(tmp_path)
    roberta(["the cat", "the cat sat on a mat"], padding="max_length", truncation=True, max_length=5)
    again = tokenize(texts(20), roberta, 64, str(tmp_path))["train"]
    assert again.to_dict() == first.to_dict()
    assert cache_files(tmp_path) == before


def own_file(folder: Path, text: str) -> Examples:
    return own(folder, "train.csv", f"text,label\n{text},x\nthe cat,y\nthe dogs,x\n")


def test_a_second_call_reads_the_cached_file_and_overwrite_cache_makes_it_anew(tmp_path, roberta):
    first = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path))["train"]
    made = cache_files(tmp_path)
    assert len(made) == 1
    second = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path))["train"]
    assert cache_files(tmp_path) == made and second.to_dict() == first.to_dict()
    third = tokenize(own_file(tmp_path, "a mat"), roberta, 32, str(tmp_path), overwrite_cache=True)["train"]
    remade = cache_files(tmp_path)
    assert remade.keys() == made.keys() and remade != made and third.to_dict() == first.to_dict()


def test_changed_text_length_rows_tokenizer_or_a_new_version_make_another_cache(
    tmp_path, roberta, deberta, monkeypatch
):
    def files_after(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
        encoded = tokenize(examples, tokenizer, max_length, str(tmp_path))["train"]
        row = tokenizer(examples.splits["train"][0]["text"], truncation=True, max_length=max_length)
        assert encoded[0]["input_ids"] == row["input_ids"]
        return len(cache_files(tmp_path))

    assert files_after(own_file(tmp_path, "a mat"), roberta, 32) == 1
    assert files_after(own_file(tmp_path, "a cat"), roberta, 32) == 2
    assert files_after(own_file(tmp_path, "a cat"), roberta, 4) == 3
    assert files_after(own_file(tmp_path, "a cat"), deberta, 4) == 4
    assert files_after(choose_rows(own_file(tmp_path, "a cat"), {"train": 2}), deberta, 4) == 5
    for number, library in enumerate(("transformers", "tokenizers"), start=6):
        monkeypatch.setattr(f"{library}.__version__", "99.0")
        assert files_after(choose_rows(own_file(tmp_path, "a cat"), {"train": 2}), deberta, 4) == number


def test_the_digest_of_training_data_is_of_every_id_token_type_and_label_in_order(tmp_path, deberta):
    table = tokenize(texts(20, pairs=True), deberta, 64, str(tmp_path))["train"]
    rows = table.to_dict()

    def of(changed: dict[str, list]) -> str:
        return digest(Dataset.from_dict(changed))

    assert len(digest(table)) == 16 and digest(table) == of(rows)
    in_pieces = concatenate_datasets([table.select(range(7)), table.select(range(7, 20))])
    drawn = concatenate_datasets([table, table]).select([*range(5), *range(25, 40)])  # by row numbers
    floats = table.cast_column("label", Value("float64"))
    alike = {digest(t) for t in (in_pieces, drawn, floats, table.remove_columns("attention_mask"))}
    assert alike == {digest(table)}
    flipped = {**rows, "label": [1 - label for label in rows["label"]]}
    one_id = {**rows, "input_ids": [*rows["input_ids"][:-1], [7, *rows["input_ids"][-1][1:]]]}
    types = {**rows, "token_type_ids": [[0] * len(row) for row in rows["token_type_ids"]]}
    turned = {name: column[::-1] for name, column in rows.items()}
    rest = {name: column for name, column in rows.items() if name != "token_type_ids"}
    cuts = [Dataset.from_dict({"input_ids": ids}) for ids in ([[1, 2], [3]], [[1], [2, 3]])]
    others = {of(x) for x in (rows, flipped, one_id, types, turned, rest)} | {digest(table.select(range(19)))}
    assert len(others | {digest(table) for table in cuts}) == 9


def test_scores_of_the_hub_and_of_a_file_have_one_digest():
    ids = {"input_ids": [[1], [2]]}
    file, hub = (Dataset.from_dict(ids | {"label": [3.8, 0.2]}) for _ in range(2))
    assert digest(file) == digest(hub.cast_column("label", Value("float32")))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_texts_cut_at_the_longest_length_are_counted_in_one_line_a_split_also_from_the_cache(
    family, pairs, tmp_path, request
):
    tokenizer, examples = request.getfixturevalue(family), texts(30, pairs)
    rows = examples.splits["train"][:]
    lengths = [len(ids) for ids in tokenizer(rows["text"], rows.get("text_pair")).input_ids]
    for longest in (sorted(lengths)[10], sorted(lengths)[20]):
        cut = sum(length > longest for length in lengths)
        assert 0 < cut < 30
        line = (
            f"train: {cut} of 30 examples are cut at --max_seq_length {longest}; the longest has {max(lengths)} tokens."
        )
        for _ in range(2):  # the second time from the cache
            assert tokenize_and_say(examples, tokenizer, longest, str(tmp_path))[1] == [line]
    assert len(cache_files(tmp_path)) == 2
    assert tokenize_and_say(examples, tokenizer, max(lengths), str(tmp_path))[1] == []


def test_texts_longer_than_the_tokenizers_limit_cause_no_warning_of_indexing_errors(tmp_path, roberta, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda *a, **k: warnings.append(a[0]))
    monkeypatch.setattr(roberta, "model_max_length", 4)
    monkeypatch.setattr(roberta, "deprecation_warnings", {})  # each warning comes once
    assert tokenize_and_say(texts(30), roberta, 4, str(tmp_path))[1]
    assert warnings == []


def test_truncation_from_the_left_is_another_cache_than_from_the_right(tmp_path, deberta):
    examples = own_file(tmp_path, "the cat sat on a mat")
    right = tokenize(examples, deberta, 6, str(tmp_path))["train"][0]
    deberta.truncation_side = "left"
    try:
        left = tokenize(examples, deberta, 6, str(tmp_path))["train"][0]
        assert (
            left["input_ids"] == deberta(examples.splits["train"][0]["text"], truncation=True, max_length=6).input_ids
        )
    finally:
        deberta.truncation_side = "right"
    assert left["input_ids"] != right["input_ids"]


def test_the_same_bytes_as_csv_and_as_tsv_do_not_share_a_cache(tmp_path, roberta):
    content = 'text\n"the cat"\n'
    got = []
    for name in ("a.csv", "a.tsv"):
        examples = load_files({"test": str(write(tmp_path / name, content))}, ["x", "y"])
        got.append(tokenize(examples, roberta, 32, str(tmp_path))["test"][0]["input_ids"])
    assert got == [roberta("the cat").input_ids, roberta('"the cat"').input_ids]


@pytest.mark.parametrize("with_file", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_read_by_the_wrong_tokenizer_class_is_refused(tmp_path, with_file):
    """BERT's files beside a RoBERTa config, as AutoTokenizer reads them: no word arrives, or letters without spaces."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*letters, *WORDS])]
    if with_file == "tokenizer.json":
        right = BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})
        right.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    else:
        write(tmp_path / "vocab.txt", "".join(piece + "\n" for piece in vocabulary))
    RobertaConfig().save_pretrained(tmp_path)
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    message = refusal(tokenize, texts(50), wrong, 64, str(tmp_path))
    assert type(wrong).__name__ in message and "tokenizer_class" in message and "--tokenizer_name" in message
    assert not cache_files(tmp_path)


def test_a_tokenizer_to_which_every_word_is_unknown_is_refused(tmp_path):
    unknowing = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "Cat": 5})
    assert unknowing("the cat").input_ids == [2, 1, 1, 3]
    assert "BertTokenizer" in refusal(tokenize, texts(50), unknowing, 64, str(tmp_path))


def test_a_few_unknown_words_are_no_reason_to_refuse(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS[::2], *WORDS[1::4]]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)})
    encoded = tokenize(texts(50), tokenizer, 64, str(tmp_path))["train"]
    assert tokenizer.unk_token_id in [i for row in encoded["input_ids"] for i in row]


def _tokenize_in_a_process(folder: str, tokenizer: PreTrainedTokenizerBase, barrier, results) -> None:
    examples = texts(3000, pairs=True)
    barrier.wait(60)
    encoded = tokenize(examples, tokenizer, 32, folder)["train"]
    results.put((os.getpid(), token_count(encoded), len(encoded)))


def test_two_processes_that_tokenise_at_once_both_get_the_complete_table(tmp_path, roberta):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (str(tmp_path), roberta, barrier, results)
    other = context.Process(target=_tokenize_in_a_process, args=arguments)
    other.start()
    _tokenize_in_a_process(*arguments)  # this process is the second
    got = [results.get(timeout=60) for _ in range(2)]
    other.join(30)
    assert other.exitcode == 0
    rows = texts(3000, pairs=True).splits["train"]
    want = sum(map(len, roberta(rows[:]["text"], rows[:]["text_pair"], truncation=True, max_length=32)["input_ids"]))
    assert len({pid for pid, _, _ in got}) == 2
    assert [(tokens, count) for _, tokens, count in got] == [(want, 3000)] * 2
    assert len(cache_files(tmp_path)) == 1 and not list(tmp_path.rglob("*tmp*"))  # and nothing half-written stays
