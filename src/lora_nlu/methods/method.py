"""What the rest of the program asks of a method: the fields of one row of the table in table.py."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Flag:
    """A command-line flag of one method or several; the value is also an attribute of the model's config."""

    name: str
    help: str
    kind: type = str  # what its text is converted to: bool, int, float or str
    default: Any = None
    unset: Any = None  # the value that a command line or config without it stands for; configs do not record this value
    options: Mapping[str, Any] = field(default_factory=dict)  # further arguments of argparse: nargs, const
    # parse(name, text, config of the model): what the config gets; None for the value itself. Raises UsageError.
    parse: Callable[[str, str, Any], Any] | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    decides: bool = False  # whether the same tensors compute something else with another value of the flag
    always: bool = False  # whether it is allowed without the method's switch: an adapter file may choose the method
    in_config: bool = True  # False for a path


@dataclass(frozen=True, eq=False)
class Method:
    """A method of training. A field that the method does not need stays at its default.

    `trained` below is the `Description` of a model's config, as `description_of(model.config)` reads it; its
    `settings` are the config's values of the method's flags.
    """

    # For people
    name: str  # in files and in `Description.method`
    label: str  # in reports and plots, as colour and marker; run.json records the three for them
    color: str
    marker: str
    title: str = ""  # at the top of a model card; "" for the label
    part: str = ""  # what trains in the encoder, in the table that a run prints at its end

    # Choosing it
    # The config's attributes, with their values, that choose the method; the first is its switch, a flag.
    chosen_by: Mapping[str, Any] = field(default_factory=dict)
    earlier: Mapping[str, Any] = field(default_factory=dict)  # the same in configs of earlier versions
    flags: tuple[Flag, ...] = ()  # those that it reads; a flag of several methods is one object
    settings: tuple[str, ...] = ()  # further attributes of the config that it reads
    path_flag: str = "adapter_path"  # the flag that reads what it trained
    combines: bool = False  # whether it may be chosen together with a method that adds parameters
    # missing(flags): what the switch needs and the command line lacks, as a message; "" if nothing.
    missing: Callable[[Any], str] | None = None
    # read(config): the fields of `Description` that it sets; None if the settings choose nothing to train (rank 0).
    # Raises ValueError, naming the config's attribute.
    read: Callable[[Any], dict[str, Any] | None] | None = None

    # What trains
    # Pattern of the names of parameters that it adds to an encoder. Their modules have the method's name as `method`,
    # and `reset_added_parameters(std)`, which draws them by torch.nn.init: normally with `std` in a DeBERTa, else None.
    added: str | None = None
    # Pattern of the names of parameters that train in the encoder; None if none does (the head always does). Frozen
    # tensors that adapter folders contain, such as VeRA's matrices, match `added` and not this.
    state: str | None = None
    freezes: bool = True  # False if everything trains, and runs save the complete model
    shards: bool = True  # whether FSDP2 and ZeRO-3 may shard what it adds
    # layer(trained, target, number, in_features, out_features): the linear layer that is one of `TARGETS` in this
    # encoder layer; None for a plain one. Called while the model is built.
    layer: Function | None = None
    # linear(in_features, out_features, r, lora_alpha, bias=, lora_dropout=, use_rslora=): a layer with the update, of a
    # variant of LoRA; `lora.new_layer` and `lora.rebuild` put it into models.
    linear: Function | None = None
    # block(trained, hidden_size, after_attention): the module at the end of one half of each encoder layer; None for
    # none. Called while the model is built.
    block: Function | None = None
    # start(model): sets the parameters that start from the base weight W, such as PiSSA's from singular vectors. Called
    # after the base model's weights are loaded, and after `rebuild`; before an adapter's tensors are copied into the
    # model and before the parameters that train are marked. A checkpoint of a complete model may already have set
    # some: leave those for which `ops.tensors.is_loaded` is true.
    # `base_fingerprint` and a DeBERTa's relative query read W by a layer's `frozen_weight()`.
    start: Callable[[Any], None] | None = None

    # A step
    # before_steps(model): replaces base weights by those that training steps multiply by (PiSSA's residual W_res).
    # Called when a run's trainer is made, and after a checkpoint is loaded into its model. The model's
    # `restore_weights` puts the base weights back.
    before_steps: Callable[[Any], None] | None = None
    loss_term: Function | None = None  # loss_term(model): a scalar added once to the mean loss of each training step
    # after_step(model): an object for one run. Its `step(number, total)` is called after optimizer step `number` of
    # `total`, while the gradients, clipped, are still there; its `state_dict()` and `load_state_dict(state)`, of
    # tensors and numbers, are saved in checkpoints and read on resuming. Its `begin(total)`, if it has one, is called
    # before the first step, and may raise UserError.
    after_step: Function | None = None
    # parameter_groups(model, groups, learning_rate): the optimizer's groups, from the trainer's ({"params",
    # "weight_decay"}); a group may set its own "lr".
    parameter_groups: Callable[[Any, list[dict[str, Any]], float], list[dict[str, Any]]] | None = None

    # Files
    # `peft_type` in adapter_config.json: the usual one, then that of a DeBERTa whose relative query lacks the update.
    # PEFT refuses a folder whose type it does not have, and so never computes something else with it.
    peft_types: tuple[str, ...] = ()
    in_peft: bool = False  # whether PEFT has the method and loads folders of the first of those types
    peft_weights: str | None = None  # pattern of the parameters whose keys end in `.weight` there
    peft_keys: tuple[str, ...] = ()  # keys of adapter_config.json that, if true, tell it from others of its type
    # Values of init_lora_weights in adapter_config.json that tell PEFT's folders of this method from others of its
    # type. Our own folders are told by the method's name in their run metadata.
    peft_inits: tuple[str, ...] = ()
    # rebuild(model, adapter, lora_alpha): gives a loaded model the layers of an `Adapter`, with new tensors; None if it
    # adds no layers.
    rebuild: Callable[[Any, Any, float | None], None] | None = None
    # to_peft(adapter): this method's keys of adapter_config.json, beside those that all methods, or all with ranks,
    # have. from_peft(config): the fields of `Adapter` that these keys set; raises UserError. to_adapter(model): fields
    # of `Adapter` too, read from a model's layers.
    to_peft: Callable[[Any], dict[str, Any]] | None = None
    from_peft: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    to_adapter: Callable[[Any], dict[str, Any]] | None = None
    # read_config(path, config): an adapter_config.json that is not checked yet, with its keys changed to LoRA's, which
    # the checks expect. Raises UserError.
    read_config: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None
    peft_settings: tuple[str, ...] = ()  # its keys of adapter_config.json, beside LoRA's
    # to_file(adapter): an `Adapter` whose tensors, ranks and alphas are those that a folder contains.
    # from_file(adapter): the reverse. Both raise UserError.
    to_file: Callable[[Any], Any] | None = None
    from_file: Callable[[Any], Any] | None = None
    facts: Callable[[Any], dict[str, Any]] | None = None  # facts(adapter): lines of `inspect` and of the model card
    # load_frozen(model, adapter): gives a model that has the adapter's layers the tensors of `Adapter.frozen`. Raises
    # UserError if they don't fit.
    load_frozen: Callable[[Any, Any], None] | None = None
    # The parameters that a file must contain for each layer with an update, if the method has ranks.
    tensors: tuple[str, ...] = ("lora_A", "lora_B")
    rank_of: str = "lora_A"  # the parameter of a layer whose first size is the layer's rank
    # scaling(adapter, rank, alpha): the factor of a layer's update, where it is not alpha / rank or alpha / sqrt(rank).
    scaling: Callable[[Any, int, float], float] | None = None
    to_config: Callable[[Any], None] | None = None  # to_config(model): writes its layers' settings to its config
    # merge(model): weights by name; with these in place of its own, the model without the method computes the same.
    # None for a method that no such weights can replace.
    merge: Callable[[Any], dict[str, Any]] | None = None
    # describe(model): what run.json records of it beside its name, in plain values.
    describe: Callable[[Any], dict[str, Any]] | None = None
    # count(model): how many parameters train in the encoder; None if the number is that of all `state`.
    count: Callable[[Any], int] | None = None

    @property
    def has_ranks(self) -> bool:
        """Whether it updates linear layers, each with a rank: LoRA or a variant of it, in PEFT's format."""
        return self.linear is not None

    @property
    def has_alpha(self) -> bool:
        """Whether its update is scaled by an alpha."""
        return any(flag.name == "lora_alpha" for flag in self.flags)

    @property
    def choice(self) -> str:
        """The flags that, after the switch, choose it among the methods of that switch: "--lora_variant dora"."""
        return " ".join(f"--{name} {value}" for name, value in [*self.chosen_by.items()][1:])

    @property
    def switch(self) -> str:
        """The flag that turns the method on; "" for the one that needs none."""
        return next(iter(self.chosen_by), "")
