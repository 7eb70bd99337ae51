"""Trained models with their adapters in files."""

from pathlib import Path

import pytest
from conversions import ALPHA, OTHERS, SMALL, R, written
from peft import LoraConfig, get_peft_model
from small_models import METADATA_OF_RUN, lora_model
from torch import nn

from lora_nlu.adapters.writing import save_adapter
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[RobertaForSequenceClassification, Path]:
    """A trained model and the folder it was saved in."""
    model, folder = lora_model(), tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(model, folder, METADATA_OF_RUN)
    return model, folder


@pytest.fixture(params=["roberta", "deberta", "deberta as PEFT reads it"])
def case(request, tmp_path) -> tuple[nn.Module, Path, Path]:
    """A trained model, the folder of its base model with a tokenizer, and its adapter folder."""
    kind, _, reading = request.param.partition(" ")
    return written(kind, tmp_path, bool(reading))


@pytest.fixture(params=OTHERS)
def other(request, tmp_path) -> tuple[str, Path]:
    """The first part of the names in a PEFT folder of a model that isn't here, and the folder."""
    model_class, config_class, targets = OTHERS[request.param]
    model = get_peft_model(
        model_class(config_class(**SMALL)), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    )
    model.save_pretrained(tmp_path / "peft")
    return request.param, tmp_path / "peft"
