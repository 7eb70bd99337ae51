"""Saving and loading of both models: no tensor of LoRA or of a bottleneck is lost, no quantised weight is read."""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from lora_nlu.errors import UserError, printable
from lora_nlu.files import read_json
from lora_nlu.methods.description import description_of, flags_that_add, is_added
from lora_nlu.methods.linear import layers_to_hold_in_bf16, widen_
from lora_nlu.methods.table import METHODS
from lora_nlu.ops.frozen import FrozenWeight, plain
from lora_nlu.ops.processor import has_fast_bf16
from lora_nlu.ops.tensors import is_loaded, is_same, load_torch_file

_LINEAR_WEIGHTS = r"(?:^|\.)encoder\.layer\.[0-9]+\..+\.(?:(?:pos_)?(?:query|key|value)(?:_proj)?|dense)\.weight$"
_dtype_of_linear: ContextVar[torch.dtype | None] = ContextVar("dtype_of_linear", default=None)
_HUB = ("cache_dir", "token", "revision", "subfolder", "local_files_only")  # arguments that say where files are


def refuse_quantised(name: Any, setting: Any) -> None:
    """Raise UserError, naming the method, if `setting` (a quantization_config, or flags of one) is set."""
    if setting:
        values = setting if isinstance(setting, dict) else setting.to_dict()
        method = getattr(values.get("quant_method"), "value", values.get("quant_method")) or ", ".join(map(str, values))
        raise UserError(
            f"{name}: quantisation ({printable(method)}) is not supported: these models compute with weights in fp32, "
            "fp16 or bf16.\nLoad the unquantised checkpoint. To quantise what was trained, merge it "
            "(python -m lora_nlu.adapters convert ... --to merged) and load that in transformers' own class."
        )


def weight_files(name: str, config: Any, **hub: Any) -> list[Path]:
    """The files that `from_pretrained` reads the weights of a folder or Hub id from; [] if there are none."""
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]
    if own := getattr(config, "transformers_weights", None):  # the config of some models names their file
        names = [_plain_name(own, "config.json")]
    for file in names:
        if path := cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub):
            if file.endswith(".index.json"):
                shards = read_json(Path(path)).get("weight_map")
                for shard in {*map(str, shards.values())} if isinstance(shards, dict) else ():
                    _plain_name(shard, path)
            paths = get_checkpoint_shard_files(name, path, **hub)[0] if file.endswith(".index.json") else [path]
            return [Path(path) for path in paths if Path(path).is_file()]
    return []


def _plain_name(file: str, named_in: str) -> str:
    """The name of a file of weights. Raises UserError for a path, which could lead out of the model's folder."""
    if Path(file).name != file:
        raise UserError(f"{named_in}: refused: it names {printable(file)}, which is no file of its own folder.")
    return file


@contextmanager
def linear_weights_as_in(files: list[Path]) -> Iterator[None]:
    """Within the block a model gets the weights of its encoder's linear layers in the dtype of its files.

    That is fp16 or bf16, if all of them have it; the rest is in the dtype that `from_pretrained` is given.
    `Checkpoints.hold_in_bf16` must follow: such a model, in two dtypes, can't compute.
    """
    dtypes = set()
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_tensor(key).dtype for key in file.keys() if re.search(_LINEAR_WEIGHTS, key)}
        else:
            state = load_torch_file(path, "meta")
            dtypes |= {x.dtype for key, x in state.items() if re.search(_LINEAR_WEIGHTS, key)}
    is_half = len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
    token = _dtype_of_linear.set(dtypes.pop() if is_half else None)
    try:
        yield
    finally:
        _dtype_of_linear.reset(token)


