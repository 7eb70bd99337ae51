"""LoRA anywhere, BitFit, bottleneck adapters, the head alone: numbers against transformers and PEFT, then files."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from helpers import (
    CLASSIFIERS,
    assert_close,
    assert_same_gradients,
    ragged_batch,
    randomise_,
    settings_of,
    tiny_config,
    tiny_deberta_config,
    twins,
)
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoConfig, DebertaV2Config, PreTrainedTokenizerFast, RobertaConfig

from lora_nlu.adapters.__main__ import main
from lora_nlu.adapters.attaching import attach_adapter, load_adapter
from lora_nlu.adapters.converting import merged_state
from lora_nlu.adapters.reading import read_adapter
from lora_nlu.adapters.writing import save_adapter
from lora_nlu.errors import UserError
from lora_nlu.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RUN_METADATA
from lora_nlu.methods.bottleneck import Bottleneck, set_bottlenecks_
from lora_nlu.methods.description import methods_in, set_method, setting_names
from lora_nlu.methods.linear import merge_lora_
from lora_nlu.methods.lora import LoRALinear, lora_layers
from lora_nlu.methods.marking import count_parameters, describe_method, mark_only_lora_as_trainable, mark_trainable
from lora_nlu.methods.table import METHODS as TABLE
from lora_nlu.methods.targets import TARGETS
from lora_nlu.models.loading import base_fingerprint, check_method, load_model
from lora_nlu.models.modeling_deberta_v2 import DebertaV2ForSequenceClassification

CONFIGS: dict[str, Any] = {"roberta": tiny_config, "deberta-v2": tiny_deberta_config}
LENGTHS = [9, 4, 6, 4, 1]
LABELS = torch.arange(len(LENGTHS)) % 3
NAMES = ["yes", "no", "perhaps"]
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 6}
HOULSBY = {"apply_adapter": True, "adapter_type": "houlsby", "adapter_size": 6}
PFEIFFER = HOULSBY | {"adapter_type": "pfeiffer"}
BITFIT = {"apply_bitfit": True}
# What each method is in the config, and which names it trains in the encoder: the second by the papers' words
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({}, r""),
    "head": ({"head_only": True}, r"(?!)"),
    "bitfit": (BITFIT, r"bias"),
    "houlsby": (HOULSBY, r"\.adapter\."),
    "pfeiffer": (PFEIFFER, r"\.adapter\."),
    "houlsby and biases": (HOULSBY | BITFIT, r"bias|\.adapter\."),
    "lora": (LORA, r"\.(query|value)(_proj)?\.lora_[AB]$"),
    "lora and biases": (LORA | BITFIT, r"bias|\.lora_[AB]$"),
    "lora elsewhere": (
        LORA | {"lora_target_modules": ["key", "output"], "lora_layers": [1], "lora_dropout": 0.25},
        r"\.layer\.1\.(attention\.self\.key(_proj)?|output\.dense)\.lora_[AB]$",
    ),
}
for row in TABLE.values():  # and each row of the table that is not above, with the names that the row says
    METHODS.setdefault(row.name, (settings_of(row), row.state or r"(?!)"))
PARTS = [name for name in METHODS if METHODS[name][0]]
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def inputs_for(config: Any) -> dict[str, Tensor]:
    return ragged_batch(LENGTHS, pad=config.pad_token_id)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_for(model.config)).logits


def trains(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_head(model: Any, name: str) -> bool:
    return not name.startswith(f"{model.base_model_prefix}.")


def names_of(model: Any, pattern: str) -> set[str]:
    """The head's names, and the encoder's in which the pattern is found."""
    return {name for name, _ in model.named_parameters() if in_head(model, name) or re.search(pattern, name)}


def only_(model: Any, pattern: str) -> None:
    """Train these names alone."""
    trained_names = names_of(model, pattern)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained_names)


def assert_same_step(ours: Any, theirs: Any) -> None:
    """The same logits, loss and gradients on a ragged batch."""
    outputs = []
    for model in (ours, theirs):
        output = model(**inputs_for(ours.config), labels=LABELS)
        output.loss.backward()
        outputs.append(output)
    got, want = outputs
    assert_close(got.logits, want.logits, what="logits")
    assert_close(got.loss, want.loss, what="loss")
    assert_same_gradients(ours, theirs)


@torch.no_grad()
def randomise_trained_(model: nn.Module, seed: int = 3) -> nn.Module:
    """What trains becomes random; the rest stays as it was loaded."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# ----------------------------------------------------------------------------- bottleneck adapters in transformers' own


