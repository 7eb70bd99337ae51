"""python -m lora_nlu.predict: texts from files, pipes and a terminal; answers equal to run_glue.py's and PEFT's."""

import csv
import json
import os
import pty
import random
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from peft import PeftModel
from runs import LORA, Outcome, sentence
from scipy.special import softmax
from test_run_glue import read, succeeded, trained_flat
from torch import save

from lora_nlu.predict import main, split_operands
from lora_nlu.training.trainer import AdapterTrainer

Predict = Callable[..., Outcome]
MARKERS = ("never", "surely", "perhaps")  # the last word of a text decides its label
COMMAND = [sys.executable, "-m", "lora_nlu.predict"]
QUICK = [*LORA, "--do_train", "--max_steps", "25", "--learning_rate", "1e-2", "--save_strategy", "no"]


def write_csv(path: Path, header: str, rows: list[tuple]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


@pytest.fixture(scope="module")
def folder(call, tmp_path_factory) -> Path:
    """Adapters of one base: `single` and `other` of sentences, `pair` of pairs, `score` a regression."""
    folder, rng = tmp_path_factory.mktemp("adapters"), random.Random(0)
    single = [(sentence(rng, MARKERS[i % 2]), ["negative", "positive"][i % 2]) for i in range(24)]
    pair = [(sentence(rng), sentence(rng, MARKERS[i % 3]), ["no", "perhaps", "yes"][i % 3]) for i in range(24)]
    files = {
        "single": write_csv(folder / "single.csv", "review,label", single),
        "pair": write_csv(folder / "pair.csv", "sentence1,sentence2,label", pair),
        "score": write_csv(folder / "score.csv", "review,label", [(text, i / 2) for i, (text, _) in enumerate(single)]),
    }
    for seed, (name, file) in enumerate((files | {"other": files["single"]}).items()):
        flags = ["--train_file", file, "--output_dir", folder / name, "--max_seq_length", 32, "--seed", seed]
        succeeded(call(*QUICK, *flags))
    return folder


@pytest.fixture
def predict(capfd) -> Predict:
    """The program in this process."""

    def run(*argv: object) -> Outcome:
        code = main([*map(str, argv)])
        return Outcome(code, *capfd.readouterr())

    return run


def lines_of(outcome: Outcome) -> list[dict]:
    return [json.loads(line) for line in succeeded(outcome).out.splitlines()]


def texts(count: int, seed: int = 1) -> list[str]:
    rng = random.Random(seed)
    return [sentence(rng, "and well " * rng.randint(0, 4) + rng.choice(MARKERS)) for _ in range(count)]


# ------------------------------------------------------------------------------------------------- what is answered


@pytest.fixture
def logits(monkeypatch) -> list:
    """The logits of every prediction of run_glue.py."""
    found, predictions_of = [], AdapterTrainer.predict

    def recorded(trainer, *args, **kwargs):
        found.append(predictions_of(trainer, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(AdapterTrainer, "predict", recorded)
    return found


@pytest.mark.parametrize("name", ["single", "pair", "score"])
def test_answers_are_those_of_run_glue_in_the_order_of_the_file(name, folder, call, predict, logits, tmp_path):
    first, second = texts(60), texts(60, seed=2)
    rows = [(a, b) if name == "pair" else (a,) for a, b in zip(first, second, strict=True)]
    file = write_csv(tmp_path / "a.csv", "sentence1,sentence2" if name == "pair" else "review", rows)
    output = tmp_path / "o"
    flags = ["--lora_path", folder / name, "--max_seq_length", 32, "--output_dir", output]
    succeeded(call("--do_predict", "--test_file", file, *flags))
    expected, labels = logits[0].predictions, read(folder / name / "run_metadata.json")["labels"]
    answers = lines_of(predict(folder / name, file, "--format", "jsonl"))
    assert [(line["text"], *([line["text_pair"]] if name == "pair" else [])) for line in answers] == rows
    of_run = [line.split("\t")[1] for line in (output / "predict_results_custom.tsv").read_text().splitlines()[1:]]
    if name == "score":
        assert [line["score"] for line in answers] == pytest.approx(expected[:, 0].tolist(), abs=1e-5)
        return
    assert [line["label"] for line in answers] == of_run and len({*of_run}) > 1
    for line, row in zip(answers, softmax(expected, axis=1), strict=True):
        assert line["probabilities"] == pytest.approx(dict(zip(labels, row.tolist(), strict=True)), abs=1e-5)
    table = [line.split("\t") for line in succeeded(predict(folder / name, file)).out.splitlines()]
    assert table[0] == [*["text", "text_pair"][: len(rows[0])], "label", *(f"p({label})" for label in labels)]
    for cells, line in zip(table[1:], answers, strict=True):
        texts_and_label, numbers = cells[: -len(labels)], cells[-len(labels) :]
        assert texts_and_label == [*(line[key] for key in ("text", "text_pair") if key in line), line["label"]]
        assert [*map(float, numbers)] == [*line["probabilities"].values()]


def test_answers_are_those_of_transformers_pipeline_with_the_same_folder_in_peft(folder, predict, tiny_model, tmp_path):
    sentences = texts(40)
    (tmp_path / "a.txt").write_text("\n".join(sentences))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model = PeftModel.from_pretrained(base, folder / "single")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)
    names = {"LABEL_0": "negative", "LABEL_1": "positive"}
    answers = lines_of(predict(folder / "single", tmp_path / "a.txt", "--format", "jsonl"))
    for line, theirs in zip(answers, classify(sentences, truncation=True, max_length=32), strict=True):
        expected = {names[x["label"]]: x["score"] for x in theirs}
        assert line["probabilities"] == pytest.approx(expected, abs=1e-5)


def test_answers_in_bf16_are_those_of_run_glue_in_bf16_and_their_precision_is_said(
    folder, call, predict, logits, tmp_path, monkeypatch
):
    file = write_csv(tmp_path / "a.csv", "review", [(text,) for text in texts(40)])
    flags = ["--lora_path", folder / "single", "--max_seq_length", 32, "--output_dir", tmp_path / "o"]
    run = succeeded(call("--do_predict", "--test_file", file, *flags, "--bf16_full_eval"))
    single, *all_three = [folder / "single", folder / "other", folder / "score"]
    outcome = succeeded(predict(single, file, "--format", "jsonl", "--bf16"))
    held = "bf16: the weights of 12 linear layers are held in bf16, and products summed in fp32; the rest is fp32.\n"
    assert held in outcome.err and held in run.out
    answers, in_fp32 = (lines_of(o) for o in (outcome, predict(single, file, "--format", "jsonl")))
    expected = softmax(logits[0].predictions, axis=1)
    distances = [
        max(abs(line["probabilities"]["positive"] - p) for line, p in zip(lines, expected[:, 1], strict=True))
        for lines in (answers, in_fp32)
    ]
    assert distances[0] < 1e-2 and distances[0] < distances[1]
    monkeypatch.setattr("lora_nlu.models.checkpoints.has_fast_bf16", lambda: False)
    together = succeeded(predict(single, *all_three, file, "--format", "jsonl", "--bf16"))
    assert together.err.startswith(f"{held}bf16: this processor has no fast instructions for it")
    assert [line["answers"]["single"]["probabilities"] for line in lines_of(together)] == [
        line["probabilities"] for line in answers
    ]


def test_several_adapters_answer_in_columns_of_their_own_as_each_alone(folder, predict, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(texts(20)))
    names = ["single", "score", "other"]
    together = lines_of(predict(*(folder / name for name in names), tmp_path / "a.txt", "--format", "jsonl"))
    alone = {name: lines_of(predict(folder / name, tmp_path / "a.txt", "--format", "jsonl")) for name in names}
    for i, line in enumerate(together):
        assert line["answers"] == {name: {k: v for k, v in alone[name][i].items() if k != "text"} for name in names}
    header = predict(*(folder / name for name in names), tmp_path / "a.txt").out.splitlines()[0].split("\t")
    of_classes = ["label", "p(negative)", "p(positive)"]
    assert header == ["text", *(f"single:{c}" for c in of_classes), "score:score", *(f"other:{c}" for c in of_classes)]
    outcome = predict(folder / "single", folder / "pair", tmp_path / "a.txt")
    assert outcome.code == 1 and "single was trained on single texts" in outcome.err and "pair on pairs" in outcome.err


def test_a_published_file_needs_its_base_its_alpha_and_the_names_of_its_classes(folder, predict, tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(texts(5)))
    expected = predict(folder / "single", tmp_path / "a.txt", "--max_seq_length", 32).out
    save(trained_flat(folder / "single"), tmp_path / "lora.bin")
    flags = {"--lora_alpha": "8", "--labels": "negative,positive", "--base": tiny_model}
    given: list[object] = [tmp_path / "lora.bin", tmp_path / "a.txt", "--max_seq_length", 32]
    for flag, value in flags.items():
        outcome = predict(*given)
        assert outcome.code == 1 and flag in outcome.err
        given += [flag, value]
    assert succeeded(predict(*given)).out == expected
    task = [*given[:4], "--lora_alpha", 8, "--base", tiny_model, "--task_name", "sst2"]
    outcome = succeeded(predict(*task))
    assert outcome.out == expected and "assumed to predict negative, positive, in this order" in outcome.err
    outcome = predict(folder / "single", tmp_path / "a.txt", "--lora_relative_query", "key")
    assert outcome.code == 2 and f"{folder / 'single'} is no DeBERTa .bin. Leave --lora_relative_query" in outcome.err
    for flag, value in (("--labels", "yes,no"), ("--task_name", "mnli")):
        outcome = predict(folder / "single", tmp_path / "a.txt", flag, value)
        assert outcome.code == 1 and "was trained to predict negative, positive" in outcome.err
        assert f"Leave {flag} out" in outcome.err


def test_the_classes_of_a_complete_model_are_those_of_the_task_that_is_named(predict, tiny_model, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "model")
    given = [tmp_path / "model", tmp_path / "a.txt"]
    outcome = predict(*given)
    assert outcome.code == 1 and "as --labels (a,b,c)" in outcome.err and "as --task_name (mnli)" in outcome.err
    outcome = succeeded(predict(*given, "--task_name", "sst2"))
    assert outcome.out.startswith("text\tlabel\tp(negative)\tp(positive)\n")
    assert "assumed to predict negative, positive, in this order" in outcome.err
    for flag, value, message in (
        ("--task_name", "mnli", "2 outputs, but --task_name gives entailment"),
        ("--lora_alpha", "8", "--lora_alpha has no effect"),
        ("--lora_relative_query", "key", "--lora_relative_query has no effect"),
    ):
        outcome = predict(*given, flag, value)
        assert outcome.code == 1 and message in outcome.err


def test_the_hub_is_looked_for_before_a_tokenizer_is_read_from_it(folder, call, predict, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lora_nlu.hub.use_cache_if_unreachable", lambda: "no answer")
    (tmp_path / "a.txt").write_text("the cat\n")
    flag = ["--tokenizer_name", "someone/tokenizer"]
    outcome = predict(folder / "single", tmp_path / "a.txt", *flag)
    assert outcome.code == 1 and outcome.err.startswith("no answer\n") and "No tokenizer in someone" in outcome.err
    files = ["--test_file", folder / "single.csv", "--output_dir", tmp_path / "o"]
    outcome = call("--do_predict", "--lora_path", folder / "single", *files, *flag)
    assert outcome.code == 1 and outcome.out.startswith("no answer\n") and "No tokenizer in someone" in outcome.err


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", 'review\n"the ""cat"", sees\nthe dog"\nthe bird\n'),
        ("a.tsv", 'idx\treview\tlabel\n0\tthe "cat\tpositive\n1\tthe bird\tnegative\n'),
        ("a.jsonl", '{"review": "the\\tcat \\u001b[2J \\u009b", "n": 1}\n\n{"review": "the bird", "n": 2}\n'),
        ("a.json", '{"text": "the cat \\ud83d\\ude00"}\n{"text": "the bird"}\n'),
        ("A.CSV", 'review\n"the ""cat"", sees"\nthe bird\n'),
        ("A.TSV", 'idx\treview\n0\tthe "cat\n1\tthe bird\n'),
        ("a.txt", "\ufeffthe\tcat\r\n\r\n   \r\nthe bird"),
        ("a.notes", "the cat\n\nthe bird\n"),
    ],
)
def test_every_kind_of_file_is_read_and_its_texts_are_printed_without_control_characters(
    name, content, folder, predict, tmp_path
):
    (tmp_path / name).write_bytes(content.encode())
    for form in ("tsv", "jsonl"):
        outcome = succeeded(predict(folder / "single", tmp_path / name, "--format", form))
        rows = outcome.out.removesuffix("\n").split("\n")[form == "tsv" :]
        assert len(rows) == 2 and "the bird" in rows[1] and "cat" in rows[0]
        assert all(character.isprintable() or character == "\t" for row in rows for character in row)
    found = re.findall(r"(\d) empty lines? (?:is|are) left out", outcome.err)
    assert found == {"a.txt": ["2"], "a.notes": ["1"]}.get(name, [])


def test_the_columns_are_those_of_the_training_or_else_found_or_named(folder, predict, tmp_path):
    file = write_csv(tmp_path / "a.csv", "comment,review,text", [("x", "the cat sees the dog", "y")])
    assert succeeded(predict(folder / "single", file)).out.splitlines()[1].startswith("the cat sees the dog\t")
    named = succeeded(predict(folder / "single", file, "--text_columns", "text"))
    assert named.out.splitlines()[1].startswith("y\t")
    assert f"{folder / 'single'}: was trained on text in 'review'; here it is in 'text'." in named.err
    file = write_csv(tmp_path / "b.csv", "comment,note", [("x", "y")])
    outcome = predict(folder / "single", file)
    assert outcome.code == 1 and "which hold the text?" in outcome.err and "--label_column" not in outcome.err
    pairs = write_csv(tmp_path / "c.csv", "premise,hypothesis,label", [("the cat", "the dog", "?")])
    outcome = succeeded(predict(folder / "pair", pairs))
    assert outcome.out.splitlines()[1].startswith("the cat\tthe dog\t") and "'premise' and 'hypothesis'" in outcome.err


def test_the_output_file_says_the_format_and_appears_when_it_is_complete(folder, predict, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\nthe dog\n")
    for name in ("o.tsv", "o.jsonl"):
        outcome = succeeded(predict(folder / "single", tmp_path / "a.txt", "--output", tmp_path / name))
        assert outcome.out == "" and f"Written to {tmp_path / name}." in outcome.err
        expected = predict(folder / "single", tmp_path / "a.txt", "--format", name[2:]).out
        assert (tmp_path / name).read_text() == expected
    (tmp_path / "bad.csv").write_text("review\nthe cat\nthe,dog\n")
    assert predict(folder / "single", tmp_path / "bad.csv", "--output", tmp_path / "bad.tsv").code == 1
    assert not (tmp_path / "bad.tsv").exists()


def test_texts_that_are_cut_are_counted_and_cut_as_in_the_training(folder, predict, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n" + "the dog sees " * 30 + "\n")
    outcome = succeeded(predict(folder / "single", tmp_path / "a.txt"))
    assert re.search(r"1 of 2 texts are cut at 32 tokens \(--max_seq_length\); the longest has \d+\.", outcome.err)
    longer = succeeded(predict(folder / "single", tmp_path / "a.txt", "--max_seq_length", 500))
    assert "--max_seq_length 500 is more than the model's 64 positions; using 64." in longer.err
    assert "1 of 2 texts are cut at 64 tokens" in longer.err
    short, long = zip(outcome.out.splitlines()[1:], longer.out.splitlines()[1:], strict=True)
    assert short[0] == short[1] and long[0] != long[1]


def test_more_rows_than_a_window_are_answered_in_order(folder, predict, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_nlu.data.texts.WINDOW_ROWS", 7)
    sentences = texts(50)
    (tmp_path / "a.txt").write_text("\n".join(sentences))
    rows = lines_of(predict(folder / "single", tmp_path / "a.txt", "--format", "jsonl"))
    assert [row["text"] for row in rows] == sentences
    monkeypatch.undo()
    at_once = lines_of(predict(folder / "single", tmp_path / "a.txt", "--format", "jsonl"))
    for one, other in zip(rows, at_once, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.csv", None, "no such file or folder"),
        ("a.csv", b"review\nthe cat\nthe,dog\n", "a.csv:3: 2 columns, the header has 1"),
        ("a.csv", b"review\nthe cat\n\xff\xfe\n", "a.csv:3: not UTF-8"),
        ("a.csv", b"review\n", "no examples, only a header"),
        ("a.tsv", b"review,label\nthe cat,positive\n", "separates columns by tabs"),
        ("a.jsonl", b'{"review": "the cat"}\n{"text": "the dog"}\n', "a.jsonl:2: no column 'review'"),
        ("a.jsonl", b'{"review": 3}\n', "a.jsonl:1: 'review' is 3; it must be a string"),
        ("a.txt", b"the cat\nthe \xff dog\n", "a.txt:2: not UTF-8"),
        ("a.txt", b"\n \n", "the file is empty"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(name, content, message, folder, predict, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = predict(folder / "single", tmp_path / name)
    assert outcome.code == 1 and message in outcome.err and "Traceback" not in outcome.err
    assert outcome.err.strip().count("\n") < 3
    if name in ("a.txt", "none.csv") and b"cat" not in (content or b""):
        assert outcome.out == ""  # no header of no answers


def test_a_pair_needs_its_tab(folder, predict, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\tthe dog\nthe bird\n")
    outcome = predict(folder / "pair", tmp_path / "a.txt")
    assert outcome.code == 1 and "a.txt:2: 1 texts, expected two with a tab" in outcome.err
    assert outcome.out.splitlines()[1].startswith("the cat\tthe dog\t")  # what came before is answered


@pytest.mark.parametrize(
    "words, message",
    [
        (["a.txt"], "a.txt is a file of text: give an adapter before it"),
        (["single", "a.txt", "b.csv"], "a.txt and b.csv are both files of text: give one"),
        (["single", "single"], "single is given twice"),
        (["single", "a.txt", "--output", "o.xlsx"], "--output o.xlsx: end it in .tsv or .jsonl, or give --format"),
        (["single", "a.txt", "--output", "a.txt", "--format", "tsv"], "--output a.txt: is the file of the texts"),
        (["single", "a.txt", "--text_columns", "a,b,c"], "one column, or two for pairs"),
        (["single", "a.txt", "--max_seq_length", "2"], "must be 4 or more"),
        (["single", "a.txt", "--labels", "yes"], "two names or more"),
    ],
)
def test_a_wrong_command_line_has_exit_code_2(words, message, predict, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat\n")
    monkeypatch.chdir(tmp_path)
    outcome = predict(*words)
    assert outcome.code == 2 and message in outcome.err


def test_a_folder_a_bin_and_a_hub_id_are_adapters_and_every_other_file_is_the_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lora.bin", "LORA.BIN", "notes", "user/name"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    for name in ("run", "run.csv"):
        Path(name).mkdir()
    adapters = ["run", "run.csv", "lora.bin", "LORA.BIN", "none.bin", "someone/adapter"]
    assert split_operands(adapters) == split_operands([*adapters, "-"]) == (adapters, None)
    for file in ("notes", "user/name", "missing.csv", "missing.TXT", "/dev/stdin"):
        assert split_operands([*adapters, file]) == (adapters, Path(file))


# --------------------------------------------------------------------------------------------- pipes and a terminal


def test_the_lines_of_a_pipe_are_answered_as_they_come(folder, environment):
    command = [*COMMAND, folder / "single"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdin and process.stdout
        for lines in (["the cat"], ["the dog", "", "the bird ü"]):
            process.stdin.write("".join(f"{line}\n" for line in lines).encode())
            process.stdin.flush()
            if lines == ["the cat"]:
                assert process.stdout.readline() == b"text\tlabel\tp(negative)\tp(positive)\n"
            for line in filter(None, lines):
                assert process.stdout.readline().decode().startswith(f"{line}\t")
        process.stdin.write(b"the last, without an end")
        process.stdin.close()
        assert process.stdout.read().startswith(b"the last, without an end\t")
    assert process.returncode == 0


def test_a_named_pipe_is_read_as_standard_input_is(folder, predict, tmp_path):
    fifo, lines = tmp_path / "fifo", texts(3_000)
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_text, args=["\n".join(lines)])
    writer.start()
    rows = succeeded(predict(folder / "single", fifo)).out.splitlines()[1:]
    writer.join()
    assert [row.split("\t")[0] for row in rows] == lines


def test_a_reader_that_has_enough_ends_the_program_quietly(folder, environment, tmp_path):
    (tmp_path / "a.txt").write_text("the cat\n" * 3_000)
    command = f"{' '.join(COMMAND)} {folder / 'single'} {tmp_path / 'a.txt'} | head -n 2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "" and len(done.stdout.splitlines()) == 2


def test_a_terminal_is_answered_line_by_line_and_a_mistake_does_not_end_it(folder, environment):
    terminal, side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, folder / "pair"], stdin=side, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout and process.stderr
    os.close(side)

    def line_of(stream) -> str:
        assert select.select([stream], [], [], 60)[0], "no line in a minute"
        return stream.readline().decode()

    assert line_of(process.stderr) == "Type sentence1, a tab, sentence2; Ctrl-D ends.\n"
    os.write(terminal, b"the cat\n")
    assert "1 texts, expected two with a tab between them" in line_of(process.stderr)
    os.write(terminal, b"the cat\tthe dog\n")
    assert line_of(process.stdout).startswith("text\ttext_pair\tlabel\t")
    assert line_of(process.stdout).startswith("the cat\tthe dog\t")
    os.write(terminal, b"\x04")
    assert process.wait(timeout=60) == 0 and process.stdout.read() == process.stderr.read() == b""
    os.close(terminal)


def test_help_comes_within_a_second_of_processor_time():
    before = os.times().children_user
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "ADAPTER is a folder" in done.stdout
    assert os.times().children_user - before < 1
