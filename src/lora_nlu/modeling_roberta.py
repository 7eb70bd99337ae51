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
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput

from lora_nlu.lora import LoRALinear, lora_linear
from lora_nlu.packing import PackedBatch


def attend(
    query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, heads: int, dropout_p: float, with_probs: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt D) v within each sequence, group by group over sequences of equal length.

    Args:    query [Q, H]: a row a token, or a row a sequence (its first token's); key, value [N, H]; packed order.
    Returns: context [Q, H] and, if `with_probs`, the probabilities [B, A, S, S] (0 where a token is masked).
    """
    per_sequence = query.shape[0] != key.shape[0]
    head_size = query.shape[1] // heads
    key_sizes = [n * length for n, length in packed.groups]
    query_sizes = [n for n, _ in packed.groups] if per_sequence else key_sizes
    contexts: list[Tensor] = []
    probs: list[Tensor] = []
    # split, not slices: the backward of one split is one concatenation
    parts = zip(query.split(query_sizes), key.split(key_sizes), value.split(key_sizes), strict=True)
    for (n, _), (q, k, v) in zip(packed.groups, parts, strict=True):
        q, k, v = (rows.view(n, -1, heads, head_size).transpose(1, 2) for rows in (q, k, v))  # [n, A, L, D]
        if with_probs:
            scores = q @ k.transpose(-1, -2) / math.sqrt(head_size)  # [n, A, L, L]
            if packed.key_mask is not None:
                scores = scores.masked_fill(~packed.key_mask, torch.finfo(scores.dtype).min)
            weights = F.dropout(scores.softmax(-1), dropout_p)
            context = weights @ v
            probs.append(weights)
        else:
            context = F.scaled_dot_product_attention(q, k, v, packed.key_mask, dropout_p)
        contexts.append(context.transpose(1, 2).reshape(-1, query.shape[1]))
    return torch.cat(contexts), packed.unpack_pairs(probs) if with_probs else None


class RobertaEmbeddings(nn.Module):
    """Words + positions + token types, normalised: [B, S] ids to [N, H]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        if config.pad_token_id is None:
            raise ValueError("RoBERTa counts positions from pad_token_id + 1: the config must set pad_token_id.")
        self.padding_idx = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=self.padding_idx)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size, padding_idx=self.padding_idx)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

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
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Any,
        packed: PackedBatch,
    ) -> Tensor:
        """Ids or embeddings as in `RobertaModel.forward`, exactly one of them None."""
        shape, device = (packed.batch, packed.length), packed.first_rows.device
        if position_ids is None:
            position_ids = self.positions(input_ids, *shape, device)
        words = self.word_embeddings(packed.pack(input_ids)) if inputs_embeds is None else packed.pack(inputs_embeds)
        positions = self.position_embeddings(packed.pack(position_ids.expand(shape)))
        if token_type_ids is None:
            types = self.token_type_embeddings.weight[0]  # [H]: type 0 for every token
        else:
            types = self.token_type_embeddings(packed.pack(token_type_ids.expand(shape)))
        return self.dropout(self.LayerNorm(words + types + positions))  # [N, H]


class RobertaSelfAttention(nn.Module):
    """Multi-head attention; LoRA, where the config asks for it, in `query` and `value`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        if size % config.num_attention_heads:
            raise ValueError(f"hidden_size {size} is no multiple of num_attention_heads {config.num_attention_heads}.")
        self.heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.query = lora_linear(config, size, size)
        self.key = nn.Linear(size, size)
        self.value = lora_linear(config, size, size)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout_p = self.dropout_p if self.training else 0.0
        query, key, value = self.query(queries), self.key(hidden_states), self.value(hidden_states)
        return attend(query, key, value, packed, self.heads, dropout_p, with_probs)


class DenseAddNorm(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual): the end of both halves of a layer."""

    def __init__(self, config: RobertaConfig, in_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class RobertaAttention(nn.Module):
    """Self-attention with its output projection, residual and norm."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.self = RobertaSelfAttention(config)
        self.output = DenseAddNorm(config, config.hidden_size)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        context, probs = self.self(queries, hidden_states, packed, with_probs)
        return self.output(context, queries), probs


class RobertaIntermediate(nn.Module):
    """The feed-forward's first half: activation(dense(x))."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        act = config.hidden_act
        self.activation = ACT2FN[act] if isinstance(act, str) else act

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.dense(x))


class RobertaLayer(GradientCheckpointingLayer):
    """One encoder layer: [N, H] to [Q, H]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = RobertaAttention(config)
        self.intermediate = RobertaIntermediate(config)
        self.output = DenseAddNorm(config, config.intermediate_size)

    def forward(
        self, hidden_states: Tensor, packed: PackedBatch, first_only: bool, with_probs: bool
    ) -> tuple[Tensor, Tensor | None]:
        """With `first_only`, keys and values come from every token, all the rest is computed for first tokens alone."""
        queries = hidden_states.index_select(0, packed.first_rows) if first_only else hidden_states  # [Q, H]
        attended, probs = self.attention(queries, hidden_states, packed, with_probs)
        return self.output(self.intermediate(attended), attended), probs


class RobertaEncoder(nn.Module):
    """The stack of layers, under the Hub's name `encoder.layer`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([RobertaLayer(config) for _ in range(config.num_hidden_layers)])


