"""What both models share: the parts of a layer, loading and saving, the forward of encoder and classifier.

Dim letters: B sequences, S longest of them, N real tokens, Q query rows (N, or B for first tokens alone), H hidden,
A heads, C labels.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPoolingAndCrossAttentions,
    SequenceClassifierOutput,
)

from lora_nlu.errors import UserError, printable
from lora_nlu.methods.bottleneck import bottleneck
from lora_nlu.methods.lora import lora_linear
from lora_nlu.methods.table import describe_lora_
from lora_nlu.models.losses import classification_loss, cutoff, two_view_losses
from lora_nlu.ops.kernels import Dropout
from lora_nlu.ops.packing import PackedBatch
from lora_nlu.ops.tensors import is_loaded

OptionalTensor = Tensor | None
_ADDED = re.compile(r"\.(lora|adapter)_[AB]\b")  # in the names of the parameters of LoRA and bottlenecks
# Keywords of transformers' forward that change nothing in an encoder: of a decoder's cache, of a tokenizer's output.
IGNORED_KEYWORDS = {
    "use_cache", "cache_position", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping",
}  # fmt: skip
# Keywords that would change the result: only None and False are accepted.
REFUSED_KEYWORDS = {"past_key_values", "encoder_hidden_states", "encoder_attention_mask", "head_mask", "is_causal"}


def check_keywords(keywords: dict[str, Any]) -> None:
    """Raise ValueError for a keyword that this model can't honour, TypeError for one that transformers lacks too."""
    for name, value in keywords.items():
        if name in REFUSED_KEYWORDS:
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by this encoder. Leave it out.")
        elif name not in IGNORED_KEYWORDS:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def embed_words(embedding: nn.Embedding, input_ids: Any, inputs_embeds: Any, packed: PackedBatch) -> Tensor:
    """Rows [N, H] of ids [B, S] or embeddings [B, S, H], one of them None.

    A hook on the embedding, such as NEFTune's, expects [B, S, H]: with a hook, padding is embedded too.
    """
    if inputs_embeds is not None:
        return packed.pack(inputs_embeds)
    if embedding._forward_hooks:
        return packed.pack(embedding(input_ids))
    return embedding(packed.pack(input_ids))


def embed_types(embedding: nn.Embedding, token_type_ids: OptionalTensor, packed: PackedBatch) -> Tensor:
    """Embeddings [N, H] of token types [B, S] or [1, S]; without any, [1, H], that of type 0, for every token."""
    if token_type_ids is None:
        return embedding(packed.first_rows[:1])  # its value is 0, a type; calling the module loads offloaded weights
    return embedding(packed.pack(token_type_ids.expand(packed.batch, packed.length)))


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what this class does: nobody replaced or wrapped it, or its `forward`."""
    return type(module).forward is kind.forward and "forward" not in vars(module)


def activation(name: Any) -> Any:
    """The activation of this name, or the function itself."""
    return ACT2FN[name] if isinstance(name, str) else name


class DenseAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of both halves of a layer, with its bottleneck, if any."""

    def __init__(self, config: Any, layer: int, in_features: int, after_attention: bool) -> None:
        super().__init__()
        self.dense = lora_linear(
            config, "dense" if after_attention else "output", layer, in_features, config.hidden_size
        )
        self.adapter = bottleneck(config, after_attention)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        rows = self.dropout(self.dense(x))
        if self.adapter is not None:
            read = self.LayerNorm(rows + residual) if self.adapter.reads_norm else rows
            rows = self.adapter(read, rows)
        return self.LayerNorm(rows + residual)


class Attention(nn.Module):
    """A model's self-attention with its output projection, residual and norm."""

    def __init__(self, config: Any, layer: int, self_attention: nn.Module) -> None:
        super().__init__()
        self.self = self_attention
        self.output = DenseAddNorm(config, layer, config.hidden_size, after_attention=True)

    def forward(self, queries: Tensor, *inputs: Any) -> tuple[Tensor, Tensor | None]:
        context, probs = self.self(queries, *inputs)
        return self.output(context, queries), probs


