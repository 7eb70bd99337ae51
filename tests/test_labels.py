"""Which row of a head belongs to which label: by name, in both models, from a checkpoint and from an adapter."""

from pathlib import Path

import pytest
import torch
from helpers import CLASSIFIERS, assert_close, ragged_batch, randomise_, tiny_config, tiny_deberta_config

from lora_nlu.adapters.attaching import attach_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.labels import config_labels, match_head_rows, recorded_labels, rows_by_label, set_labels
from lora_nlu.models.loading import load_model
from lora_nlu.training.inputs import Head

CONFIGS = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
NAMES = ("yes", "no", "perhaps")
TURNED = ("No", "perhaps ", "YES")  # rows 1, 2, 0 of NAMES


@pytest.mark.parametrize(
    ("trained", "task_labels", "rows"),
    [
        (("a", "b"), ("a", "b"), [0, 1]),
        (("a", "b"), ("b", "a"), [1, 0]),
        (NAMES, TURNED, [1, 2, 0]),
        (TURNED, NAMES, [2, 0, 1]),
        (("Pos", "pos"), ("pos", "Pos"), [1, 0]),
        (("Pos", "pos"), ("pos", "POS"), None),
        (("Pos", "pos"), ("pos", "neg"), None),
        (("a", "b"), ("a", "c"), None),
        (("a", "b"), ("a", "b", "c"), None),
        (("a", "b", "c"), ("a", "b"), None),
        (("a", "b"), (), None),
        ((), ("a", "b"), None),
        ((), (), [0]),
    ],
)
def test_rows_of_a_head_are_matched_by_name_and_names_that_differ_only_in_case_or_blanks_are_different(
    trained, task_labels, rows
):
    assert rows_by_label(trained, task_labels) == rows


def test_a_config_with_transformers_own_names_records_none():
    assert recorded_labels(tiny_config(num_labels=3)) is None
    assert recorded_labels(tiny_config(num_labels=1)) == ()
    config = tiny_config(num_labels=3)
    set_labels(config, NAMES)
    assert recorded_labels(config) == config_labels(config) == NAMES


def test_a_head_of_another_number_is_left_behind_and_the_line_names_what_it_is_for():
    rows, line = match_head_rows("file", 3, None, ("a", "b"))
    assert rows is None and "3 outputs" in line and "a, b" in line
    rows, line = match_head_rows("file", 3, NAMES, ())
    assert rows is None and "yes, no, perhaps" in line and "a number (regression)" in line
    assert match_head_rows("file", 1, None, ()) == ([0], "")
    assert match_head_rows("file", 3, NAMES, NAMES) == ([0, 1, 2], "")


def test_a_head_without_names_gives_only_ids():
    head = Head("file", None, 3)
    for ids in (("0", "1", "2"), ("LABEL_0", "LABEL_1", "LABEL_2")):
        assert ", ".join(ids) in head.check_ids(ids)
    for labels in (("0", "1"), ("1", "2", "3"), NAMES, ("0", "2", "1"), (), None):
        with pytest.raises(UserError, match="mnli entailment,neutral,contradiction; ax entailment"):
            head.check_ids(labels)


# ----------------------------------------------------------------------------------------- a checkpoint's own head


@pytest.fixture(params=list(CONFIGS))
def kind(request) -> str:
    return request.param


def saved(kind: str, folder: Path, names: tuple[str, ...] | None = NAMES) -> torch.nn.Module:
    """Transformers' own classifier with random weights, saved with these label names."""
    config = CONFIGS[kind](num_labels=3)
    if names:
        set_labels(config, names)
    theirs = randomise_(CLASSIFIERS[kind][1](config)).eval()
    theirs.save_pretrained(folder)
    return theirs


def logits(model: torch.nn.Module) -> torch.Tensor:
    batch = ragged_batch([7, 3, 12], pad=model.config.pad_token_id)
    with torch.no_grad():
        return model.eval()(**batch).logits


def loaded(kind: str, folder: Path, task_labels: tuple[str, ...], trained: tuple[str, ...] | None, **how):
    config = CONFIGS[kind]()
    set_labels(config, task_labels)
    torch.manual_seed(0)
    return load_model(str(folder), config, trained_labels=trained, **{"needs_head": False, **how})


@pytest.mark.parametrize("needs_head", [False, True])
def test_a_checkpoints_head_gives_transformers_logits_in_our_order_of_its_labels(kind, needs_head, tmp_path):
    theirs = saved(kind, tmp_path)
    ours, notes = loaded(kind, tmp_path, TURNED, NAMES, needs_head=needs_head)
    assert_close(logits(ours), logits(theirs)[:, [1, 2, 0]])
    assert len(notes) == 1 and "yes, no, perhaps" in notes[0] and "No, perhaps , YES" in notes[0]
    ours, notes = loaded(kind, tmp_path, NAMES, NAMES, needs_head=needs_head)
    assert_close(logits(ours), logits(theirs))
    assert notes == []


