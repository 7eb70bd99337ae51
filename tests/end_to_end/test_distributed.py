"""One run in one process and in several, on one machine and on two: the same losses, adapter, metrics and predictions.

The models are without dropout, whose draws depend on who draws them. R-Drop is on all the same: with a cutoff of
(nearly) all tokens the second view is another than the first, and the same in every run.
"""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import free_port
from runs import LORA, cut_off, flags_of_command, program, write_models
from test_run_glue import read, rte, scores, succeeded, trained_flat
from torch.distributed import launch
from torch.distributed.run import config_from_args, macros

from lora_nlu.errors import UserError
from lora_nlu.models import modeling_deberta_v2, modeling_roberta
from lora_nlu.training.output_folder import locked, wait_for_file
from lora_nlu.training.processes import seed_from
from lora_nlu.training.trainer import _DropoutOfProcess

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FSDP = ["--fsdp", "--fsdp_config", CONFIGS / "fsdp2.json"]
BY_LENGTH = ["--train_sampling_strategy", "group_by_length"]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# 45 examples, 8 a step: the sixth step of an epoch has 5 of them. 21 to evaluate on, 8 at a time.
STEPS = ["--max_steps", 20, "--max_train_samples", 45, "--learning_rate", "1e-2", "--logging_steps", 1]
STEPS += ["--max_seq_length", 64, "--reg_loss_wgt", 2, "--masking_prob", 0.9999999, "--do_train"]
EVAL = ["--do_eval", "--do_predict", "--max_eval_samples", 21, "--per_device_eval_batch_size", 8]
BATCH, ACCUMULATE = "--per_device_train_batch_size", "--gradient_accumulation_steps"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)


@pytest.fixture(scope="module")
def steady(tmp_path_factory, glue) -> dict[str, Path]:
    """Both models without dropout."""
    return write_models(tmp_path_factory.mktemp("steady"), glue, **STEADY)


def history(output: Path, key: str) -> torch.Tensor:
    log = read(output / "trainer_state.json")["log_history"]
    return torch.tensor([entry[key] for entry in log if key in entry], dtype=torch.float64)