def houlsby(output: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """LayerNorm(up(swish(down(h))) + h + input): h what the half's dense and dropout make."""
    h = output.dropout(output.dense(hidden_states))
    down = output.adapter["adapter_A"](h)
    return output.LayerNorm(output.adapter["adapter_B"](down * down.sigmoid()) + h + input_tensor)


def pfeiffer(output: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """LayerNorm(up(relu(down(LayerNorm(h + input)))) + h + input)."""
    h = output.dropout(output.dense(hidden_states))
    down = output.adapter["adapter_A"](output.LayerNorm(h + input_tensor))
    return output.LayerNorm(output.adapter["adapter_B"](down.clamp(min=0)) + h + input_tensor)


# formula, and the names of transformers' modules that it replaces
FORMULAS = {
    "houlsby": (houlsby, ("RobertaSelfOutput", "RobertaOutput", "DebertaV2SelfOutput", "DebertaV2Output")),
    "pfeiffer": (pfeiffer, ("RobertaOutput", "DebertaV2Output")),
}
ADAPTERS = pytest.mark.parametrize("adapter_type", FORMULAS)


def adapter_twins(config: Any) -> tuple[Any, Any]:
    """Our classifier, and transformers' with the formula of its adapters: the same random weights, in train mode."""
    ours_class, theirs_class = CLASSIFIERS[config.model_type]
    formula, places = FORMULAS[config.adapter_type]
    theirs = theirs_class(copy.deepcopy(config))
    for module in [*theirs.modules()]:
        if type(module).__name__ in places:
            sizes = (config.hidden_size, config.adapter_size)
            module.adapter = nn.ModuleDict({"adapter_A": nn.Linear(*sizes), "adapter_B": nn.Linear(*sizes[::-1])})
            module.forward = partial(formula, module)
    ours = ours_class(config)
    ours.load_state_dict(randomise_(theirs).state_dict())  # strict: the names are those of the formulas above
    return ours.train(), theirs.train()


@KINDS
@ADAPTERS
@pytest.mark.parametrize("biases", [False, True], ids=["", "and biases"])
def test_adapters_have_the_logits_loss_and_gradients_of_their_formula_in_transformers_own_model(
    kind, adapter_type, biases
):
    config = CONFIGS[kind](**HOULSBY | {"adapter_type": adapter_type, "apply_bitfit": biases})
    ours, theirs = adapter_twins(config)
    mark_trainable(ours)
    only_(theirs, METHODS["houlsby and biases" if biases else "houlsby"][1])
    assert_same_step(ours, theirs)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    per_layer = 8 if adapter_type == "houlsby" else 4  # A and B, weight and bias, once or twice
    assert sum(".adapter." in name for name in gradients) == 2 * per_layer
    assert all(gradient.abs().max() > 0 for name, gradient in gradients.items() if ".adapter." in name)


@KINDS
@ADAPTERS
def test_the_adapters_of_each_type_move_the_logits_their_own_way(kind, adapter_type):
    config = CONFIGS[kind](**HOULSBY | {"adapter_type": adapter_type})
    ours, theirs = adapter_twins(config)
    without = CLASSIFIERS[kind][1](CONFIGS[kind]())
    without.load_state_dict({name: t for name, t in theirs.state_dict().items() if ".adapter." not in name})
    assert (logits(without) - logits(ours)).abs().max() > 0.1
    for module in ours.modules():
        if isinstance(module, Bottleneck):
            module.method = next(other for other in FORMULAS if other != adapter_type)
    assert (logits(ours) - logits(theirs)).abs().max() > 0.01


@pytest.mark.usefixtures("torch_draws")
@KINDS
@ADAPTERS
def test_adapters_read_and_pass_on_what_dropout_left(kind, adapter_type):
    # Of one sentence without padding, with every row of DeBERTa's table in use (4 buckets reach 8 rows in 6 tokens),
    # all that dropout meets has transformers' size and order: one seed gives one draw.
    settings = HOULSBY | {"adapter_type": adapter_type, "hidden_dropout_prob": 0.2}
    settings |= {"position_buckets": 4, "max_relative_positions": 5} if kind == "deberta-v2" else {}
    ours, theirs = adapter_twins(CONFIGS[kind](**settings))
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    states = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        states.append(model(input_ids=ids, output_hidden_states=True).hidden_states)
    for i, (got, want) in enumerate(zip(*states, strict=True)):
        assert_close(got, want, what=f"hidden state {i}")
    undropped = ours.eval()(input_ids=ids, output_hidden_states=True).hidden_states
    assert (states[0][-1] - undropped[-1]).abs().max() > 0.1


@KINDS
def test_the_adapters_names_are_the_references(kind):
    def names(adapter_type: str) -> set[str]:
        model = CLASSIFIERS[kind][0](CONFIGS[kind](**HOULSBY | {"adapter_type": adapter_type}))
        plain = CLASSIFIERS[kind][1](CONFIGS[kind]())
        return model.state_dict().keys() - plain.state_dict().keys()

    def expected(*places: str) -> set[str]:
        tensors = [f"adapter_{letter}.{part}" for letter in "AB" for part in ("weight", "bias")]
        prefix = f"{kind.removesuffix('-v2')}.encoder.layer"
        return {f"{prefix}.{i}.{place}.adapter.{tensor}" for i in (0, 1) for place in places for tensor in tensors}

    assert names("houlsby") == expected("attention.output", "output")
    assert names("pfeiffer") == expected("output")
    assert kind != "roberta" or names("houlsby") >= {
        "roberta.encoder.layer.0.attention.output.adapter.adapter_A.weight",
        "roberta.encoder.layer.0.output.adapter.adapter_B.bias",
    }


@pytest.mark.parametrize("adapter_type, size", [("houlsby", 0), ("parallel", 8)])
def test_an_adapter_of_an_unknown_type_or_of_width_0_is_refused(adapter_type, size):
    with pytest.raises(ValueError, match="houlsby or pfeiffer, 1 or more"):
        Bottleneck(32, adapter_type, size)


# ------------------------------------------------------------------------------------------- from a base checkpoint


def save_base(kind: str, folder: Path, seed: int = 5, **settings: Any) -> Path:
    """transformers' own classifier, of 3 layers by default, every parameter random, as a folder with a tokenizer."""
    config = CONFIGS[kind](**{"num_hidden_layers": 3, **settings})
    randomise_(CLASSIFIERS[kind][1](config), seed).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 2}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_base(kind, tmp_path_factory.mktemp(kind) / "base") for kind in CONFIGS}


def loaded(folder: Path, num_labels: int = 3, seed: int = 0, **method: Any) -> Any:
    """Our model of a folder by a method, as run_glue.py loads it."""
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = num_labels
    set_method(config, method)
    torch.manual_seed(seed)
    return load_model(str(folder), config, needs_head=False)[0]


def theirs_of(folder: Path) -> Any:
    kind = AutoConfig.from_pretrained(folder).model_type
    return CLASSIFIERS[kind][1].from_pretrained(folder)


@KINDS
@ADAPTERS
@pytest.mark.parametrize("when", ["while loading", "after loading"])
def test_new_adapters_are_drawn_as_the_other_layers_are_and_the_base_stays_as_it_was(kind, adapter_type, when, bases):
    def started(seed: int) -> Any:
        if when == "while loading":
            settings = {"apply_adapter": True, "adapter_type": adapter_type, "adapter_size": 16}
            return loaded(bases[kind], seed=seed, **settings)
        model = loaded(bases[kind])
        torch.manual_seed(seed)
        set_bottlenecks_(model, adapter_type, 16)
        return model

    model = started(seed=1)
    state, base = model.state_dict(), theirs_of(bases[kind]).state_dict()
    new = {name: state[name] for name in state.keys() - base.keys()}
    assert len(new) == 3 * (8 if adapter_type == "houlsby" else 4)
    assert all(torch.equal(state[name], base[name]) for name in base)
    assert all(torch.count_nonzero(t) == 0 for name, t in new.items() if name.endswith("bias"))
    for letter in "AB":
        drawn = torch.cat([t.flatten() for name, t in new.items() if name.endswith(f"{letter}.weight")])
        assert len(drawn) == len(set(drawn.tolist())), "two layers share their draws"
        # 1,536 or 3,072 numbers; a linear layer's own uniform start has p < 1e-14
        assert scipy.stats.kstest(drawn, "norm", args=(0, model.config.initializer_range)).pvalue > 0.01
    again, other = started(seed=1).state_dict(), started(seed=2).state_dict()
    weights = [name for name in new if name.endswith("weight")]
    assert all(torch.equal(again[name], state[name]) for name in new)
    assert not any(torch.equal(other[name], state[name]) for name in weights)


