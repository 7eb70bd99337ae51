"""Run folders and reports that several test files read."""

from pathlib import Path

import pytest
from run_folders import BITFIT, LORA, write_run, write_seeds

from lora_nlu.report.__main__ import main


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two tasks, three seeds; one run unfinished, two never begun. The figures below are of these."""
    folder = tmp_path_factory.mktemp("small")
    for seed, (best, last) in enumerate([(0.60, 0.58), (0.67, 0.67), (0.62, 0.60)]):
        measured = {"train_seconds": [50.0, 3700.0, 70.6][seed], "peak_memory_gib": 2.0 + seed}
        write_run(folder / f"lora_cola_{seed}", "cola", seed, (0.1, best, last), measured=measured)
    for seed, figures in enumerate([(0.5, 0.8), (0.9, 0.7)]):
        write_run(folder / f"lora_qnli_{seed}", "qnli", seed, figures, measured={"peak_gpu_memory_gib": 11.3})
    write_run(folder / "lora_qnli_2", "qnli", 2, state="stopped", measured={"train_seconds": 9e9})
    write_run(folder / "bitfit_cola_1", "cola", 1, (0.5,), method=BITFIT, encoder=102_144)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a report with all kinds of pictures."""
    folder = tmp_path_factory.mktemp("written")
    for i, (method, rank) in enumerate([(LORA, 4), (LORA, 8), (BITFIT, 0)]):
        write_seeds(folder / "runs" / str(i), "cola", (0.5, 0.6), method=method, rank=rank, encoder=100_000 + i)
    assert main([str(folder / "runs"), "--out", str(folder / "new" / "report")]) == 0
    return folder / "new" / "report"
