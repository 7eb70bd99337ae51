"""Training steps on a GPU as CUDA graphs: a step is recorded once for each shape, then replayed by one launch.

A small batch leaves a GPU waiting for the host, which launches more than a thousand kernels a step. Batches are padded
to few lengths, and packed into few numbers of rows, so that shapes repeat; what fills them up changes nothing beyond
rounding. Dropout draws anew in every replay.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_nlu.errors import first_line
from lora_nlu.ops.packing import PackedBatch, lengths_of

logger = logging.getLogger(__name__)
MOST = 64  # graphs; batches of other shapes run without one
LENGTHS, ROWS = 32, 64  # smallest distance between two lengths of a batch, and between two numbers of packed rows
PADDING = {"input_ids": None, "attention_mask": 0, "token_type_ids": 0}  # [B, S] inputs, and what they are padded with


@dataclass(frozen=True)
class Recorded:
    """A step of one shape: where a replay reads its inputs, and what it has computed."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: dict[str, Any]
    loss: Tensor
    trained: list[int]  # numbers of the parameters that get a gradient


class GraphedSteps:
    """Adds the gradients of a batch to the parameters' `.grad`, by a graph wherever there is one of its shape.

    The first batch of a shape runs one operation at a time; the second is recorded. `loss_of` computes the loss of a
    batch's inputs on the GPU, and nothing in it may wait for the GPU or do other work: a replay repeats only what the
    GPU does. `longest`: up to this length a batch may be padded; `pad_id`: with what. `half`: the dtype of the autocast
    in `loss_of`, to which frozen weights are then converted once instead of in every step, with the same rounding.
    `scale`: of fp16's gradient scaler, which keeps its factor in a tensor; the gradients are those of the scaled loss.
    """

    def __init__(
        self, model: nn.Module, loss_of: Callable[[dict[str, Any]], Tensor], longest: int, pad_id: int,
        half: torch.dtype | None = None, scale: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.halves = halves_of(model, half)
        self.loss_of, self.longest, self.pad_id, self.scale = loss_of, longest, pad_id, scale
        self.gradients: dict[int, Tensor] = {}  # what graphs add to, by the parameter's number
        self.recorded: dict[tuple, Recorded] = {}
        self.seen: set[tuple] = set()
        self.has_failed = False
        self.replays = 0
        self.stream: Any = None
        if any(p.is_cuda for p in self.parameters):
            self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def step(self, inputs: dict[str, Any]) -> Tensor | None:
        """The loss of a batch; None, and no gradients, if its mask is not one of padding on the right."""
        sized = with_fixed_size(inputs, self.longest, self.pad_id)
        if sized is None:
            return None
        inputs, rows = sized
        shapes = [(name, (x.shape, x.dtype) if isinstance(x, Tensor) else x) for name, x in inputs.items()]
        key = (rows, *shapes)
        step = self.recorded.get(key)
        if step is None and self.stream and key in self.seen and len(self.recorded) < MOST and not self.has_failed:
            step = self._record(key, inputs, rows)
        self.seen.add(key)
        if step is None:
            return self._run(inputs, rows)
        for name, x in inputs.items():
            if isinstance(x, Tensor):
                step.inputs[name].copy_(x)
        self._attach_gradients(step.trained)
        step.graph.replay()
        self.replays += 1
        return step.loss.clone()

    def _compute(self, inputs: dict[str, Any], rows: int | None) -> tuple[Tensor, list[int], list[Tensor]]:
        """The loss, the numbers of the parameters that it depends on, and their gradients."""
        if rows is not None:
            inputs = inputs | {"packed": PackedBatch.of_size(inputs["attention_mask"], rows)}
        with converted(self.halves):
            loss = self.loss_of(dict(inputs))
            scaled = self.scale(loss) if self.scale else loss
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        trained = [i for i, gradient in enumerate(gradients) if gradient is not None]
        return loss.detach(), trained, [gradients[i] for i in trained]

    def _run(self, inputs: dict[str, Any], rows: int | None) -> Tensor:
        """A step without a graph, on the stream that records: libraries are set up there before they are recorded."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            loss, trained, gradients = self._compute(inputs, rows)
            self._attach_gradients(trained)
            torch._foreach_add_([self.gradients[i] for i in trained], gradients)
        if self.stream:
            torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def _record(self, key: tuple, inputs: dict[str, Any], rows: int | None) -> Recorded | None:
        """Record the step of a batch whose shape has run before; None, with a line that says why, if that fails."""
        own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: the thread that pins batches in memory goes on
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                loss, trained, gradients = self._compute(own, rows)
                torch._foreach_add_([self.gradients[i] for i in trained], gradients)
        except (RuntimeError, KeyError) as e:
            reason = first_line(e.__context__ or e)  # the end of recording fails after what fails in it
            logger.warning("Training without CUDA graphs, which is slower: %s.", reason)
            logger.debug("recording", exc_info=True)
            self.has_failed = True
            self.recorded.clear()
            torch.cuda.set_stream(current)
            # torch leaves its generator as if it were still recording
            fresh = torch.Generator(current.device).manual_seed(torch.cuda.initial_seed() + self.replays + 1)
            torch.cuda.default_generators[current.device.index].graphsafe_set_state(fresh.graphsafe_get_state())
            return None
        self.recorded[key] = Recorded(graph, own, loss, trained)
        return self.recorded[key]

    def _attach_gradients(self, trained: list[int]) -> None:
        """Let the `.grad` of these parameters be the tensors that graphs add to, with the values that they have."""
        new = []
        for i in trained:
            p = self.parameters[i]
            if i not in self.gradients:
                self.gradients[i] = torch.empty_like(p, memory_format=torch.contiguous_format)
            if p.grad is None:
                new.append(self.gradients[i])
            elif p.grad is not self.gradients[i]:
                self.gradients[i].copy_(p.grad)
            p.grad = self.gradients[i]
        if new:
            torch._foreach_zero_(new)


def halves_of(model: nn.Module, half: torch.dtype | None) -> list[tuple[nn.Parameter, Tensor]]:
    """The fp32 parameters that autocast would convert to `half` in each step and that don't train, and them converted.

    None of a layer that also reads its weight in fp32.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv1d)] if half else []
    layers = [layer for layer in layers if not getattr(layer, "reads_weight", False)]
    found = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    frozen = [p for p in found if not p.requires_grad and type(p) is nn.Parameter and p.dtype is torch.float32]
    return [(p, p.detach().to(half)) for p in frozen]