def test_new_bottlenecks_replace_those_of_a_model_and_keep_its_dtype_and_mode(bases):
    model = loaded(bases["roberta"], **HOULSBY).to(torch.bfloat16).eval()
    set_bottlenecks_(model, "pfeiffer", 3)
    found = {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}
    assert [*found] == [f"roberta.encoder.layer.{i}.output.adapter" for i in range(3)]
    for module in found.values():
        assert module.adapter_A.weight.shape == (3, 32) and module.adapter_A.weight.dtype == torch.bfloat16
        assert not module.training
    config = model.config
    assert (config.apply_adapter, config.adapter_type, config.adapter_size) == (True, "pfeiffer", 3)


# --------------------------------------------------------------------------------------------- what trains, how many

# tensors that train in an encoder of 3 layers: 8 biases a layer (query, key, value, dense and norm of the attention,
# intermediate, output and its norm), 1 of the embeddings' norm; DeBERTa's relative table and convolution have 3 more
TENSORS = {
    "roberta": {"head": 0, "bitfit": 25, "houlsby": 24, "pfeiffer": 12, "houlsby and biases": 49, "lora": 12,
                "lora and biases": 37, "lora elsewhere": 4},
    "deberta-v2": {"head": 0, "bitfit": 28, "houlsby": 24, "pfeiffer": 12, "houlsby and biases": 52, "lora": 12,
                   "lora and biases": 40, "lora elsewhere": 4},
}  # fmt: skip


@KINDS
@pytest.mark.parametrize("name", METHODS)
def test_exactly_the_parameters_of_the_method_train(kind, name, bases):
    settings, pattern = METHODS[name]
    model = loaded(bases[kind], **settings)
    assert trains(model) == names_of(model, pattern)
    inside = [n for n in trains(model) if not in_head(model, n)]
    if name == "full":
        assert len(inside) == len([*model.base_model.parameters()])
    else:
        assert len(inside) == TENSORS[kind].get(name, len(inside))
    heads = {"roberta": ["classifier.dense", "classifier.out_proj"], "deberta-v2": ["classifier", "pooler.dense"]}
    assert trains(model) - {*inside} == {f"{n}.{part}" for n in heads[kind] for part in ("weight", "bias")}


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
SHAPES: dict[str, Any] = {
    "roberta-base": RobertaConfig(**ROBERTA, hidden_size=768, num_hidden_layers=12, intermediate_size=3072),
    "roberta-large": RobertaConfig(
        **ROBERTA, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "deberta-v2-xxlarge": DebertaV2Config(
        vocab_size=128100, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144,
        type_vocab_size=0, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type="p2c|c2p", position_biased_input=False, conv_kernel_size=3, conv_act="gelu",
    ),
}  # fmt: skip
OF_SIZE = {size: {"apply_adapter": True, "adapter_size": size} for size in (8, 16, 64)}


def at_full_size(shape: str, **method: Any) -> Any:
    """The model at its real shape without memory for it, what trains marked."""
    config = copy.deepcopy(SHAPES[shape])
    config.update(method)
    with torch.device("meta"):
        model = CLASSIFIERS[config.model_type][0](config)
    mark_trainable(model)
    return model


@pytest.mark.parametrize(
    ("shape", "method", "count", "paper"),
    [
        ("roberta-base", {"apply_bitfit": True}, 102_144, "0.1M"),
        ("roberta-base", {"apply_lora": True, "lora_r": 8, "lora_alpha": 16}, 294_912, "0.3M"),
        ("roberta-large", {"apply_lora": True, "lora_r": 8, "lora_alpha": 16}, 786_432, "0.8M"),
        ("roberta-large", {"adapter_type": "houlsby", **OF_SIZE[8]}, 835_968, "0.8M"),
        ("roberta-large", {"adapter_type": "pfeiffer", **OF_SIZE[16]}, 811_392, "0.8M"),
        ("deberta-v2-xxlarge", {"apply_lora": True, "lora_r": 16, "lora_alpha": 32}, 4_718_592, "4.7M"),
    ],
    ids=lambda value: value.get("adapter_type", next(iter(value))) if isinstance(value, dict) else str(value),
)
def test_the_encoder_trains_as_many_parameters_as_the_papers_table_says(shape, method, count, paper):
    counts = count_parameters(at_full_size(shape, **method))
    assert counts.encoder == count
    assert f"{counts.encoder / 1e6:.1f}M" == paper


@pytest.mark.parametrize(("adapter_type", "an_encoder", "paper"), [("houlsby", 48, 6.0), ("pfeiffer", 24, 3.0)])
def test_at_size_64_the_papers_3_and_6_million_are_the_matrices_without_biases_in_units_of_2_to_the_20(
    adapter_type, an_encoder, paper
):
    # 3.0M in the paper is 2 * 1024 * 64 * 24 = 3.0 * 2^20, and 6.0M twice that; with the biases, in units of 10^6,
    # there are 3.17 and 6.34 of them.
    model = at_full_size("roberta-large", adapter_type=adapter_type, **OF_SIZE[64])
    matrices = sum(p.numel() for name, p in model.named_parameters() if re.search(r"adapter_[AB]\.weight$", name))
    assert matrices == 2 * 1024 * 64 * an_encoder == paper * 2**20
    assert count_parameters(model).encoder == matrices + (64 + 1024) * an_encoder


@pytest.mark.parametrize(("shape", "paper"), [("roberta-base", 125), ("roberta-large", 355)])
def test_full_fine_tuning_trains_all_of_robertas_125_and_355_million(shape, paper):
    counts = count_parameters(at_full_size(shape))
    with torch.device("meta"):
        theirs = CLASSIFIERS["roberta"][1](SHAPES[shape])
    assert counts.trainable == counts.total == sum(p.numel() for p in theirs.parameters())
    assert counts.encoder == sum(p.numel() for p in theirs.roberta.parameters())
    # The paper's .0 is no digit: with the head 124.65 and 355.36, the encoders alone 124.06 and 354.31
    assert round(counts.trainable / 1e6) == paper


def test_full_fine_tuning_of_deberta_xxlarge_trains_the_papers_1500_million_to_5_percent():
    # 1500M is the name of the size ("1.5B"); the encoder has 1564.5 million parameters, the head 2.4 more. Term by
    # term: a layer's four projections, feed-forward and two norms; the tables of words and of relative positions, the
    # convolution, and the norms of embeddings, relative table and convolution.
    counts = count_parameters(at_full_size("deberta-v2-xxlarge"))
    h, f = 1536, 6144
    layer = 4 * (h * h + h) + (2 * h * f + f + h) + 4 * h
    assert counts.encoder == 48 * layer + (128100 + 512) * h + (3 * h * h + h) + 3 * 2 * h == 1_564_549_632
    assert counts.trainable == counts.total == counts.encoder + (h * h + h) + 2 * (h + 1)
    assert abs(counts.trainable / 1500e6 - 1) < 0.05


# --------------------------------------------------------------------------------------------------------- BitFit


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("roberta", {}),
        ("deberta-v2", {}),
        ("deberta-v2", {"pos_att_type": ["p2c"]}),
        ("deberta-v2", {"conv_kernel_size": 0, "position_biased_input": True}),
    ],
    ids=str,
)
def test_bitfit_has_transformers_gradients_for_the_biases_and_none_elsewhere_in_the_encoder(kind, settings):
    ours, theirs = twins(CONFIGS[kind](**BITFIT, **settings))
    mark_trainable(ours)
    only_(theirs, "bias")
    assert_same_step(ours, theirs)
    gradients = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients == names_of(theirs, "bias")
    if kind == "deberta-v2":
        # over tokens alone a key's bias has no gradient; this one is of the keys that the table's queries meet
        assert ours.get_parameter("deberta.encoder.layer.0.attention.self.key_proj.bias").grad.abs().max() > 1e-4