class Intermediate(nn.Module):
    """The feed-forward's first half: activation(dense(x))."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.dense = lora_linear(config, "intermediate", layer, config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


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


class Checkpoints:
    """Saving and loading of both models, with checks that no tensor of LoRA or of a bottleneck gets lost."""

    config_class: Any

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The name of our attention in a config: "eager" (default) or "sdpa", one computation. Others are refused."""
        if requested_attention in (None, "eager", "sdpa"):
            return requested_attention or "eager"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """True, so that `set_attn_implementation` works; transformers would search the source of our module for it."""
        return True

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with the LoRA settings in the config. Raises UserError as `lora.describe_lora_`."""
        describe_lora_(self)
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers'.

        Raises UserError if the checkpoint has LoRA or bottlenecks that the model lacks, or only some of those that it
        has, and for quantisation.
        """
        cls._check_quantisation(*args, **kwargs)
        model, report = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        name = model.name_or_path
        unused = sorted(key for key in report["unexpected_keys"] if _ADDED.search(key))
        if unused:
            raise UserError(
                f"{name}: contains {unused[0]} and {len(unused) - 1} more adapter tensors that this model lacks; they "
                "would be left out.\nGive the settings it was trained with (--apply_lora --lora_r R "
                "--lora_alpha A), or the plain base model, and the adapter as --lora_path (adapters.attach_adapter)."
            )
        for kind in (r"\.lora_[AB]\b", r"\.adapter_[AB]\b"):
            every = {key: p for key, p in model.named_parameters() if re.search(kind, key)}
            added = {key: is_loaded(p) or p.is_meta for key, p in every.items()}  # meta: stays on the disk
            lacks = [key for key, loaded in added.items() if not loaded]
            if lacks and len(lacks) < len(added):
                # Pfeiffer's bottlenecks are Houlsby's without those after attention
                is_pfeiffer = "adapter" in kind and all((".attention." in key) != added[key] for key in added)
                remedy = "--adapter_type pfeiffer" if is_pfeiffer else "the settings it was saved with"
                raise UserError(
                    f"{name}: is damaged, or was saved with other settings: of {len(added)} adapter tensors it lacks "
                    f"{len(lacks)}, {lacks[0]} first.\nGive {remedy}, or use a complete copy of the file."
                )
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


def refuse_adapter_names(layer: nn.Module) -> None:
    """Raise ValueError if PEFT was given an adapter for each example: rows are tokens, or examples by their length."""
    for module in layer.modules():
        if any("adapter_names" in getattr(hook, "keywords", ()) for hook in module._forward_pre_hooks.values()):
            raise ValueError("adapter_names: PEFT's adapter for each example is not supported; give one to the batch.")


class EncoderLayer(GradientCheckpointingLayer):
    """One encoder layer around a model's self-attention: [N, H] to [Q, H]."""

    def __init__(self, config: Any, layer: int, self_attention: nn.Module) -> None:
        super().__init__()
        self.attention = Attention(config, layer, self_attention)
        self.intermediate = Intermediate(config, layer)
        self.output = DenseAddNorm(config, layer, config.intermediate_size, after_attention=False)

    def forward(
        self, hidden_states: Tensor, packed: PackedBatch, first_only: bool, with_probs: bool, *positions: Any
    ) -> tuple[Tensor, Tensor | None]:
        """With `first_only`, keys and values come from every token; all else is computed for first tokens alone.

        `positions` are further arguments of the self-attention: none, or DeBERTa's relative table and distances.
        """
        queries = hidden_states  # [Q, H]
        if first_only:
            refuse_adapter_names(self)
            queries = hidden_states.index_select(0, packed.first_rows)
        attended, probs = self.attention(queries, hidden_states, packed, with_probs, *positions)
        return self.output(self.intermediate(attended), attended), probs


class EncoderOutputs:
    """Rows [Q, H] after the latest layer; of all layers so far hidden states [B, S, H] and attentions [B, A, S, S].

    Requested hidden states are part of the autograd graph: the next layer reads its rows from the padded tensor.
    """

    def __init__(self, rows: Tensor, packed: PackedBatch, with_hidden: bool) -> None:
        self.packed, self.with_hidden = packed, with_hidden
        self.hidden_states: list[Tensor] = []
        self.attentions: list[Tensor | None] = []
        self._set(rows)

    def add(self, rows: Tensor, probs: Tensor | None) -> None:
        """Append the results of a layer (of DeBERTa's first: after its convolution)."""
        self._set(rows)
        self.attentions.append(probs)

    def _set(self, rows: Tensor) -> None:
        if self.with_hidden:
            self.hidden_states.append(self.packed.unpack(rows))
            rows = self.packed.pack(self.hidden_states[-1])
        self.rows = rows


