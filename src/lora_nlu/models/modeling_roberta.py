"""RoBERTa (Liu et al. 2019, arXiv 1907.11692) with LoRA inline in the query and value projections, on real tokens only.

Parameter names are the Hub's, plus `lora_A` and `lora_B`. `forward` takes padded [batch, seq] tensors, packs them, runs
every layer on rows of real tokens, and pads again only what the caller asked for.

Dim letters: B sequences, S longest of them, N real tokens, Q query rows (N, or B for first tokens alone), H hidden,
A heads, D head size, C labels; L the length shared by one group of sequences, n their number.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CamembertConfig, PreTrainedModel, RobertaConfig, XLMRobertaConfig
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, SequenceClassifierOutput

from lora_nlu.methods.description import Description, added_patterns, description_of
from lora_nlu.methods.marking import new_linear, reset_added_parameters
from lora_nlu.models import layers
from lora_nlu.models.checkpoints import Checkpoints
from lora_nlu.models.layers import EncoderLayer
from lora_nlu.models.losses import output_with_loss, two_views
from lora_nlu.ops.kernels import Dropout, attention, is_traced
from lora_nlu.ops.packing import PackedBatch


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
        """Positions [B, S] from padding_idx + 1; of padding, padding_idx. Raises ValueError beyond the table's end."""
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
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None,
        inputs_embeds: Tensor | None, packed: PackedBatch,
    ) -> Tensor:  # fmt: skip
        """Ids or embeddings as in `RobertaModel.forward`, exactly one of them None, to rows [N, H]."""
        shape, device = (packed.batch, packed.length), packed.first_rows.device
        if position_ids is None:
            position_ids = self.positions(input_ids, *shape, device)
        words = layers.embed_words(self.word_embeddings, input_ids, inputs_embeds, packed)
        positions = self.position_embeddings(packed.pack(position_ids.expand(shape)))
        types = layers.embed_types(self.token_type_embeddings, token_type_ids, packed)
        return self.dropout(self.LayerNorm(words + types + positions))  # [N, H]


class RobertaSelfAttention(nn.Module):
    """Multi-head attention; LoRA, where the config asks for it, in `query` and `value`, or `lora_target_modules`."""

    def __init__(self, config: RobertaConfig, trained: Description, layer: int) -> None:
        super().__init__()
        size = config.hidden_size
        if size % config.num_attention_heads:
            raise ValueError(f"hidden_size {size} is no multiple of num_attention_heads {config.num_attention_heads}.")
        self.heads = config.num_attention_heads
        self.dropout = Dropout(config.attention_probs_dropout_prob)  # for its p, which may be changed
        self.query = new_linear(trained, "query", layer, size, size)
        self.key = new_linear(trained, "key", layer, size, size)
        self.value = new_linear(trained, "value", layer, size, size)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """queries [Q, H] and hidden_states [N, H] to context [Q, H] and, if asked, probabilities [B, A, S, S]."""
        query, key, value = self.query(queries), self.key(hidden_states), self.value(hidden_states)
        dropout_p = self.dropout.p if self.training else 0.0
        if not with_probs:
            scale = 1 / math.sqrt(query.shape[1] // self.heads)
            context = attention(query, key, value, packed, self.heads, scale, dropout_p)  # [Q, H]
            if context is not None:
                return context, None
        query, key, value = layers.in_dtype_of(hidden_states, query, key, value)
        return attend(query, key, value, packed, self.heads, dropout_p, with_probs)


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, heads: int, dropout_p: float, with_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt D) v within each sequence, group by group over sequences of equal length, by torch.

    Args:    query [Q, H]: a row a token, or a row a sequence (its first token's); key, value [N, H]; packed order.
    Returns: context [Q, H] and, if `with_probs`, the probabilities [B, A, S, S] (0 where a token is masked).
    """
    head_size = query.shape[1] // heads
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
            if with_probs and packed.is_padded:
                probs = probs * packed.key_mask.transpose(-1, -2)  # type: ignore[union-attr]
            context = probs @ v  # [n, A, L, D]
        else:
            context = F.scaled_dot_product_attention(q, k, v, packed.key_mask, dropout_p)  # [n, A, L, D]
        contexts.append(context.transpose(1, 2).reshape(-1, query.shape[1]))  # [n L, H]
    return torch.cat(contexts), probs if with_probs else None


class RobertaEncoder(nn.Module):
    """The stack of layers, under the Hub's name `encoder.layer`."""

    def __init__(self, config: RobertaConfig, trained: Description) -> None:
        super().__init__()
        numbers = range(config.num_hidden_layers)
        self.layer = nn.ModuleList([EncoderLayer(config, trained, i, RobertaSelfAttention) for i in numbers])

    def forward(
        self, rows: Tensor, packed: PackedBatch, first_only: bool, with_hidden: bool, with_probs: bool
    ) -> layers.EncoderOutputs:
        """Embedded rows [N, H] through the layers."""
        encoded = layers.EncoderOutputs(rows, packed, with_hidden)
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

    config: RobertaConfig
    config_class = RobertaConfig
    base_model_prefix = "roberta"
    _supports_sdpa = True  # as transformers' class says; "sdpa" and "eager" are one computation here
    # A base checkpoint has the language-model head and pooler that a classifier lacks; what a method adds starts anew.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"pooler\.", r"position_ids$"]

    def __init__(self, config: RobertaConfig) -> None:
        if config.is_decoder or config.add_cross_attention:
            raise ValueError("This RoBERTa is an encoder: is_decoder and add_cross_attention must be false.")
        if (kind := getattr(config, "position_embedding_type", None) or "absolute") != "absolute":
            raise ValueError(f"This RoBERTa has absolute positions; position_embedding_type={kind!r} is not supported.")
        super().__init__(config)
        self._keys_to_ignore_on_load_missing = added_patterns()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal(0, initializer_range), biases 0; loaded tensors are left alone
        reset_added_parameters(module)


class RobertaModel(RobertaPreTrainedModel):
    """The bare encoder, in place of `transformers.RobertaModel`."""

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = RobertaEncoder(config, description_of(config))
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None, first_token_only: bool = False, packed: PackedBatch | None = None,
        sequence_lengths: Sequence[int] | None = None, **keywords: object,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:  # fmt: skip
        """Encode a batch.

        Args:    input_ids [B, S] int64 or inputs_embeds [B, S, H], one of them; attention_mask [B, S], 0 = padding;
                 token_type_ids and position_ids [B, S] int64. `first_token_only` computes and returns just the first
                 token of each sequence, exactly, unless attentions or hidden states are requested. `packed`: the
                 plan of the batch, which is made from attention_mask without it. `sequence_lengths`: the tokens of
                 each sequence, if all padding is on the right; with them, nothing waits for a GPU.
        Returns: last_hidden_state [B, S, H] ([B, 1, H] for first tokens only), 0 where the mask is 0; pooler_output
                 [B, H], if there is a pooler; hidden_states ([B, S, H] each; where output_hidden_states is a number or
                 numbers, those of other numbers are None) and attentions ([B, A, S, S] a layer) on request. In the
                 fallback of `PackedBatch`, masked positions hold what transformers computes there.
        Raises:  ValueError if both or neither input is given, a shape disagrees, the batch is empty or a sequence is
                 too long; for other keywords as `check_keywords`.
        """
        layers.check_keywords(keywords)
        config = self.config
        with_probs = config.output_attentions if output_attentions is None else output_attentions
        with_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        first_token_only = first_token_only and not with_probs and not with_hidden
        batch, length, device = layers.input_shape(input_ids, inputs_embeds)

        if packed is None:
            packed = PackedBatch.from_mask(attention_mask, batch, length, device, lengths=sequence_lengths)
        rows = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, packed)  # [N, H]
        encoded = self.encoder(rows, packed, first_token_only, with_hidden, with_probs)
        last = encoded.first_tokens() if first_token_only else encoded.all_tokens()  # [B, 1, H] or [B, S, H]
        pooled = None if self.pooler is None else self.pooler(last)  # [B, H]

        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=requested_layers(encoded.hidden_states, with_hidden) if with_hidden else None,
            attentions=tuple(encoded.attentions) if with_probs else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def requested_layers(states: list[Tensor], request: bool | int | Sequence[int]) -> tuple[Any, ...]:
    """The hidden states, those of layers that were not requested None; a negative number counts from the last."""
    if isinstance(request, bool):
        return tuple(states)
    numbers = [request] if isinstance(request, int) else request
    return tuple(x if i in numbers or i - len(states) in numbers else None for i, x in enumerate(states))


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


