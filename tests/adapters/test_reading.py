"""Reading an adapter: a published file, a folder, the Hub's; what is broken or hostile is refused."""

import json
import os

import huggingface_hub
import pytest
import torch
from helpers import (
    GOLDENS,
    tiny_config,
)
from safetensors.torch import load_file, save_file
from small_models import (
    ALPHA,
    METADATA_OF_RUN,
    logits,
    lora_deberta,
    lora_model,
    peft_deberta,
    published,
    refused,
    trained,
)

from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.marking import describe_method
from lora_nlu.models.modeling_roberta import RobertaForSequenceClassification

# --------------------------------------------------------------------------------------------------- published files


def test_the_published_layout_of_roberta_base_loads_by_exactly_its_52_keys(tmp_path):
    """The keys and shapes of the published RoBERTa-base MNLI file, with a hidden size of 32 for 768."""
    d, r, state = 32, 8, {}
    for i in range(12):
        for projection in ("query", "value"):
            name = f"roberta.encoder.layer.{i}.attention.self.{projection}"
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = torch.randn(r, d), torch.randn(d, r)
    state["classifier.dense.weight"], state["classifier.dense.bias"] = torch.randn(d, d), torch.randn(d)
    state["classifier.out_proj.weight"], state["classifier.out_proj.bias"] = torch.randn(3, d), torch.randn(3)
    assert len(state) == 52
    for prefix in ("", "module."):
        model = lora_model(num_hidden_layers=12, lora_r=8, lora_alpha=16)
        adapter = read_adapter(str(published(tmp_path / f"{prefix}mnli.bin", state, prefix)))
        assert adapter.labels is None and adapter.lora_alpha is None
        assert load_adapter(model, adapter, allow_new_head=False) == []
        got = trained(model)
        assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state), prefix


@pytest.mark.parametrize("kind, new_model", [("roberta", lora_model), ("deberta", lora_deberta)])
@pytest.mark.parametrize("labels", [3, 2, 1])
def test_training_from_another_tasks_file_keeps_or_drops_the_head_as_the_reference_does(
    labels, kind, new_model, tmp_path
):
    case = json.loads((GOLDENS / "head_loading.json").read_text())["loading"][f"{kind}_3_to_{labels}"]
    state = trained(new_model())
    head = sorted(name for name in state if "lora_" not in name)
    assert head == sorted(case["checkpoint_keys_not_lora"])
    model = new_model(seed=1, num_labels=labels)
    fresh = trained(model)
    path = published(tmp_path / "mnli.bin", state)
    notes = load_adapter(model, read_adapter(str(path)), allow_new_head=True)
    assert ["its classifier is for other labels" in note for note in notes] == [True] * bool(case["head_dropped"])
    got = trained(model)
    for name in got:
        kept = fresh[name] if name in case["head_dropped"] else state[name]
        assert torch.equal(got[name], kept), name
    assert sorted([*case["head_loaded"], *case["head_dropped"]]) == head


def test_the_published_layout_of_deberta_xxlarge_loads_by_exactly_its_196_keys(tmp_path):
    """The keys and shapes of the published files, with a hidden size of 32 for 1536."""
    d, r, state = 32, 16, {}
    for i in range(48):
        for projection in ("query_proj", "value_proj"):
            name = f"deberta.encoder.layer.{i}.attention.self.{projection}"
            state[f"{name}.lora_A"], state[f"{name}.lora_B"] = torch.randn(r, d), torch.randn(d, r)
    state["pooler.dense.weight"], state["pooler.dense.bias"] = torch.randn(d, d), torch.randn(d)
    state["classifier.weight"], state["classifier.bias"] = torch.randn(3, d), torch.randn(3)
    assert len(state) == 196
    model = lora_deberta(num_hidden_layers=48, lora_r=r, lora_alpha=32)
    load_adapter(model, read_adapter(str(published(tmp_path / "mnli.bin", state))), allow_new_head=False)
    got = trained(model)
    assert got.keys() == state.keys() and all(torch.equal(got[name], state[name]) for name in state)


# --------------------------------------------------------------------------- old files, the Hub, files without an alpha


