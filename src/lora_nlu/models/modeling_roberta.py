"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) with LoRA inline in the query and value projections, on real tokens only.

Parameter names are the Hub's, plus `lora_A` and `lora_B`. `forward` takes padded [batch, seq] tensors, packs them, runs
every layer on rows of real tokens, and pads again only what the caller asked for.

Dim letters: B sequences, S longest of them, N real tokens, Q query rows (N, or B for first tokens alone), H hidden,
A heads, D head size, C labels; L the length shared by one group of sequences, n their number.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, RobertaConfig

from lora_nlu.methods.lora import LoRALinear, lora_linear
from lora_nlu.models.layers import (
    Checkpoints,
    EncoderLayer,
    EncoderOutputs,
    OptionalTensor,
    PackedEncoder,
    SequenceClassifier,
    embed_types,
    embed_words,
    has_forward_of,
)
from lora_nlu.ops.kernels import Dropout, attention, is_traced
from lora_nlu.ops.packing import PackedBatch


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, heads: int, dropout_p: float, with_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt D) v within each sequence, group by group over sequences of equal length.

    Args:    query [Q, H]: a row a token, or a row a sequence (its first token's); key, value [N, H]; packed order.
    Returns: context [Q, H] and, if `with_probs`, the probabilities [B, A, S, S] (0 where a token is masked).
    """
    head_size = query.shape[1] // heads
    if not with_probs:
        fused = attention(query, key, value, packed, heads, 1 / math.sqrt(head_size), dropout_p)
        if fused is not None:
            return fused, None
    if packed.attends_padded(query.device, with_probs):
        query, key, value = (packed.to_padded(x) for x in (query, key, value))
        context, probs = attend(query, key, value, packed.padded, heads, dropout_p, with_probs)
        return packed.from_padded(context), probs
    contexts: list[Tensor] = []
    probs = None
    for n, _, parts in packed.grouped(query, key, value):
        q, k, v = (rows.view(n, -1, heads, head_size).transpose(1, 2) for rows in parts)  # [n, A, L, D]
        if with_probs or is_traced():  # torch's fused attention has no forward-mode and no second derivatives
            scores = q @ k.transpose(-1, -2) / math.sqrt(head_size)  # [n, A, L, L]
            if packed.key_mask is not None:  # added, as transformers does: a row that sees no key keeps its gradient
                hidden = torch.zeros_like(packed.key_mask, dtype=scores.dtype)
                scores = scores + hidden.masked_fill(~packed.key_mask, torch.finfo(scores.dtype).min)
            probs = F.dropout(scores.softmax(-1), dropout_p)  # with_probs: of all sequences, in one padded group
            if packed.is_padded:
                probs = probs * packed.key_mask.transpose(-1, -2)  # type: ignore[union-attr]
            context = probs @ v
        else:
            context = F.scaled_dot_product_attention(q, k, v, packed.key_mask, dropout_p)
        contexts.append(context.transpose(1, 2).reshape(-1, query.shape[1]))
    return torch.cat(contexts), probs if with_probs else None


class RobertaEmbeddings(nn.Module):
    """Words + positions + token types, normalised: [B, S] ids to [N, H]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        if config.pad_token_id is None:
            raise ValueError("RoBERTa counts positions from pad_token_id + 1: the config must set pad_token_id.")
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        # last, as in transformers: optimizer states and seeds go by the order of the parameters
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size, padding_idx=self.padding_idx)

    def positions(self, input_ids: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
        """Positions [B, S] (or [1, S]) counted from padding_idx + 1; padding tokens stay at padding_idx.

        Raises ValueError if a sequence is longer than the position table.
        """
        first, limit = self.padding_idx + 1, self.position_embeddings.num_embeddings
        if input_ids is None:
            positions = torch.arange(first, first + length, device=device)[None]
        else:
            real = input_ids.ne(self.padding_idx).long()
            positions = real.cumsum(1) * real + self.padding_idx
        if length > limit - first and int(positions.max()) >= limit:
            raise ValueError(
                f"A sequence of {int(positions.max()) - self.padding_idx} tokens exceeds the model's {limit - first} "
                f"positions; truncate it with max_length={limit - first}."
            )
        return positions.expand(batch, length)

    def forward(
        self,
        input_ids: Any,
        token_type_ids: OptionalTensor,
        position_ids: OptionalTensor,
        inputs_embeds: Any,
        packed: PackedBatch,
    ) -> Tensor:
        """Ids or embeddings as in `PackedEncoder.forward`, exactly one of them None, to rows [N, H]."""
        shape, device = (packed.batch, packed.length), packed.first_rows.device
        if position_ids is None:
            position_ids = self.positions(input_ids, *shape, device)
        words = embed_words(self.word_embeddings, input_ids, inputs_embeds, packed)
        positions = self.position_embeddings(packed.pack(position_ids.expand(shape)))
        types = embed_types(self.token_type_embeddings, token_type_ids, packed)
        return self.dropout(self.LayerNorm(words + types + positions))  # [N, H]


class RobertaSelfAttention(nn.Module):
    """Multi-head attention; LoRA, where the config asks for it, in `query` and `value`, or `lora_target_modules`."""

    def __init__(self, config: RobertaConfig, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        if size % config.num_attention_heads:
            raise ValueError(f"hidden_size {size} is no multiple of num_attention_heads {config.num_attention_heads}.")
        self.heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)  # for its p, which may be changed
        self.query = lora_linear(config, "query", layer, size, size)
        self.key = lora_linear(config, "key", layer, size, size)
        self.value = lora_linear(config, "value", layer, size, size)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout.p if self.training else 0.0
        query, key, value = self.query(queries), self.key(hidden_states), self.value(hidden_states)
        return attend(query, key, value, packed, self.heads, dropout_p, with_probs)


class RobertaEncoder(nn.Module):
    """The stack of layers, under the Hub's name `encoder.layer`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        layers = [EncoderLayer(config, i, RobertaSelfAttention(config, i)) for i in range(config.num_hidden_layers)]
        self.layer = nn.ModuleList(layers)

    def forward(
        self, rows: Tensor, packed: PackedBatch, first_only: bool, with_hidden: bool, with_probs: bool, views: int
    ) -> EncoderOutputs:
        """Embedded rows [N, H] through the layers; no dropout is shared by examples, so `views` changes nothing."""
        encoded = EncoderOutputs(rows, packed, with_hidden)
        for i, layer in enumerate(self.layer):
            is_last = i + 1 == len(self.layer)
            encoded.add(*layer(encoded.rows, packed, first_only and is_last, with_probs))
        return encoded


class RobertaPooler(nn.Module):
    """tanh(dense(first token)): [B, S, H] to [B, H]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))