@contextmanager
def checkpoint_tensors(path: Path) -> Iterator[tuple[Iterable[str], Callable[[str], Tensor]]]:
    """The names of the tensors in a file of weights, and a function that reads one of them."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            yield file.keys(), file.get_tensor
    else:
        state = load_torch_file(path)
        yield state, state.__getitem__


def _named(module: str, modules: Container[str]) -> str | None:
    """A checkpoint's module among a model's: one of the two may have the encoder's prefix before its names."""
    prefix, _, rest = module.partition(".")
    of_model = [f"{p}.{module}" for p in ("roberta", "deberta")]
    return next((name for name in (module, rest, *of_model) if name in modules), None)


def hold_in_bf16(models: Sequence[Any], trains: bool) -> int:
    """Replace weights of the encoders' linear layers by bf16, packed for their products on a CPU.

    Layers of several models that share a weight share the packed one. trains: leave those that are marked to train.
    Returns the number of weights that are held so: 0 if all train, or if no file can give the exact ones back
    (`restore_weights`). What they multiply is summed in fp32 and returned in bf16.
    """
    layers_by_weight: dict[int, list[Any]] = {}
    for model in models:
        encoder = getattr(model.base_model, "encoder", None)
        layers = [] if encoder is None else layers_to_hold_in_bf16(encoder)
        layers = [layer for layer in layers if not (trains and layer.weight.requires_grad)]
        for layer in layers if layers and model.has_weight_files() else ():
            layers_by_weight.setdefault(id(layer.weight), []).append(layer)
    for layers in layers_by_weight.values():
        frozen = FrozenWeight(layers[0].weight.detach())
        for layer in layers:
            layer.frozen, layer.weight = frozen, nn.Parameter(frozen.weight, layer.weight.requires_grad)
    held: set[int] = set()
    for model in models:
        widen_(model)
        of_model = {f"{name}.weight": getattr(module, "frozen", None) for name, module in model.named_modules()}
        names = [name for name, frozen in of_model.items() if frozen is not None]
        # DistributedDataParallel copies the first process's weights to the others; all have read the same file
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        held |= {id(of_model[name]) for name in names}
    return len(held)


def notes_on_bf16(count: int) -> list[str]:
    """Lines to print after `hold_in_bf16`, which returned `count`."""
    if not count:
        reason = "no weight is frozen, or the model was loaded from no file, or its method multiplies in fp32 alone"
        return [f"bf16: all is computed in fp32: {reason}."]
    held = f"the weights of {count} linear layers are held in bf16, and products summed in fp32; the rest is fp32"
    slow = (
        "bf16: this processor has no fast instructions for it: a product takes about 3 to 10 times as long as in fp32 "
        "(measured with AVX2 and AVX-512 alone). Remove --bf16."
    )
    return [f"bf16: {held}.", *([] if has_fast_bf16() else [slow])]