@pytest.mark.parametrize("task_labels", [("a", "b", "c"), ("a", "b"), ()])
def test_a_checkpoints_head_for_other_labels_starts_anew_but_for_debertas_pooler(kind, task_labels, tmp_path):
    theirs = saved(kind, tmp_path).state_dict()
    ours, notes = loaded(kind, tmp_path, task_labels, NAMES)
    assert len(notes) == 1 and "not loaded" in notes[0] and "yes, no, perhaps" in notes[0]
    for name, tensor in ours.state_dict().items():
        if not name.startswith("classifier."):
            assert torch.equal(tensor, theirs[name]), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            assert tensor.shape != theirs[name].shape or not torch.allclose(tensor, theirs[name]), name
            assert tensor.std().item() == pytest.approx(0.2, rel=0.5), name  # initializer_range
    with pytest.raises(UserError, match="was trained to predict|no trained head"):
        loaded(kind, tmp_path, task_labels, NAMES, needs_head=True)


def test_a_checkpoints_head_without_names_is_kept_by_position_and_a_line_says_so(kind, tmp_path):
    theirs = saved(kind, tmp_path, None)
    ours, notes = loaded(kind, tmp_path, TURNED, None)
    assert_close(logits(ours), logits(theirs))
    assert len(notes) == 1 and "records no label names" in notes[0] and "No, perhaps , YES" in notes[0]


# ------------------------------------------------------------------------------------------------ an adapter's head


@pytest.fixture
def adapter(kind, tmp_path) -> tuple[torch.nn.Module, Path]:
    """Our classifier with LoRA and random weights, and the folder of its adapter, which records NAMES."""
    config = CONFIGS[kind](apply_lora=True, lora_r=2, lora_alpha=4, num_labels=3)
    model = randomise_(CLASSIFIERS[kind][0](config)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or not name.startswith(f"{model.base_model_prefix}."))
    save_adapter(model, tmp_path, {"task": "custom", "labels": [*NAMES]})
    return model, tmp_path


def base_of(model: torch.nn.Module, kind: str, labels: tuple[str, ...] | None) -> torch.nn.Module:
    """A model without LoRA with the same encoder and a head of its own."""
    config = CONFIGS[kind](num_labels=3)
    if labels is not None:
        set_labels(config, labels)
    base = CLASSIFIERS[kind][0](config)
    randomise_(base, 1)
    encoder = {name: t for name, t in model.base_model.state_dict().items() if "lora_" not in name}
    base.base_model.load_state_dict(encoder)
    return base


def test_an_adapters_head_gives_its_logits_in_our_order_of_its_labels(kind, adapter):
    model, folder = adapter
    for new_head in (False, True):
        other = base_of(model, kind, TURNED)
        (note,) = attach_adapter(other, read_adapter(str(folder)), None, allow_new_head=new_head)
        assert "put in the order No, perhaps , YES" in note
        assert_close(logits(other), logits(model)[:, [1, 2, 0]])


def test_an_adapters_head_for_other_labels_stays_behind_but_for_debertas_pooler(kind, adapter):
    model, folder = adapter
    other = base_of(model, kind, ("a", "b", "c"))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match="was trained to predict yes, no, perhaps; the examples have a, b, c"):
        attach_adapter(other, read_adapter(str(folder)), None, allow_new_head=False)
    (note,) = attach_adapter(other, read_adapter(str(folder)), None, allow_new_head=True)
    assert "not loaded" in note and "yes, no, perhaps" in note and "a, b, c" in note
    for name, tensor in other.state_dict().items():
        own = before if name.startswith("classifier.") else model.state_dict()
        assert torch.equal(tensor, own[name]), name


def test_a_model_whose_config_records_no_names_takes_an_adapters_rows_as_they_stand(kind, adapter):
    model, folder = adapter
    other = base_of(model, kind, None)
    assert attach_adapter(other, read_adapter(str(folder)), None, allow_new_head=False) == []
    assert_close(logits(other), logits(model))
    other = base_of(model, kind, None)  # a run whose labels are named so
    placeholders = ("LABEL_0", "LABEL_1", "LABEL_2")
    (note,) = attach_adapter(other, read_adapter(str(folder)), None, True, placeholders)
    assert "not loaded" in note


def test_an_adapter_whose_names_are_not_as_many_as_its_rows_is_refused(kind, adapter):
    model, folder = adapter
    metadata = (folder / "run_metadata.json").read_text().replace('"perhaps"', '"perhaps", "never"')
    (folder / "run_metadata.json").write_text(metadata)
    with pytest.raises(UserError, match="its head has 3 outputs, but run_metadata.json names yes, no, perhaps, never"):
        attach_adapter(base_of(model, kind, NAMES), read_adapter(str(folder)), None, allow_new_head=True)