def assert_same_run(got: Path, want: Path, steps: int = 20) -> None:
    """Losses, their parts, gradient norms, adapter and evaluation to 1e-5; predictions and discrete metrics equal."""
    for key in ("loss", "task_loss", "consistency_loss", "grad_norm"):
        one, other = history(got, key), history(want, key)
        assert len(one) == len(other) == steps
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), (key, one, other)
    assert history(want, "consistency_loss").min() > 1e-5  # R-Drop has something to say
    one, other = trained_flat(got), trained_flat(want)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert (one[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name
    one, other = scores(got / "eval_results.json"), scores(want / "eval_results.json")
    assert one.pop("eval_loss") == pytest.approx(other.pop("eval_loss"), rel=1e-5)
    assert one == other and one["eval_samples"] == 21
    name = "predict_results_rte.tsv"
    assert (got / name).read_text() == (want / name).read_text()


# ----------------------------------------------------------------------------------------- the same steps everywhere


@pytest.mark.parametrize(
    "model, examples, backend",
    [
        ("roberta", 45, [*BY_LENGTH, "--class_weights", "1,3"]),
        ("deberta", 45, []),
        ("roberta", 41, []),
        ("roberta", 45, FSDP),
        ("deberta", 45, FSDP),
        ("deberta", 41, [*FSDP, "--lora_variant", "dora"]),
    ],
    ids=[
        "roberta by length with class weights",
        "deberta",
        "one process idle in the last step",
        "roberta FSDP2",
        "deberta FSDP2",
        "DoRA FSDP2",
    ],
)
def test_a_step_is_the_same_however_its_examples_are_divided_among_processes(
    model, examples, backend, steady, fork, call, glue, tmp_path
):
    def flags(name: str, *more: object) -> list[object]:
        common = ["--model_name_or_path", steady[model], *STEPS, *EVAL, "--max_train_samples", examples]
        return rte(glue, tmp_path / name, *common, *more, *backend)

    succeeded(call(*flags("one", BATCH, 8)))  # which has nothing to shard
    succeeded(fork(*flags("two", BATCH, 4), processes=2))
    assert_same_run(tmp_path / "two", tmp_path / "one")
    if examples == 45:
        succeeded(call(*flags("accumulated", BATCH, 4, ACCUMULATE, 2)))
        succeeded(fork(*flags("both", BATCH, 2, ACCUMULATE, 2), processes=2))
        assert_same_run(tmp_path / "accumulated", tmp_path / "one")
        assert_same_run(tmp_path / "both", tmp_path / "one")


def test_without_compensation_for_the_last_uneven_step_the_runs_would_differ(steady, call, glue, tmp_path):
    """The comparison above can fail: the mean of micro-batches' means is another number."""
    flags = ["--model_name_or_path", steady["roberta"], *STEPS, "--max_steps", 6]
    succeeded(call(*rte(glue, tmp_path / "one", *flags, BATCH, 8)))
    succeeded(call(*rte(glue, tmp_path / "other", *flags, BATCH, 4, "--max_train_samples", 44)))
    one, other = history(tmp_path / "one", "loss"), history(tmp_path / "other", "loss")
    assert len(one) == len(other) == 6 and (one[-1] - other[-1]).abs() > 1e-4


def test_what_the_references_launcher_starts_trains_scores_and_predicts_a_regression_as_one_process(
    steady, fork, call, glue, tmp_path
):
    """It adds --local-rank. STS-B: 24 examples to evaluate on and 10 to predict, 7 a process a time: none divides.

    That it starts run_glue.py is proved in test_run_glue.py; here are the arguments that torch's launcher gives each.
    """
    flags = ["--task_name", "stsb", "--glue_dir", glue, "--model_name_or_path", steady["roberta"], *LORA]
    flags += ["--max_seq_length", 64, "--do_eval", "--do_predict", "--per_device_eval_batch_size", 7]
    training = ["--do_train", "--max_steps", 7, "--learning_rate", "1e-2"]
    _, _, words = config_from_args(launch.parse_args(["--nproc_per_node=2", "run_glue.py"]))
    assert words[-1].startswith("--local-rank="), words
    added = f"sys.argv[1:1] = [{words[-1]!r}.replace({macros.local_rank!r}, os.environ['LOCAL_RANK'])]"
    succeeded(call(*flags, *training, "--output_dir", tmp_path / "one", BATCH, 10))
    own = program(tmp_path, added)
    outcome = succeeded(fork(*flags, *training, "--output_dir", tmp_path / "two", BATCH, 5, processes=2, script=own))
    assert "--local-rank=0: dropped, the launcher sets it" in outcome.out
    flags += ["--lora_path", tmp_path / "one", "--output_dir", tmp_path / "scored"]
    succeeded(fork(*flags, processes=2))
    one = scores(tmp_path / "one" / "eval_results.json")
    assert scores(tmp_path / "two" / "eval_results.json") == pytest.approx(one, rel=1e-4)
    assert scores(tmp_path / "scored" / "eval_results.json") == pytest.approx(one, rel=1e-5)
    assert one["eval_samples"] == 24
    predicted = (tmp_path / "one" / "predict_results_stsb.tsv").read_text()
    assert len(predicted.splitlines()) == 11
    assert (tmp_path / "scored" / "predict_results_stsb.tsv").read_text() == predicted
    details = (tmp_path / "scored" / "predictions_stsb.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in details] == [*range(10)]


def test_two_machines_train_what_one_process_does(steady, fork, environment, base_flags, glue, tmp_path):
    """Two launches of one script that meet on the loopback address; 48 examples are less than one step of 2 x 32.

    They meet by c10d; that they do by node_rank and master_addr is proved in tests/test_scripts.py.
    """
    script = ["bash", ROOT / "scripts" / "roberta_base_cola.sh", *base_flags[2:]]
    script += ["--model_name_or_path", steady["roberta"], "--max_steps", 5, "--max_seq_length", 64]
    clean = {k: v for k, v in environment.items() if not k.startswith("SLURM")} | {"GLUE_DIR": str(glue)}

    def launched(output: Path, **settings: object) -> subprocess.Popen:
        env = clean | {name: str(value) for name, value in settings.items()} | {"output_dir": str(output)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([*map(str, script)], env=env, **pipes)

    rendezvous = f"--rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()} --rdzv_id=test"
    common: dict[str, object] = {"nnodes": 2, "devices": 1, "torchrun_options": rendezvous}
    nodes = [launched(tmp_path / "two", node_rank=rank, **common) for rank in (0, 1)]
    alone = launched(tmp_path / "one", devices=0, DRY_RUN=1)
    printed = []
    for process in (*nodes, alone):
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err[-3000:]
        assert "2 x 32 = 64 examples a step" in err
        printed.append(out)
    succeeded(fork(*flags_of_command(printed[-1]), base=False))
    assert history(tmp_path / "two", "eval_loss").tolist() == pytest.approx(
        history(tmp_path / "one", "eval_loss").tolist(), rel=1e-5
    )
    one, two = trained_flat(tmp_path / "one"), trained_flat(tmp_path / "two")
    assert all((two[name] - one[name]).abs().max() <= 1e-5 * one[name].abs().max() for name in one)
    results = scores(tmp_path / "one" / "eval_results.json")
    assert scores(tmp_path / "two" / "eval_results.json") == pytest.approx(results, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- resuming


def test_a_run_resumes_with_another_number_of_processes_and_under_another_backend(steady, fork, call, glue, tmp_path):
    """Cut off in the middle of an epoch, after 8 of 20 steps of which an epoch has 6."""

    def flags(name: str, *more: object) -> list[object]:
        common = ["--model_name_or_path", steady["roberta"], *STEPS, *EVAL, "--save_steps", 8, *BY_LENGTH]
        common += ["--lora_variant", "rslora", "--loraplus_lr_ratio", 2, "--head_learning_rate", "4e-3"]
        common += ["--adam_epsilon", "1e-3"]  # else Adam makes a step of what is only rounding
        return rte(glue, tmp_path / name, *common, *more)

    succeeded(call(*flags("one", BATCH, 8)))
    succeeded(fork(*flags("sharded", BATCH, 4, *FSDP), processes=2))
    for name, source in (("two", "one"), ("sharded again", "one"), ("one again", "sharded")):
        cut_off(tmp_path / source, tmp_path / name, after=8)
    outcomes = [
        succeeded(fork(*flags("two", BATCH, 4), processes=2)),
        succeeded(fork(*flags("sharded again", BATCH, 2, ACCUMULATE, 2, *FSDP), processes=2)),
        succeeded(call(*flags("one again", BATCH, 4, ACCUMULATE, 2))),
    ]
    assert all("checkpoint-8" in outcome.out and "Resuming from" in outcome.out for outcome in outcomes)
    assert "written by 1 process: from here on dropout draws anew" in outcomes[0].out
    assert "written by 2 processes: from here on dropout draws anew" in outcomes[2].out
    for name in ("two", "sharded again", "one again"):
        assert_same_run(tmp_path / name, tmp_path / "one")
    # and another batch is another run
    cut_off(tmp_path / "one", tmp_path / "other", after=8)
    outcome = fork(*flags("other", BATCH, 8), processes=2)
    assert outcome.code != 0 and "examples_a_step 8, now 16" in outcome.err
    assert outcome.err.count("run_glue.py: error") == 1


def test_full_fine_tuning_under_fsdp2_ends_in_one_models_file_and_resumes_in_one_process(
    steady, fork, call, glue, tmp_path
):
    def flags(name: str, *more: object) -> list[object]:
        common = ["--task_name", "rte", "--glue_dir", glue, "--output_dir", tmp_path / name]
        common += ["--model_name_or_path", steady["roberta"], "--max_steps", 6, "--save_steps", 2, *EVAL]
        return [*common, "--logging_steps", 1, "--learning_rate", "1e-3", "--max_seq_length", 64, "--do_train", *more]

    succeeded(call(*flags("one", BATCH, 8)))
    succeeded(fork(*flags("two", BATCH, 4, *FSDP), processes=2))
    cut_off(tmp_path / "two", tmp_path / "resumed", after=4)
    succeeded(call(*flags("resumed", BATCH, 8)))
    want = scores(tmp_path / "one" / "eval_results.json")
    for name in ("two", "resumed"):
        torch.testing.assert_close(
            history(tmp_path / name, "loss"), history(tmp_path / "one", "loss"), rtol=1e-5, atol=0
        )
        assert scores(tmp_path / name / "eval_results.json") == pytest.approx(want, rel=1e-4)
        assert (tmp_path / name / "model.safetensors").is_file()
    evaluate = ["--task_name", "rte", "--glue_dir", glue, "--model_name_or_path", tmp_path / "two", *EVAL]
    succeeded(call(*evaluate, "--max_seq_length", 64, "--output_dir", tmp_path / "two"))  # refused for other weights
    weights = read(tmp_path / "two" / "run.json")["weights_fingerprint"]
    assert weights == read(tmp_path / "two" / "eval_results.json")["weights_fingerprint"] is not None


def test_fsdp2_in_bf16_saves_fp32_after_an_evaluation_and_loads_the_best(steady, fork, glue, tmp_path):
    """An evaluation leaves the head gathered in bf16: what is saved then must be the shards, and what is loaded too."""
    flags = [
        "--model_name_or_path",
        steady["roberta"],
        "--max_steps",
        6,
        "--logging_steps",
        1,
        "--do_train",
        "--do_eval",
    ]
    flags += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_steps", 2, BATCH, 4, "--bf16"]
    # a rate that grows until it is too fast: the best checkpoint is not the last
    flags += [
        "--learning_rate",
        "6e-2",
        "--warmup_steps",
        6,
        "--load_best_model_at_end",
        "--metric_for_best_model",
        "loss",
    ]
    succeeded(fork(*rte(glue, tmp_path / "ddp", *flags), processes=2))
    succeeded(fork(*rte(glue, tmp_path / "o", *flags, *FSDP), processes=2))
    one, other = history(tmp_path / "o", "loss"), history(tmp_path / "ddp", "loss")
    assert one.tolist() == pytest.approx(other.tolist(), rel=0.02) and one.tolist() != other.tolist()
    evaluated = history(tmp_path / "o", "eval_loss")
    assert evaluated[:3].argmin() < 2, evaluated
    best = tmp_path / "o" / f"checkpoint-{2 * int(evaluated[:3].argmin()) + 2}"
    state = trained_flat(tmp_path / "o")
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained_flat(best).items())
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert "lora_B" in name or not torch.equal(tensor, tensor.bfloat16().float()), name
    results = read(tmp_path / "o" / "eval_results.json")
    assert results["eval_loss"] == pytest.approx(float(evaluated[:3].min()), rel=1e-6)


def test_a_rank_killed_in_mid_epoch_ends_the_run_which_then_goes_on_to_the_same_adapter(fork, glue, tmp_path):
    """With dropout: the processes take up their own random states again."""

    def flags(name: str) -> list[object]:
        steps = ["--max_steps", 60, "--save_steps", 4, "--save_total_limit", 2, "--logging_steps", 1, BATCH, 4]
        return rte(glue, tmp_path / name, *steps, "--max_seq_length", 64, "--do_train", "--do_eval")

    def kill(processes: list[int]) -> None:
        while not [*(tmp_path / "killed").glob("checkpoint-*")]:
            os.kill(processes[1], 0)  # it has not ended
            time.sleep(0.01)
        os.kill(processes[1], signal.SIGKILL)

    succeeded(fork(*flags("complete"), processes=2))
    outcome = fork(*flags("killed"), processes=2, meanwhile=kill)
    assert outcome.code == -signal.SIGKILL and not (tmp_path / "killed" / "train_results.json").exists()
    for text in ("Connection closed by peer", "run_glue.py: error", "Traceback"):  # of what the survivor met
        assert text not in outcome.err, outcome.err

    outcome = succeeded(fork(*flags("killed"), processes=2))
    assert "Resuming from" in outcome.out
    one, other = trained_flat(tmp_path / "complete"), trained_flat(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.testing.assert_close(
        history(tmp_path / "killed", "loss"), history(tmp_path / "complete", "loss"), rtol=0, atol=0
    )


# ------------------------------------------------------------------------------------------------------------- errors


def test_an_error_of_all_processes_is_printed_once_and_again_at_the_end_of_torchruns_summary(start, glue, tmp_path):
    outcome = start(*rte(glue, tmp_path / "o", "--do_train", "--lora_path", tmp_path / "none"), launcher=TWO)
    printed, _, traceback = outcome.err.partition("Traceback")
    assert outcome.code != 0 and len(re.findall("^run_glue.py: error: .* no such file", printed, re.M)) == 1
    end = traceback.rpartition("Root Cause")[2]  # torchrun's summary comes last, and quotes it
    assert re.search(r"traceback : run_glue.py: error: .*no such file or folder\.\n=+\n$", end), outcome.err


@pytest.mark.parametrize(
    "more, expected_message",
    [
        (["--tokenizer_name", "/nowhere"], "No tokenizer in /nowhere"),
        (["--learning_rate", "0.5"], "was started otherwise than the first: learning_rate 5e-05, now 0.5"),
        (["--glue_dir", "OTHER"], "was started otherwise than the first: train_data "),
    ],
    ids=["a file that one machine lacks", "other flags on one machine", "other examples on one machine"],
)
def test_an_error_of_one_process_is_printed_by_it_and_ends_the_others(more, expected_message, fork, glue, tmp_path):
    """The first process waits for the other meanwhile."""
    header, *rows = (glue / "RTE" / "train.tsv").read_text().splitlines()
    (tmp_path / "other" / "RTE").mkdir(parents=True)
    (tmp_path / "other" / "RTE" / "train.tsv").write_text("\n".join([header, *rows[::-1]]) + "\n")
    more = [str(tmp_path / "other") if word == "OTHER" else word for word in more]
    differs = program(tmp_path, f"if os.environ['RANK'] == '1': sys.argv += {more!r}")
    outcome = fork(*rte(glue, tmp_path / "o", "--do_train", "--max_steps", 2), processes=2, script=differs)
    assert outcome.code != 0
    err = outcome.err.replace(f"process 1 (on {socket.gethostname()}) ", "")
    assert f"run_glue.py: error (process 1): {expected_message}" in err
    assert err.count("run_glue.py: error") == 1


def test_dropout_of_every_seed_and_process_is_its_own_and_the_first_processs_that_of_a_lone_one():
    """Medians over seeds are over independent runs only then; after a change of the number of processes as well.

    That the order of the data stays the same in all processes is what the comparisons above prove.
    """
    started, resumed = {}, {}
    for seed in range(10):
        for process in range(8):
            args = SimpleNamespace(seed=seed, process_index=process)
            torch.manual_seed(seed)
            _DropoutOfProcess().on_train_begin(args, None, None)
            started[seed, process] = tuple(torch.rand(4).tolist())
            for step in (0, 1, 1000):
                resumed[seed, process, step] = seed_from(seed, step, process)
        torch.manual_seed(seed)
        assert started[seed, 0] == tuple(torch.rand(4).tolist())
    assert len({*started.values()}) == len(started) == 80
    assert len({*resumed.values()}) == len(resumed) == 240


@pytest.mark.parametrize(
    "flags, expected_message",
    [
        (["--fsdp", "--fsdp_config", "none.json"], "--fsdp_config none.json: no such file"),
        (["--deepspeed", "none.json"], "--deepspeed none.json: no such file"),
        (
            ["--deepspeed", CONFIGS / "deepspeed_zero2.json"],
            "--deepspeed: (the package is not installed|a launcher must)",
        ),
    ],
)
def test_a_backend_that_cannot_start_is_refused_with_a_remedy(flags, expected_message, call, glue, tmp_path):
    outcome = call(*rte(glue, tmp_path / "o", "--do_train", *flags))
    assert outcome.code == 2 and re.search(expected_message, outcome.err)


def test_a_folder_that_a_run_trains_into_is_refused_to_another_until_it_ends(call, glue, tmp_path):
    """As after a launcher was killed and its processes were not: two would write the same checkpoints."""
    flags = rte(glue, tmp_path / "o", "--do_train", "--max_steps", 1, "--max_seq_length", 64)
    (tmp_path / "o").mkdir()
    with locked(tmp_path / "o"):
        outcome = call(*flags)
        assert outcome.code == 1 and "another run trains into it now" in outcome.err
        assert [*(tmp_path / "o").iterdir()] == [tmp_path / "o" / "_lock"]
    succeeded(call(*flags))


def test_an_output_folder_that_another_machine_does_not_see_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "run.json").write_text("of another run")

    class Args:
        process_index = 8

    wait_for_file(tmp_path / "run.json", "of another run", Args)
    with pytest.raises(UserError, match=r"run\.json: process 8 \(on .*\n.*a disk that all machines share"):
        wait_for_file(tmp_path / "run.json", "what the first wrote", Args)


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("model", ["roberta", "deberta"])
def test_deepspeed_trains_saves_and_resumes_the_same_adapter(model, stage, steady, fork, call, glue, tmp_path):
    backend = ["--deepspeed", CONFIGS / f"deepspeed_zero{stage}.json"]

    def flags(name: str, *more: object) -> list[object]:
        common = ["--model_name_or_path", steady[model], *STEPS, *EVAL, "--save_steps", 8]
        return rte(glue, tmp_path / name, *common, *more)

    succeeded(call(*flags("one", BATCH, 8)))
    succeeded(fork(*flags("two", BATCH, 2, ACCUMULATE, 2, *backend), processes=2))
    cut_off(tmp_path / "two", tmp_path / "resumed", after=8)
    succeeded(fork(*flags("resumed", BATCH, 4, *backend), processes=2))
    for name in ("two", "resumed"):
        assert_same_run(tmp_path / name, tmp_path / "one")
    size = sum(path.stat().st_size for path in (tmp_path / "two" / "checkpoint-20").rglob("*.pt"))
    trained = sum(tensor.numel() for tensor in trained_flat(tmp_path / "two").values())
    assert size < 4 * trained * 4 + 60_000  # value and two moments of what trains, not the model
    cut_off(tmp_path / "two", tmp_path / "other", after=8)
    outcome = call(*flags("other", BATCH, 8))
    assert outcome.code == 1 and "saved by DeepSpeed in 2 processes" in outcome.err


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.name)
def test_a_config_is_json_that_names_what_there_is(path):
    config = json.loads(path.read_text())
    if path.name.startswith("fsdp"):
        models, names = (modeling_roberta, modeling_deberta_v2), config["transformer_layer_cls_to_wrap"]
        assert all(hasattr(model, name) for model in models for name in names)
        assert config["version"] == 2 and not config["cpu_ram_efficient_loading"]  # each process hashes the weights
    else:
        assert config["zero_optimization"]["stage"] == int(path.stem[-1])
        assert config["train_batch_size"] == config["gradient_accumulation_steps"] == "auto"


def test_there_is_a_config_for_each_backend():
    assert {path.name for path in CONFIGS.iterdir()} == {
        "fsdp2.json",
        "deepspeed_zero2.json",
        "deepspeed_zero3.json",
    }
