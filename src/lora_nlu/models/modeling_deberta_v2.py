"""DeBERTa-V2 and V3 (He et al. 2020, arXiv 2006.03654; 2021, arXiv 2111.09543) with LoRA inline, on real tokens only.

Parameter names are the Hub's, plus `lora_A` and `lora_B` in `query_proj` and `value_proj`. Attention between tokens i
and j of a sequence sums content to content, content to position and position to content (eq. 4 of the first paper):

    score(i, j) = (q_i . k_j  +  q_i . k^r[i - j]  +  k_j . q^r[i - j]) / sqrt(3 D)

q^r and k^r are projections of a table of relative embeddings. Only the rows of distances that occur are projected, each
once; a product with all 2 L - 1 distances of a length becomes [L, L] by reading its rows shifted.

With `share_att_key` the table goes through `query_proj` and `key_proj` themselves. There the reference implementation
of LoRA, and so every published adapter, uses the frozen weight of `query_proj` alone; PEFT, and any merge of the update
into the weight, also applies the update. An update of `key_proj`, which the reference doesn't have, is read the same
way, but AdaLoRA's DeBERTa applies this one alone. The config's `lora_relative_query` chooses: "none" (the reference's
reading), "key" (AdaLoRA's) or "both" (PEFT's).

Dim letters: B sequences, S longest of them, N real tokens, Q query rows (N, or B for first tokens alone), H hidden,
A heads, D head size, C labels; L the length shared by one group of sequences, n their number, M their query places
(L or 1); V views (parts of the batch with a dropout of the table each), U rows of the table in use.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from lora_nlu.methods.description import (
    Description,
    added_patterns,
    description_of,
    relative_query,
    same_relative_query,
)
from lora_nlu.methods.linear import UpdatedLinear, updated_layers
from lora_nlu.methods.marking import new_linear, reset_added_parameters
from lora_nlu.models import layers
from lora_nlu.models.checkpoints import Checkpoints
from lora_nlu.models.layers import EncoderLayer
from lora_nlu.models.losses import output_with_loss, two_views
from lora_nlu.ops.kernels import Dropout, Linear, attention, is_traced
from lora_nlu.ops.packing import PackedBatch


@lru_cache(maxsize=1024)
def table_rows(longest: int, buckets: int, reach: int) -> tuple[int, ...]:
    """The row of the relative table for each distance from -(longest - 1) to longest - 1.

    Without buckets (0 or less) a distance d has row reach + d. With them, distances up to buckets / 2 have a row each
    and farther ones share rows in steps that grow logarithmically up to `reach`, the configured
    `max_relative_positions`; the table's middle is at row `buckets`. Rows beyond the table's ends are its ends.
    """
    middle = buckets if buckets > 0 else reach
    half = buckets // 2
    rows = []
    for distance in range(1 - longest, longest):
        size = abs(distance)
        if buckets > 0 and size > half:
            steps = math.log(size / half) / math.log((reach - 1) / half) * (half - 1)
            size = math.ceil(steps) + half
        rows.append(min(max(middle + (size if distance > 0 else -size), 0), 2 * middle - 1))
    return tuple(rows)


def distances_on(device: torch.device, longest: int, buckets: int, reach: int) -> Tensor:
    """`table_rows`, counted from its first, as a tensor; to a GPU it is sent once, because that waits for it."""
    settings = (device, longest, buckets, reach)
    return _sent_once(*settings) if device.type == "cuda" and not is_traced() else _sent(*settings)


def _sent(device: torch.device, longest: int, buckets: int, reach: int) -> Tensor:
    rows = table_rows(longest, buckets, reach)
    return torch.tensor(rows, device=device) - rows[0]


_sent_once = lru_cache(maxsize=None)(_sent)  # a CUDA graph reads it where it is: none may be dropped


def shifted(products: Tensor) -> Tensor:
    """[..., L, 2 L - 1] to [..., L, L]: row i starts L - 1 - i places later than the last row, which starts at 0.

    With columns by descending distance, element (i, j) is then column L - 1 - (i - j): that of distance i - j. A view
    of a contiguous tensor, differentiable.
    """
    length = products.shape[-2]
    *outer, row, column = products.stride()
    return products.as_strided(
        (*products.shape[:-1], length), (*outer, row - column, column), products.storage_offset() + length - 1
    )


class DebertaV2Embeddings(nn.Module):
    """Words (+ positions, + token types), projected to the hidden size where they are smaller, normalised."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size, hidden = getattr(config, "embedding_size", config.hidden_size), config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=config.pad_token_id)
        places = config.max_position_embeddings if config.position_biased_input else 0
        self.position_embeddings = nn.Embedding(places, size) if places else None
        types = config.type_vocab_size
        self.token_type_embeddings = nn.Embedding(types, size) if types > 0 else None
        self.embed_proj = Linear(size, hidden, bias=False) if size != hidden else None
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None,
        inputs_embeds: Tensor | None, packed: PackedBatch,
    ) -> Tensor:  # fmt: skip
        """Ids or embeddings, exactly one of them None, to rows [N, H]. Raises ValueError beyond the position table."""
        shape = (packed.batch, packed.length)
        rows = layers.embed_words(self.word_embeddings, input_ids, inputs_embeds, packed)
        if self.position_embeddings is not None:
            limit = self.position_embeddings.num_embeddings
            places = torch.arange(packed.length, device=rows.device) if position_ids is None else position_ids
            places = packed.pack(places.expand(shape))  # [N]
            if packed.length > limit and int(places.max()) >= limit:
                raise ValueError(
                    f"A sequence of {int(places.max()) + 1} tokens exceeds the model's {limit} positions; "
                    f"truncate it with max_length={limit}."
                )
            rows = rows + self.position_embeddings(places)
        if self.token_type_embeddings is not None:
            rows = rows + layers.embed_types(self.token_type_embeddings, token_type_ids, packed)
        if self.embed_proj is not None:
            rows = self.embed_proj(rows)
        return self.dropout(only_real(self.LayerNorm(rows), packed))  # [N, H]