def test_bitfit_reaches_the_biases_of_deberta_position_projections_of_its_own():
    # In float64, for what is added to all keys alike, as pos_key_proj's bias is, has an exact gradient of 0: relative
    # to the largest gradient, and to 1e-7 of it because transformers rounds sqrt(3 D) to fp32 in float64 too.
    ours, theirs = (m.double() for m in twins(tiny_deberta_config(**BITFIT, share_att_key=False)))
    mark_trainable(ours)
    only_(theirs, "bias")
    for model in (ours, theirs):
        model(**inputs_for(ours.config), labels=LABELS).loss.backward()
    want = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    largest = max(gradient.abs().max().item() for gradient in want.values())
    for name, gradient in want.items():
        assert_close(ours.get_parameter(name).grad, gradient, 1e-7, scale=largest, what=name)
    assert trains(ours) == {*want}
    assert want["deberta.encoder.layer.0.attention.self.pos_query_proj.bias"].abs().max() > 1e-4


# --------------------------------------------------------------------------------------- LoRA on any layer, by PEFT

# What PEFT has to look for, by the paper's letters W_q, W_k, W_v, W_o and the two of the feed-forward
MODULES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "dense": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}


def module_of(kind: str, target: str) -> str:
    return MODULES[target] + ("_proj" if kind == "deberta-v2" and ".self." in MODULES[target] else "")


def lora_twins(kind: str, targets: list[str], layers: list[int], **settings: Any) -> tuple[Any, Any]:
    """Our classifier of 3 layers with LoRA in these places and transformers' under PEFT: the same random weights."""
    places = {"lora_target_modules": targets, "lora_layers": layers} | settings
    ours = randomise_(CLASSIFIERS[kind][0](CONFIGS[kind](num_hidden_layers=3, **LORA | places)))
    mark_trainable(ours)
    modules = "|".join(re.escape(module_of(kind, target)) for target in targets)
    pattern = rf".*\.layer\.({'|'.join(map(str, layers))})\.({modules})"
    lora = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0, target_modules=pattern)
    theirs = inject_adapter_in_model(lora, CLASSIFIERS[kind][1](CONFIGS[kind](num_hidden_layers=3)))
    with torch.no_grad():
        for name, parameter in in_our_names(theirs).items():
            parameter.copy_(ours.get_parameter(name))
            parameter.requires_grad_("lora_" in name or in_head(ours, name))
    return ours.train(), theirs.train()


def in_our_names(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's parameters by the names that ours have."""
    names = ((name.replace(".base_layer.", "."), parameter) for name, parameter in theirs.named_parameters())
    return {name.removesuffix(".default.weight"): parameter for name, parameter in names}


@KINDS
@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ([*TARGETS], [0, 1, 2]),
        *(([target], [0, 2]) for target in TARGETS),
        (["query", "value"], [2]),
        (["key", "dense", "output"], [0, 1]),
    ],
    ids=str,
)
def test_lora_on_any_layers_has_pefts_logits_and_gradients(kind, targets, layers):
    ours, theirs = lora_twins(kind, targets, layers, lora_relative_query=kind == "deberta-v2")
    outputs = []
    for model in (ours, theirs):
        outputs.append(model(**inputs_for(ours.config), labels=LABELS))
        outputs[-1].loss.backward()
    got, want = outputs
    assert_close(got.logits, want.logits)
    assert_close(got.loss, want.loss)
    parameters = in_our_names(theirs)
    assert parameters.keys() == dict(ours.named_parameters()).keys()
    assert trains(ours) == {name for name, parameter in parameters.items() if parameter.requires_grad}
    assert sum("lora_" in name for name in trains(ours)) == 2 * len(targets) * len(layers)
    for name, parameter in parameters.items():
        gradient = ours.get_parameter(name).grad
        if parameter.grad is None:
            assert gradient is None, name
        else:
            assert parameter.grad.abs().max() > 0, name
            assert_close(gradient, parameter.grad, 2e-5, what=name)  # helpers.assert_same_gradients says why 2e-5


