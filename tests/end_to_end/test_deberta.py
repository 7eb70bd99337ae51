"""DeBERTa-V2, R-Drop and cutoff from a script's first line to the last file, on sentences with a tiny model."""

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from peft import LoraConfig, get_peft_model
from runs import (
    LORA,
    Outcome,
    Run,
    contents,
    cut_off,
    flags_of_command,
    sentence,
    write_deberta,
    write_sentencepiece,
    write_tsv,
)
from test_run_glue import read, scores, succeeded, trained_flat
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DebertaV2Config

from lora_nlu.ops.processor import has_fast_bf16

ROOT = Path(__file__).parents[2]
GLUE = Path(os.environ.get("GLUE_DIR") or ROOT.parent / "shared" / "glue")
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"no GLUE download at {GLUE}; set GLUE_DIR")
SHORT = ["--max_steps", "6", "--max_seq_length", "64", "--learning_rate", "1e-2", "--logging_steps", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path, rng = tmp_path_factory.mktemp("text") / "text.txt", random.Random(3)
    markers = ["surely", "never", "perhaps", "well", "of", "very alike"]
    path.write_text("\n".join(sentence(rng, rng.choice(markers)) for _ in range(400)))
    return path


@pytest.fixture(scope="module")
def tiny_deberta(tmp_path_factory, text) -> Path:
    folder = tmp_path_factory.mktemp("tiny-deberta")
    write_sentencepiece(folder, text)
    return write_deberta(folder)


@pytest.fixture
def run(call, tiny_deberta, glue) -> Callable[..., Outcome]:
    """run_glue.py with the tiny DeBERTa, without a check of how it ends."""
    return lambda *flags: call("--model_name_or_path", tiny_deberta, "--glue_dir", glue, *flags)


# ------------------------------------------------------------------------------------------------------- tokenizer


def test_a_sentencepiece_tokenizer_of_local_files_gives_sentencepieces_own_ids(tiny_deberta):
    tokenizer = AutoTokenizer.from_pretrained(tiny_deberta)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_deberta / "spm.model"))
    for written in ("the cat sees the dog", "never  the Bird, surely", "perhaps zebra"):
        ids = tokenizer(written)["input_ids"]
        assert ids == [1, *reference.encode(written), 2]
    pair = tokenizer("the cat", "the dog")
    assert pair["input_ids"] == [1, *reference.encode("the cat"), 2, *reference.encode("the dog"), 2]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)


# ------------------------------------------------------------------------------------------------- a run of a script


