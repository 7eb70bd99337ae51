"""Seconds of a training step, side by side with transformers + PEFT and the machine's own matmul.

    python benchmarks/train_step.py [--only RTE] [--pairs 5] [--bf16] [--earlier FOLDER]

Each row of the table is one interleaved run of processes that hold the same architecture with random weights: in turn,
a step of ours and one of the peer on the same batch (real lengths, a new batch each pair), then that batch's dense
products alone. Forward with dropout, loss, backward, clipping, AdamW; fp32. Ratios are medians over pairs. With
`--bf16` ours in bf16 and the peer under bf16 autocast take their turns too, and the products also run in bf16; with
`--earlier`, ours as another source tree has it (git worktree add FOLDER COMMIT) in fp32.
"""

from compare import Work, main

DYNAMIC, TO_128, TO_512 = 0, 128, 512
BF16 = True
ROBERTA, DEBERTA, XXLARGE = "roberta-base", "deberta-base", "deberta-xxlarge-3-layers"
WORKS = [
    Work("RTE B16", ROBERTA, "rte", 16, DYNAMIC, BF16),
    Work("SST-2 B16", ROBERTA, "sst2", 16, DYNAMIC, BF16),
    Work("CoLA B32", ROBERTA, "cola", 32, DYNAMIC),
    Work("STS-B B16", ROBERTA, "stsb", 16, DYNAMIC),
    Work("MRPC-like B16", ROBERTA, "mrpc-like", 16, DYNAMIC),
    Work("64 tokens each B16", ROBERTA, "equal-64", 16, DYNAMIC),
    Work("256 tokens each B8", ROBERTA, "equal-256", 8, DYNAMIC),
    Work("RTE B16, peer padded to 128", ROBERTA, "rte", 16, TO_128),
    Work("CoLA B32, peer padded to 128", ROBERTA, "cola", 32, TO_128),
    Work("RTE B16, peer padded to 512", ROBERTA, "rte", 16, TO_512),
    Work("CoLA B32, peer padded to 512", ROBERTA, "cola", 32, TO_512),
    Work("DeBERTa RTE B16", DEBERTA, "rte", 16, DYNAMIC, BF16),
    Work("DeBERTa SST-2 B16", DEBERTA, "sst2", 16, DYNAMIC),
    Work("DeBERTa 64 tokens each B16", DEBERTA, "equal-64", 16, DYNAMIC),
    Work("DeBERTa xxlarge dims, 3 layers, RTE B8", XXLARGE, "rte", 8, DYNAMIC),
    Work("DeBERTa xxlarge dims, 3 layers, SST-2 B8", XXLARGE, "sst2", 8, DYNAMIC),
]

if __name__ == "__main__":
    main("train", WORKS, __doc__)
