"""Parts that RoBERTa and DeBERTa-V2 share word for word: checks of the inputs, the encoder layer around the attention.

Dim letters: B sequences, S longest of them, N real tokens, Q query rows (N, or B for first tokens alone), H hidden,
A heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, RobertaConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_nlu.methods.description import Description
from lora_nlu.methods.marking import new_block, new_linear
from lora_nlu.ops.kernels import GELU, Dropout
from lora_nlu.ops.packing import PackedBatch

Config = RobertaConfig | DebertaV2Config
# Keywords of transformers' forward that change nothing in an encoder: of a decoder's cache, of a tokenizer's output.
IGNORED_KEYWORDS = {
    "use_cache", "cache_position", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping",
}  # fmt: skip
# Keywords that would change the result: only None and False are accepted.
REFUSED_KEYWORDS = {"past_key_values", "encoder_hidden_states", "encoder_attention_mask", "head_mask", "is_causal"}


def check_keywords(keywords: dict[str, object]) -> None:
    """Raise ValueError for a keyword that this model doesn't support, TypeError for one that transformers lacks too."""
    for name, value in keywords.items():
        if name in REFUSED_KEYWORDS:
            if value is not None and value is not False:
                raise ValueError(f"{name} is not supported by this encoder. Leave it out.")
        elif name not in IGNORED_KEYWORDS:
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")


def input_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int, torch.device]:
    """(B, S, device) of ids [B, S] or embeddings [B, S, H]. Raises ValueError for both, none, or another shape."""
    if input_ids is not None and inputs_embeds is None:
        grid, rank, expected = input_ids, 2, "input_ids must be [batch, seq]"
    elif inputs_embeds is not None and input_ids is None:
        grid, rank, expected = inputs_embeds, 3, "inputs_embeds must be [batch, seq, H]"
    else:
        raise ValueError("Give exactly one of input_ids and inputs_embeds.")
    if grid.dim() != rank or not grid.numel():
        raise ValueError(f"{expected}, at least one token of one sequence, got {list(grid.shape)}.")
    return grid.shape[0], grid.shape[1], grid.device


def embed_words(embedding: nn.Embedding, ids: Tensor | None, embeds: Tensor | None, packed: PackedBatch) -> Tensor:
    """Rows [N, H] of ids [B, S] or embeddings [B, S, H], one of them None.

    A hook on the embedding, such as NEFTune's, expects [B, S, H]: with a hook, padding is embedded too.
    """
    if embeds is not None:
        return packed.pack(embeds)
    assert ids is not None
    return packed.pack(embedding(ids)) if embedding._forward_hooks else embedding(packed.pack(ids))


def embed_types(embedding: nn.Embedding, token_type_ids: Tensor | None, packed: PackedBatch) -> Tensor:
    """Embeddings [N, H] of token types [B, S] or [1, S]; without any, [1, H], that of type 0, for every token."""
    if token_type_ids is None:
        return embedding(packed.first_rows[:1])  # its value is 0, a type; calling the module loads offloaded weights
    return embedding(packed.pack(token_type_ids.expand(packed.batch, packed.length)))