@contextmanager
def converted(halves: list[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Let parameters have these values within the block."""
    before = [p.data for p, _ in halves]
    try:
        for p, half in halves:
            p.data = half
        yield
    finally:
        for (p, _), full in zip(halves, before, strict=True):
            p.data = full


def with_fixed_size(inputs: dict[str, Any], longest: int, pad_id: int) -> tuple[dict[str, Any], int | None] | None:
    """Inputs padded to one of few lengths, and to how many rows they are packed.

    Inputs without padding have no mask and None rows. None for a mask that is not one of padding on the right. Waits
    for the GPU once if the inputs have no `sequence_lengths`.
    """
    inputs = dict(inputs)
    lengths = inputs.pop("sequence_lengths", None)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None or ids.dim() != 2:
        return None
    if mask is None:
        return inputs, None
    batch, length = ids.shape
    lengths = lengths_of(mask.cpu()) if lengths is None else lengths
    if mask.shape != ids.shape or lengths is None:
        return None
    count, size = sum(lengths), rounded(length, LENGTHS)
    size = size if size <= longest else length
    if count == batch * length and size == length:
        return {name: x for name, x in inputs.items() if name != "attention_mask"}, None
    padded = dict(inputs)
    for name, value in PADDING.items():
        if name in inputs and size > length:
            value = pad_id if value is None else value
            padded[name] = F.pad(inputs[name], (0, size - length), value=value)
    return padded, min(rounded(max(count, batch + 1), ROWS), batch * size)


def rounded(n: int, least: int) -> int:
    """n, or the next multiple of a step that is at most an eighth of n, or `least` if that is more."""
    step = max(least, 2 ** (n.bit_length() - 1) // 8)
    return -(-n // step) * step
