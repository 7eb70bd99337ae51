"""The launcher of several processes: their own error is the last line, and it ends as they do."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = [sys.executable, "-m", "lora_nlu.training.torchrun", "--standalone", "--nproc_per_node=2"]


def write(folder: Path, program: str) -> str:
    (folder / "program.py").write_text(program)
    return str(folder / "program.py")


@pytest.mark.parametrize(
    "end, code, expected",
    [
        ("print('error: no such file', file=sys.stderr); sys.exit(3)", 3, "error: no such file"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "Process 1 was ended by SIGKILL."),
        ("sys.exit(0)", 0, ""),
    ],
    ids=["an error", "killed", "success"],
)
def test_the_error_of_a_process_is_the_last_thing_printed_and_its_code_the_launchers(end, code, expected, tmp_path):
    program = f"import os, signal, sys, time\nif os.environ['RANK'] == '1': {end}\ntime.sleep({30 if code else 0})\n"
    done = subprocess.run([*LAUNCHER, write(tmp_path, program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (code, expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_both_signals_reach_the_processes_and_the_launcher_waits_for_them(name, tmp_path):
    program = """
import os, signal, time, pathlib
here = pathlib.Path(__file__).with_name(os.environ["RANK"])
def end(number, frame):
    time.sleep(1)
    here.write_text(signal.Signals(number).name)
    raise SystemExit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, end)
here.touch()
time.sleep(60)
"""
    process = subprocess.Popen([*LAUNCHER, write(tmp_path, program)], stderr=subprocess.PIPE, text=True)
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # while it starts the last process, torch's launcher may miss a signal
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and err == ""
    assert [(tmp_path / rank).read_text() for rank in "01"] == 2 * ["SIGTERM"]