def frozen_reading_by_hand(ours: Any) -> Any:
    """transformers' own DeBERTa with the updates in its weights, and the base's for relative positions beside them."""
    theirs = CLASSIFIERS["deberta-v2"][1](tiny_deberta_config(num_hidden_layers=3, share_att_key=False))
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items() if "lora_" not in name}
    for i in range(3):
        attention = f"deberta.encoder.layer.{i}.attention.self"
        for projection in ("query_proj", "key_proj"):
            for part in ("weight", "bias"):
                state[f"{attention}.pos_{projection}.{part}"] = state[f"{attention}.{projection}.{part}"].clone()
    for name, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] += 6 / 4 * module.lora_B.detach() @ module.lora_A.detach()
    theirs.load_state_dict(state)
    return theirs.train()


@pytest.mark.parametrize("targets", [["key"], ["query", "key"], [*TARGETS]], ids=str)
def test_by_default_relative_positions_go_through_the_base_weights_of_query_and_key(targets):
    ours, other_reading = lora_twins("deberta-v2", targets, [0, 2], **BITFIT)
    theirs = frozen_reading_by_hand(ours)
    got, want = (model(**inputs_for(ours.config), labels=LABELS) for model in (ours, theirs))
    assert_close(got.logits, want.logits)
    assert_close(got.loss, want.loss)
    assert (got.logits - other_reading(**inputs_for(ours.config)).logits).abs().max() > 0.01
    got.loss.backward()
    want.loss.backward()
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    assert len(layers) == 2 * len(targets)
    for name, layer in layers.items():  # W = W0 + s B A, so with G = dL/dW: dL/dA = s B^T G and dL/dB = s G A^T
        G = theirs.get_parameter(f"{name}.weight").grad
        assert_close(layer.lora_A.grad, 6 / 4 * layer.lora_B.detach().T @ G, 2e-5, what=f"{name}.lora_A")
        assert_close(layer.lora_B.grad, 6 / 4 * G @ layer.lora_A.detach().T, 2e-5, what=f"{name}.lora_B")
    biases = [name for name in trains(ours) if name.endswith("bias")]
    assert len(biases) == TENSORS["deberta-v2"]["bitfit"] + 2
    for name in biases:  # one bias here is two there: of tokens, and of relative positions
        want = theirs.get_parameter(name).grad
        if name.endswith(("query_proj.bias", "key_proj.bias")):
            want = want + theirs.get_parameter(name.replace(".self.", ".self.pos_")).grad
        assert_close(ours.get_parameter(name).grad, want, 2e-5, what=name)
    state, settings = merged_state(ours)
    assert settings == {"share_att_key": False} and state.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert_close(state[name], tensor, what=name)


@pytest.mark.parametrize(
    ("targets", "settings", "frozen"),
    [
        (["value"], {}, None),
        (["value", "dense", "intermediate", "output"], {}, None),
        (["query"], {}, True),
        (["key"], {}, True),
        (["key"], {"lora_layers": [1]}, True),
        (["key"], {"lora_relative_query": True}, False),
        (["value"], {"lora_relative_query": True}, None),
        (["key"], {"pos_att_type": ["c2p"]}, True),
        (["key"], {"pos_att_type": ["p2c"]}, None),  # the table's keys are of content to position
        (["query"], {"pos_att_type": ["c2p"]}, None),
        (["query"], {"pos_att_type": ["p2c"]}, True),
        (["query", "key"], {"share_att_key": False}, None),
        (["query", "key"], {"relative_attention": False}, None),
    ],
    ids=str,
)
def test_two_readings_differ_only_where_the_table_goes_through_a_projection_with_lora(targets, settings, frozen):
    config = tiny_deberta_config(**LORA, lora_target_modules=targets, **settings)
    model = randomise_(DebertaV2ForSequenceClassification(config))
    assert model.frozen_relative_query is frozen
    one = logits(model)
    config.lora_relative_query = not getattr(config, "lora_relative_query", False)
    assert torch.equal(logits(model), one) == (frozen is None)


def test_a_merged_deberta_with_lora_on_the_key_alone_cannot_be_saved_where_the_relative_key_is_frozen():
    ours, _ = lora_twins("deberta-v2", ["key"], [1])
    merge_lora_(ours.eval())
    with pytest.raises(RuntimeError, match="frozen can't be saved"):
        ours.state_dict()


@pytest.mark.usefixtures("torch_draws")
def test_a_models_lora_dropout_is_that_of_pefts_in_every_layer():
    # One sentence without padding: what the updates read has PEFT's size, and its draws come in PEFT's order.
    ours, theirs = lora_twins("roberta", [*TARGETS], [0, 1, 2], lora_dropout=0.3)
    assert {m.lora_dropout for m in ours.modules() if isinstance(m, LoRALinear)} == {0.3}
    for name, module in theirs.named_modules():
        if name.endswith(".lora_dropout"):
            module["default"] = nn.Dropout(0.3)
    ids = torch.randint(3, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        output = model(input_ids=ids, labels=LABELS[:1], output_hidden_states=True)  # all tokens of the last layer too
        output.loss.backward()
        found.append(output.logits)
    assert_close(*found)
    for name, parameter in in_our_names(theirs).items():
        if parameter.grad is not None:
            assert_close(ours.get_parameter(name).grad, parameter.grad, 2e-5, what=name)
    still = ours.eval()(input_ids=ids).logits
    assert_close(still, theirs.eval()(input_ids=ids).logits)
    assert (found[0] - still).abs().max() > 0.1


# -------------------------------------------------------------------------------------------------------- on disk


def trained(base: Path, folder: Path, **settings: Any) -> Any:
    """A model with random numbers in all that a method trains, saved as an adapter folder."""
    model = loaded(base, **settings)
    metadata = {"task": "custom", "labels": NAMES, "base_model": str(base), "base_fingerprint": base_fingerprint(model)}
    save_adapter(randomise_trained_(model), folder, metadata)
    return model


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory) -> Callable[[str, str], tuple[Any, Path]]:
    """The model that a method trained from a kind of base, and its folder, for nobody to change."""

    @cache
    def of(kind: str, method: str) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp(f"{kind} {method}") / "adapter"
        return trained(bases[kind], folder, **METHODS[method][0]), folder

    return of


