"""The pico model and corpus of the tests: as small as a real Megatron model can be, with every part in place."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 96
PADDED_VOCABULARY = 128
LAYERS = 4

MODEL = (
    f"--num-layers {LAYERS} --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --seq-length 32 --max-position-embeddings 32 --swiglu --normalization RMSNorm "
    "--norm-epsilon 1e-5 --position-embedding-type rope --untie-embeddings-and-output-weights --disable-bias-linear "
    "--attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer "
    f"--vocab-size {VOCABULARY} --padded-vocab-size {PADDED_VOCABULARY}"
).split()

MOE = (
    "--num-experts 4 --moe-router-topk 2 --moe-router-dtype fp32 --moe-ffn-hidden-size 48 "
    "--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01"
).split()

TRAINING = (
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --clip-grad 1.0 "
    "--weight-decay 0.1 --adam-beta2 0.95 --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--tensorboard-log-interval 1 --ckpt-format torch_dist --seed 1234 --distributed-timeout-minutes 2"
).split()

READERS = ["--num-workers", "2"]
"""Megatron's default, which users have: processes that read ahead. For runs that are killed, stopped or resumed."""


def write_corpus(prefix: Path, documents: int = 200, seed: int = 0) -> Path:
    """An indexed dataset of random walks over the vocabulary: learnable, and different for every seed."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        steps = random.integers(0, 2 + seed, int(random.integers(20, 120)))
        tokens = np.append(np.cumsum(steps) % (VOCABULARY - 2), VOCABULARY - 1)
        builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [len(tokens)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def train(
    data: Path, iterations: int, metrics: Path | None = None, moe: bool = False, cache: Path | None = None
) -> list[str]:
    """The flags of a pico run. It reads by itself: starting two processes takes as long as five of its steps."""
    flags = [*MODEL, *(MOE if moe else []), *TRAINING, "--train-iters", str(iterations)]
    flags += ["--num-workers", "0", "--train-data-path", str(data)]
    flags += ["--data-cache-path", str(cache or data.parent / "cache")]
    return flags + (["--btx-metrics", str(metrics)] if metrics else [])
