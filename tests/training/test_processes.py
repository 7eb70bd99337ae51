"""How a program ends: one message that names what failed, and the right exit code."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from lora_nlu.files import write_json
from lora_nlu.training import processes


def message_of(main, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        processes.run(main, ["run_glue.py"], {})
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("run_glue.py: error: ") and message.count("\n") == 1
    assert "What was saved before is untouched" in message and "while writing results" not in message
    return message


def raising(error: OSError):
    def main(argv: list[str]) -> None:
        raise error

    return main


def test_a_folder_in_the_place_of_a_file_is_to_be_moved_away(tmp_path, capsys):
    (tmp_path / "run.json").mkdir()
    message = message_of(lambda _: write_json(tmp_path / "run.json", {}), capsys)
    assert str(tmp_path / "run.json") in message and "Move that folder away" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path, capsys):
    def reads(argv: list[str]) -> None:
        (tmp_path / "none.csv").read_text()

    def writes(argv: list[str]) -> None:
        Path("/dev/full").write_text("x" * 10)

    assert f"No such file or directory: {tmp_path / 'none.csv'}." in message_of(reads, capsys)
    assert "No space left on device, while writing." in message_of(writes, capsys)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        TimeoutError("timed out"),
        socket.gaierror(-2, "Name or service not known"),
        OfflineModeIsEnabled("no route"),
        urllib.error.URLError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_network_that_fails_is_called_so(error, capsys):
    message = message_of(raising(error), capsys)
    assert "the network, or a server, failed: " in message and "writ" not in message


def test_of_an_error_that_names_nothing_the_line_is_named(capsys):
    message = message_of(raising(OSError("handle is closed")), capsys)
    assert "handle is closed (OSError in main, " in message and "test_processes.py:" in message
    assert "Input/output error (OSError in main" in message_of(
        raising(OSError(errno.EIO, "Input/output error")), capsys
    )


def test_a_process_that_alone_is_interrupted_ends_by_the_signal_which_its_launcher_names():
    program = """
import sys
from lora_nlu.training import processes
def main(argv):
    raise KeyboardInterrupt
processes.run(main, sys.argv, {"LOCAL_RANK": "1", "RANK": "1"})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("pause, ended_by", [(0.2, None), (3.5, signal.SIGTERM)])
def test_a_second_signal_ends_the_process_unless_it_is_the_first_one_sent_on(pause, ended_by):
    if (pid := os.fork()) == 0:
        with contextlib.suppress(processes.Interrupted), processes.deferred_signals([]):
            time.sleep(6)
            raise processes.Interrupted
        os._exit(0)
    time.sleep(0.5)
    for wait in (pause, 0):
        os.kill(pid, signal.SIGTERM)
        time.sleep(wait)
    _, status = os.waitpid(pid, 0)
    assert (os.WTERMSIG(status) if os.WIFSIGNALED(status) else None) == ended_by
