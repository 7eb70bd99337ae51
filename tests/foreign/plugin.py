"""The pytest plugin of run.py: fixed seeds, the classes under test, local checkpoints for PEFT, outcomes as JSON.

FOREIGN_SIDE=ours|theirs chooses the classes, FOREIGN_RESULTS names the JSON file: test -> [outcome, pytest's report].
"""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from foreign.run import CHECKPOINTS
from foreign.stubs import install_stubs
from transformers import AutoModel, AutoModelForSequenceClassification, DebertaV2Config, RobertaConfig

from lora_nlu.models import modeling_deberta_v2, modeling_roberta

SEVERITY = ["passed", "skipped", "failed"]
results: dict[str, list[str]] = {}

install_stubs()


def pytest_configure(config: pytest.Config) -> None:
    """Make the Auto classes, through which PEFT's tests load every model, return ours."""
    if os.environ["FOREIGN_SIDE"] == "ours":
        roberta, deberta = modeling_roberta, modeling_deberta_v2
        AutoModel.register(RobertaConfig, roberta.RobertaModel, exist_ok=True)
        AutoModel.register(DebertaV2Config, deberta.DebertaV2Model, exist_ok=True)
        classifiers = AutoModelForSequenceClassification
        classifiers.register(RobertaConfig, roberta.RobertaForSequenceClassification, exist_ok=True)
        classifiers.register(DebertaV2Config, deberta.DebertaV2ForSequenceClassification, exist_ok=True)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Replace the Hub's model names, in place: the module's decorators and tests share one list of them."""
    for mark in metafunc.definition.iter_markers("parametrize"):
        if mark.args[0] == "model_id":
            mark.args[1][:] = CHECKPOINTS


def pytest_runtest_setup(item: pytest.Item) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of a test's phases and subtests."""
    name = report.nodeid.rpartition("/")[2].lstrip(":")
    text = str(report.longrepr or "")
    if name not in results or SEVERITY.index(report.outcome) > SEVERITY.index(results[name][0]):
        results[name] = [report.outcome, text]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # of pytest-xdist's processes the controller gets all reports
        Path(os.environ["FOREIGN_RESULTS"]).write_text(json.dumps(results, indent=1))