def only_real(rows: Tensor, packed: PackedBatch) -> Tensor:
    """Rows [N, H], those of masked tokens 0; only the fallback of `PackedBatch` keeps any."""
    return rows if packed.key_mask is None else rows * packed.key_mask.reshape(-1, 1)


class DisentangledSelfAttention(nn.Module):
    """Attention by content and by distance; LoRA, where the config asks for it, in `query_proj` and `value_proj`."""

    def __init__(self, config: DebertaV2Config, trained: Description, layer: int) -> None:
        super().__init__()
        size, self.heads = config.hidden_size, config.num_attention_heads
        kinds = position_kinds(config)
        relative, shared = config.relative_attention, bool(getattr(config, "share_att_key", False))
        self.scale = math.sqrt(size // self.heads * (1 + len(kinds)))
        self.query_proj = new_linear(trained, "query", layer, size, size)
        self.key_proj = new_linear(trained, "key", layer, size, size)
        self.value_proj = new_linear(trained, "value", layer, size, size)
        self.content_to_position = relative and "c2p" in kinds
        self.position_to_content = relative and "p2c" in kinds
        if self.content_to_position and not shared:
            self.pos_key_proj = Linear(size, size)
        if self.position_to_content and not shared:
            self.pos_query_proj = Linear(size, size)
        self.shared, self.config = shared, config
        self.pos_dropout = Dropout(config.hidden_dropout_prob)
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, queries: Tensor, hidden_states: Tensor, packed: PackedBatch, with_probs: bool,
        table: Tensor | None, distances: Tensor | None, table_trains: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """queries [Q, H] and hidden_states [N, H] to context [Q, H] and, if asked, probabilities [B, A, S, S].

        table [V, U, H] and distances [2 S - 1] int64: the relative table's rows in use, and the row of each distance
        from -(S - 1) to S - 1; `table_trains`: whether the table requires a gradient in grad mode.
        """
        query, key, value = self.query_proj(queries), self.key_proj(hidden_states), self.value_proj(hidden_states)
        relative_key = relative_query = None  # k^r by descending, q^r by ascending distance
        if table is not None and distances is not None:
            key_proj, query_proj = self.relative_projections()
            table = self.pos_dropout(table)  # [V, U, H]
            if key_proj is not None:
                relative_key = key_proj(table, **self.relative_arguments(key_proj))
                relative_key = relative_key.index_select(1, distances.flip(0))  # [V, 2 S - 1, H]
            if query_proj is not None:
                relative_query = query_proj(table, **self.relative_arguments(query_proj))
                relative_query = relative_query.index_select(1, distances)  # [V, 2 S - 1, H]
        # The kernel gives the tables no gradients. Reentrant checkpointing runs a layer first without grad mode: if the
        # recomputation can't use the kernel, that first run must not either, as the kernel draws other dropout.
        drops = self.dropout.training
        needs_table_grad = drops and not torch.is_grad_enabled() and self.trains_relative(table, table_trains)
        if not with_probs and type(self.dropout) is Dropout and not needs_table_grad:
            p = self.dropout.p if drops else 0.0
            fused = attention(query, key, value, packed, self.heads, 1 / self.scale, p, relative_key, relative_query)
            if fused is not None:
                return fused, None
        query, key, value = layers.in_dtype_of(hidden_states, query, key, value)
        relative_key, relative_query = (
            None if x is None else layers.in_dtype_of(hidden_states, x)[0] for x in (relative_key, relative_query)
        )
        query, relative_key = query / self.scale, self.by_head(relative_key)
        relative_query = self.by_head(None if relative_query is None else relative_query / self.scale)
        if packed.attends_padded(query.device, with_probs):
            query, key, value = (packed.to_padded(x) for x in (query, key, value))
            context, probs = self.attend(query, key, value, packed.padded, with_probs, relative_key, relative_query)
            return packed.from_padded(context), probs
        return self.attend(query, key, value, packed, with_probs, relative_key, relative_query)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, packed: PackedBatch, with_probs: bool,
        relative_key: Tensor | None, relative_query: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention group by group: query [Q, H], already scaled; key, value [N, H]; tables [A, V, 2 S - 1, D]."""
        head_size = query.shape[1] // self.heads
        contexts: list[Tensor] = []
        probs = None
        for n, length, parts in packed.grouped(query, key, value):
            q, k, v = (rows.view(n, -1, self.heads, head_size).permute(2, 0, 1, 3) for rows in parts)
            q, k = q.contiguous(), k.contiguous()  # [A, n, M, D], [A, n, L, D]
            scores = q @ k.transpose(-1, -2)  # [A, n, M, L]
            middle = slice(packed.length - length, packed.length + length - 1)  # the 2 L - 1 distances of this length
            if relative_key is not None:
                scores = add_(scores, content_to_position(q, relative_key[:, :, middle], length))
            if relative_query is not None:
                scores = add_(scores, position_to_content(k, relative_query[:, :, middle], q.shape[2]))
            if packed.key_mask is not None:  # the scores of a masked query are all equal, as in transformers
                seen = packed.key_mask.transpose(0, 1)  # [1, B, 1, S]
                seen = seen & seen[..., : q.shape[2]].transpose(-1, -2)
                scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            # .forward: ZeRO-3 counts calls of modules by hooks and needs the same number on every rank
            weights = self.dropout.forward(scores.softmax(-1))
            if with_probs:
                probs = weights.transpose(0, 1)  # [B, A, S, S]: all sequences are in one padded group
                if packed.is_padded:
                    probs = probs * packed.key_mask.transpose(-1, -2)  # type: ignore[union-attr]
                weights = probs.transpose(0, 1)
            contexts.append((weights @ v).permute(1, 2, 0, 3).reshape(-1, query.shape[1]))
        return torch.cat(contexts), probs

    def relative_projections(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The layers that the relative table goes through to keys and queries; None where the config has none."""
        key_proj, query_proj = ("key_proj", "query_proj") if self.shared else ("pos_key_proj", "pos_query_proj")
        return (
            getattr(self, key_proj) if self.content_to_position else None,
            getattr(self, query_proj) if self.position_to_content else None,
        )

    def relative_arguments(self, projection: nn.Module) -> dict[str, bool]:
        """What a projection is called with for the relative table; the config decides about its update.

        It is called as a module: hooks load offloaded weights, and what wraps a layer passes the argument on.
        """
        return {"apply_update": False} if self.skips(projection) and updated_layers(projection) else {}

    def skips(self, projection: nn.Module) -> bool:
        """Whether the relative table bypasses the update of this one of its projections, by the config."""
        way = relative_query(self.config)
        return self.shared and (way == "none" or (way == "key" and projection is self.query_proj))

    def shared_updates(self) -> dict[str, list[UpdatedLinear]]:
        """The updates that tokens and relative table share, by projection: where `lora_relative_query` matters."""
        key_proj, query_proj = self.relative_projections() if self.shared else (None, None)
        projections = {"query_proj": query_proj, "key_proj": key_proj}
        updates = {name: updated_layers(layer) for name, layer in projections.items() if layer is not None}
        return {name: layers for name, layers in updates.items() if layers}

    def skipped_updates(self) -> list[UpdatedLinear]:
        """The shared updates that the relative table bypasses."""
        return [x for name, layers in self.shared_updates().items() if self.skips(getattr(self, name)) for x in layers]

    def trains_relative(self, table: Tensor | None, table_trains: bool) -> bool:
        """Whether relative keys or queries would require gradients in grad mode."""
        if table is None:
            return False
        skipped = {id(x) for layer in self.skipped_updates() for x in layer.update_parameters()}
        parameters = [x for layer in self.relative_projections() if layer is not None for x in layer.parameters()]
        return table_trains or any(x.requires_grad for x in parameters if id(x) not in skipped)

    def by_head(self, rows: Tensor | None) -> Tensor | None:
        """[V, 2 S - 1, H] to [A, V, 2 S - 1, D]."""
        return None if rows is None else rows.view(*rows.shape[:2], self.heads, -1).permute(2, 0, 1, 3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if any(layer.merged for layer in self.skipped_updates()):
            raise RuntimeError(
                "A merged DeBERTa whose relative query is frozen can't be saved: a model that loads the file would "
                "apply the update to the relative query too. Call lora_nlu.unmerge_lora_(model) and save the adapter."
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)


def add_(scores: Tensor, others: Tensor) -> Tensor:
    """scores + others, in place unless a transform, a trace or selective checkpointing's mode may keep `scores`."""
    # torch has no public function that tells whether a dispatch mode is on
    may_be_kept = not torch.compiler.is_compiling() and (is_traced() or torch._C._len_torch_dispatch_stack() > 0)
    return scores + others if may_be_kept else scores.add_(others)


def content_to_position(q: Tensor, relative_key: Tensor, length: int) -> Tensor:
    """q_i . k^r[i - j]: q [A, n, M, D], relative_key [A, V, 2 L - 1, D] by descending distance, to [A, n, M, L]."""
    heads, n, places, size = q.shape
    if places < length:  # first tokens: distances 0 to -(L - 1), in the order of j already
        relative_key = relative_key[:, :, length - 1 :]
    rows = q.reshape(heads, relative_key.shape[1], -1, size)  # [A, V, n / V * M, D]
    products = (rows @ relative_key.transpose(-1, -2)).view(heads, n, places, -1)
    return products if places < length else shifted(products)


def position_to_content(k: Tensor, relative_query: Tensor, places: int) -> Tensor:
    """k_j . q^r[i - j]: k [A, n, L, D], relative_query [A, V, 2 L - 1, D] by ascending distance, to [A, n, M, L]."""
    heads, n, length, size = k.shape
    if places < length:  # first tokens: k_j meets only distance -j
        rows = k.view(heads, relative_query.shape[1], -1, length, size)  # [A, V, n / V, L, D]
        return (rows * relative_query[:, :, None, :length].flip(3)).sum(-1).view(heads, n, 1, length)
    rows = k.reshape(heads, relative_query.shape[1], -1, size)
    products = (rows @ relative_query.transpose(-1, -2)).view(heads, n, length, -1)
    return shifted(products).transpose(-1, -2)  # [A, n, j, i] to [A, n, i, j]


class ConvLayer(nn.Module):
    """LayerNorm(residual + act(dropout(conv(x)))), the convolution over each sequence alone, 0 beyond its ends."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size, groups = config.hidden_size, getattr(config, "conv_groups", 1)
        self.margin = config.conv_kernel_size // 2  # type: ignore[attr-defined]
        self.conv = nn.Conv1d(size, size, 2 * self.margin + 1, padding=self.margin, groups=groups)
        self.activation = layers.activation(getattr(config, "conv_act", "tanh"))
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, embedded: Tensor, residual: Tensor, packed: PackedBatch) -> Tensor:
        """embedded, residual [N, H] to [N, H]."""
        # One long stream, `margin` zeros between sequences: a single convolution, however many lengths there are.
        (rows, size), device = embedded.shape, embedded.device
        sequence, count = packed.sequences(rows)
        places = torch.arange(rows, device=device) + self.margin * sequence  # [N]
        stream = embedded.new_zeros(rows + self.margin * (count - 1), size)
        stream = stream.index_copy(0, places, embedded)
        convolved = self.conv(stream.t()[None])[0].t().index_select(0, places)  # [N, H]
        return only_real(self.LayerNorm(residual + self.activation(self.dropout(convolved))), packed)


class DebertaV2Encoder(nn.Module):
    """The layers, the relative table they share, and the convolution after the first, under the Hub's names."""

    def __init__(self, config: DebertaV2Config, trained: Description) -> None:
        super().__init__()
        numbers = range(config.num_hidden_layers)
        self.layer = nn.ModuleList([EncoderLayer(config, trained, i, DisentangledSelfAttention) for i in numbers])
        self.buckets = getattr(config, "position_buckets", -1)
        reach = config.max_relative_positions
        self.reach = reach if reach > 0 else config.max_position_embeddings
        if config.relative_attention:
            rows = 2 * (self.buckets if self.buckets > 0 else self.reach)
            self.rel_embeddings = nn.Embedding(rows, config.hidden_size)
        if "layer_norm" in relative_norm(config):
            self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.conv = ConvLayer(config) if getattr(config, "conv_kernel_size", 0) > 0 else None

    def relative_table(self, packed: PackedBatch, views: int) -> tuple[Tensor | None, Tensor | None]:
        """The rows [V, U, H] of the table that a batch's distances fall on, and [2 S - 1] the row of each distance."""
        if not hasattr(self, "rel_embeddings"):
            return None, None
        rows = table_rows(packed.length, self.buckets, self.reach)
        first, last = rows[0], rows[-1]
        table = self.rel_embeddings(torch.arange(first, last + 1, device=packed.first_rows.device))
        if hasattr(self, "LayerNorm"):
            table = self.LayerNorm(table)
        if not self.training:
            views = 1  # without dropout all views have the same table
        return table.repeat(views, 1, 1), distances_on(table.device, packed.length, self.buckets, self.reach)

    def forward(
        self, rows: Tensor, packed: PackedBatch, first_only: bool, with_hidden: bool, with_probs: bool, views: int
    ) -> layers.EncoderOutputs:
        """Embedded rows [N, H] through the layers; each of the batch's `views` parts has a dropout of the table."""
        table, distances = self.relative_table(packed, views)
        sources = [getattr(self, name) for name in ("rel_embeddings", "LayerNorm") if hasattr(self, name)]
        table_trains = any(x.requires_grad for module in sources for x in module.parameters())
        encoded = layers.EncoderOutputs(rows, packed, with_hidden)
        rows = encoded.rows
        for i, layer in enumerate(self.layer):
            convolves = i == 0 and self.conv is not None
            narrow = first_only and i + 1 == len(self.layer) and not convolves
            output, probs = layer(encoded.rows, packed, narrow, with_probs, table, distances, table_trains)
            encoded.add(self.conv(rows, output, packed) if convolves else output, probs)  # type: ignore[misc]
        return encoded


def position_kinds(config: DebertaV2Config) -> list[str]:
    """The kinds of relative attention in `pos_att_type`, a list or string ("c2p|p2c"), without "none" and ""."""
    kinds = config.pos_att_type or []
    if isinstance(kinds, str):
        kinds = [kind.strip().lower() for kind in kinds.split("|")]
    return [kind for kind in kinds if kind not in ("none", "")]


def relative_norm(config: DebertaV2Config) -> list[str]:
    return [kind.strip() for kind in str(getattr(config, "norm_rel_ebd", "none")).lower().split("|")]


def check_config(config: DebertaV2Config) -> None:
    """Raise ValueError for settings that this model would have to ignore or compute differently."""
    size, heads = config.hidden_size, config.num_attention_heads
    buckets, reach = getattr(config, "position_buckets", -1), config.max_relative_positions
    reach = reach if reach > 0 else config.max_position_embeddings
    problems = []
    if size % heads:
        problems.append(f"hidden_size {size} is no multiple of num_attention_heads {heads}")
    elif getattr(config, "attention_head_size", size // heads) != size // heads:
        problems.append(f"attention_head_size {config.attention_head_size} is not hidden_size / num_attention_heads")
    kinds = position_kinds(config)
    if unknown := sorted(set(kinds) - {"c2p", "p2c"}):
        problems.append(f"pos_att_type {'|'.join(unknown)}: only c2p and p2c are supported")
    if len(set(kinds)) != len(kinds):
        problems.append(f"pos_att_type {'|'.join(kinds)} names a kind twice")
    if unknown := sorted(set(relative_norm(config)) - {"layer_norm", "none"}):
        problems.append(f"norm_rel_ebd {'|'.join(unknown)}: only layer_norm and none are supported")
    if buckets > 0 and (buckets < 2 or reach - 1 <= buckets // 2):
        problems.append(f"position_buckets {buckets} does not fit max_relative_positions {reach}")
    if (kernel := getattr(config, "conv_kernel_size", 0)) > 0 and kernel % 2 == 0:
        problems.append(f"conv_kernel_size {kernel} is even")
    if config.pooler_hidden_size != size:
        problems.append(f"pooler_hidden_size {config.pooler_hidden_size} is not hidden_size {size}")
    if getattr(config, "z_steps", 0) > 1:
        problems.append(f"z_steps {config.z_steps}: the enhanced mask decoder is not supported")
    if problems:
        raise ValueError(f"This DeBERTa-V2 does not support its config: {'; '.join(problems)}.")


class DebertaV2PreTrainedModel(Checkpoints, PreTrainedModel):
    """What encoder and classifier share: configuration class, loading, initialisation."""

    config: DebertaV2Config
    config_class = DebertaV2Config
    base_model_prefix = "deberta"
    # A base checkpoint has heads of its pretraining that a classifier lacks; what a method adds starts anew.
    _keys_to_ignore_on_load_unexpected = [r"^(cls|lm_predictions|mask_predictions)\.", r"position_(ids|embeddings)"]

    def __init__(self, config: DebertaV2Config) -> None:
        check_config(config)
        super().__init__(config)
        self._keys_to_ignore_on_load_missing = added_patterns()

    @property
    def relative_query(self) -> str | None:
        """Which relative projections have their update: none (the reference's reading), key, or both (PEFT's).

        The first that computes the same (`same_relative_query`); None where all do.
        """
        attentions = (module for module in self.modules() if isinstance(module, DisentangledSelfAttention))
        updated = {name for attention in attentions for name in attention.shared_updates()}
        return same_relative_query(relative_query(self.config), updated) if updated else None

    @property
    def frozen_relative_query(self) -> bool | None:
        """Whether relative positions bypass an update, which PEFT would apply; None where all readings are the same."""
        return None if self.relative_query is None else self.relative_query != "both"

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # normal(0, initializer_range), biases 0; loaded tensors are left alone
        reset_added_parameters(module, self.config.initializer_range)  # the reference draws LoRA's A so here alone


class DebertaV2Model(DebertaV2PreTrainedModel):
    """The bare encoder, in place of `transformers.DebertaV2Model`."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.embeddings = DebertaV2Embeddings(config)
        self.encoder = DebertaV2Encoder(config, description_of(config))
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, first_token_only: bool = False, views: int = 1,
        packed: PackedBatch | None = None, sequence_lengths: Sequence[int] | None = None, **keywords: object,
    ) -> BaseModelOutput | tuple:  # fmt: skip
        """Encode a batch; arguments, results and errors as of `RobertaModel.forward`, without a pooler.

        Hidden states are returned of all layers or of none. The batch consists of `views` equal parts, each with its
        own dropout of the relative table.
        """
        layers.check_keywords(keywords)
        config = self.config
        with_probs = config.output_attentions if output_attentions is None else output_attentions
        with_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        first_token_only = first_token_only and not with_probs and not with_hidden
        batch, length, device = layers.input_shape(input_ids, inputs_embeds)

        if packed is None:
            packed = PackedBatch.from_mask(attention_mask, batch, length, device, True, sequence_lengths)
        rows = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds, packed)  # [N, H]
        encoded = self.encoder(rows, packed, first_token_only, with_hidden, with_probs, views)
        output = BaseModelOutput(
            last_hidden_state=encoded.first_tokens() if first_token_only else encoded.all_tokens(),
            hidden_states=tuple(encoded.hidden_states) if with_hidden else None,  # type: ignore[arg-type]
            attentions=tuple(encoded.attentions) if with_probs else None,
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class ContextPooler(nn.Module):
    """act(dense(dropout(first token))): [B, H] to [B, H]."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        self.dense = nn.Linear(config.pooler_hidden_size, config.pooler_hidden_size)
        self.dropout = nn.Dropout(config.pooler_dropout)
        self.activation = layers.activation(config.pooler_hidden_act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(self.dropout(hidden_states[:, 0])))


class DebertaV2ForSequenceClassification(DebertaV2PreTrainedModel):
    """DeBERTa-V2 with a classification or regression head, in place of transformers' class of that name.

    Its settings are those of `RobertaForSequenceClassification`, and in the config `lora_relative_query`.
    """

    accepts_loss_kwargs = False  # Trainer takes a forward with **keywords for one that divides by num_items_in_batch
    class_weights: Tensor | None = None

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.deberta = DebertaV2Model(config)
        self.pooler = ContextPooler(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        dropout = getattr(config, "cls_dropout", None)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)  # 0 counts
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
        sequence_lengths: Sequence[int] | None = None, **keywords: object,
    ) -> SequenceClassifierOutput | tuple:  # fmt: skip
        """Classify a batch; inputs, requests and errors as in `DebertaV2Model.forward`.

        Args:    labels: [B] int64 class ids (cross-entropy), [B] numbers for one label (mean squared error), or [B, C]
                 floats (cross-entropy against distributions); `config.problem_type`, where set, decides.
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
        encoded = self.deberta(
            **inputs, output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=True,
            first_token_only=layers.has_forward_of(self.pooler, ContextPooler),  # others may read all
            views=2 if two_view_weight else 1, **keywords,
        )  # fmt: skip
        pooled = self.pooler(encoded.last_hidden_state)  # [B, S, H] or [B, 1, H] to [B, H]
        logits = self.classifier(self.dropout(pooled))  # [B, C]

        weights = self.class_weights if self.training else None
        output = output_with_loss(
            config, logits, labels, "soft_label_classification", two_view_weight, encoded, weights
        )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()
