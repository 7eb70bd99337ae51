"""The methods of training, a row each; all of them also train the classification head.

- LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of linear layers (lora.py).
- Variants of LoRA, whose rows `_lora` makes. Each but rsLoRA has its own class of layers, in its own file.
  DoRA (Liu et al. 2024, arXiv 2402.09353): the rows of the updated weight have trained lengths (dora.py).
  PiSSA (Meng et al. 2024, arXiv 2404.02948): A and B start as the principal part of the weight (pissa.py).
  AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): ranks fall while training, where directions matter least (adalora.py).
  VeRA (Kopiczko et al. 2023, arXiv 2310.11454): trained vectors scale frozen random A and B of all layers (vera.py).
  rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): the update is scaled by alpha / sqrt(r).
- Bottleneck adapters (bottleneck.py), placed and initialised as the reference implementation of LoRA does. Houlsby
  (Houlsby et al. 2019, arXiv 1902.00751): after the attention's output projection and after the feed-forward's.
  Pfeiffer (Pfeiffer et al. 2020, arXiv 2005.00247): after the feed-forward alone.
- BitFit (Ben Zaken et al. 2021, arXiv 2106.10199): every bias of the encoder; alone, or beside one of the above.
- The head alone, on the frozen encoder.
- Fine-tuning of everything.

The order matters where a config chooses several methods: the first row names the model's method. Colours are Okabe and
Ito's, which colour-blind readers tell apart; the variants of LoRA have Tol's muted ones. This module imports neither
torch nor transformers.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from lora_nlu.methods.method import Flag, Method
from lora_nlu.methods.targets import parse_layers, parse_relative_query, parse_targets


class LazyModule:
    """A module of this package, imported when one of its functions is first called: importing torch takes seconds."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, function: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return getattr(import_module(f"lora_nlu.methods.{self.name}"), function)(*args, **options)

        setattr(self, function, call)  # so that every row which names the function gets the same object
        return call


lora, dora, pissa = LazyModule("lora"), LazyModule("dora"), LazyModule("pissa")
adalora = LazyModule("adalora")
vera, bottleneck = LazyModule("vera"), LazyModule("bottleneck")
_ADAPTER_PATH = Flag("adapter_path", "Run of a method other than LoRA, to start from or evaluate", in_config=False)
_LORA_FLAGS = (
    Flag("apply_lora", "Train LoRA, in query and value by default, and the head", bool, False),
    Flag("lora_variant", "Variant (default: lora)", unset="lora", decides=True),
    Flag("lora_r", "Rank of the update; 0 is plain fine-tuning", int, at_least=0),
    Flag("lora_alpha", "The update is scaled by lora_alpha / lora_r", float, above=0, decides=True),
    Flag("lora_path", "Adapter to start from or evaluate: .bin, folder or Hub id",
         in_config=False),
    Flag("lora_relative_query", "DeBERTa: relative projections with LoRA: none (default), key, both",
         options={"nargs": "?", "const": "both", "metavar": "{none,key,both}"}, unset="none",
         parse=parse_relative_query, decides=True, always=True),
    Flag("lora_target_modules", "Layers with LoRA, of query,key,value,dense (attention), "
         "intermediate,output (feed-forward); default: query,value", parse=parse_targets),
    Flag("lora_layers", "Encoder layers with LoRA, from 0, such as 0-3,11; default: all", parse=parse_layers),
    Flag("lora_dropout", "Dropout of what the update reads; the reference has none", float, at_least=0, below=1),
)  # fmt: skip
_ADALORA_FLAGS = (
    Flag("target_rank", "AdaLoRA: mean rank of a layer at the end; it starts from --lora_r", int, at_least=1),
    Flag("reg_orth_coef", "AdaLoRA: weight of the distance of A and B from orthogonal", float, at_least=0),
    Flag("init_warmup", "AdaLoRA: steps before the ranks begin to fall", int, at_least=0),
    Flag("final_warmup", "AdaLoRA: last steps, in which the ranks stay as they are", int, at_least=0),
    Flag("mask_interval", "AdaLoRA: steps between two choices of the directions that stay", int, at_least=1),
    Flag("beta1", "AdaLoRA: smoothing of the sensitivity; default: 0.85", float, at_least=0, below=1),
    Flag("beta2", "AdaLoRA: smoothing of the uncertainty; default: 0.85", float, at_least=0, below=1),
)
_VERA_FLAGS = (
    *(flag for flag in _LORA_FLAGS if flag.name != "lora_alpha"),
    Flag("vera_seed", "VeRA: seed of the frozen matrices; default: 0", int, unset=0, at_least=0, below=2**63,
         decides=True),
)  # fmt: skip
_BOTTLENECK_FLAGS = (
    Flag("apply_adapter", "Train bottleneck adapters, and the head", bool, False),
    Flag("adapter_type", "Where adapters go and what they read", decides=True),
    Flag("adapter_size", "Width of the adapters' bottleneck", int, at_least=1),
    _ADAPTER_PATH,
)


