"""torch.distributed.run as launch scripts start it: the error of a process is the last thing printed, not a traceback.

python -m lora_nlu.training.torchrun --standalone --nproc_per_node=2 run_glue.py --task_name rte ...
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Start the processes. The exit code is that of the process that failed first, or 128 + the number of a signal."""
    # torch forwards SIGTERM to the processes, and SIGUSR1 only in some versions: to a run they are the same
    signal.signal(signal.SIGUSR1, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(None))  # the flags of the command line
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # the process has printed why
        print(f"Process {rank} was ended by {failure.signal_name()}.", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as e:
        return 128 + e.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