class RobertaPooler(nn.Module):
    """tanh(dense(first token)): [B, H] to [B, H]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


class RobertaPreTrainedModel(PreTrainedModel):
    """What both models share: configuration class, loading, initialisation."""

    config_class = RobertaConfig
    base_model_prefix = "roberta"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RobertaLayer"]
    # A base checkpoint has the language-model head and pooler that a classifier lacks; LoRA matrices start anew.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"pooler\.", r"position_ids$"]
    _keys_to_ignore_on_load_missing = [r"\.lora_[AB]$"]

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


class RobertaModel(RobertaPreTrainedModel):
    """The bare encoder, in place of `transformers.RobertaModel`."""

    def __init__(self, config: RobertaConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = RobertaEmbeddings(config)
        self.encoder = RobertaEncoder(config)
        self.pooler = RobertaPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        first_token_only: bool = False,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode a batch.

        Args:    input_ids [B, S] int64 or inputs_embeds [B, S, H], one of them; attention_mask [B, S], 0 = padding;
                 token_type_ids and position_ids [B, S] int64. `first_token_only` computes and returns just the first
                 token of each sequence, exactly, where neither attentions nor hidden states are wanted.
        Returns: last_hidden_state [B, S, H] ([B, 1, H] for first tokens only), 0 where the mask is 0; pooler_output
                 [B, H] or None; hidden_states and attentions ([B, A, S, S] a layer) on request. If the first position
                 of a sequence is masked, masked positions hold what transformers computes there.
        Raises:  ValueError if both or neither input is given, a shape disagrees or a sequence is too long.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        with_probs = self.config.output_attentions if output_attentions is None else output_attentions
        with_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        first_token_only = first_token_only and not with_probs and not with_hidden
        grid: Any = input_ids if inputs_embeds is None else inputs_embeds
        packed = PackedBatch.from_mask(attention_mask, grid.shape[0], grid.shape[1], grid.device)

        rows = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, packed)  # [N, H]
        hidden_states = [rows] if with_hidden else []
        attentions = []
        for i, layer in enumerate(self.encoder.layer):
            is_last = i + 1 == len(self.encoder.layer)
            rows, probs = layer(rows, packed, first_token_only and is_last, with_probs)
            if with_hidden:
                hidden_states.append(rows)
            attentions.append(probs)

        if first_token_only:
            first = packed.in_batch_order(rows)  # [B, H]
            last_hidden_state = first[:, None]  # [B, 1, H]
        else:
            last_hidden_state = packed.unpack(rows)  # [B, S, H]
            first = last_hidden_state[:, 0]
        output = BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pooler(first) if self.pooler is not None else None,
            hidden_states=tuple(packed.unpack(rows) for rows in hidden_states) if with_hidden else None,
            attentions=tuple(attentions) if with_probs else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class RobertaClassificationHead(nn.Module):
    """dropout, dense, tanh, dropout, out_proj on the first token: [B, H] to [B, C]."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        choices = (getattr(config, "cls_dropout", None), config.classifier_dropout, config.hidden_dropout_prob)
        self.dropout = nn.Dropout(next(p for p in choices if p is not None))  # 0 counts
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]

    def forward(self, first: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(first)))))


class RobertaForSequenceClassification(RobertaPreTrainedModel):
    """RoBERTa with a classification or regression head, in place of transformers' class of that name.

    LoRA settings are plain attributes of the config: `apply_lora`, `lora_r`, `lora_alpha`; `cls_dropout` sets the
    head's dropout. After `from_pretrained`, `lora.mark_only_lora_as_trainable` leaves the update and the head to train.
    """

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Classify a batch; inputs as in `RobertaModel.forward`.

        Args:    labels: [B] int64 class ids (cross-entropy), [B] numbers for one label (mean squared error), or [B, C]
                 floats (binary cross-entropy); `config.problem_type`, where set, decides.
        Returns: loss (None without labels), logits [B, C], hidden_states and attentions on request.
        """
        output = self.roberta(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            first_token_only=True,
        )
        logits = self.classifier(output.last_hidden_state[:, 0])  # [B, C]
        loss = None if labels is None else classification_loss(logits, labels, self.config.problem_type)
        result = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()


def classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    """The loss of `logits` [B, C]: by `problem_type`, or by the labels' count and dtype as transformers chooses."""
    if problem_type is None:
        is_integer = not labels.is_floating_point()
        several = "single_label_classification" if is_integer else "multi_label_classification"
        problem_type = "regression" if logits.shape[-1] == 1 else several
    if problem_type == "regression":
        return F.mse_loss(logits.reshape(-1), labels.to(logits.dtype).reshape(-1))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.reshape(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