class PackedEncoder:
    """The forward of both base models: pack, embed, run the layers, unpack what was requested."""

    config: Any
    embeddings: Any
    encoder: Any
    pooler: Any  # only in RoBERTa, where it may be None

    keeps_distances = False  # attention depends on distances: packing must not close the holes of a mask
    selects_hidden_states = False  # output_hidden_states may be layer numbers, as in transformers' RoBERTa

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(
        self,
        input_ids: OptionalTensor = None,
        attention_mask: OptionalTensor = None,
        token_type_ids: OptionalTensor = None,
        position_ids: OptionalTensor = None,
        inputs_embeds: OptionalTensor = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        first_token_only: bool = False,
        views: int = 1,
        **keywords: Any,
    ) -> BaseModelOutput | tuple:
        """Encode a batch.

        Args:    input_ids [B, S] int64 or inputs_embeds [B, S, H], one of them; attention_mask [B, S], 0 = padding;
                 token_type_ids and position_ids [B, S] int64. `first_token_only` computes and returns just the first
                 token of each sequence, exactly, unless attentions or hidden states are requested. The batch consists
                 of `views` equal parts, between which no dropout is shared.
        Returns: last_hidden_state [B, S, H] ([B, 1, H] for first tokens only), 0 where the mask is 0; pooler_output
                 [B, H] of a model that has one; hidden_states and attentions ([B, A, S, S] a layer) on request. In the
                 fallback of `PackedBatch`, masked positions hold what transformers computes there. Where
                 output_hidden_states is a number or numbers (RoBERTa), hidden states of other numbers are None.
        Raises:  ValueError if both or neither input is given, a shape disagrees, the batch is empty or a sequence is
                 too long; for other keywords as `check_keywords`.
        """
        check_keywords(keywords)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        config = self.config
        with_probs = config.output_attentions if output_attentions is None else output_attentions
        with_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        first_token_only = first_token_only and not with_probs and not with_hidden
        grid: Any = input_ids if inputs_embeds is None else inputs_embeds
        if grid.dim() != (2 if inputs_embeds is None else 3) or not grid.numel():
            must = (
                "input_ids must be [batch, seq]" if inputs_embeds is None else "inputs_embeds must be [batch, seq, H]"
            )
            raise ValueError(f"{must}, at least one token of one sequence, got {list(grid.shape)}.")
        batch, length = grid.shape[:2]
        packed = PackedBatch.from_mask(attention_mask, batch, length, grid.device, self.keeps_distances)

        rows = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, packed)  # [N, H]
        encoded = self.encoder(rows, packed, first_token_only, with_hidden, with_probs, views)
        if first_token_only:
            rows = encoded.rows
            if rows.shape[0] != batch:  # rows of all tokens: no layers, or a convolution after the only one
                rows = rows.index_select(0, packed.first_rows)
            last_hidden_state = packed.in_batch_order(rows)[:, None]  # [B, 1, H]
        else:
            last_hidden_state = encoded.hidden_states[-1] if with_hidden else packed.unpack(encoded.rows)  # [B, S, H]
        hidden: list[OptionalTensor] = [*encoded.hidden_states]
        if self.selects_hidden_states and not isinstance(with_hidden, bool):
            numbers = [with_hidden] if isinstance(with_hidden, int) else with_hidden
            hidden = [x if i in numbers or i - len(hidden) in numbers else None for i, x in enumerate(hidden)]
        parts: dict[str, Any] = {
            "last_hidden_state": last_hidden_state,
            "hidden_states": tuple(hidden) if with_hidden else None,
            "attentions": tuple(encoded.attentions) if with_probs else None,
        }
        output: Any
        if hasattr(self, "pooler"):  # given now, not later: a tuple has its parts in the order of the class's fields
            pooled = None if self.pooler is None else self.pooler(last_hidden_state)
            output = BaseModelOutputWithPoolingAndCrossAttentions(pooler_output=pooled, **parts)
        else:
            output = BaseModelOutput(**parts)
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