def attached(base: Path, folder: Path, new_head: bool = False, **settings: Any) -> tuple[Any, list[str]]:
    """A freshly loaded base with the adapter of a folder, and the notes on it."""
    model = loaded(base, seed=9, **settings)
    return model, attach_adapter(model, read_adapter(str(folder)), None, allow_new_head=new_head)


@pytest.fixture(scope="module")
def again(bases, saved) -> Callable[[str, str], tuple[Any, list[str]]]:
    """A fresh base with what a method saved attached, and the notes on it, for nobody to change."""
    return cache(lambda kind, method: attached(bases[kind], saved(kind, method)[1]))


@cache
def base_logits(base: Path) -> Tensor:
    return logits(loaded(base, seed=9))


@cache
def fresh_state(base: Path, num_labels: int) -> dict[str, Tensor]:
    return loaded(base, num_labels=num_labels, seed=9).state_dict()


@KINDS
@pytest.mark.parametrize("method", PARTS)
def test_what_a_method_trained_gives_the_same_logits_bit_for_bit_in_a_fresh_base(kind, method, bases, saved, again):
    model, folder = saved(kind, method)
    attached_model, notes = again(kind, method)
    assert notes == [] and trains(attached_model) == trains(model)
    assert torch.equal(logits(attached_model), logits(model))
    assert (base_logits(bases[kind]) - logits(model)).abs().max() > 0.1, "the method changed nothing"
    # a model that has the layers, as one that resumes does
    resumed = loaded(bases[kind], seed=9, **METHODS[method][0])
    assert load_adapter(resumed, read_adapter(str(folder)), allow_new_head=False) == []
    assert torch.equal(logits(resumed), logits(model))


@KINDS
@pytest.mark.parametrize("method", PARTS)
def test_a_base_with_a_folder_attached_is_described_as_what_was_trained(kind, method, saved, again):
    described = describe_method(saved(kind, method)[0])
    # the dropout of a training says nothing of the next one's
    described |= {"lora_dropout": 0.0} if "lora_dropout" in described else {}
    assert describe_method(again(kind, method)[0]) == described


@KINDS
@pytest.mark.parametrize("method", [name for name in PARTS if name not in TABLE or not TABLE[name].to_file])
def test_a_folder_contains_what_was_trained_and_nothing_else(kind, method, saved):
    model, folder = saved(kind, method)
    state = model.state_dict()

    def in_file(name: str) -> str:  # as PEFT calls what it wraps
        inside = f"{name.removesuffix('.bias')}.lora_A" in state
        name = name.replace(".bias", ".base_layer.bias") if inside else name
        return f"base_model.model.{name}{'.weight' if re.search(r'[.]lora_[AB]$', name) else ''}"

    tensors = load_file(folder / ADAPTER_WEIGHTS)
    expected = {in_file(name): state[name] for name in names_of(model, METHODS[method][1])}
    expected |= read_adapter(str(folder)).frozen  # VeRA's matrices, which are no parameters of the model
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    numbers = sum(tensor.numel() for tensor in expected.values())
    assert (folder / ADAPTER_WEIGHTS).stat().st_size < 4 * numbers + 200 * len(
        expected
    ) + 200  # numbers and their names


@KINDS
@pytest.mark.parametrize("method", ["head", "bitfit", "houlsby", "pfeiffer", "houlsby and biases"])
def test_peft_refuses_the_folder_of_a_method_that_it_does_not_have(kind, method, bases, saved):
    with pytest.raises((KeyError, ValueError), match=f"(?i){method.split()[0]}"):
        PeftModel.from_pretrained(theirs_of(bases[kind]), str(saved(kind, method)[1]))


@pytest.mark.parametrize("biases", [False, True], ids=["", "and biases"])
def test_peft_loads_lora_on_every_layer_type_of_two_of_three_layers_with_the_same_logits(biases, bases, tmp_path):
    places = {"lora_target_modules": [*TARGETS], "lora_layers": [0, 1], "lora_dropout": 0.1}
    model = trained(bases["roberta"], tmp_path, **LORA, **places, apply_bitfit=biases)
    theirs = PeftModel.from_pretrained(theirs_of(bases["roberta"]), str(tmp_path))
    assert_close(logits(theirs), logits(model))
    assert theirs.peft_config["default"].lora_dropout == 0.1
    with_lora = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A.default")]
    assert len(with_lora) == len(TARGETS) * 2 and not any(".layer.2." in name for name in with_lora)


@KINDS
def test_rslora_attached_and_saved_again_has_its_own_alpha_and_the_same_logits_here_and_in_peft(kind, bases, tmp_path):
    config = AutoConfig.from_pretrained(bases[kind])
    config.num_labels = 3
    set_method(config, LORA | {"lora_relative_query": True})  # PEFT's way with a DeBERTa
    config.use_rslora = True
    model, _ = load_model(str(bases[kind]), config, needs_head=False)
    save_adapter(randomise_trained_(model), tmp_path / "first", {"task": "custom", "labels": NAMES})
    again, _ = attached(bases[kind], tmp_path / "first")
    save_adapter(again, tmp_path / "second", {"task": "custom", "labels": NAMES})
    for folder in (tmp_path / "first", tmp_path / "second"):
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
        assert (settings["use_rslora"], settings["lora_alpha"], settings["alpha_pattern"]) == (True, 6, {})
        theirs = PeftModel.from_pretrained(theirs_of(bases[kind]), str(folder))
        assert_close(logits(theirs), logits(model))
        assert {x for m in theirs.modules() if hasattr(m, "lora_A") for x in m.scaling.values()} == {6 / 4**0.5}
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method, p", [("lora elsewhere", 0.25), ("lora", 0.0)])
def test_the_dropout_that_updates_were_trained_with_is_recorded(method, p, saved):
    folder = saved("roberta", method)[1]
    assert json.loads((folder / ADAPTER_CONFIG).read_text())["lora_dropout"] == p
    assert read_adapter(str(folder)).lora_dropout == p