def test_a_peft_folder_with_the_old_bin_file_loads_like_the_safetensors_one(tmp_path):
    theirs = peft_deberta()
    theirs.save_pretrained(tmp_path)
    safe = read_adapter(str(tmp_path))
    torch.save(load_file(tmp_path / ADAPTER_WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / ADAPTER_WEIGHTS).unlink()
    old = read_adapter(str(tmp_path))
    assert old.state.keys() == safe.state.keys()
    assert all(torch.equal(old.state[name], safe.state[name]) for name in safe.state)


def test_an_adapter_on_the_hub_is_read_by_its_id(tmp_path, monkeypatch):
    """The Hub's own cache layout, as an earlier download leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--an-adapter"
    save_adapter(lora_model(), repository / "snapshots" / commit, METADATA_OF_RUN)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter = read_adapter("someone/an-adapter", cache_dir=str(tmp_path))
    model = lora_model(seed=1)
    assert load_adapter(model, adapter, allow_new_head=False) == []
    assert torch.equal(logits(model)[0], logits(lora_model())[0]) is False  # other base weights, same adapter
    assert all(torch.equal(adapter.state[name], tensor) for name, tensor in trained(lora_model()).items())
    with pytest.raises(
        UserError, match="^someone/else: no such file or folder; the Hub .* is not reached, and no adapter"
    ):
        read_adapter("someone/else", cache_dir=str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_missing_path_or_a_folder_without_an_adapter_is_refused(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nowhere.bin")
    assert ADAPTER_CONFIG in refused(tmp_path)


class Payload:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_is_refused_and_never_runs(tmp_path):
    marker, command = tmp_path / "marker", f"touch {tmp_path / 'marker'}"
    torch.save({"roberta.x.lora_A": Payload(command)}, tmp_path / "bad.bin")
    torch.save({"roberta.x.lora_A": Payload(command)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("bad.bin", "old.bin"):
        assert "refused" in refused(tmp_path / name)
        assert not marker.exists()
    torch.load(tmp_path / "bad.bin", weights_only=False)
    assert marker.exists(), "the payload is no payload: the test proves nothing"


def test_a_file_that_contains_no_state_dict_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    torch.save({"epoch": 3, "model": {"a.lora_A": torch.zeros(2)}}, tmp_path / "nested.bin")
    torch.save({1: torch.zeros(2)}, tmp_path / "numbers.bin")
    for name in ("list.bin", "nested.bin", "numbers.bin"):
        assert "no state dict" in refused(tmp_path / name)
    published(tmp_path / "head.bin", {"classifier.dense.weight": torch.zeros(2, 2)})
    assert "no tensor of LoRA" in refused(tmp_path / "head.bin")


TEXTS = {
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3550413\n",
        "git lfs pull",
    ),
    "a web page": (b"\n<!DOCTYPE html>\n<html><head><title>Hub \xe2\x80\x93 a page", "Download the file itself"),
    "JSON": (b'{"error":"Access to model x/y is restricted"}', "Access to model x/y is restricted"),
    "text": (b"404: Not Found", "404: Not Found"),
    "it is empty": (b"", "Download it again"),
}


@pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, "adapter_model.bin", "published.bin"])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_in_the_place_of_weights_is_refused_by_what_it_is_with_the_remedy(kind, name, saved, tmp_path):
    _, folder = saved
    for path in (folder / ADAPTER_CONFIG, folder / RUN_METADATA):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content, remedy = TEXTS[kind]
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name if name == "published.bin" else tmp_path)
    assert f"{tmp_path / name}: " in message and kind in message and remedy in message, message


def test_control_characters_in_what_stands_for_weights_never_reach_the_terminal(tmp_path):
    (tmp_path / "page.bin").write_bytes(b"<html>\r\n\t" + "\N{ZERO WIDTH SPACE}x".encode() * 1000)
    (tmp_path / "long.bin").write_bytes(b"a line\n" * 100_000)
    for name in ("page.bin", "long.bin"):
        message = refused(tmp_path / name)
        assert len(message) < 400 and all(character.isprintable() or character == "\n" for character in message)


SPOILT = {
    "NaN": lambda tensor: tensor * float("nan"),
    "infinity": lambda tensor: tensor.masked_fill(torch.arange(tensor.numel()).view_as(tensor) == 1, float("-inf")),
    "more than fp32 holds": lambda tensor: tensor.double() * 1e300,
    "int8": lambda tensor: tensor.to(torch.int8),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "not an ordinary tensor": lambda tensor: tensor.to_sparse(),
    "not an ordinary tensor, without values": lambda tensor: tensor.to("meta"),
    "contains fewer numbers": lambda tensor: tensor[:1, :1].expand(4, 2**44),
}


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("where", ["lora_A", "out_proj.weight"])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_whose_numbers_are_not_finite_is_never_put_into_a_model(what, where, training, tmp_path):
    state = trained(lora_model())
    name = [name for name in state if name.endswith(where)][-1]
    path = published(tmp_path / "spoilt.bin", state | {name: SPOILT[what](state[name])})
    message = refused(path, training=training)
    assert name in message, message
    messages = {
        "NaN": "1 of its 12 tensors are not finite",
        "int8": "contains torch.int8",
        "complex": "contains torch.complex64",
    }
    assert (messages.get(what) or ("not finite" if "fin" in what or "fp32" in what else what.split(",")[0])) in message
    model = RobertaForSequenceClassification(tiny_config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match=name):
        attach_adapter(model, read_adapter(str(path)), ALPHA, allow_new_head=training)
    after = dict(model.named_parameters())
    assert all(torch.equal(tensor, after[n]) for n, tensor in before.items())


def test_a_complete_checkpoint_whose_base_weights_are_not_finite_is_refused(tmp_path):
    model = lora_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "roberta.encoder.layer.1.attention.self.query.weight"
    state[name][3, 3] = float("nan")
    path = published(tmp_path / "complete.bin", state)
    base = RobertaForSequenceClassification(tiny_config())
    base.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    with pytest.raises(UserError, match=f"{name} first"):
        attach_adapter(base, read_adapter(str(path)), ALPHA, allow_new_head=False)


def test_a_file_cut_short_anywhere_is_refused(saved, tmp_path):
    model, folder = saved
    content = published(tmp_path / "complete.bin", trained(model)).read_bytes()
    for part in (0.0, 0.01, 0.5, 0.95, 0.999):
        cut = tmp_path / "cut.bin"
        cut.write_bytes(content[: int(part * len(content))])
        assert refused(cut), part
    weights = (folder / ADAPTER_WEIGHTS).read_bytes()
    for name in (ADAPTER_CONFIG, RUN_METADATA):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for part in (0.0, 0.01, 0.5, 0.999):
        (tmp_path / ADAPTER_WEIGHTS).write_bytes(weights[: int(part * len(weights))])
        with pytest.raises(UserError, match="damaged or cut short"):
            read_adapter(str(tmp_path))
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(weights)
    assert read_adapter(str(tmp_path)).state.keys() == trained(model).keys()


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, RUN_METADATA])
def test_a_folder_whose_json_is_cut_is_refused_by_the_files_name(name, saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_text((folder / name).read_text()[:20])
    with pytest.raises(UserError, match=name):
        read_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "setting",
    [
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa_niter_4"},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"some_new_method": {"on": True}},
        {"r": None},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": "6"},
        {"rank_pattern": ["query"]},
        {"alpha_pattern": {"que(ry": 2}},
    ],
    ids=str,
)
def test_a_peft_adapter_of_a_kind_we_would_compute_wrongly_is_refused(setting, saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | setting))
    assert next(iter(setting)) in refused(tmp_path)


def test_a_folder_whose_ranks_are_not_those_of_its_tensors_is_refused(saved, tmp_path):
    _, folder = saved
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / ADAPTER_CONFIG).write_text(
        json.dumps(json.loads((folder / ADAPTER_CONFIG).read_text()) | {"rank_pattern": {"query": 2}})
    )
    message = refused(tmp_path)
    assert "self.query.lora_A has rank 4" in message and "says 2" in message


def _without(ending):
    """Leaves out the first tensor whose key ends so."""
    return lambda tensors, config: tensors.pop(min(key for key in tensors if key.endswith(ending)))


def _changed(ending, change):
    """Replaces the first tensor whose key ends so."""

    def of(tensors, config):
        key = min(key for key in tensors if key.endswith(ending))
        tensors[key] = change(tensors[key]).contiguous()

    return of


def _set(**settings):
    return lambda tensors, config: config.update(settings)


def _mask(change):
    """Changes the list of the first layer in AdaLoRA's rank_pattern."""
    return lambda tensors, config: change(config["rank_pattern"][min(config["rank_pattern"])])


@pytest.mark.parametrize(
    ("variant", "damage", "words"),
    [
        ("dora", _set(use_dora=False), "contains roberta.encoder.layer.0.attention.self.query.lora_magnitude_vector"),
        ("dora", _without("lora_magnitude_vector"), "the file lacks"),
        ("rslora", _set(use_dora=True), "use_dora=True is not supported"),
        ("pissa", _set(use_dora=True), "use_dora=True is not supported"),
        ("lora", _set(init_lora_weights="pissa"), "describes PiSSA, run_metadata.json LoRA"),
        ("lora", _set(r="4"), 'r is "4"; expected a positive integer'),
        ("vera", _without("vera_lambda_d"), "query.vera_lambda_d"),
        ("vera", _without("vera_lambda_b"), "query.vera_lambda_b"),
        ("vera", _changed("vera_lambda_d", torch.sum), "vera_lambda_d is []; expected [r]"),
        ("vera", _without("vera_A"), "vera_A is missing and base_model.vera_B is [32, 4]"),
        ("vera", _changed("vera_A", lambda A: A[:3]), "vera_A is [3, 32] and"),
        ("vera", _changed("vera_B", torch.flatten), "vera_B is [128]; expected [4, in] and [32, 4]"),
        ("vera", _set(projection_prng_key=None), "adapter_config.json: projection_prng_key is None"),
        ("vera", _set(projection_prng_key=3), "adapter_config.json has vera_seed 3, run_metadata.json 0"),
        ("adalora", _mask(lambda mask: mask.append(False)), "a rank_pattern that keeps 4 of 5 directions"),
        ("adalora", _mask(lambda mask: mask.pop()), "has init_r 4 and a rank_pattern that keeps 3 of 3 directions"),
        ("adalora", _set(init_r=8, rank_pattern={}), "has rank 4, adapter_config.json says 8"),
        ("adalora", _set(beta1=1.5), "beta1 is 1.5; expected a number from 0 to below 1"),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_a_variant_is_refused_where_it_is_read(variant, damage, words, tmp_path):
    alpha = {"lora_alpha": None} if variant == "vera" else {}
    model = lora_model(lora_variant=variant, **alpha)
    save_adapter(model, tmp_path, METADATA_OF_RUN | {"method": describe_method(model)})
    read_adapter(str(tmp_path))
    tensors = load_file(tmp_path / ADAPTER_WEIGHTS)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / ADAPTER_WEIGHTS, {"format": "pt"})
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        read_adapter(str(tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value), error.value
