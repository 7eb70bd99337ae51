"""A fork server for run_glue.py: torch and transformers are imported once, every attempt is a process of its own.

Importing this module sets the environment of all that follows (one thread, no Hub, a cache of its own) and then imports
what a run needs. The parent must compute nothing with torch: a fork copies only the thread that forks, and the locks of
the others' pools as they are. Work with tensors goes through `call`, in a child.
"""

import atexit
import gc
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PARENT = os.getpid()
_HOME = tempfile.mkdtemp(prefix="lora-nlu-stress-home-")


@atexit.register
def _remove_home() -> None:
    if os.getpid() == _PARENT:
        shutil.rmtree(_HOME, ignore_errors=True)


for _name in [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_", "RANK", "LOCAL_RANK", "WORLD_"))]:
    del os.environ[_name]
os.environ |= {"HF_HOME": _HOME, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "end_to_end")]

import torch  # noqa: E402

torch.set_num_threads(1)

import datasets  # noqa: E402
import scipy.stats  # noqa: E402, F401
import sklearn.metrics  # noqa: E402, F401
import transformers  # noqa: E402
from runs import LORA, SCRIPT, sentence, write_checkpoint, write_tsv, write_vocabulary  # noqa: E402
from transformers import AutoConfig, AutoTokenizer, Trainer  # noqa: E402, F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import lora_nlu.models.loading  # noqa: E402
import lora_nlu.training.runs  # noqa: E402, F401
import lora_nlu.training.trainer  # noqa: E402, F401

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
get_checkpoint_conversion_mapping("roberta")  # builds a table of all models' names, which takes a run 0.4 s
_SCRIPT = Path(shutil.copy(SCRIPT, _HOME))  # like the modules above, it stays as it is while this process lives


def threads() -> int:
    """Threads of this process; only with one is a fork safe."""
    return len(os.listdir("/proc/self/task"))


class _Log(io.RawIOBase):
    """A file that is appended to by pwritev, a call that nothing else here makes: a trace tells the two apart."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def write(self, data: Any) -> int:
        return os.pwritev(self.descriptor, [data], 0)  # the file is open to append: Linux ignores the place


def launch(main: Callable[[], Any], log: Path, is_stopped: bool = False) -> int:
    """Call `main` in a process and session of its own; output in `log`.out and `log`.err. Returns the pid.

    is_stopped: the process stops before it calls `main`, and goes on by SIGCONT.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # the collections that a run asks for leave out what is imported here
    pid = os.fork()
    if pid:
        if is_stopped:
            os.waitpid(pid, os.WUNTRACED)
        return pid
    code = 70
    try:
        os.setsid()
        logs = []
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), number)
            logs.append(io.TextIOWrapper(io.BufferedWriter(_Log(number)), line_buffering=True))
        sys.stdout, sys.stderr = logs
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if is_stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            code = main() or 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def run_glue(argv: list[object]) -> None:
    """run_glue.py with these flags, in this process."""
    sys.argv = [str(_SCRIPT), *map(str, argv)]
    runpy.run_path(str(_SCRIPT), run_name="__main__")


def start(argv: list[object], log: Path) -> int:
    """run_glue.py with these flags in a process of its own, as `launch`."""
    return launch(lambda: run_glue(argv), log)


def finish(pid: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def call(function: Callable, *arguments: Any) -> Any:
    """What `function` returns (as JSON gives it back), computed in a forked child, so that this process stays fit to
    fork."""
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                json.dump(function(*arguments), pipe)
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    if code := finish(pid):
        raise RuntimeError(f"{function.__name__} ended with {code} in its child")
    return json.loads(result)


def prepare(work: Path) -> tuple[Path, Path]:
    """A tiny RTE in the standard layout (48, 24, 10 pairs) and a tiny RoBERTa under `work`: their folders."""
    glue, rng = work / "glue", random.Random(0)
    for name, rows in (("train", 48), ("dev", 24), ("test", 10)):
        table: list[list[object]] = [["index", "sentence1", "sentence2", "label"]]
        for i in range(rows):
            yes = rng.random() < 0.5
            second = sentence(rng, "surely" if yes else "never")
            table.append([i, sentence(rng), second, "entailment" if yes else "not_entailment"])
        write_tsv(glue / "RTE" / f"{name}.tsv", [row[:-1] for row in table] if name == "test" else table)
    call(_write_model, str(work))
    return glue, work / "model"


def _write_model(work: str) -> None:
    write_checkpoint(Path(work, "model"), write_vocabulary(Path(work, "vocabulary"), Path(work, "glue")))


def flags(glue: Path, model: Path, output: Path, cache: Path, steps: int, save_steps: int) -> list[object]:
    """A run on RTE that saves and evaluates every `save_steps` steps and ends with its best model."""
    argv: list[object] = ["--model_name_or_path", model, "--task_name", "rte", "--glue_dir", glue]
    argv += ["--output_dir", output, "--cache_dir", cache, *LORA, "--max_seq_length", 32, "--disable_tqdm", "true"]
    argv += ["--do_train", "--do_eval", "--max_steps", steps, "--learning_rate", "1e-2"]
    argv += ["--save_strategy", "steps", "--save_steps", save_steps, "--eval_strategy", "steps"]
    argv += ["--eval_steps", save_steps, "--load_best_model_at_end", "--per_device_eval_batch_size", 24]
    return argv