@dataclass
class TwoViewOutput(SequenceClassifierOutput):
    """A training step on two views: `loss` = `task_loss` + `consistency_loss`; the rest is the first view's."""

    task_loss: Tensor | None = None
    consistency_loss: Tensor | None = None


class SequenceClassifier:
    """The forward of both classifiers, in place of transformers' classes of their names.

    LoRA settings are plain attributes of the config: `apply_lora`, `lora_r`, `lora_alpha`; `cls_dropout` sets the
    head's dropout. After `from_pretrained`, `lora.mark_only_lora_as_trainable` leaves the update and the head to train.
    With `reg_loss_wgt` above 0 training steps run every example twice, as one batch of twice the size (R-Drop); with
    `masking_prob` too, some tokens of the second view are `unk_token_id`, none of `special_token_ids` (cutoff).
    """

    config: Any
    training: bool
    base_model: Any
    soft_labels = "multi_label_classification"  # what labels [B, C] mean to transformers' class of that name
    accepts_loss_kwargs = False  # Trainer takes a forward with **keywords for one that divides by num_items_in_batch

    def head(self, hidden_states: Tensor) -> Tensor:
        """[B, S, H], or [B, 1, H] of first tokens, to logits [B, C]."""
        raise NotImplementedError(f"{type(self).__name__} must define its head.")

    def reads_first_token_only(self) -> bool:
        """Whether the head is this package's own; one put in its place may read every token."""
        raise NotImplementedError(f"{type(self).__name__} must say what its head reads.")

    def forward(
        self,
        input_ids: OptionalTensor = None,
        attention_mask: OptionalTensor = None,
        token_type_ids: OptionalTensor = None,
        position_ids: OptionalTensor = None,
        inputs_embeds: OptionalTensor = None,
        labels: OptionalTensor = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        **keywords: Any,
    ) -> SequenceClassifierOutput | tuple:
        """Classify a batch; inputs, requests and errors as in `PackedEncoder.forward`.

        Args:    labels: [B] int64 class ids (cross-entropy), [B] numbers for one label (mean squared error), or [B, C]
                 floats; `config.problem_type`, where set, decides.
        Returns: loss (None without labels), logits [B, C], hidden_states and attentions on request.
        """
        config = self.config
        weight = getattr(config, "reg_loss_wgt", 0) if self.training and labels is not None else 0
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        if weight:
            inputs = self._two_views(inputs)
        output = self.base_model(
            **inputs,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            first_token_only=self.reads_first_token_only(),
            views=2 if weight else 1,
            **keywords,
        )
        logits = self.head(output.last_hidden_state)  # [B, C]
        problem_type = config.problem_type
        if problem_type is None and labels is not None and labels.dim() == 2 and labels.shape[1] > 1:
            problem_type = self.soft_labels
        rest = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        result: SequenceClassifierOutput
        if weight and labels is not None:
            first, second = logits.chunk(2)
            rest = {
                name: layers and tuple(x if x is None else x.chunk(2)[0] for x in layers)
                for name, layers in rest.items()
            }
            task, consistency = two_view_losses(first, second, labels, problem_type, weight)
            rest |= {"task_loss": task, "consistency_loss": consistency}
            result = TwoViewOutput(loss=task + consistency, logits=first, **rest)
        else:
            loss = None if labels is None else classification_loss(logits, labels, problem_type)
            result = SequenceClassifierOutput(loss=loss, logits=logits, **rest)
        return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _two_views(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch and itself again, or its cutoff, as one batch of 2 B."""
        config, second = self.config, dict(inputs)
        if p := getattr(config, "masking_prob", 0):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            if ids is None:
                raise ValueError("masking_prob replaces tokens: give input_ids, not inputs_embeds.")
            if not hasattr(config, "special_token_ids") or not hasattr(config, "unk_token_id"):
                raise ValueError("masking_prob needs the tokenizer's special_token_ids and unk_token_id in the config.")
            second["input_ids"] = cutoff(ids, mask, p, config.special_token_ids, config.unk_token_id)
        doubled = dict(inputs)
        for name, x in inputs.items():
            shared = name in ("token_type_ids", "position_ids") and x is not None and x.shape[0] == 1
            if x is not None and not shared:  # one row of types or positions stands for all
                doubled[name] = torch.cat([x, second[name]])
        return doubled
