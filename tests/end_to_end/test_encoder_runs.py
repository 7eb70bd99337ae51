"""XLM-RoBERTa and CamemBERT with SentencePiece's files: trained, evaluated, inspected, merged, read by PEFT."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers
from peft import PeftModel
from runs import LORA, TINY
from test_run_glue import LEARN, read, scores, succeeded
from transformers import AutoTokenizer

from lora_nlu.adapters.__main__ import main

CLASSES = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


def cola(glue: Path, output: Path, *flags: object) -> list[object]:
    return ["--task_name", "cola", "--glue_dir", glue, "--output_dir", output, *LORA, *flags]


def write_base(folder: Path, glue: Path, model_type: str) -> Path:
    """A masked-language model with sentencepiece.bpe.model, in the layout of fairseq, as the Hub's checkpoints."""
    folder.mkdir()
    text = folder.parent / "text.txt"
    text.write_text("".join(path.read_text() for path in sorted(glue.glob("*/train.tsv"))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "sentencepiece.bpe"), vocab_size=150, hard_vocab_limit=False,
        minloglevel=2,
    )  # fmt: skip
    (folder / "sentencepiece.bpe.vocab").unlink()
    name = CLASSES[model_type]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=160, max_position_embeddings=66, type_vocab_size=1, layer_norm_eps=1e-5, **TINY
    )
    torch.manual_seed(0)
    getattr(transformers, f"{name}ForMaskedLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CLASSES)
def trained(request, call, glue, tmp_path_factory) -> tuple[str, Path, Path]:
    """Model type, base, and the output folder of a run on CoLA."""
    folder = tmp_path_factory.mktemp(request.param)
    base = write_base(folder / "base", glue, request.param)
    flags = ["--model_name_or_path", base, *LEARN, "--do_train", "--do_eval", "--do_predict"]
    succeeded(call(*cola(glue, folder / "o", *flags)))
    return request.param, base, folder / "o"


def test_a_run_learns_and_its_adapter_has_its_scores_in_another_run(trained, call, glue, tmp_path):
    _, base, output = trained
    assert read(output / "eval_results.json")["eval_matthews_correlation"] > 0.2
    flags = ["--model_name_or_path", base, "--lora_path", output, "--do_eval", "--max_seq_length", 64]
    succeeded(call(*cola(glue, tmp_path / "again", *flags)))
    assert scores(tmp_path / "again" / "eval_results.json") == scores(output / "eval_results.json")


def test_inspect_names_the_model_and_a_merged_one_predicts_the_same_in_transformers_class(
    trained, glue, tmp_path, capsys
):
    model_type, base, output = trained
    assert main(["inspect", str(output)]) == 0
    assert {"xlm-roberta": "XLM-RoBERTa", "camembert": "CamemBERT"}[model_type] in capsys.readouterr().out
    assert main(["convert", str(output), str(tmp_path / "merged"), "--to", "merged"]) == 0
    assert read(tmp_path / "merged" / "config.json")["model_type"] == model_type
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert type(merged).__name__ == f"{CLASSES[model_type]}ForSequenceClassification"
    labels = read(output / "run_metadata.json")["labels"]
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    in_peft = PeftModel.from_pretrained(plain, output).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    with (output / "predict_results_cola.tsv").open() as file:
        predicted = [row["prediction"] for row in csv.DictReader(file, delimiter="\t")]
    texts = [line.split("\t") for line in (glue / "CoLA" / "test.tsv").read_text().splitlines()[1:]]
    assert len(predicted) == len(texts) == 10
    for (_, text), label in zip(texts, predicted, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        assert tokenizer.unk_token_id not in batch["input_ids"]
        with torch.no_grad():
            for model in (merged, in_peft):
                assert labels[model(**batch).logits.argmax()] == label


def test_an_adapter_of_another_type_of_model_is_refused_by_both_types(trained, call, glue, tiny_model, tmp_path):
    """All names and shapes are the same; a fingerprint of the base may be missing."""
    model_type, base, output = trained
    other = Path(shutil.copytree(output, tmp_path / "other"))
    record = read(other / "run_metadata.json")
    assert record.pop("base_fingerprint") and record["model_type"] == model_type
    (other / "run_metadata.json").write_text(json.dumps(record))
    for adapter in (output, other):
        flags = ["--model_name_or_path", tiny_model, "--lora_path", adapter, "--do_eval"]
        outcome = call(*cola(glue, tmp_path / "e", *flags))
        assert outcome.code == 1 and f"{adapter}: was trained on a {model_type} model ({base})" in outcome.err, outcome
        assert "the given one is a roberta model" in outcome.err