def refused(base: Path, folder: Path, **settings: Any) -> str:
    """The message with which a folder is refused for a freshly loaded base."""
    with pytest.raises(UserError) as error:
        attached(base, folder, **settings)
    assert str(error.value).count("\n") < 3 and str(folder) in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Bases with other weights, or of another depth or width, of each kind."""
    shapes = {"deeper": {"num_hidden_layers": 4}, "shallower": {"num_hidden_layers": 2}, "wider": {"hidden_size": 40}}
    return {
        name: {kind: save_base(kind, tmp_path_factory.mktemp(name) / kind, **settings) for kind in CONFIGS}
        for name, settings in {"retrained": {"seed": 6}, **shapes}.items()
    }


@KINDS
@pytest.mark.parametrize("method", PARTS)
def test_another_base_is_refused_by_its_fingerprint(kind, method, bases, others, saved):
    message = refused(others["retrained"][kind], saved(kind, method)[1])
    assert "another base model" in message and str(bases[kind]) in message and "--model_name_or_path" in message


@KINDS
@pytest.mark.parametrize("method", ["bitfit", "houlsby", "pfeiffer"])
def test_another_depth_or_width_is_refused_by_names_and_shapes(kind, method, others, saved):
    folder, prefix = saved(kind, method)[1], kind.removesuffix("-v2")
    message = refused(others["deeper"][kind], folder)
    assert f"lacks {prefix}.encoder.layer.3." in message
    assert f"Layers with {TABLE[method].label}: 3 in the file, 4 in the {kind} model" in message
    assert f"contains but the model lacks {prefix}.encoder.layer.2." in refused(others["shallower"][kind], folder)
    message = refused(others["wider"][kind], folder)
    assert re.search(r"is \[.*32\] in the file, \[.*40\] in the model", message) and "another base model" in message


@pytest.mark.parametrize("method", ["bitfit", "houlsby", "pfeiffer", "head"])
def test_an_adapter_of_the_other_model_is_refused_by_its_record_or_its_names(method, bases, saved, tmp_path):
    folder = saved("roberta", method)[1]
    message = refused(bases["deberta-v2"], folder)
    assert "was trained on a roberta model" in message and "the given one is a deberta-v2 model" in message
    without = Path(shutil.copytree(folder, tmp_path / "adapter"))
    (without / RUN_METADATA).unlink()
    expected = "not an adapter of this model" if method == "head" else "was trained on a roberta model"
    assert expected in refused(bases["deberta-v2"], without)


def saying(kind: str, folder: Path, place: Path) -> Path:
    """A copy of an adapter folder whose config names another method."""
    copied = Path(shutil.copytree(folder, place / "adapter"))
    config = json.loads((copied / ADAPTER_CONFIG).read_text())
    assert config["peft_type"] != kind
    (copied / ADAPTER_CONFIG).write_text(json.dumps(config | {"peft_type": kind}))
    return copied


@pytest.mark.parametrize("contained, named", [("HOULSBY", "PFEIFFER"), ("PFEIFFER", "HOULSBY"), ("BITFIT", "HEAD")])
def test_a_folder_whose_config_names_another_method_is_refused(contained, named, bases, saved, tmp_path):
    refused(bases["roberta"], saying(named, saved("roberta", contained.lower())[1], tmp_path))


@pytest.mark.parametrize("named", ["HOULSBY", "PFEIFFER", "BITFIT"])
def test_a_folder_with_nothing_of_the_method_it_names_is_refused_where_it_is_read(named, saved, tmp_path):
    folder = saying(named, saved("roberta", "head")[1], tmp_path)
    with pytest.raises(UserError, match=f"says {named.lower()}, but the file contains no tensor"):
        read_adapter(str(folder))


@KINDS
@pytest.mark.parametrize("method", PARTS)
def test_a_head_for_other_labels_stays_behind_when_training_starts_and_is_refused_otherwise(kind, method, bases, saved):
    model, folder = saved(kind, method)
    assert "head has 3 labels, this task 2" in refused(bases[kind], folder, num_labels=2)
    fresh = fresh_state(bases[kind], num_labels=2)
    started, notes = attached(bases[kind], folder, new_head=True, num_labels=2)
    assert len(notes) == 1 and "its classifier is for other labels and is not loaded" in notes[0]
    state = started.state_dict()
    for name in names_of(model, METHODS[method][1]):
        left = name.startswith("classifier.")  # all of RoBERTa's head; DeBERTa keeps its pooler
        assert torch.equal(state[name], fresh[name] if left else model.state_dict()[name]), name
    assert trains(started) == trains(model)


@pytest.mark.parametrize(
    ("settings", "described"),
    [
        ({}, {"name": "full"}),
        ({"head_only": True}, {"name": "head"}),
        (BITFIT, {"name": "bitfit"}),
        (HOULSBY, {"name": "houlsby", "adapter_size": 6}),
        (PFEIFFER, {"name": "pfeiffer", "adapter_size": 6}),
        (PFEIFFER | BITFIT, {"name": "pfeiffer", "adapter_size": 6, "biases": True}),
        (LORA, {"name": "lora", "targets": ["query", "value"], "layers": None, "lora_dropout": 0.0}),
        (
            LORA | BITFIT | {"lora_layers": [2, 0], "lora_dropout": 0.5},
            {"name": "lora", "targets": ["query", "value"], "layers": [0, 2], "lora_dropout": 0.5, "biases": True},
        ),
        (
            LORA | {"lora_target_modules": ["output", "key"], "lora_layers": [0, 1, 2]},
            {"name": "lora", "targets": ["key", "output"], "layers": None, "lora_dropout": 0.0},
        ),
        (LORA | {"lora_r": 0}, {"name": "full"}),
    ],
    ids=str,
)
@KINDS
def test_a_models_method_is_described_in_plain_values(kind, settings, described):
    model = CLASSIFIERS[kind][0](CONFIGS[kind](num_hidden_layers=3, **settings))
    row = TABLE[described["name"]]
    described = described | {"label": row.label, "color": row.color, "marker": row.marker}
    assert describe_method(model) == described == json.loads(json.dumps(described))


def test_a_method_that_a_checkpoints_config_was_saved_with_is_not_another_runs():
    stale = {name: settings[name] for settings, _ in METHODS.values() for name in settings}
    stale |= {"lora_relative_query": True, "use_rslora": True, "beta1": 0.5, "beta2": 0.5}
    assert {*stale} == {*setting_names()}, "a setting that no method here has"
    for name, (settings, _) in METHODS.items():
        config = tiny_config(num_hidden_layers=3, **stale)
        set_method(config, dict.fromkeys(setting_names()) | settings)
        assert {key: value for key, value in config.to_dict().items() if key in setting_names()} == settings
        model = CLASSIFIERS["roberta"][0](config)
        fresh = CLASSIFIERS["roberta"][0](tiny_config(num_hidden_layers=3, **settings))
        assert describe_method(model) == describe_method(fresh)
        assert any(row.freezes for row in methods_in(model)) == (name != "full")


@KINDS
def test_a_class_of_configs_may_choose_the_method(kind):
    class Chosen(CLASSIFIERS[kind][1].config_class):
        apply_lora, lora_r, lora_alpha = True, 4, 6

    theirs = CONFIGS[kind](num_hidden_layers=3).to_dict()
    model, same = (CLASSIFIERS[kind][0](config) for config in (Chosen(**theirs), CONFIGS[kind](**theirs | LORA)))
    assert describe_method(model) == describe_method(same) and describe_method(model)["name"] == "lora"


@pytest.mark.parametrize("size", [None, 0, "8", True])
def test_a_bottleneck_without_a_width_is_refused_by_the_settings_name(size):
    with pytest.raises(
        ValueError, match=f"config.adapter_size {size!r}: apply_adapter=True needs a width of 1 or more"
    ):
        CLASSIFIERS["roberta"][0](tiny_config(**HOULSBY | {"adapter_size": size}))


@KINDS
@pytest.mark.parametrize("earlier", [False, True])
def test_a_base_that_contains_rslora_is_not_given_another_scaling(kind, earlier, bases, tmp_path):
    loaded(bases[kind], **LORA, lora_variant="rslora").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["lora_variant"] == "rslora" and "use_rslora" not in settings
    if earlier:  # as versions wrote it that had no variants
        del settings["lora_variant"]
        (tmp_path / "config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    config = AutoConfig.from_pretrained(tmp_path)
    saved = set_method(config, LORA)
    model, _ = load_model(str(tmp_path), config, needs_head=False)
    with pytest.raises(UserError, match="lora_A, trained with lora_variant rslora; the flags give lora"):
        check_method(model, str(tmp_path), saved)
    set_method(config, LORA | {"lora_variant": "rslora"})
    model, _ = load_model(str(tmp_path), config, needs_head=False)
    check_method(model, str(tmp_path), saved)
    assert {layer.scaling for layer in lora_layers(model).values()} == {3.0}


# ------------------------------------------------------------------------------------------------- in other forms


@pytest.fixture
def run_program(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line of lora_nlu.adapters: code, what it printed, its error."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([*map(str, argv)])
        return code, *capsys.readouterr()

    return run


@KINDS
@pytest.mark.parametrize("method", ["head", "bitfit", "houlsby", "pfeiffer"])
def test_inspect_prints_the_method_its_size_and_how_many_parameters_are_in_the_encoder(
    kind, method, bases, saved, run_program
):
    model, folder = saved(kind, method)
    code, out, err = run_program("inspect", folder)
    assert code == 0, err
    table = {name.strip(): value.strip() for name, value in (line.strip().split("  ", 1) for line in out.splitlines())}
    counts = count_parameters(model)
    assert (
        table["method"] == method and table["labels"] == "yes, no, perhaps" and table["base model"] == str(bases[kind])
    )
    assert table["parameters"].startswith(f"{counts.trainable:,}, {counts.encoder:,} of them")
    assert table.get("adapter size") == ("6" if method in ("houlsby", "pfeiffer") else None)
    assert not {"rank", "alpha", "layers with LoRA", "relative query"} & table.keys()


@KINDS
@pytest.mark.parametrize("method", PARTS)
def test_a_folder_converted_to_one_with_a_card_gives_the_same_logits(kind, method, bases, saved, tmp_path, run_program):
    model, folder = saved(kind, method)
    code, _, err = run_program("convert", folder, tmp_path / "copy", "--to", "peft")
    assert code == 0, err
    assert torch.equal(logits(attached(bases[kind], tmp_path / "copy")[0]), logits(model))
    card = (tmp_path / "copy" / "README.md").read_text()
    row = methods_in(model)[0]
    in_peft = row.in_peft and not getattr(model, "frozen_relative_query", False)
    assert ("library_name: peft" in card) == in_peft and ("library_name: lora-nlu" in card) != in_peft
    assert f"--{row.path_flag} adapter " in card
    assert len(re.findall("--(lora|adapter)_path", card)) == 1


@KINDS
@pytest.mark.parametrize("method", ["head", "bitfit", "lora and biases", "lora elsewhere"])
def test_merged_into_a_plain_model_transformers_own_class_has_the_same_logits(
    kind, method, saved, tmp_path, run_program
):
    model, folder = saved(kind, method)
    code, _, err = run_program("convert", folder, tmp_path / "merged", "--to", "merged")
    assert code == 0, err
    theirs, report = CLASSIFIERS[kind][1].from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(logits(theirs), logits(model))
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    ours = ("apply_", "lora_", "adapter_", "head_only")
    assert [name for name in settings if name.startswith(ours)] == []
    assert [*theirs.config.id2label.values()] == NAMES


@pytest.mark.parametrize(
    ("method", "to", "words"),
    [
        *((method, "bin", "use peft") for method in ("head", "bitfit", "houlsby", "pfeiffer")),
        ("lora elsewhere", "bin", "LoRA on query and value"),
        *((method, "merged", "no plain model has them") for method in ("houlsby", "pfeiffer")),
    ],
)
@KINDS
def test_a_form_that_cannot_contain_what_a_method_trained_is_refused_and_nothing_is_written(
    kind, method, to, words, saved, tmp_path, run_program
):
    code, _, err = run_program("convert", saved(kind, method)[1], tmp_path / "new", "--to", to)
    assert code == 1 and words in err and err.strip().count("\n") < 3, err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("variant", ["dora", "adalora", "pissa", "vera"])
def test_of_a_variant_of_lora_all_that_it_trains_is_marked(variant):
    model = CLASSIFIERS["roberta"][0](tiny_config(**settings_of(TABLE[variant])))
    mark_trainable(model)
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    mark_only_lora_as_trainable(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
