"""run_glue.py in forked processes: the parent has imported what a run imports, so that each start takes no seconds.

multiprocessing's fork server is the parent. `torch_run` starts the processes of one run as torchrun would.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from unittest import mock

from runs import Outcome
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

PARENT = multiprocessing.get_context("forkserver")
IMPORTS = ["peft", "scipy.stats", "sklearn.metrics", "torch.distributed.fsdp", "transformers.trainer"]
IMPORTS += ["lora_nlu.training.runs", "lora_nlu.training.sharded", "lora_nlu.report.collect", "forked"]
# The parent imports this file last. What every run would do again, a second each: build transformers' table of all its
# models' names, and look for garbage among the objects of all modules.
get_checkpoint_conversion_mapping("roberta")
gc.freeze()


def start_parent(environment: dict[str, str]) -> None:
    """Start it in this environment, which a library may read when it is imported."""
    PARENT.set_forkserver_preload(IMPORTS)
    folders = [str(Path(__file__).parent), *sys.path]  # tests/stress/ has a forked.py too
    with mock.patch.dict(os.environ, environment | {"PYTHONPATH": os.pathsep.join(folders)}, clear=True):
        forkserver.ensure_running()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_script(argv: list[str], environment: dict[str, str], output: str, script: str) -> None:
    """In the forked process: what `python script argv` does, with stdout in `output`.out and stderr in `output`.err."""
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *argv]
    runpy.run_path(script, run_name="__main__")


def torch_run(
    argv: list[str],
    environment: dict[str, str],
    folder: Path,
    processes: int,
    script: Path,
    meanwhile: Callable[[list[int]], None] | None = None,
) -> Outcome:
    """One run in so many processes; the first that fails ends the others. What they print is written into `folder`.

    meanwhile: is called with the ids of the processes once all have started.
    """
    torchrun = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(processes):
        own = torchrun | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        arguments = argv, environment | (own if processes > 1 else {}), str(folder / "run"), str(script)
        running.append(PARENT.Process(target=run_script, args=arguments))
        running[-1].start()
    if meanwhile:
        meanwhile([process.pid for process in running])
    codes = []
    while running:
        ended = wait([process.sentinel for process in running], timeout=240)
        codes += [process.exitcode for process in running if process.sentinel in ended]
        running = [process for process in running if process.sentinel not in ended]
        if not ended or any(codes):
            time.sleep(0.1 * bool(running))  # as torchrun, which looks ten times a second: the others meet the failure
            for process in running:
                process.terminate()
        assert ended, f"no end in 240 seconds: {argv}"
    out, err = ((folder / f"run.{kind}").read_text() for kind in ("out", "err"))
    return Outcome(next((code for code in codes if code), 0), out, err)