def _missing_lora(flags: Any) -> str:
    text = "--apply_lora needs --lora_r and --lora_alpha (the paper's RoBERTa: --lora_r 8 --lora_alpha 16)."
    return text if flags.lora_r != 0 and None in (flags.lora_r, flags.lora_alpha) else ""


def _missing_adalora(flags: Any) -> str:
    names = ["lora_r", "lora_alpha", *(flag.name for flag in _ADALORA_FLAGS if flag.name not in ("beta1", "beta2"))]
    missing = [f"--{name}" for name in names if getattr(flags, name) is None]
    if flags.lora_r == 0 or not missing:
        is_lower = flags.lora_r == 0 or flags.target_rank < flags.lora_r
        return "" if is_lower else f"--target_rank {flags.target_rank}: must be below --lora_r {flags.lora_r}."
    return f"--lora_variant adalora needs {', '.join(missing)}."


def _missing_vera(flags: Any) -> str:
    text = "--lora_variant vera needs --lora_r (its paper: 1024 for RoBERTa-base, 256 for RoBERTa-large)."
    return text if flags.lora_r is None else ""


def _missing_bottleneck(flags: Any) -> str:
    text = "--apply_adapter needs --adapter_type (houlsby or pfeiffer) and --adapter_size."
    return text if None in (flags.adapter_type, flags.adapter_size) else ""


def _lora(name: str, label: str, color: str, marker: str, **fields: Any) -> Method:
    """The row of LoRA or of a variant; `fields` are those of `Method` in which the row differs from LoRA's."""
    common: dict[str, Any] = {
        "part": label, "chosen_by": {"apply_lora": True, "lora_variant": name}, "flags": _LORA_FLAGS,
        "settings": ("use_rslora",), "path_flag": "lora_path", "missing": _missing_lora, "read": lora.read_settings,
        "added": r"\.lora_[AB]$", "state": r"\.lora_[AB]$", "layer": lora.new_layer, "linear": lora.LoRALinear,
        "peft_types": ("LORA", "LORA_FROZEN_RELATIVE_QUERY"), "in_peft": True, "peft_weights": r"\.lora_[AB]$",
        "rebuild": lora.rebuild, "to_config": lora.write_settings, "merge": lora.merged_weights,
        "describe": lora.describe,
    }  # fmt: skip
    return Method(name, label, color, marker, **(common | fields))


def _bottleneck(name: str, added: str, color: str, marker: str) -> Method:
    return Method(
        name, name.title(), color, marker, title=f"{name.title()} adapters", part="adapters",
        chosen_by={"apply_adapter": True, "adapter_type": name}, flags=_BOTTLENECK_FLAGS, missing=_missing_bottleneck,
        read=bottleneck.read_settings, added=added, state=added, block=bottleneck.new_block, peft_types=(name.upper(),),
        rebuild=bottleneck.rebuild, describe=bottleneck.describe,
    )  # fmt: skip


