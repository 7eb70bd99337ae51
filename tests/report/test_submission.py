"""The zip for the GLUE server, read by a reader of its own; every refusal names what is wrong and what to do."""

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_nlu.errors import UserError
from lora_nlu.report.__main__ import main
from lora_nlu.report.submission import write_submission

GLUE = Path(os.environ.get("GLUE_DIR") or Path(__file__).parents[3] / "shared" / "glue")

MNLI = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
# the server's file: task, a run's prediction file, rows of the test set, what the server wants for each label
SERVER: dict[str, tuple[str, str, int, dict[str, str]]] = {
    "CoLA.tsv": ("cola", "predict_results_cola.tsv", 1063, {"unacceptable": "0", "acceptable": "1"}),
    "SST-2.tsv": ("sst2", "predict_results_sst2.tsv", 1821, {"negative": "0", "positive": "1"}),
    "MRPC.tsv": ("mrpc", "predict_results_mrpc.tsv", 1725, {"not_equivalent": "0", "equivalent": "1"}),
    "STS-B.tsv": ("stsb", "predict_results_stsb.tsv", 1379, {"0.000": "0.000", "2.345": "2.345", "5.000": "5.000"}),
    "QQP.tsv": ("qqp", "predict_results_qqp.tsv", 390965, {"not_duplicate": "0", "duplicate": "1"}),
    "MNLI-m.tsv": ("mnli", "predict_results_mnli.tsv", 9796, MNLI),
    "MNLI-mm.tsv": ("mnli", "predict_results_mnli-mm.tsv", 9847, MNLI),
    "QNLI.tsv": ("qnli", "predict_results_qnli.tsv", 5463, ENTAILMENT),
    "RTE.tsv": ("rte", "predict_results_rte.tsv", 3000, ENTAILMENT),
    "WNLI.tsv": ("wnli", "predict_results_wnli.tsv", 146, {"not_entailment": "0", "entailment": "1"}),
    "AX.tsv": ("ax", "predict_results_ax.tsv", 1104, MNLI),
}
TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]