class RobertaPreTrainedModel(Checkpoints, PreTrainedModel):
    """What encoder and classifier share: configuration class, loading, initialisation."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    supports_gradient_checkpointing = True
    _supports_sdpa = True  # as transformers' class says; "sdpa" and "eager" are one computation here
    _no_split_modules = ["EncoderLayer"]
    # A base checkpoint has the language-model head and pooler that a classifier lacks; what a method adds starts anew.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"pooler\.", r"position_ids$"]
    _keys_to_ignore_on_load_missing = [r"\.lora_[AB]$", r"\.adapter_[AB]\."]

    def __init__(self, config: RobertaConfig) -> None:
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("This RoBERTa is an encoder: is_decoder and add_cross_attention must be false.")
        if (kind := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
            raise ValueError(f"This RoBERTa has absolute positions; position_embedding_type={kind!r} is not supported.")
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal(0, initializer_range), biases 0; loaded tensors are left alone
        if isinstance(module, LoRALinear):
            module.reset_lora_parameters()


class RobertaModel(PackedEncoder, RobertaPreTrainedModel):
    """The bare encoder, in place of `transformers.RobertaModel`."""

    selects_hidden_states = True

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = RobertaEncoder(config)
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
        self.post_init()


class RobertaClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, out_proj on the first token: [B, S, H] to [B, C]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        choices = (getattr(config, "cls_dropout", None), config.classifier_dropout, config.hidden_dropout_prob)
        self.dropout = nn.Dropout(next(p for p in choices if p is not None))  # 0 counts
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(features[:, 0])))))


class RobertaForSequenceClassification(SequenceClassifier, RobertaPreTrainedModel):
    """RoBERTa with a classification or regression head, in place of transformers' class of that name."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    def head(self, hidden_states: Tensor) -> Tensor:
        return self.classifier(hidden_states)

    def reads_first_token_only(self) -> bool:
        return has_forward_of(self.classifier, RobertaClassificationHead)