_DORA_NAMES = r"\.lora_([AB]|magnitude_vector)$"
_ROWS = (
    _lora("lora", "LoRA", "#D55E00", "s"),
    _lora(
        "dora", "DoRA", "#44AA99", ">", added=_DORA_NAMES, state=_DORA_NAMES, linear=dora.DoRALinear,
        peft_keys=("use_dora",), tensors=("lora_A", "lora_B", "lora_magnitude_vector"),
        to_peft=lambda adapter: {"use_dora": True},
    ),
    _lora(
        "pissa", "PiSSA", "#332288", "X", added=r"\.lora_[AB](_start)?$", linear=pissa.PissaLinear, shards=False,
        start=pissa.start, before_steps=pissa.before_steps, rebuild=pissa.rebuild, peft_inits=("pissa",),
        to_adapter=pissa.to_adapter, to_file=pissa.to_file, from_file=pissa.from_file,
    ),
    _lora(
        "adalora", "AdaLoRA", "#117733", "*", flags=(*_LORA_FLAGS, *_ADALORA_FLAGS), settings=(),
        missing=_missing_adalora, read=adalora.read_settings, added=r"\.lora_[AEB]$", state=r"\.lora_[AEB]$",
        linear=adalora.AdaLoRALinear, loss_term=adalora.loss_term, after_step=adalora.RankAllocator, shards=False,
        peft_types=("ADALORA", "ADALORA_FROZEN_RELATIVE_QUERY"), peft_weights=None, rebuild=adalora.rebuild,
        peft_settings=("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
                       "total_step", "kept"),
        read_config=adalora.read_config, to_peft=adalora.to_peft, from_peft=adalora.from_peft,
        to_file=adalora.to_file, from_file=adalora.from_file, to_adapter=adalora.to_adapter, scaling=adalora.scaling,
        describe=adalora.describe, count=adalora.count, facts=adalora.facts,
    ),
    _lora(
        "vera", "VeRA", "#999933", "p", flags=_VERA_FLAGS, settings=(), missing=_missing_vera, read=vera.read_settings,
        added=r"(\.vera_lambda_[bd]|^base_model\.vera_[AB])$", state=r"\.vera_lambda_[bd]$", rank_of="vera_lambda_d",
        tensors=("vera_lambda_d", "vera_lambda_b"), layer=vera.new_layer, linear=vera.VeraLinear, shards=False,
        peft_types=("VERA", "VERA_FROZEN_RELATIVE_QUERY"), peft_weights=None,
        peft_settings=("d_initial", "init_weights", "projection_prng_key", "save_projection", "vera_dropout"),
        read_config=vera.read_config, to_peft=vera.to_peft, from_peft=vera.from_peft, from_file=vera.from_file,
        rebuild=vera.rebuild, load_frozen=vera.load_projections, to_adapter=vera.to_adapter, to_config=vera.write_seed,
        describe=vera.describe, facts=vera.facts,
    ),
    # After the other variants, whose PEFT folders may set use_rslora too: of several rows that fit the first is chosen.
    _lora(
        "rslora", "rsLoRA", "#882255", "<", earlier={"apply_lora": True, "use_rslora": True}, settings=(),
        read=lora.read_rslora_settings, peft_keys=("use_rslora",),
    ),
    _bottleneck("houlsby", r"\.adapter_[AB]\.(weight|bias)$", "#009E73", "D"),
    _bottleneck("pfeiffer", r"(?<!attention)\.output\.adapter\.adapter_[AB]\.(weight|bias)$", "#CC79A7", "^"),
    Method(
        "head", "head alone", "#56B4E9", "P", title="A classification head", chosen_by={"head_only": True},
        flags=(Flag("head_only", "Train the head alone, on the frozen encoder", bool, False), _ADAPTER_PATH),
        peft_types=("HEAD",), merge=lambda model: {},
    ),
    Method(
        "bitfit", "BitFit", "#E69F00", "v", part="biases", chosen_by={"apply_bitfit": True}, combines=True,
        flags=(Flag("apply_bitfit", "Train the encoder's biases, and the head (BitFit)", bool, False), _ADAPTER_PATH),
        state="bias$", peft_types=("BITFIT",), merge=lambda model: {},
    ),
    Method("full", "fine-tuning", "#0072B2", "o", path_flag="model_name_or_path", state="", freezes=False),
)  # fmt: skip
METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