class RobertaForSequenceClassification(RobertaPreTrainedModel):
    """RoBERTa with a classification or regression head, in place of transformers' class of that name.

    LoRA settings are plain attributes of the config: `apply_lora`, `lora_r`, `lora_alpha`; `cls_dropout` sets the
    head's dropout. After `from_pretrained`, `mark_trainable` leaves the update and the head to train.
    With `reg_loss_wgt` above 0 training steps run every example twice, as one batch of twice the size (R-Drop); with
    `masking_prob` too, some tokens of the second view are `unk_token_id`, none of `special_token_ids` (cutoff).
    `class_weights`, a tensor [C] on the model's device, weighs the cross-entropy of training steps.
    """

    accepts_loss_kwargs = False  # Trainer takes a forward with **keywords for one that divides by num_items_in_batch
    class_weights: Tensor | None = None

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None, return_dict: bool | None = None,
        sequence_lengths: Sequence[int] | None = None, **keywords: object,
    ) -> SequenceClassifierOutput | tuple:  # fmt: skip
        """Classify a batch; inputs, requests and errors as in `RobertaModel.forward`.

        Args:    labels: [B] int64 class ids (cross-entropy), [B] numbers for one label (mean squared error), or [B, C]
                 floats (binary cross-entropy); `config.problem_type`, where set, decides.
        Returns: loss (None without labels), logits [B, C], hidden_states and attentions on request.
        """
        config = self.config
        two_view_weight = getattr(config, "reg_loss_wgt", 0) if self.training and labels is not None else 0
        inputs: dict[str, Any] = {
            "input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids,
            "position_ids": position_ids, "inputs_embeds": inputs_embeds, "sequence_lengths": sequence_lengths,
        }  # fmt: skip
        if two_view_weight:
            inputs = two_views(config, inputs)  # from here to the logits, B is twice the batch
        encoded = self.roberta(
            **inputs, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True,
            first_token_only=layers.has_forward_of(self.classifier, RobertaClassificationHead),  # others may read all
            **keywords,
        )  # fmt: skip
        logits = self.classifier(encoded.last_hidden_state)  # [B, S, H] or [B, 1, H] to [B, C]

        weights = self.class_weights if self.training else None
        output = output_with_loss(
            config, logits, labels, "multi_label_classification", two_view_weight, encoded, weights
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class XLMRobertaForSequenceClassification(RobertaForSequenceClassification):
    """XLM-RoBERTa, in place of transformers' class of that name: RoBERTa under a model type of its own."""

    config_class = XLMRobertaConfig  # type: ignore[assignment]


class CamembertForSequenceClassification(RobertaForSequenceClassification):
    """CamemBERT, in place of transformers' class of that name: RoBERTa under a model type of its own."""

    config_class = CamembertConfig  # type: ignore[assignment]
