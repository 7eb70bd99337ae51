"""Fast operations beside the torch expressions that define them, packed batches, sharded tensors."""

from typing import TYPE_CHECKING

from lora_nlu.lazy import lazy_names

if TYPE_CHECKING:
    from lora_nlu.ops.kernels import Dropout as Dropout
    from lora_nlu.ops.kernels import Linear as Linear
    from lora_nlu.ops.kernels import attention as attention
    from lora_nlu.ops.kernels import dropout as dropout
    from lora_nlu.ops.kernels import linear as linear
    from lora_nlu.ops.packing import PackedBatch as PackedBatch

__getattr__, __all__ = lazy_names(__name__, __file__)
