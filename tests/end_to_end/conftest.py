"""A RoBERTa that trains in seconds, GLUE folders to train it on, and run_glue.py inside and outside this process."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import start_parent, torch_run
from runs import SCRIPT, Outcome, Run, write_checkpoint, write_glue, write_vocabulary

from lora_nlu.errors import UsageError, UserError


@pytest.fixture(scope="session")
def glue(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory, glue) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary"), glue)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, vocabulary) -> Path:
    """Hidden 32, 2 layers, 64 tokens at most."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny-roberta"), vocabulary)


@pytest.fixture(scope="session")
def run_glue() -> ModuleType:
    """run_glue.py as a module."""
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_glue"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def base_flags(tiny_model, tmp_path_factory) -> list[str]:
    """What every run of these tests says: the tiny model, a cache of its own, no progress bars."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--model_name_or_path", str(tiny_model), "--cache_dir", cache, "--disable_tqdm", "true"]


@pytest.fixture(scope="session")
def call(run_glue, base_flags) -> Run:
    """run_glue.main in this process, its exceptions as the exit codes that they stand for."""

    def run(*argv: object, base: bool = True) -> Outcome:
        out = io.StringIO()
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(out):
            try:
                run_glue.main([*(base_flags if base else []), *map(str, argv)])
            except UsageError as e:
                return Outcome(2, out.getvalue(), str(e))
            except UserError as e:
                return Outcome(1, out.getvalue(), str(e))
        return Outcome(0, out.getvalue(), "")

    return run


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a process that finds no Hub and nobody's cache, and computes on one thread."""
    home = tmp_path_factory.mktemp("home")
    settings = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    dropped = ("HF_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TRANSFORMERS_")
    return {k: v for k, v in os.environ.items() if not k.startswith(dropped)} | settings


@pytest.fixture(scope="session")
def start(base_flags, environment) -> Run:
    """run_glue.py in a process of its own, by `launcher` if it isn't Python alone."""

    def run(
        *argv: object, launcher: tuple[str, ...] = (), base: bool = True, env: dict | None = None, **kwargs
    ) -> Outcome:
        command = [sys.executable, *launcher, str(SCRIPT), *(base_flags if base else []), *map(str, argv)]
        done = subprocess.run(
            command, env=environment | (env or {}), capture_output=True, text=True, timeout=240, **kwargs
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def fork(base_flags, environment, tmp_path_factory) -> Run:
    """run_glue.py in processes of its own, each one as torchrun starts it, without the seconds of imports.

    `start` is what a user does; this is for what a process, or several together, make of their flags.
    """
    start_parent(environment)

    def run(
        *argv: object,
        processes: int = 1,
        base: bool = True,
        script: Path = SCRIPT,
        meanwhile: Callable[[list[int]], None] | None = None,
    ) -> Outcome:
        flags = [*(base_flags if base else []), *map(str, argv)]
        return torch_run(flags, environment, tmp_path_factory.mktemp("printed"), processes, script, meanwhile)

    return run