def answers(name: str) -> list[str]:
    """What a run predicts for a file of the server: every label, in turn."""
    *_, rows, labels = SERVER[name]
    return [*labels] * (rows // len(labels)) + [*labels][: rows % len(labels)]


def write_predictions(folder: Path, name: str, predicted: list[str] | None = None) -> Path:
    lines = [f"{i}\t{answer}\n" for i, answer in enumerate(answers(name) if predicted is None else predicted)]
    path = folder / SERVER[name][1]
    path.write_text("index\tprediction\n" + "".join(lines))
    return path


def make_run(
    folder: Path, task: str, seed: int = 0, figures: dict | None = None, base: str = "base", predicts: bool = True
) -> Path:
    """An output folder of run_glue.py with predictions for all rows of the task's test sets."""
    folder.mkdir(parents=True)
    record = {"task": task, "base_model": base, "hyperparameters": {"seed": seed}, "labels": []}
    (folder / "run.json").write_text(json.dumps(record))
    if figures:
        (folder / "eval_results.json").write_text(json.dumps(figures))
    for name in SERVER:
        if SERVER[name][0] == task and predicts:
            write_predictions(folder, name)
    return folder


def read_zip(path: Path) -> dict[str, list[str]]:
    """Predictions of each file of a submission, with its form checked as the server does."""
    predictions = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            header, *rows = csv.reader(io.StringIO(archive.read(name).decode("ascii")), delimiter="\t")
            assert header == ["index", "prediction"]
            assert [index for index, _ in rows] == [str(i) for i in range(SERVER[name][2])]
            predictions[name] = [prediction for _, prediction in rows]
            assert name == "STS-B.tsv" or {*predictions[name]} <= {*SERVER[name][3].values()}
    return predictions


def refusal(runs: list[Path], out: Path, partial: bool = True) -> str:
    """The message of the UserError raised: three lines at most, nothing written."""
    with pytest.raises(UserError) as caught:
        write_submission(runs, out, partial)
    lines = str(caught.value).split("\n")
    assert len(lines) <= 3 and all(lines), caught.value
    assert not out.exists() and not [*out.parent.glob(".lora_nlu-*")]
    return str(caught.value)


def about(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(start)]


# ---------------------------------------------------------------------------------------------------- the complete zip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run of each task; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs")
    for task in TASKS:
        make_run(folder / "base" / task, task)
    return folder


@pytest.fixture(scope="module")
def complete(runs, tmp_path_factory) -> tuple[Path, list[str]]:
    """A submission of all tasks, and the lines that it printed."""
    out = tmp_path_factory.mktemp("out") / "new" / "glue.zip"
    return out, write_submission([runs], out)


def test_the_zip_contains_the_servers_eleven_files_flat_compressed_and_nothing_else(complete):
    with zipfile.ZipFile(complete[0]) as archive:
        assert sorted(archive.namelist()) == sorted(SERVER)
        assert all(entry.compress_type == zipfile.ZIP_DEFLATED for entry in archive.infolist())
        assert all(entry.external_attr >> 16 == 0o644 for entry in archive.infolist())
    assert os.listdir(complete[0].parent) == ["glue.zip"]
    assert complete[1][-1] == f"{complete[0]}: 11 files."


def test_every_file_contains_a_runs_predictions_in_order_in_the_servers_format(complete):
    found = read_zip(complete[0])
    for name, (*_, labels) in SERVER.items():
        assert found[name] == [labels[answer] for answer in answers(name)], name


@pytest.mark.parametrize("name", SERVER)
def test_row_counts_are_those_of_the_published_test_sets(name):
    kind = {"MNLI-m.tsv": "test_matched", "MNLI-mm.tsv": "test_mismatched"}.get(name, "test")
    path = GLUE / name.removesuffix(".tsv").partition("-m")[0] / f"{kind}.tsv"
    if not path.is_file():
        pytest.skip(f"no {path}; set GLUE_DIR")
    assert path.read_bytes().count(b"\n") == 1 + SERVER[name][2]


def test_the_same_predictions_give_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    make_run(tmp_path / "rte", "rte")
    for day in (1, 2):
        monkeypatch.setattr("time.time", lambda day=day: 1.7e9 + day * 86400)
        write_submission([tmp_path], tmp_path / f"{day}.zip", partial=True)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_module_needs_neither_torch_nor_numpy():
    code = "import sys, lora_nlu.report.submission; sys.exit(bool({'torch', 'numpy', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --------------------------------------------------------------------------------------------------- finding the runs


def test_runs_are_found_at_any_depth_each_once_and_not_in_checkpoints_or_hidden_folders(tmp_path):
    run = make_run(tmp_path / "a" / "b" / "rte", "rte", seed=7)
    for other in (run / "checkpoint-10", tmp_path / ".cache", tmp_path / "a" / ".old" / "rte"):
        make_run(other, "rte")
    (tmp_path / "link").symlink_to(run)
    lines = write_submission([tmp_path, run, tmp_path / "link"], tmp_path / "glue.zip", partial=True)
    assert about(lines, "RTE") == [f"RTE: seed 7, the only run, not evaluated: {run}"]


def test_a_hidden_folder_that_is_named_is_searched(tmp_path):
    make_run(tmp_path / ".demo" / "rte", "rte")
    write_submission([tmp_path / ".demo"], tmp_path / "glue.zip", partial=True)
    assert "RTE.tsv" in read_zip(tmp_path / "glue.zip")


def test_runs_of_other_tasks_are_passed_over(tmp_path):
    make_run(tmp_path / "rte", "rte")
    make_run(tmp_path / "mine", "custom")
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert "mine" not in "".join(lines)


@pytest.mark.parametrize(
    "name, expected_message", [("absent", "no such folder"), ("file", "no such folder"), ("empty", "no run")]
)
def test_an_argument_that_is_no_folder_or_contains_no_run_is_refused_even_beside_a_good_one(
    tmp_path, name, expected_message
):
    good = make_run(tmp_path / "rte", "rte")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    message = refusal([good, tmp_path / name], tmp_path / "glue.zip")
    assert f"{tmp_path / name}: " in message and expected_message in message and "run_glue.py" in message


def test_a_run_json_that_is_cut_is_named(tmp_path):
    run = make_run(tmp_path / "rte", "rte")
    (run / "run.json").write_text('{"task": ')
    assert f"{run / 'run.json'}: can't be read" in refusal([run], tmp_path / "glue.zip")


# ------------------------------------------------------------------------------------------------- several runs a task


@pytest.mark.parametrize(
    "task, title, key, metric",
    [
        ("cola", "CoLA", "eval_matthews_correlation", "matthews_correlation"),
        ("mrpc", "MRPC", "eval_accuracy", "accuracy"),
        ("stsb", "STS-B", "eval_pearson", "pearson"),
        ("mnli", "MNLI", "eval_accuracy_overall", "accuracy"),
        ("rte", "RTE", "eval_accuracy", "accuracy"),
    ],
)
def test_of_several_seeds_the_best_by_the_tasks_own_dev_metric_is_used_and_named(tmp_path, task, title, key, metric):
    # the other figures would choose another run
    others = ("eval_f1", "eval_spearmanr", "eval_loss", "eval_accuracy", "eval_accuracy_mm")
    for seed, figure in ((1, -0.25), (2, 0.5), (3, 0.8659), (4, 0.0)):
        make_run(tmp_path / f"seed{seed}", task, seed, {name: 1 - figure for name in others} | {key: figure})
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    expected_line = f"{title}: seed 3 of 4 runs, dev {metric} 0.866 of its final model: {tmp_path / 'seed3'}"
    assert about(lines, f"{title}:") == [expected_line]


def test_the_predictions_in_the_zip_are_the_chosen_runs(tmp_path):
    for seed, answer in enumerate(["entailment", "not_entailment", "entailment"]):
        run = make_run(tmp_path / str(seed), "rte", seed, {"eval_accuracy": 0.9 if seed == 1 else 0.7})
        write_predictions(run, "RTE.tsv", [answer] * 3000)
    write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert {*read_zip(tmp_path / "glue.zip")["RTE.tsv"]} == {"not_entailment"}


@pytest.mark.parametrize("arguments, first", [(["b", "a"], "b"), (["."], "a")])
def test_equal_figures_give_the_run_that_was_named_first_or_comes_first_by_name(tmp_path, arguments, first):
    for name in ("c", "a", "b"):
        make_run(tmp_path / name, "rte", figures={"eval_accuracy": 0.5})
    lines = write_submission([tmp_path / name for name in arguments], tmp_path / "glue.zip", partial=True)
    assert about(lines, "RTE")[0].endswith(f": {tmp_path / first}")


@pytest.mark.parametrize("figures", [None, {"eval_loss": 0.1}, {"eval_accuracy": "1"}])
def test_several_runs_are_refused_if_one_has_no_dev_figure(tmp_path, figures):
    make_run(tmp_path / "good", "rte", 0, {"eval_accuracy": 0.9})
    run = make_run(tmp_path / "other", "rte", 1, figures)
    message = refusal([tmp_path], tmp_path / "glue.zip")
    assert message.startswith(f"RTE: 2 runs predict it, and {run} has no dev accuracy.")
    assert "--do_eval" in message and "only one run" in message


def test_a_run_without_predictions_does_not_count_and_needs_no_dev_figure(tmp_path):
    run = make_run(tmp_path / "predicted", "rte", 5)
    make_run(tmp_path / "trained", "rte", 6, predicts=False)
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert about(lines, "RTE") == [f"RTE: seed 5, the only run, not evaluated: {run}"]


def write_log(run: Path, *entries: dict) -> None:
    (run / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


@pytest.mark.parametrize("task, title, place", [("rte", "RTE", ""), ("mnli", "MNLI", " on the matched set")])
def test_a_better_epoch_than_that_of_the_predicting_model_is_reported_with_its_figure_and_a_remedy(
    tmp_path, task, title, place
):
    for seed, (best, last) in enumerate([(0.9, 0.6), (0.8, 0.7), (0.65, 0.65)]):
        figures = {"eval_accuracy": last, "eval_accuracy_overall": last}
        run = make_run(tmp_path / str(seed), task, seed, figures if task == "mnli" else {"eval_accuracy": last})
        evaluations = [{"step": 10 * i, "epoch": i, "eval_accuracy": value} for i, value in enumerate((best, last), 3)]
        write_log(run, {"step": 5, "loss": 0.5}, *evaluations)
    lines = about(write_submission([tmp_path], tmp_path / "glue.zip", partial=True), title)
    assert lines == [
        f"{title}: seed 1 of 3 runs, dev accuracy 0.700 of its final model: {tmp_path / '1'}",
        f"{title}: epoch 3 of seed 0 had accuracy 0.900{place}; "
        "--load_best_model_at_end would have kept that model and predicted with it.",
    ]
    only = about(write_submission([tmp_path / "2"], tmp_path / "2.zip", partial=True), title)
    assert len(only) == 1  # it ended with its best


DIVERGED: dict[str, tuple[dict, dict, str]] = {
    "evaluation": ({"eval_accuracy": 0.9, "eval_loss": float("nan")}, {"loss": 0.5}, "eval_loss nan"),
    "metric": ({"eval_accuracy": float("nan"), "eval_loss": 0.1}, {"loss": 0.5}, "eval_accuracy nan"),
    "logged loss": ({"eval_accuracy": 0.9}, {"loss": float("inf")}, "loss inf"),
    "gradients, by a version that logged a loss of 0": (
        {"eval_accuracy": 0.9},
        {"loss": 0.0, "grad_norm": float("nan")},
        "grad_norm nan",
    ),
}


@pytest.mark.parametrize("case", DIVERGED)
def test_a_diverged_run_is_left_out_by_name_and_never_the_best_seed(tmp_path, case):
    figures, logged, why = DIVERGED[case]
    write_log(make_run(tmp_path / "diverged", "rte", 0, figures), {"step": 1, "loss": 0.7}, {"step": 2} | logged)
    good = make_run(tmp_path / "good", "rte", 1, {"eval_accuracy": 0.5})
    write_log(good, {"step": 1, "loss": 0.7, "grad_norm": 3.0})
    write_predictions(good, "RTE.tsv", ["not_entailment"] * 3000)
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert about(lines, "left out") == [f"left out, diverged ({why}): {tmp_path / 'diverged'}"]
    assert about(lines, "RTE")[0].startswith("RTE: seed 1, the only run, dev accuracy 0.500")
    assert {*read_zip(tmp_path / "glue.zip")["RTE.tsv"]} == {"not_entailment"}


@pytest.mark.parametrize("partial", [True, False])
def test_a_submission_of_diverged_runs_alone_is_refused(tmp_path, partial):
    run = make_run(tmp_path / "run", "rte", 0, {"eval_accuracy": 0.5271, "eval_loss": float("nan")})
    assert f"left out, diverged (eval_loss nan): {run}" in refusal([run], tmp_path / "glue.zip", partial)


def test_a_missing_task_names_its_diverged_run(tmp_path):
    make_run(tmp_path / "good", "cola", 1, {"eval_matthews_correlation": 0.5})
    run = make_run(tmp_path / "run", "rte", 0, {"eval_accuracy": 0.5271, "eval_loss": float("nan")})
    message = refusal([tmp_path], tmp_path / "glue.zip", partial=False)
    assert "RTE.tsv" in message and f"left out, diverged (eval_loss nan): {run}." in message


def test_a_step_that_the_loss_scaler_of_fp16_left_out_is_no_divergence(tmp_path):
    run = make_run(tmp_path / "run", "rte", 0, {"eval_accuracy": 0.8})
    record = json.loads((run / "run.json").read_text())
    record["hyperparameters"]["fp16"] = True
    (run / "run.json").write_text(json.dumps(record))
    write_log(run, {"step": 2, "loss": 0.5, "grad_norm": float("inf")})
    assert not about(write_submission([run], tmp_path / "glue.zip", partial=True), "left out")


def test_results_of_another_model_than_the_runs_are_neither_chosen_by_nor_sent(tmp_path):
    """In a folder of evaluations: the earlier adapter's figure, or its predictions, beside the later one's."""
    for name, evaluated, predicted in (("a", "aa", "aa"), ("b", "bb", "aa"), ("c", "aa", "cc")):
        folder = make_run(tmp_path / name, "rte", figures={"eval_accuracy": 0.9, "weights_fingerprint": evaluated})
        run = json.loads((folder / "run.json").read_text()) | {"weights_fingerprint": name * 2}
        (folder / "run.json").write_text(json.dumps(run))
        of = {"predict_results_rte.tsv": {"weights_fingerprint": predicted}}
        (folder / "predict_results.json").write_text(json.dumps(of))
    lines = write_submission([tmp_path / "a", tmp_path / "b"], tmp_path / "glue.zip", partial=True)
    assert f"left out: {tmp_path}/b/predict_results_rte.tsv: of another model than the run's" in lines
    assert about(lines, "RTE:") == [f"RTE: seed 0, the only run, dev accuracy 0.900 of its final model: {tmp_path}/a"]
    message = refusal([tmp_path], tmp_path / "other.zip")
    assert f"2 runs predict it, and {tmp_path}/c has no dev accuracy" in message
    lines = write_submission([tmp_path / "c"], tmp_path / "c.zip", partial=True)
    assert f"left out: {tmp_path}/c, eval_results.json: of another model" in lines
    assert "not evaluated" in about(lines, "RTE:")[0]
    (tmp_path / "a" / "predict_results.json").write_text("{")
    lines = write_submission([tmp_path], tmp_path / "rest.zip", partial=True)
    assert about(lines, f"left out: {tmp_path}/a/predict_results.json: can't be read")


@pytest.mark.parametrize("bases, listed", [(("b", "b"), []), (("b", "l"), ["b (CoLA); l (RTE)"])])
def test_different_base_models_are_allowed_and_listed(tmp_path, bases, listed):
    for task, base in zip(("cola", "rte"), bases, strict=True):
        make_run(tmp_path / task, task, base=base)
    make_run(tmp_path / "unused", "sst2", base="third", predicts=False)
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert about(lines, "The runs have") == [f"The runs have different base models: {each}." for each in listed]


# ------------------------------------------------------------------------------------------------------------ AX, WNLI


def test_ax_comes_with_the_chosen_mnli_run_and_not_from_another(tmp_path):
    for seed, label in enumerate(["neutral", "entailment"]):
        run = make_run(tmp_path / f"mnli{seed}", "mnli", seed, {"eval_accuracy_overall": seed / 2})
        write_predictions(run, "AX.tsv", [label] * 1104)
    make_run(tmp_path / "ax1", "ax")
    make_run(tmp_path / "ax2", "ax")
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert about(lines, "AX") == ["AX: from the MNLI run."]
    assert {*read_zip(tmp_path / "glue.zip")["AX.tsv"]} == {"entailment"}


def test_ax_of_a_separate_run_is_used_if_the_chosen_mnli_run_has_none_and_its_folder_is_named(tmp_path):
    worse = make_run(tmp_path / "mnli0", "mnli", 0, {"eval_accuracy_overall": 0.1})
    write_predictions(worse, "AX.tsv", ["neutral"] * 1104)
    make_run(tmp_path / "mnli1", "mnli", 1, {"eval_accuracy_overall": 0.2})
    run = make_run(tmp_path / "ax", "ax")
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert about(lines, "AX") == [f"AX: from a separate run: {run}"]
    assert {*read_zip(tmp_path / "glue.zip")["AX.tsv"]} == {*MNLI}


def test_several_separate_ax_runs_are_refused(tmp_path):
    runs = [make_run(tmp_path / name, "ax") for name in ("ax1", "ax2")]
    message = refusal([tmp_path], tmp_path / "glue.zip")
    assert "AX: 2 runs predict it" in message and all(str(run) in message for run in runs) and "Name only" in message


def test_wnli_without_a_run_gets_the_majority_class_and_a_line_says_so(tmp_path):
    make_run(tmp_path / "rte", "rte")
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert read_zip(tmp_path / "glue.zip")["WNLI.tsv"] == ["0"] * 146
    assert about(lines, "WNLI") == ["WNLI: no run; all 146 rows are not_entailment, as 323 of the 635 in training are."]


@pytest.mark.skipif(not (GLUE / "WNLI").is_dir(), reason=f"no WNLI at {GLUE}; set GLUE_DIR")
def test_zero_is_the_majority_class_of_wnlis_training_set():
    labels = [line.rpartition("\t")[2] for line in (GLUE / "WNLI" / "train.tsv").read_text().splitlines()[1:]]
    assert (labels.count("0"), len(labels)) == (323, 635)


def test_wnli_that_was_trained_but_not_predicted_is_missing_and_not_made_up(tmp_path):
    make_run(tmp_path / "wnli", "wnli", predicts=False)
    make_run(tmp_path / "rte", "rte")
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert [*read_zip(tmp_path / "glue.zip")] == ["RTE.tsv"] and "WNLI.tsv" in about(lines, "Left out")[0]


# ------------------------------------------------------------------------------------------------------- missing tasks


@pytest.mark.parametrize("task", [task for task in TASKS if task != "wnli"])
def test_a_missing_task_is_refused_with_its_files_and_what_to_run(runs, tmp_path, task):
    message = refusal([runs / "base" / other for other in TASKS if other != task], tmp_path / "glue.zip", partial=False)
    names = [name for name in SERVER if SERVER[name][0] == task]
    assert message.startswith(f"no predictions for {', '.join(names)}.\n")
    assert "run_glue.py --task_name X --do_predict ..." in message and f"X being {task}" in message
    assert ("MNLI run's adapter" in message) == (task == "ax") and "--partial" in message


def test_all_missing_files_are_listed_at_once(runs, tmp_path):
    message = refusal([runs / "base" / "rte"], tmp_path / "glue.zip", partial=False)
    assert ", ".join(name for name in SERVER if name not in ("RTE.tsv", "WNLI.tsv")) in message
    assert "cola, sst2, mrpc, stsb, qqp, mnli, qnli, ax" in message


def test_mnli_without_its_mismatched_half_is_missing(tmp_path):
    run = make_run(tmp_path / "mnli", "mnli")
    (run / "predict_results_mnli-mm.tsv").unlink()
    assert "MNLI-m.tsv, MNLI-mm.tsv" in refusal([run], tmp_path / "glue.zip", partial=False)


def test_partial_leaves_missing_files_out_lists_them_and_warns_that_the_server_requires_all(tmp_path):
    for task in ("rte", "mnli"):
        make_run(tmp_path / task, task)
    lines = write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    there = ["MNLI-m.tsv", "MNLI-mm.tsv", "RTE.tsv", "WNLI.tsv"]
    assert [*read_zip(tmp_path / "glue.zip")] == there
    (line,) = about(lines, "Left out")
    assert ", ".join(name for name in SERVER if name not in there) in line and "all eleven" in line
    assert lines[-1] == f"{tmp_path / 'glue.zip'}: 4 files."


def test_a_complete_submission_reports_no_missing_files_with_or_without_partial(complete):
    assert not about(complete[1], "Left out") and len(complete[1]) == 11


# --------------------------------------------------------------------------------------------------- prediction files


def replaced(line: int, by: str | None) -> Callable[[list[str]], list[str]]:
    """A change of a file's lines: line `line` (from 1) by another, or by none."""
    return lambda lines: [*lines[: line - 1], *([] if by is None else [by]), *lines[line:]]


BROKEN: dict[str, tuple[str, Callable[[list[str]], list[str]], int, str, str]] = {
    "empty file": ("RTE.tsv", lambda lines: [], 1, "header ''", r"'index\tprediction'"),
    "no header": ("RTE.tsv", replaced(1, None), 1, r"header '0\tentailment'", r"'index\tprediction'"),
    "other header": ("RTE.tsv", replaced(1, "id,label"), 1, "header 'id,label'", r"'index\tprediction'"),
    "row left out": ("RTE.tsv", replaced(8, None), 8, "index '7'", "'6'"),
    "rows swapped": ("RTE.tsv", lambda lines: [*lines[:-2], lines[-1], lines[-2]], 3000, "index '2999'", "'2998'"),
    "from 1": ("RTE.tsv", replaced(2, "1\tentailment"), 2, "index '1'", "'0'"),
    "index 00": ("RTE.tsv", replaced(2, "00\tentailment"), 2, "index '00'", "'0'"),
    "blank line": ("RTE.tsv", replaced(5, ""), 5, "index ''", "'3'"),
    "no tab": ("RTE.tsv", replaced(5, "3"), 5, "prediction ''", "entailment, not_entailment"),
    "three columns": ("RTE.tsv", replaced(5, "3\tentailment\t0.9"), 5, r"'entailment\t0.9'", "entailment, not_entailm"),
    "id for name": ("RTE.tsv", replaced(5, "3\t1"), 5, "prediction '1'", "entailment, not_entailment"),
    "another task's label": ("CoLA.tsv", replaced(9, "7\tneutral"), 9, "prediction 'neutral'", "unacceptable, accep"),
    "not UTF-8": ("RTE.tsv", replaced(5, "3\tentailment\udcff"), 5, "prediction 'entailment\ufffd'", "entailment, not"),
    "too few rows": ("RTE.tsv", lambda lines: lines[:101], 101, "the file ends after 100 rows", "3,000"),
    "too many rows": ("RTE.tsv", lambda lines: [*lines, "x"], 3002, "the file ends after 3,001 rows", "3,000"),
    "blank line at the end": ("RTE.tsv", lambda lines: [*lines, ""], 3002, "3,001 rows", "3,000"),
    "header only": ("WNLI.tsv", lambda lines: lines[:1], 1, "the file ends after 0 rows", "146"),
    "MNLI's second half": ("MNLI-mm.tsv", lambda lines: lines[:9797], 9797, "9,796 rows", "9,847"),
    "AX": ("AX.tsv", replaced(1105, "1103\tmaybe"), 1105, "prediction 'maybe'", "entailment, neutral, contradiction"),
    "nan": ("STS-B.tsv", replaced(4, "2\tnan"), 4, "prediction 'nan'", "a finite number"),
    "underscore": ("STS-B.tsv", replaced(4, "2\t1_0.5"), 4, "prediction '1_0.5'", "a finite number"),
    "infinite": ("STS-B.tsv", replaced(4, "2\t-inf"), 4, "prediction '-inf'", "a finite number"),
    "word for number": ("STS-B.tsv", replaced(4, "2\tgood"), 4, "prediction 'good'", "a finite number"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_prediction_file_that_is_not_right_is_refused_with_line_found_expected_and_remedy(tmp_path, case):
    name, change, line, found, expected = BROKEN[case]
    run = make_run(tmp_path / "run", SERVER[name][0])
    path = run / SERVER[name][1]
    lines = change(path.read_text().splitlines())
    path.write_text("".join(f"{text}\n" for text in lines), errors="surrogateescape")
    message = refusal([run], tmp_path / "glue.zip")
    assert message.startswith(f"{path}:{line}: ") and found in message and f"expected {expected}" in message
    assert "Run again with --do_predict, without --max_predict_samples" in message and SERVER[name][0] in message


def test_only_the_files_that_go_into_the_zip_are_checked(tmp_path):
    make_run(tmp_path / "good", "rte", 0, {"eval_accuracy": 0.9})
    write_predictions(make_run(tmp_path / "worse", "rte", 1, {"eval_accuracy": 0.8}), "RTE.tsv", ["entailment"])
    write_submission([tmp_path], tmp_path / "glue.zip", partial=True)
    assert len(read_zip(tmp_path / "glue.zip")["RTE.tsv"]) == 3000


def test_stsb_is_limited_to_0_and_5_with_three_decimals_and_the_number_of_changed_values_is_printed(tmp_path):
    run = make_run(tmp_path / "stsb", "stsb")
    predictions = ["-0.001", "0", "-0", "5.0", "5.001", "1e3", "2.3456", "4"] + ["1.000"] * 1371
    write_predictions(run, "STS-B.tsv", predictions)
    lines = write_submission([run], tmp_path / "glue.zip", partial=True)
    found = read_zip(tmp_path / "glue.zip")["STS-B.tsv"]
    assert found[:9] == ["0.000", "0.000", "0.000", "5.000", "5.000", "5.000", "2.346", "4.000", "1.000"]
    assert about(lines, "STS-B: 3") == ["STS-B: 3 of 1,379 numbers moved into 0..5."]


# ------------------------------------------------------------------------------------------------------------- writing


def test_an_existing_file_is_not_written_over(tmp_path):
    run = make_run(tmp_path / "rte", "rte")
    (tmp_path / "glue.zip").write_text("mine")
    with pytest.raises(UserError, match="glue.zip: exists already and is not overwritten"):
        write_submission([run], tmp_path / "glue.zip", partial=True)
    assert (tmp_path / "glue.zip").read_text() == "mine"


def test_a_zip_that_could_not_be_written_to_the_end_leaves_nothing(tmp_path, monkeypatch):
    run = make_run(tmp_path / "rte", "rte")

    def full(self, entry, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(OSError, match="No space left"):
        write_submission([run], tmp_path / "glue.zip", partial=True)
    assert os.listdir(tmp_path) == ["rte"]


@pytest.mark.parametrize(
    "fault, expected_message", [("row", "'RTE.tsv': 2999"), ("name", "'rte.tsv': 3000"), ("bytes", "CRC")]
)
def test_a_zip_that_reads_back_otherwise_gets_no_name(tmp_path, monkeypatch, fault, expected_message):
    run = make_run(tmp_path / "rte", "rte")
    write, read = zipfile.ZipFile.writestr, zipfile.ZipFile.read

    def faulty(self, entry, data):
        if entry.filename == "RTE.tsv" and fault == "row":
            data = data.replace("2999\tnot_entailment\n", "")
        elif entry.filename == "RTE.tsv" and fault == "name":
            entry.filename = "rte.tsv"
        write(self, entry, data)

    def damaged(self, name):
        if fault == "bytes":
            self.getinfo(name).CRC += 1
        return read(self, name)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", faulty)
    monkeypatch.setattr(zipfile.ZipFile, "read", damaged)
    message = refusal([run], tmp_path / "glue.zip")
    assert expected_message in message and "Removed" in message
    assert os.listdir(tmp_path) == ["rte"]


# -------------------------------------------------------------------------------------------------------- command line


def test_the_program_prints_what_it_did_and_ends_with_0(tmp_path, capsys):
    run = make_run(tmp_path / "rte", "rte", 3, {"eval_accuracy": 0.866})
    assert main(["submission", str(run), "--out", str(tmp_path / "glue.zip"), "--partial"]) == 0
    printed = capsys.readouterr()
    assert (
        printed.out.startswith(f"RTE: seed 3, the only run, dev accuracy 0.866 of its final model: {run}\n")
        and not printed.err
    )
    assert printed.out.endswith(f"{tmp_path / 'glue.zip'}: 2 files.\n")


def test_the_program_takes_several_folders(tmp_path):
    folders = [str(make_run(tmp_path / task, task)) for task in ("rte", "cola")]
    assert main(["submission", *folders, "--out", str(tmp_path / "glue.zip"), "--partial"]) == 0
    assert [*read_zip(tmp_path / "glue.zip")] == ["CoLA.tsv", "RTE.tsv", "WNLI.tsv"]


@pytest.mark.parametrize(
    "out, flags, expected_message",
    [("glue.zip", [], "no predictions for"), ("rte/run.json/glue.zip", ["--partial"], "run.json")],
    ids=["UserError", "OSError"],
)
def test_the_program_ends_with_1_and_a_message_for_what_a_person_can_put_right(
    tmp_path, capsys, out, flags, expected_message
):
    run = make_run(tmp_path / "rte", "rte")
    assert main(["submission", str(run), "--out", str(tmp_path / out), *flags]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("lora_nlu.report: error: ") and expected_message in printed.err and not printed.out


@pytest.mark.parametrize("arguments", [[], ["somewhere"], ["--out", "glue.zip"], ["a", "--out", "b", "--unknown"]])
def test_a_command_line_that_is_wrong_ends_with_2_and_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["submission", *arguments])
    assert caught.value.code == 2
    assert "usage: python -m lora_nlu.report" in capsys.readouterr().err
