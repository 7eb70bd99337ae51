"""Fine-tune, evaluate or predict with LoRA on a GLUE task or on files of your own: flags in, results out.

    python run_glue.py --model_name_or_path roberta-base --task_name mnli --do_eval --output_dir output/eval \
        --apply_lora --lora_r 8 --lora_alpha 16 --lora_path roberta_base_lora_mnli.bin
"""

import os
import shlex
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # before the imports that take seconds, and that another Python lacks
    if missing := [name for name in ("lora_nlu", "transformers") if not find_spec(name)]:
        activate = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "activate"
        remedy = f"source {shlex.quote(os.path.relpath(activate))}"
        if not activate.is_file():
            remedy = "bash scripts/demo.sh, which makes .venv (README.md has other ways)"
        sys.exit(f"run_glue.py: error: {sys.executable} has no {missing[0]}. Do this first: {remedy}")
    if {"-h", "--help"} & {*sys.argv[1:]}:
        from lora_nlu.training.help import help_text

        print(help_text())
        sys.exit()

from transformers import DataCollatorWithPadding

from lora_nlu.data.glue import HUB_DATASET
from lora_nlu.data.metrics import compute_metrics
from lora_nlu.hub import look_for_hub
from lora_nlu.models.loading import load_config
from lora_nlu.training import processes
from lora_nlu.training.checks import choose_metrics
from lora_nlu.training.inputs import read_examples, starting_head, tokenize_examples, weights_of_classes
from lora_nlu.training.metadata import run_metadata
from lora_nlu.training.model import load_adapter, prepare_model
from lora_nlu.training.output_folder import check_all_alike, check_output_dir, locked, record_evaluation
from lora_nlu.training.parsing import parse_arguments
from lora_nlu.training.processes import say
from lora_nlu.training.runs import (
    closing_table,
    describe_run,
    evaluate,
    loaded_weights,
    predict,
    train,
    trainer_class,
)


def main(argv: list[str]) -> None:
    flags = model_args, data_args, args = parse_arguments(argv, os.environ)
    name, start = model_args.model_name_or_path, model_args.adapter_source
    if args.process_index == 0:
        check_output_dir(args.output_dir, args.overwrite_output_dir)
    glue = HUB_DATASET if data_args.task_name and not data_args.glue_dir else None
    say(args, *look_for_hub(name, start, model_args.config_name, model_args.tokenizer_name, glue))

    # Data. The base's config and the adapter come first: their labels give the examples' labels their class ids.
    config = load_config(model_args.config_name or name, **model_args.hub)
    adapter = load_adapter(flags, config)
    examples, head = read_examples(flags, adapter, starting_head(flags, config, adapter))
    class_weights = weights_of_classes(flags, examples)

    # Model
    model, tokenizer, fingerprints = prepare_model(flags, config, adapter, head, examples.labels)
    tables, max_length = tokenize_examples(flags, examples, config, tokenizer)
    metrics = choose_metrics(args, data_args.task, examples.is_regression)
    padding = "max_length" if data_args.pad_to_max_length else "longest"
    trainer = trainer_class(args)(
        model=model,
        args=args,
        train_dataset=tables.get("train"),
        eval_dataset=next((table for split, table in tables.items() if split.startswith("validation")), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer, padding=padding, max_length=max_length),
        compute_metrics=lambda p: compute_metrics(metrics, p.predictions, p.label_ids),
        class_weights=class_weights,
        metadata=run_metadata(flags, model, examples, tables, max_length, fingerprints, class_weights),
    )
    check_all_alike(trainer, tables)

    # Train, score, report
    with locked(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        if args.do_train:
            weights = train(trainer, args.overwrite_output_dir)
        else:
            weights = loaded_weights(trainer)
            record_evaluation(trainer, start or name, weights)
        scores = evaluate(trainer, tables, examples, metrics[0], weights) if args.do_eval else {}
        if args.do_train:
            describe_run(trainer, scores, metrics[0])
        files = predict(trainer, tables, examples, weights) if args.do_predict else []
    say(args, closing_table(trainer, scores, metrics[0], tables), *(f"  predictions: {path}" for path in files))


if __name__ == "__main__":
    processes.run(main, sys.argv, os.environ)
