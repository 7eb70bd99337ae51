"""The trainer under FSDP2 and DeepSpeed, which shard parameters over processes. Only their runs import this module."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations import deepspeed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from lora_nlu.files import ADAPTER_WEIGHTS
from lora_nlu.ops.sharding import copy_into, load_optimizer_state, optimizer_state, parameters, writable_parameters
from lora_nlu.ops.tensors import load_torch_file
from lora_nlu.training.checkpoints import explain_damage
from lora_nlu.training.trainer import AdapterTrainer


@contextmanager
def complete_loading(args: Any) -> Iterator[None]:
    """Load a model completely in every process; DeepSpeed ZeRO-3 would read shards. It shards the model afterwards."""
    deepspeed.unset_hf_deepspeed_config()
    yield
    if args.deepspeed:
        deepspeed.set_hf_deepspeed_config(args.hf_deepspeed_config)


class ShardedTrainer(AdapterTrainer):
    """`AdapterTrainer` under FSDP2 or DeepSpeed.

    Under FSDP2 a checkpoint's files are those of one process, so that any backend and number of processes can resume
    from it. DeepSpeed has a format of its own for the optimizer, in which every process writes its shard.
    """

    def create_accelerator_and_postprocess(self) -> None:
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        if self.args.fsdp and half:  # by default gradients are summed and the loss returned in half precision
            policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
            self.args.fsdp_plugin_args["mixed_precision_policy"] = policy
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and self.args.world_size > 1 and not self.is_fsdp_enabled:
            # accelerate ignores --fsdp on CPUs without a message; torch can shard there as well
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type, self.is_fsdp_enabled = DistributedType.FSDP, True

    @property
    def _gathers_state(self) -> bool:
        """Whether the parameters to save are gathered here; transformers gathers those of a full model under ZeRO."""
        return self.is_fsdp_enabled or (self.saves_part and self.is_deepspeed_enabled)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers', but only the parameters that are saved are gathered."""
        if not self._gathers_state:
            super().save_model(output_dir, _internal_call)
            return
        state = parameters(self.model, trained_only=self.saves_part)
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._gathers_state:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        states = {SCHEDULER_NAME: self.lr_scheduler.state_dict()}
        if self.is_fsdp_enabled:
            states[OPTIMIZER_NAME] = optimizer_state(self.optimizer)
        else:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        if self.args.should_save:
            for name, state in states.items():
                torch.save(state, Path(output_dir, name))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if not resume_from_checkpoint or not self.is_deepspeed_enabled or not self.saves_part:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        with explain_damage(resume_from_checkpoint):  # transformers' call would require the frozen parameters in it
            deepspeed.deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        is_adapter = Path(resume_from_checkpoint, ADAPTER_WEIGHTS).is_file()
        if not is_adapter and not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with writable_parameters(self.model):
            if is_adapter:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                copy_into(self.model, load_file(Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)))

    def _read_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not checkpoint or not self.is_fsdp_enabled:
            super()._read_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer_state(self.optimizer, load_torch_file(Path(checkpoint, OPTIMIZER_NAME)))
        self.lr_scheduler.load_state_dict(load_torch_file(Path(checkpoint, SCHEDULER_NAME)))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and not self.accelerator._models:
            # FSDP2 takes a model only with its optimizer, and transformers creates none where nothing is trained
            self.model_wrapped, _ = self.accelerator.prepare(self.model, self.create_optimizer())
        return super().evaluation_loop(*args, **kwargs)