@pytest.fixture
def script(environment, base_flags, tmp_path) -> Run:
    """A script as a user runs it on a machine without a GPU, another model and a few steps on its command line."""

    def run(name: str, *flags: object, **settings: str) -> Outcome:
        env = environment | {"GLUE_DIR": str(GLUE), "devices": "0", "tuned_for_gpus": "1"} | settings
        command = ["bash", str(ROOT / "scripts" / name), *base_flags[2:], *map(str, flags)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def printed_command(script, fork) -> Run:
    """The same command, as the script prints it, in a forked process."""

    def run(*argv: object, **settings: str) -> Outcome:
        dry = succeeded(script(*argv, DRY_RUN="1", **settings))
        done = fork(*flags_of_command(dry.out), base=False)
        return Outcome(done.code, done.out, dry.err + done.err)

    return run


@needs_glue
@pytest.mark.parametrize(
    "name, task, kind",
    [
        ("deberta_v2_xxlarge_cola.sh", "cola", "deberta"),
        ("deberta_v2_xxlarge_sst2.sh", "sst2", "deberta"),
        ("mnli.rdrop.sh", "cola", "deberta"),
        ("mnli.cutoff.sh", "sst2", "roberta"),
    ],
)
def test_a_script_trains_on_real_sentences_resumes_and_its_adapter_evaluates_to_the_same(
    name, task, kind, script, printed_command, tiny_model, tmp_path
):
    """One of them as a user starts it; the others' flags, as they print them, in forked processes."""
    lines = (GLUE / ("CoLA" if task == "cola" else "SST-2") / "train.tsv").read_text().splitlines()[1:3000]
    (tmp_path / "text.txt").write_text("\n".join(line.split("\t")[3 if task == "cola" else 0] for line in lines))
    model = tiny_model
    if kind == "deberta":
        write_sentencepiece(tmp_path / "model", tmp_path / "text.txt")
        model = write_deberta(tmp_path / "model")
    few = ["--model_name_or_path", model, "--max_train_samples", 64, "--max_eval_samples", 40, "--task_name", task]
    few += ["--max_steps", 8, "--eval_steps", 4, "--save_steps", 4, "--logging_steps", 2]

    first = script if name == "mnli.rdrop.sh" else printed_command
    outcome = succeeded(first(name, *few, output_dir=str(tmp_path / "complete")))
    assert f"no GPU: --fp16 is {'replaced by --bf16' if has_fast_bf16() else 'dropped'}" in outcome.err
    state = read(tmp_path / "complete" / "trainer_state.json")
    assert state["global_step"] == 8 and len([e for e in state["log_history"] if "eval_loss" in e]) == 2
    assert any("consistency_loss" in entry for entry in state["log_history"]) == name.startswith("mnli.")

    stopped = cut_off(tmp_path / "complete", tmp_path / "stopped", after=4)
    resumed = succeeded(printed_command(name, *few, output_dir=str(stopped)))
    assert f"Resuming from {stopped / 'checkpoint-4'}" in resumed.out
    got, want = trained_flat(stopped), trained_flat(tmp_path / "complete")
    assert [key for key in want if not torch.equal(got[key], want[key])] == []

    flags = [*few[:8], "--lora_path", stopped, "--do_train", "false"]
    succeeded(printed_command(name, *flags, output_dir=str(tmp_path / "again")))
    assert scores(tmp_path / "again" / "eval_results.json") == scores(tmp_path / "complete" / "eval_results.json")


def test_rte_from_an_mnli_adapter_keeps_the_pooler_and_leaves_the_classifier(run, tmp_path):
    succeeded(run("--task_name", "mnli", "--output_dir", tmp_path / "mnli", *LORA, *SHORT, "--do_train", "--do_eval"))
    flags = ["--lora_path", tmp_path / "mnli", "--learning_rate", "0", "--do_train", "--output_dir", tmp_path / "rte"]
    outcome = succeeded(run("--task_name", "rte", *LORA, *SHORT, *flags))
    assert len([line for line in outcome.out.splitlines() if "its classifier is for other labels" in line]) == 1
    got, mnli = trained_flat(tmp_path / "rte"), trained_flat(tmp_path / "mnli")
    assert {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"} <= mnli.keys()
    assert [name for name in mnli if not torch.equal(got[name], mnli[name])] == ["classifier.bias", "classifier.weight"]
    assert got["classifier.weight"].shape[0] == 2


def test_lora_on_the_relative_query_is_saved_with_the_adapter_and_checked_on_loading(run, tmp_path):
    train = ["--task_name", "cola", *LORA, *SHORT, "--do_train", "--do_eval"]
    succeeded(run(*train, "--output_dir", tmp_path / "frozen"))
    succeeded(run(*train, "--output_dir", tmp_path / "peft", "--lora_relative_query"))
    kinds = {name: read(tmp_path / name / "adapter_config.json")["peft_type"] for name in ("frozen", "peft")}
    assert kinds == {"frozen": "LORA_FROZEN_RELATIVE_QUERY", "peft": "LORA"}
    one, other = (trained_flat(tmp_path / name) for name in kinds)
    assert not torch.equal(*(t["deberta.encoder.layer.0.attention.self.query_proj.lora_A"] for t in (one, other)))
    evaluate = ["--task_name", "cola", *LORA, "--do_eval", "--max_seq_length", "64", "--output_dir", tmp_path / "o"]
    for name, value, remedy in (("frozen", "true", "Leave out"), ("peft", "false", "Give")):
        outcome = run(*evaluate, "--lora_path", tmp_path / name, "--lora_relative_query", value)
        assert outcome.code == 1 and f"{remedy} --lora_relative_query" in outcome.err
    for name in kinds:  # without the flag, the file decides
        succeeded(run(*evaluate, "--lora_path", tmp_path / name))
        assert scores(tmp_path / "o" / "eval_results.json") == scores(tmp_path / name / "eval_results.json")
    # a .bin doesn't record it: the reference's way, with a line about it, or the flag's
    for name, flags, expected in (
        ("frozen", [], "without LoRA, the reference's way, which the file can't confirm"),
        ("frozen", ["--lora_relative_query", "false"], "without LoRA, the reference's way"),
        ("peft", ["--lora_relative_query"], "with LoRA, PEFT's way, which the file can't confirm"),
    ):
        torch.save(trained_flat(tmp_path / name), tmp_path / f"{name}.bin")
        outcome = succeeded(run(*evaluate, "--lora_path", tmp_path / f"{name}.bin", *flags))
        assert expected in outcome.out
        assert scores(tmp_path / "o" / "eval_results.json") == scores(tmp_path / name / "eval_results.json")
    succeeded(run(*evaluate, "--lora_path", tmp_path / "peft.bin"))
    assert scores(tmp_path / "o" / "eval_results.json") != scores(tmp_path / "peft" / "eval_results.json")


def test_lora_on_the_relative_key_alone_is_recorded_in_the_run_and_checked_on_loading_and_resuming(run, tmp_path):
    train = ["--task_name", "cola", *LORA, *SHORT, "--lora_target_modules", "query,key", "--do_train", "--do_eval"]
    succeeded(run(*train, "--output_dir", tmp_path / "key", "--lora_relative_query", "key"))
    assert read(tmp_path / "key" / "run.json")["lora"]["lora_relative_query"] == "key"
    evaluate = ["--task_name", "cola", "--do_eval", "--max_seq_length", "64", "--output_dir", tmp_path / "o"]
    evaluate += ["--lora_path", tmp_path / "key"]
    succeeded(run(*evaluate))
    assert scores(tmp_path / "o" / "eval_results.json") == scores(tmp_path / "key" / "eval_results.json")
    outcome = run(*evaluate, "--lora_relative_query", "none")
    assert outcome.code == 1 and "Give --lora_relative_query key." in outcome.err
    outcome = run(*train, "--output_dir", tmp_path / "key", "--lora_relative_query")
    assert outcome.code == 1 and "lora_relative_query key, now True" in outcome.err


def test_a_deberta_has_no_longest_input_where_it_has_no_position_table(run, tmp_path):
    flags = ["--task_name", "rte", *LORA, *SHORT, "--max_seq_length", "200", "--do_train", "--output_dir", tmp_path]
    outcome = succeeded(run(*flags, "--overwrite_output_dir"))
    assert "is more than the model's" not in outcome.out


# -------------------------------------------------------------------------------------------------- R-Drop and cutoff


@pytest.mark.parametrize("kind", ["roberta", "deberta"])
@pytest.mark.parametrize("masking", [[], ["--masking_prob", "0.3"]], ids=["R-Drop", "cutoff"])
@pytest.mark.parametrize("task", ["rte", "stsb"])
def test_two_views_train_and_resume_and_log_both_parts_of_the_loss(
    kind, masking, task, call, tiny_model, tiny_deberta, glue, tmp_path
):
    model = tiny_model if kind == "roberta" else tiny_deberta
    flags = ["--model_name_or_path", model, "--glue_dir", glue, "--task_name", task, *LORA, *SHORT, "--do_train"]
    flags += ["--do_eval", "--save_steps", "4", "--reg_loss_wgt", "1.5", *masking]
    succeeded(call(*flags, "--output_dir", tmp_path / "o"))
    logged = [entry for entry in read(tmp_path / "o" / "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert entry["task_loss"] + entry["consistency_loss"] == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["consistency_loss"] > 0
    results = read(tmp_path / "o" / "eval_results.json")
    assert "eval_task_loss" not in results and results["eval_loss"] > 0

    plain = ["--lora_path", tmp_path / "o", "--do_eval", "--output_dir", tmp_path / "plain", "--max_seq_length", "64"]
    succeeded(call("--model_name_or_path", model, "--glue_dir", glue, "--task_name", task, *LORA, *plain))
    assert scores(tmp_path / "plain" / "eval_results.json") == scores(tmp_path / "o" / "eval_results.json")

    resumed = cut_off(tmp_path / "o", tmp_path / "resumed", after=4)
    assert "Resuming" in succeeded(call(*flags, "--output_dir", resumed)).out
    got, want = trained_flat(resumed), trained_flat(tmp_path / "o")
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def test_a_resume_in_mid_epoch_with_accumulation_and_other_data_workers_ends_bit_equal(run, tmp_path):
    flags = ["--task_name", "rte", *LORA, *SHORT, "--max_steps", "5", "--save_steps", "1", "--do_train"]
    flags += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4", "--logging_steps", "1"]
    succeeded(run(*flags, "--output_dir", tmp_path / "complete"))
    for step in (1, 3, 4):
        resumed = cut_off(tmp_path / "complete", tmp_path / f"resumed-{step}", after=step)
        outcome = succeeded(run(*flags, "--dataloader_num_workers", "2", "--output_dir", resumed))
        assert f"Resuming from {resumed / f'checkpoint-{step}'}" in outcome.out
        got, want = trained_flat(resumed), trained_flat(tmp_path / "complete")
        assert [name for name in want if not torch.equal(got[name], want[name])] == [], step
        logs = [
            [e["loss"] for e in read(f / "trainer_state.json")["log_history"] if "loss" in e]
            for f in (resumed, tmp_path / "complete")
        ]
        assert logs[0] == logs[1]


def test_an_adapter_of_pefts_own_evaluates_to_pefts_own_answers(run, tiny_deberta, glue, tmp_path):
    names = ["query_proj", "value_proj", "dense"]
    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=3,
        lora_alpha=5,
        target_modules=names,
        use_rslora=True,
        modules_to_save=["classifier", "pooler"],
    )
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_deberta, num_labels=2)
    theirs = get_peft_model(base, settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "peft")
    flags = [
        "--do_predict",
        "--max_seq_length",
        "200",
        "--lora_path",
        tmp_path / "peft",
        "--output_dir",
        tmp_path / "o",
    ]
    outcome = succeeded(run("--task_name", "rte", *flags))
    assert "rank 3, alpha 5" in outcome.out
    rows = [line.split("\t") for line in (glue / "RTE" / "test.tsv").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(tiny_deberta)
    with torch.no_grad():
        batch = tokenizer([r[1] for r in rows], [r[2] for r in rows], padding=True, return_tensors="pt")
        answers = [["entailment", "not_entailment"][int(i)] for i in theirs(**batch).logits.argmax(1)]
    written = [
        line.split("\t")[1] for line in (tmp_path / "o" / "predict_results_rte.tsv").read_text().splitlines()[1:]
    ]
    assert written == answers and len(set(answers)) == 2


def test_a_peft_adapter_without_a_pooler_needs_a_base_that_has_one_and_training_can_start_from_it(
    call, run, tiny_deberta, glue, tmp_path
):
    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_deberta, num_labels=2)
    shutil.copytree(tiny_deberta, tmp_path / "tuned")
    base.save_pretrained(tmp_path / "tuned")
    settings = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["query_proj", "value_proj"])
    theirs = get_peft_model(base, settings).eval()  # modules_to_save: classifier, score
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "peft")
    flags = ["--task_name", "rte", "--glue_dir", glue, "--max_seq_length", "200", "--lora_path", tmp_path / "peft"]
    outcome = run(*flags, "--do_eval", "--output_dir", tmp_path / "refused")
    assert outcome.code == 1 and "did not save" in outcome.err and '["classifier", "pooler"]' in outcome.err

    tuned = ["--model_name_or_path", tmp_path / "tuned", *flags]
    outcome = succeeded(call(*tuned, "--do_eval", "--do_predict", "--output_dir", tmp_path / "eval"))
    assert "its classifier uses the base checkpoint's" in outcome.out
    rows = [line.split("\t") for line in (glue / "RTE" / "dev.tsv").read_text().splitlines()[1:]]
    labels = torch.tensor([["entailment", "not_entailment"].index(row[3]) for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(tiny_deberta)
    with torch.no_grad():
        batch = tokenizer([r[1] for r in rows], [r[2] for r in rows], padding=True, return_tensors="pt")
        loss = torch.nn.functional.cross_entropy(theirs(**batch).logits, labels).item()
    assert read(tmp_path / "eval" / "eval_results.json")["eval_loss"] == pytest.approx(loss, rel=1e-5)

    short = ["--do_train", "--max_steps", "2", "--do_eval"]
    outcome = succeeded(run(*flags, *short, "--output_dir", tmp_path / "new_head"))
    assert "a new head is initialised" in outcome.out
    outcome = succeeded(call(*tuned, *short, "--output_dir", tmp_path / "old_head"))
    assert {"pooler.dense.weight", "classifier.weight"} <= {*trained_flat(tmp_path / "old_head")}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--masking_prob", "0.1"], ["--masking_prob needs --reg_loss_wgt"]),
        (["--reg_loss_wgt", "-1"], ["--reg_loss_wgt -1.0"]),
        (["--reg_loss_wgt", "1", "--masking_prob", "-0.1"], ["--masking_prob -0.1"]),
        (["--reg_loss_wgt", "1", "--masking_prob", "1.1"], ["--masking_prob 1.1", "from 0"]),
        (["--reg_loss_wgt", "nan"], ["--reg_loss_wgt nan"]),
        (["--reg_loss_wgt", "1", "--label_smoothing_factor", "0.1"], ["--label_smoothing_factor", "--reg_loss_wgt"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_settings_of_the_two_views_that_make_no_sense_end_with_code_2(flags, expected, run, tmp_path):
    outcome = run("--task_name", "rte", "--do_train", "--output_dir", tmp_path / "o", *LORA, *flags)
    assert outcome.code == 2 and all(words in outcome.err for words in expected), outcome
    assert not (tmp_path / "o").exists()


def test_lora_on_the_relative_query_of_a_roberta_ends_with_code_2(call, glue, tmp_path):
    flags = ["--task_name", "rte", "--glue_dir", glue, "--do_train", *LORA, "--lora_relative_query"]
    outcome = call(*flags, "--output_dir", tmp_path / "o")
    assert outcome.code == 2 and "--lora_relative_query" in outcome.err and "roberta" in outcome.err


def test_where_relative_positions_have_their_own_projections_the_flag_is_refused_and_none_contradicts_no_adapter(
    call, glue, text, tmp_path
):
    write_sentencepiece(tmp_path / "base", text)
    base = ["--model_name_or_path", write_deberta(tmp_path / "base", share_att_key=False)]
    flags = [*base, "--task_name", "rte", "--glue_dir", glue, *LORA]
    outcome = call(*flags, "--do_train", "--lora_relative_query", "key", "--output_dir", tmp_path / "none")
    assert outcome.code == 2 and "relative positions with projections of their own" in outcome.err
    flags += ["--lora_relative_query", "none"]
    succeeded(call(*flags, *SHORT, "--max_steps", "1", "--do_train", "--output_dir", tmp_path / "run"))
    evaluate = ["--do_eval", "--max_seq_length", "64", "--output_dir", tmp_path / "o"]
    succeeded(call(*flags, *evaluate, "--lora_path", tmp_path / "run"))


def test_cutoff_with_a_tokenizer_without_an_unknown_token_is_refused(run, tiny_deberta, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_deberta)
    tokenizer.unk_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--task_name", "rte", "--do_train", *LORA, *SHORT, "--reg_loss_wgt", "1", "--masking_prob", "0.1"]
    outcome = run(*flags, "--tokenizer_name", tmp_path / "tokenizer", "--output_dir", tmp_path / "o")
    assert outcome.code == 1 and "no unknown token" in outcome.err, outcome


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_config_the_model_cannot_honour_is_refused_by_the_setting(run, text, tmp_path):
    write_sentencepiece(tmp_path / "model", text)
    write_deberta(tmp_path / "model")
    config = DebertaV2Config.from_pretrained(tmp_path / "model")
    config.pos_att_type = ["p2p", "c2p"]
    config.save_pretrained(tmp_path / "model")
    flags = ["--task_name", "rte", "--do_train", *LORA, *SHORT, "--output_dir", tmp_path / "o"]
    outcome = run(*flags, "--model_name_or_path", tmp_path / "model")
    assert outcome.code == 1 and "p2p" in outcome.err and outcome.err.count("\n") < 3, outcome


def test_adapters_of_another_model_rank_or_label_count_are_refused_and_nothing_changes(run, call, glue, tmp_path):
    train = ["--task_name", "rte", *SHORT, "--do_train", "--do_eval"]
    succeeded(run(*train, *LORA, "--output_dir", tmp_path / "deberta"))
    succeeded(call(*train, *LORA, "--glue_dir", glue, "--output_dir", tmp_path / "roberta"))
    before = contents(tmp_path / "deberta")
    evaluate = ["--do_eval", "--output_dir", tmp_path / "deberta", "--max_seq_length", "64"]
    for flags, words in (
        (["--task_name", "rte", *LORA, "--lora_path", tmp_path / "roberta"],
         ["a roberta model", "a deberta-v2 model"]),
        (["--task_name", "mnli", *LORA, "--lora_path", tmp_path / "deberta"], ["entailment, neutral, contradiction"]),
        (["--task_name", "rte", *LORA, "--lora_r", "2", "--lora_alpha", "8", "--lora_path", tmp_path / "deberta"],
         ["[4, 32]", "[2, 32]", "--lora_r 4"]),
    ):  # fmt: skip
        outcome = run(*evaluate, *flags)
        assert outcome.code == 1 and outcome.err.count("\n") < 3, outcome
        assert all(word in outcome.err for word in words), outcome.err
        assert contents(tmp_path / "deberta") == before


def test_words_of_glue_reach_the_model_though_written_in_a_file_of_ones_own(call, tiny_deberta, tmp_path):
    rows, rng = [["sentence", "label"]], random.Random(0)
    rows += [[sentence(rng, word), label] for word, label in (("surely", "yes"), ("never", "no")) for _ in range(12)]
    write_tsv(tmp_path / "train.tsv", rows)
    flags = ["--train_file", tmp_path / "train.tsv", "--validation_file", tmp_path / "train.tsv", *LORA]
    flags += ["--max_steps", "60", "--learning_rate", "1e-2", "--max_seq_length", "64", "--do_train", "--do_eval"]
    succeeded(call("--model_name_or_path", tiny_deberta, *flags, "--output_dir", tmp_path / "o"))
    assert read(tmp_path / "o" / "eval_results.json")["eval_accuracy"] > 0.9