def in_dtype_of(hidden_states: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
    """On a CPU, rows in the dtype of the residual stream: what layers with weights held in bf16 return is narrower."""
    return tuple(x.to(hidden_states.dtype) if x.is_cpu else x for x in rows)


def activation(name: str | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The activation of this name, or the function itself."""
    if name == "gelu":
        return GELU()
    return ACT2FN[name] if isinstance(name, str) else name


def has_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what this class does: nobody replaced or wrapped it, or its `forward`."""
    return type(module).forward is kind.forward and "forward" not in vars(module)


def refuse_adapter_names(layer: nn.Module) -> None:
    """Raise ValueError if PEFT was given an adapter for each example: rows are tokens, or examples by their length."""
    for module in layer.modules():
        if any("adapter_names" in getattr(hook, "keywords", ()) for hook in module._forward_pre_hooks.values()):
            raise ValueError("adapter_names: PEFT's adapter for each example is not supported; give one to the batch.")


class DenseAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of both halves of a layer, with its bottleneck, if any."""

    def __init__(self, config: Config, trained: Description, layer: int, inputs: int, after_attention: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.dense = new_linear(trained, "dense" if after_attention else "output", layer, inputs, size)
        self.adapter = new_block(trained, size, after_attention)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x [Q, inputs], residual [Q, H] to [Q, H]."""
        rows = self.dense(x)
        if self.adapter is None and rows.dtype is not residual.dtype and type(self.dropout) is Dropout:
            return self.LayerNorm(self.dropout(rows, residual))  # of rows in bf16, in one pass
        rows = self.dropout(rows)
        if self.adapter is not None:
            adapter_input = self.LayerNorm(rows + residual) if self.adapter.reads_norm else rows
            rows = self.adapter(adapter_input, rows)
        return self.LayerNorm(rows + residual)


class Intermediate(nn.Module):
    """The feed-forward's first half: activation(dense(x))."""

    def __init__(self, config: Config, trained: Description, layer: int) -> None:
        super().__init__()
        self.dense = new_linear(trained, "intermediate", layer, config.hidden_size, config.intermediate_size)
        self.activation = activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class Attention(nn.Module):
    """Self-attention, its output projection, residual and norm: [Q, H] and [N, H] to [Q, H]."""

    def __init__(self, config: Config, trained: Description, layer: int, attention: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.self = attention(config, trained, layer)
        self.output = DenseAddNorm(config, trained, layer, config.hidden_size, after_attention=True)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool, *relative: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        context, probs = self.self(queries, hidden_states, packed, with_probs, *relative)
        return self.output(context, queries), probs


class EncoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward: [N, H] to [Q, H]. `relative`: what a DeBERTa's attention reads beside the tokens."""

    def __init__(self, config: Config, trained: Description, layer: int, attention: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.attention = Attention(config, trained, layer, attention)
        self.intermediate = Intermediate(config, trained, layer)
        self.output = DenseAddNorm(config, trained, layer, config.intermediate_size, after_attention=False)

    def forward(
        self, hidden_states: Tensor, packed: PackedBatch, first_only: bool, with_probs: bool, *relative: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """With `first_only`, keys and values come from every token; all else is computed for first tokens alone."""
        queries = hidden_states  # [N, H]
        if first_only:
            refuse_adapter_names(self)
            queries = hidden_states.index_select(0, packed.first_rows)  # [B, H]
        attended, probs = self.attention(queries, hidden_states, packed, with_probs, *relative)
        return self.output(self.intermediate(attended), attended), probs  # [Q, H]


class EncoderOutputs:
    """Rows [Q, H] after the latest layer; of all layers so far hidden states [B, S, H] and attentions [B, A, S, S].

    Requested hidden states are part of the autograd graph: the next layer reads its rows from the padded tensor.
    """

    def __init__(self, rows: Tensor, packed: PackedBatch, with_hidden: bool) -> None:
        self.packed, self.with_hidden = packed, with_hidden
        self.hidden_states: list[Tensor] = []
        self.attentions: list[Tensor | None] = []
        self.add(rows)

    def add(self, rows: Tensor, *probs: Tensor | None) -> None:
        """Append the results of a layer (of DeBERTa's first: after its convolution); the embeddings have no `probs`."""
        self.attentions += probs
        if self.with_hidden:
            self.hidden_states.append(self.packed.unpack(rows))
            rows = self.packed.pack(self.hidden_states[-1])
        self.rows = rows

    def first_tokens(self) -> Tensor:
        """The first token of each sequence after the latest layer: [B, 1, H]."""
        rows = self.rows
        if rows.shape[0] != self.packed.batch:  # rows of all tokens: no layers, or a convolution after the only one
            rows = rows.index_select(0, self.packed.first_rows)
        return self.packed.in_batch_order(rows)[:, None]

    def all_tokens(self) -> Tensor:
        """Every token after the latest layer, padding 0: [B, S, H]."""
        return self.hidden_states[-1] if self.with_hidden else self.packed.unpack(self.rows)
