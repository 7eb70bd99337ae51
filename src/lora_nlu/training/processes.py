"""How a program ends that may be one of several processes, and which of them prints why."""

import errno
import gc
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from lora_nlu.errors import UsageError, UserError, first_line, is_out_of_memory, printable_lines

_NETWORK = ("aiohttp", "datasets", "fsspec", "httpx", "huggingface_hub", "requests", "ssl", "urllib", "urllib3")
# Seconds that a process waits before it prints: for the first process's error, for the error of the one that ended
_WAIT_FOR_FIRST, _WAIT_FOR_ANOTHER = 6, 10

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what a cluster sends before it takes the machine back
# SLURM signals every process of a job, and torchrun forwards what it receives: within so many seconds it is one signal
_SAME_SIGNAL = 3.0


class Interrupted(UserError):
    """A signal ended the training after a step, and a checkpoint of it is saved; the exit code is 75 (EX_TEMPFAIL)."""


@contextmanager
def deferred_signals(received: list[int]) -> Iterator[None]:
    """Within the block SIGTERM and SIGUSR1 are appended to `received`; another one, seconds later, ends the process.

    Who raises Interrupted has acted on them; if the block ends otherwise, they have their usual effect, unless there is
    another error to print.
    """
    first = 0.0

    def receive(number: int, frame: Any) -> None:
        nonlocal first
        if received and time.monotonic() - first > _SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first = first if received else time.monotonic()
        received.append(number)

    handlers = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    except BaseException as e:
        if not lost_process(e):
            received.clear()
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if received:
            signal.raise_signal(received[0])


def ignore_signals() -> None:
    """In a process that loads data: the process that it works for decides when both end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def lost_process(error: BaseException) -> bool:
    """Whether an error is only the consequence of another process of the run having ended."""
    gone = isinstance(error, RuntimeError) and re.search("gloo|[Cc]onnection (closed|reset)", str(error))
    return isinstance(error, torch.distributed.DistError) or bool(gone)


def _failed(error: OSError) -> str:
    """What failed: the file, the network, writing, or else the line of code that raised the error."""
    reason = error.strerror or first_line(error)
    if error.filename:
        return f"{reason}: {error.filename}"
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, ConnectionError | TimeoutError | socket.gaierror) or package in _NETWORK:
        return f"the network, or a server, failed: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return f"{reason}, while writing"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{reason} ({type(error).__name__} in {frame.name}, {frame.filename}:{frame.lineno})"


def _message(error: BaseException) -> str | None:
    """What the user is told about an error; None for a fault of the program, which needs its traceback."""
    if isinstance(error, UsageError | UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted. Earlier checkpoints are complete; the same command resumes from the last."
    if isinstance(error, OSError):
        remedy = " Move that folder away: a file belongs in its place." * isinstance(error, IsADirectoryError)
        return f"{_failed(error)}. What was saved before is untouched.{remedy}"
    on_gpu = isinstance(error, torch.OutOfMemoryError)
    if on_gpu or is_out_of_memory(error):
        memory = "the GPU's memory is full" if on_gpu else "there is not enough memory"
        return (
            f"{memory} ({first_line(error)}).\nLower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by the same factor (the step stays the same); in evaluation, lower "
            "--per_device_eval_batch_size. A lower --max_seq_length also helps; docs/scaling.md has more."
        )
    if lost_process(error):
        return f"another process of this run ended ({first_line(error)}). Its own error is printed elsewhere."
    return None


def run(main: Callable[[list[str]], None], argv: list[str], environ: Mapping[str, str]) -> None:
    """Run `main` on the flags; turn what a user can help into a message on stderr and an exit code.

    argv: the program's name and flags; environ: where torchrun says which process this is. An error is printed
    once per machine: by its first process at once; by another only if the launcher has not ended it a little later, so
    that an error of all processes is not printed by all.
    """
    is_first = environ.get("LOCAL_RANK", "0") == "0"
    logging.captureWarnings(True)
    if not is_first:
        logging.disable(logging.WARNING)
        transformers.logging.disable_progress_bar()
    try:
        main(argv[1:])
        _leave_group()
    except Interrupted as e:
        if is_first:
            print(f"{Path(argv[0]).name}: {e}", file=sys.stderr, flush=True)
        _leave_group()
        sys.exit(os.EX_TEMPFAIL)
    except (Exception, KeyboardInterrupt) as e:
        if (message := _message(e)) is None:
            raise
        is_interrupt = isinstance(e, KeyboardInterrupt) or isinstance(e.__cause__, KeyboardInterrupt)
        if is_interrupt and not is_first:
            # The first process prints it, if it is interrupted as well; else the launcher, which sees this signal.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        if lost_process(e):
            time.sleep(_WAIT_FOR_ANOTHER)
        if not is_first:
            time.sleep(_WAIT_FOR_FIRST)
        process = "" if is_first else f" (process {environ.get('RANK')})"
        text = f"{Path(argv[0]).name}: error{process}: {printable_lines(message)}"
        print(text, file=sys.stderr, flush=True)
        if error_file := environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun ends with a summary, which quotes it
            record = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
            with suppress(OSError):
                Path(error_file).write_text(json.dumps({"message": record}))
        sys.exit(2 if isinstance(e, UsageError) else 1)


def _leave_group() -> None:
    gc.collect()  # DDP's reducer, freed after its process group, can wait forever for that one's threads
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # without this a process sometimes aborts at exit


def seed_from(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of these numbers; their sum would be the same for neighbouring runs."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def say(args: Any, *lines: str) -> None:
    """Print lines once, whatever the number of processes."""
    if args.process_index == 0:
        for line in lines:
            print(printable_lines(line), flush=True)
