"""Seconds of an evaluation step, side by side with transformers + PEFT and the machine's own matmul.

    python benchmarks/eval.py [--only SST-2] [--pairs 5] [--bf16] [--earlier FOLDER]

As train_step.py, but for the forward pass without dropout or gradient, on batches of 8 and 32.
"""

from compare import Work, main

BF16 = True
ROBERTA, DEBERTA, XXLARGE = "roberta-base", "deberta-base", "deberta-xxlarge-3-layers"
WORKS = [
    Work("RTE B8", ROBERTA, "rte", 8, 0),
    Work("RTE B32", ROBERTA, "rte", 32, 0, BF16),
    Work("SST-2 B8", ROBERTA, "sst2", 8, 0),
    Work("SST-2 B32", ROBERTA, "sst2", 32, 0, BF16),
    Work("DeBERTa RTE B8", DEBERTA, "rte", 8, 0),
    Work("DeBERTa RTE B32", DEBERTA, "rte", 32, 0),
    Work("DeBERTa xxlarge dims, 3 layers, RTE B8", XXLARGE, "rte", 8, 0),
]

if __name__ == "__main__":
    main("evaluate", WORKS, __doc__)
