"""SIGTERM and SIGUSR1 while a run trains: a checkpoint, the end, and the same bits as if nothing had happened."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import program
from test_run_glue import read, rte, scores, succeeded, trained_flat

# 48 examples; the tiny model has dropout
RUN = ["--do_train", "--do_eval", "--max_seq_length", 64, "--learning_rate", "1e-2", "--logging_steps", 5]
RUN += ["--max_steps", 20, "--lr_scheduler_type", "constant"]
BATCH = "--per_device_train_batch_size"
# The process of this rank gets a signal while it computes a step, or before it saves the model
SIGNALLED = """
import signal
from lora_nlu.training import runs, trainer

step, save = trainer.AdapterTrainer.training_step, runs._save
def kill():
    if os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), signal.{name})
def training_step(self, *args):
    if self.state.global_step + 1 == {at}:
        kill()
    return step(self, *args)
def before_saving(*args):
    if {at} == 0:
        kill()
    save(*args)
trainer.AdapterTrainer.training_step, runs._save = training_step, before_saving
"""


@pytest.fixture
def signalled(tmp_path):
    """The path of such a program."""

    def write(name: str, at: int, rank: int = 0) -> Path:
        return program(tmp_path, SIGNALLED.format(name=name, at=at, rank=rank))

    return write


def assert_same_end(got: Path, want: Path) -> None:
    one, other = trained_flat(got), trained_flat(want)
    assert [name for name in other if not torch.equal(one[name], other[name])] == []
    assert scores(got / "eval_results.json") == scores(want / "eval_results.json")
    one, other = (scores(folder / "train_results.json") for folder in (got, want))
    assert one.pop("train_loss") == pytest.approx(other.pop("train_loss"), rel=1e-6)
    assert read(got / "run.json").keys() == read(want / "run.json").keys()


EPOCHS = ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--load_best_model_at_end"]
PLATEAU = ["--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "epoch", "--save_steps", 6]


@pytest.mark.parametrize(
    "processes, name, at, flags",
    [
        (1, "SIGTERM", 8, EPOCHS),  # 6 steps an epoch
        (1, "SIGTERM", 12, PLATEAU),
        (1, "SIGUSR1", 8, ["--save_strategy", "no", "--save_only_model", "--reg_loss_wgt", 1]),
        (1, "SIGTERM", 3, ["--enable_jit_checkpoint", "true", "--save_steps", 2, "--dataloader_num_workers", 1]),
        (2, "SIGUSR1", 7, ["--save_steps", 2, "--reg_loss_wgt", 1]),
        (2, "SIGTERM", 11, EPOCHS),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_the_run_which_resumes_to_the_same_bits(
    processes, name, at, flags, signalled, fork, glue, tmp_path
):
    flags = [*RUN, *flags, BATCH, 8 // processes]
    succeeded(fork(*rte(glue, tmp_path / "complete", *flags), processes=processes))
    output = tmp_path / "o"
    program = signalled(name, at, rank=processes - 1)
    outcome = fork(*rte(glue, output, *flags), processes=processes, script=program)
    assert outcome.code == os.EX_TEMPFAIL, outcome
    step = at if processes == 1 else at + 1  # the others learn of it when the next step begins
    assert f"at step {step} of 20. {output}/checkpoint-{step} is complete: the same command resumes" in outcome.err
    assert outcome.err.count("interrupted") == 1 and "error" not in outcome.err
    record = read(output / "run.json")
    assert record["interrupted"]["step"] == step and "trained" not in record
    assert not (output / "adapter_model.safetensors").exists() and not (output / "eval_results.json").exists()
    outcome = succeeded(fork(*rte(glue, output, *flags), processes=processes))
    assert f"Resuming from {output}/checkpoint-{step}." in outcome.out
    assert_same_end(output, tmp_path / "complete")


@pytest.mark.parametrize("at", [20, 0], ids=["in the last step", "before the trained model is saved"])
def test_a_signal_when_all_steps_are_taken_waits_until_the_trained_model_is_saved(at, signalled, fork, glue, tmp_path):
    flags = [*RUN, "--save_strategy", "no", BATCH, 8]
    outcome = fork(*rte(glue, tmp_path / "o", *flags), script=signalled("SIGTERM", at))
    assert outcome.code == -signal.SIGTERM and read(tmp_path / "o" / "run.json")["trained"]
    assert not (tmp_path / "o" / "eval_results.json").exists()
    assert "already trained" in succeeded(fork(*rte(glue, tmp_path / "o", *flags))).out
    succeeded(fork(*rte(glue, tmp_path / "complete", *flags)))
    assert_same_end(tmp_path / "o", tmp_path / "complete")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_to_a_lone_run_keeps_its_checkpoints(name, fork, glue, tmp_path):
    """SIGHUP and a second SIGINT end it at once, SIGTERM after a checkpoint."""
    flags = [*RUN, "--max_steps", 2000, "--save_steps", 3, "--save_total_limit", 2, BATCH, 8]

    def send(processes: list[int]) -> None:
        while not [*(tmp_path / "o").glob("checkpoint-*")]:
            os.kill(processes[0], 0)  # it has not ended
            time.sleep(0.01)
        os.kill(processes[0], getattr(signal, name))
        if name == "SIGINT":
            time.sleep(0.05)
            with contextlib.suppress(ProcessLookupError):
                os.kill(processes[0], signal.SIGINT)

    outcome = fork(*rte(glue, tmp_path / "o", *flags), meanwhile=send)
    expected = {"SIGTERM": os.EX_TEMPFAIL, "SIGHUP": -signal.SIGHUP, "SIGINT": 1}[name]
    assert outcome.code in (expected, -signal.SIGINT) and "Traceback" not in outcome.err, outcome
    record = read(tmp_path / "o" / "run.json")
    assert ("interrupted" in record) == (name == "SIGTERM") and "trained" not in record
    record["hyperparameters"]["max_steps"] = 2001  # not to wait for all steps: the checkpoint is found, then refused
    (tmp_path / "o" / "run.json").write_text(json.dumps(record))
    outcome = fork(*rte(glue, tmp_path / "o", *flags))
    assert outcome.code == 1 and "max_steps 2001, now 2000" in outcome.err


def test_a_signal_to_the_launcher_saves_a_checkpoint_in_all_processes(base_flags, environment, fork, glue, tmp_path):
    """To one process, as the first test has it."""
    flags = [*RUN, "--save_strategy", "no", BATCH, 4]
    slow = program(  # a step takes half a second: the signal comes before the last
        tmp_path,
        "import time\nfrom lora_nlu.training import trainer\nstep = trainer.AdapterTrainer.training_step\n"
        "def slow(self, *args):\n    print('step', flush=True)\n    time.sleep(0.5)\n    return step(self, *args)\n"
        "trainer.AdapterTrainer.training_step = slow",
    )
    launcher = ["-m", "lora_nlu.training.torchrun", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, slow, *base_flags, *rte(glue, tmp_path / "o", *flags)]
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and any(line.startswith("step") for line in process.stdout)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "interrupted" in err and "Traceback" not in err
    step = read(tmp_path / "o" / "run.json")["interrupted"]["step"]
    assert 0 < step < 20
    outcome = succeeded(fork(*rte(glue, tmp_path / "o", *flags), processes=2))
    assert f"Resuming from {tmp_path}/o/checkpoint-{step}." in outcome.out
    succeeded(fork(*rte(glue, tmp_path / "complete", *flags), processes=2))
    assert_same_end(tmp_path / "o", tmp_path / "complete")