class Checkpoints:
    """Saving and loading of both models, with checks that no tensor of LoRA or of a bottleneck gets lost."""

    config_class: Any
    _hub: dict[str, Any] = {}  # how `from_pretrained` was told to find the files
    supports_gradient_checkpointing = True
    _no_split_modules: Any = ["EncoderLayer"]
    _input_embed_layer = "word_embeddings"  # where transformers looks for the input embeddings, in `embeddings`

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The name of our attention in a config: "eager" (default) or "sdpa", one computation. Others are refused."""
        if requested_attention in (None, "eager", "sdpa"):
            return requested_attention or "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True, so that `set_attn_implementation` works; transformers would search the source of our module for it."""
        return True

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        """Of parameters that are not loaded in `dtype`: a pattern of their names, and the dtype."""
        of_linear = _dtype_of_linear.get()
        plan = super()._get_dtype_plan(dtype)  # type: ignore[misc]
        return plan | ({_LINEAR_WEIGHTS: of_linear} if of_linear else {})

    def hold_in_bf16(self, trains: bool) -> int:
        """As the function `hold_in_bf16`, of this model."""
        return hold_in_bf16([self], trains)

    def has_weight_files(self) -> bool:
        """Whether files contain the weights that this model was loaded with."""
        model: Any = self
        return bool(model.name_or_path and weight_files(model.name_or_path, model.config, **self._hub))

    @property
    def is_held_in_bf16(self) -> bool:
        """Whether `hold_in_bf16` replaced weights."""
        model: Any = self
        return any(getattr(module, "frozen", None) is not None for module in model.modules())

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Read the weights that `hold_in_bf16` or a method replaced from the checkpoint again, in fp32.

        Raises UserError if it has other weights now, or is gone.
        """
        model: Any = self
        held = {name: m for name, m in model.named_modules() if getattr(m, "is_replaced", False)}
        missing, name = dict(held), model.name_or_path
        for path in weight_files(name, model.config, **self._hub) if held else ():
            with checkpoint_tensors(path) as (keys, read):
                for key in keys:
                    module = _named(key.removesuffix(".weight"), missing) if key.endswith(".weight") else None
                    if module is None:
                        continue
                    layer = missing[module]
                    now = layer.weight if layer.frozen is None else plain(layer.frozen.weight)
                    weight = read(key).to(now.device, now.dtype if layer.frozen is None else torch.float32)
                    if not is_same(layer.of_checkpoint(weight), now):
                        raise UserError(
                            f"{name}: {key} is not what this model was loaded from: the files have changed.\nLoad the "
                            "model again."
                        )
                    layer.restore_weight(weight)
                    del missing[module]
        if missing:
            raise UserError(
                f"{name}: {[*missing][0]}.weight and {len(missing) - 1} more weights, which this model has replaced, "
                "can't be read again: the files have changed or are gone.\nLoad the model again."
            )
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [])

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the method's settings in the config. Raises UserError as `lora.write_settings`.

        Weights that are held in bf16 are restored first.
        """
        self.restore_weights()
        for to_config in dict.fromkeys(row.to_config for row in METHODS.values()):
            if to_config:
                to_config(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers'. Raises UserError if LoRA or bottlenecks would be lost or are incomplete; if quantised."""
        cls._check_quantisation(*args, **kwargs)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        model._hub = {key: kwargs[key] for key in _HUB if key in kwargs}
        name = model.name_or_path
        if unused := sorted(key for key in report["unexpected_keys"] if is_added(key)):
            raise UserError(
                f"{name}: contains {unused[0]} and {len(unused) - 1} more adapter tensors that this model lacks; they "
                "would be left out.\nGive the settings it was trained with (--apply_lora --lora_r R "
                "--lora_alpha A), or the plain base model, and the adapter as --lora_path (adapters.attach_adapter)."
            )
        for row in description_of(model.config).rows:
            every = [(key, p) for key, p in model.named_parameters() if row.added and re.search(row.added, key)]
            added = {key: is_loaded(p) or p.is_meta for key, p in every}  # meta: stays on the disk
            missing = [key for key, loaded in added.items() if not loaded]
            if missing and len(missing) < len(added):
                remedy = flags_that_add(added) or "the settings it was saved with"
                raise UserError(
                    f"{name}: is damaged, or was saved with other settings: of {len(added)} adapter tensors it lacks "
                    f"{len(missing)}, {missing[0]} first.\nGive {remedy}, or use a complete copy of the file."
                )
            if missing and row.start:
                row.start(model)
        return (model, report) if output_loading_info else model

    @classmethod
    def _check_quantisation(
        cls, pretrained_model_name_or_path: Any = None, *_: Any, config: Any = None, **kwargs: Any
    ) -> None:
        """Raise UserError for quantisation, before transformers looks for its package and replaces layers with LoRA."""
        name = pretrained_model_name_or_path
        flags = {key: kwargs[key] for key in ("load_in_8bit", "load_in_4bit", "gguf_file") if kwargs.get(key)}
        refuse_quantised(name, kwargs.get("quantization_config") or flags)
        settings = getattr(config, "__dict__", None)
        if settings is None:
            with suppress(Exception):  # transformers reports an unreadable folder or id afterwards
                settings, _ = cls.config_class.get_config_dict(name if config is None else config, **kwargs)
        refuse_quantised(name, (settings or {}).get("quantization_config"))
