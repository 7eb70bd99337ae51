"""Names of other libraries that src/ uses though their documentation does not promise them, and why it needs each.

A test fails, naming them, when an upgrade removes one or changes the arguments of a method that we override, or when
the code uses one that is not listed here. Owner (a module or class): name: reason.
"""

PRIVATE_NAMES: dict[str, dict[str, str]] = {
    "transformers.trainer.Trainer": {
        "_evaluate": "an evaluation while training first checks that what trains is finite",
        "_finalize_training": "the last logged loss is averaged over processes; checkpoints are removed by their lists",
        "_get_dataloader": "evaluations read every row once, in order; errors of --dataloader_... flags name them",
        "_get_output_dir": "checkpoints are written under a temporary name",
        "_get_train_sampler": "group_by_length draws from seed and epoch, so that resumed runs and processes agree",
        "_init_training_state": "the best checkpoint is found where the one that is resumed from is",
        "_initial_num_input_tokens_seen": "tokens per second of a resumed run",
        "_load_best_model": "the best adapter is read as an adapter",
        "_load_callback_state": "a resumed run continues the sum of its losses",
        "_load_from_checkpoint": "an adapter is read as an adapter; errors name the damaged file",
        "_load_optimizer_and_scheduler": "errors name the damaged file; FSDP2 reads one process's file",
        "_load_rng_state": "dropout is drawn anew in another number of processes",
        "_load_scaler": "errors name the damaged file",
        "_prepare_for_training": "DeepSpeed loads a checkpoint without frozen parameters",
        "_prepare_inputs": "a recorded step reads the batch where it is computed",
        "_push_from_checkpoint": "a checkpoint is uploaded once it has its name",
        "_run_epoch": "a run that stopped or took its last step does not train on; the length-grouped order is set",
        "_save": "only what trains is saved",
        "_save_checkpoint": "checkpoints are written completely, then renamed",
        "_save_optimizer_and_scheduler": "FSDP2 writes one process's file; DeepSpeed leaves frozen parameters out",
        "_save_rng_state": "one process writes the random states of all into the checkpoint",
        "_total_loss_scalar": "the mean loss of a resumed run is of all its steps",
        "_tr_loss": "the loss since the last log, averaged over all processes",
        "_track_num_input_tokens": "the loss is checked where transformers already waits for the GPU",
        "create_accelerator_and_postprocess": "FSDP2 in mixed precision, and on CPUs",
        "get_batch_samples": "examples that fill an epoch's last batches are removed; micro-batches are weighed",
        "init_hf_repo": "errors of the Hub become messages",
        "is_deepspeed_enabled": "which backend runs",
        "is_fsdp_enabled": "which backend runs",
        "current_gradient_accumulation_steps": "transformers 5.17 divides every loss by it",
    },
    "transformers.trainer": {"OPTIMIZER_NAME": "a file of a checkpoint", "SCHEDULER_NAME": "a file of a checkpoint"},
    "transformers.trainer_pt_utils": {
        "AcceleratorConfig": "its defaults are left out of run.json",
        "BatchRebalanceSampler": "its seed is set: transformers has one order for all seeds",
        "LengthGroupedSampler": "its order is drawn from seed and epoch",
        "safe_globals": "random states are read without unpickling code",
    },
    "transformers.training_args.TrainingArguments": {
        "_n_gpu": "one process uses one GPU, and DataParallel never starts",
        "fsdp_plugin_args": "the version and precision of FSDP",
    },
    "transformers.integrations.deepspeed": {
        "deepspeed_load_checkpoint": "a checkpoint without frozen parameters is loaded",
        "set_hf_deepspeed_config": "a model is loaded completely before ZeRO-3 shards it",
        "unset_hf_deepspeed_config": "as above",
    },
    "transformers.modeling_utils.PreTrainedModel": {
        "_get_dtype_plan": "frozen weights stay in the file's fp16 until bf16 replaces them",
        "_hf_peft_config_loaded": "a folder with a model and an adapter is refused",
        "_init_weights": "new layers are drawn by transformers' own rule",
        "_input_embed_layer": "the input embeddings are found, and replaced, by their name",
        "_keys_to_ignore_on_load_missing": "LoRA and bottlenecks start anew on a base checkpoint",
        "_keys_to_ignore_on_load_unexpected": "the pretraining head is no weight that is missing a place",
        "_no_split_modules": "FSDP2 shards by layers",
        "_supports_sdpa": "pipelines and other code may ask for this attention",
    },
    "transformers.initialization": {"_is_hf_initialized": "which parameters were read from a file"},
    "transformers.configuration_utils.PreTrainedConfig": {
        "_attn_implementation": "our attention is our own, whatever the file asks for",
        "_commit_hash": "run.json records the revision of a Hub model",
    },
    "accelerate.accelerator.Accelerator": {
        "_models": "whether FSDP2 has been given the model",
        "dataloader_config": "evaluations read every row once",
    },
    "accelerate.state.AcceleratorState": {"fsdp_plugin": "FSDP2 on CPUs", "distributed_type": "FSDP2 on CPUs"},
    "datasets.Dataset": {"_fingerprint": "tokenised tables are kept by the content of what was tokenised"},
    "argparse.ArgumentParser": {"_option_string_actions": "an unknown flag is answered with similar flags"},
    "torch._C": {
        "_TorchDispatchModeKey": "the compiled kernels stand back under modes that watch operations",
        "_are_functorch_transforms_active": "the compiled kernels stand back under torch.func",
        "_functorch": "its functions, below",
        "_get_dispatch_mode": "the compiled kernels stand back under modes that watch operations",
        "_has_storage": "a batch of gradients (is_grads_batched) has none",
        "_is_tracing": "the compiled kernels stand back while torch.jit traces",
        "_len_torch_dispatch_stack": "attention scores are not changed in place under modes that may keep them",
    },
    "torch._C._functorch": {
        "get_unwrapped": "whether vmap batches a tensor within another transform",
        "is_batchedtensor": "the values of a tensor that vmap batches can't be read",
        "is_functorch_wrapped_tensor": "whether torch.func transforms a tensor",
    },
    "torch._dynamo": {"list_backends": "an unknown --torch_compile_backend is refused with the known ones"},
    "torch.autograd.forward_ad": {"_current_level": "the compiled kernels stand back under forward-mode derivatives"},
    "torch.distributed.run": {"parse_args": "the launcher's options", "run": "the launcher without its traceback"},
    "torch.nn.parallel.DistributedDataParallel": {
        "_set_params_and_buffers_to_ignore_for_model": "packed weights are not copied between processes",
    },
    "torch.ops.mkldnn": {
        "_linear_pointwise": "oneDNN's product with a bias, faster than addmm on CPUs",
        "_reorder_linear_weight": "a frozen weight in the layout that oneDNN multiplies fastest",
    },
    "torch.utils._pytree": {"tree_map": "optimizer states are nested"},
    "torch": {
        "_foreach_add_": "the gradients of a recorded step are added by a few kernels",
        "_foreach_zero_": "as above",
    },
    "torch.Tensor": {
        "_backward_hooks": "a step is not recorded where something watches a gradient",
        "_post_accumulate_grad_hooks": "as above",
        "_version": "whether a merged weight was changed since",
    },
    "torch.nn.Module": {
        "_apply": "a packed weight stays as it is when a model is moved to the CPU that it is on",
        "_forward_hooks": "the embedding is called where someone watches it",
        "_forward_pre_hooks": "PEFT's hook for an adapter per example is refused",
        "_load_from_state_dict": "a merged layer is unmerged before other tensors are loaded",
        "_save_to_state_dict": "a merged layer is saved once",
    },
}
# In packages that need not be installed
OPTIONAL_NAMES = {"deepspeed": {"_hp_mapping": "ZeRO's copy of a parameter in fp32"}}
