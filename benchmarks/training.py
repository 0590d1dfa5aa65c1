"""Speed of training on this machine, for a dense model and a MoE: tokens/s, TFLOP/s per GPU, share of the peak, memory.

    python benchmarks/training.py --output FOLDER        writes FOLDER/training.json and each model's log

Each model is trained by the real program (torch.distributed.run -m megatron_btx.pretrain) on random tokens; step times
are the differences of the time stamps in its --btx-metrics. Without a GPU a pico model takes the same path: that tests
this script and measures nothing, and its record says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_btx.cost import flops as numbers
from megatron_btx.cost.flops import ModelShape

REPOSITORY = Path(__file__).resolve().parent.parent

BF16_PEAK_FLOPS = {
    "NVIDIA H200": 989.4e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}
"""Dense bf16 peak by torch's device name, from NVIDIA's data sheets (SXM modules, without sparsity)."""

EXPERTS, TOPK = 4, 2


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_groups: int
    seq_length: int
    vocabulary: int

    def flags(self) -> list[str]:
        """Megatron's flags."""
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --ffn-hidden-size {self.ffn} "
            f"--num-attention-heads {self.heads} --group-query-attention --num-query-groups {self.kv_groups} "
            f"--seq-length {self.seq_length} --max-position-embeddings {self.seq_length} --swiglu "
            "--normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
            "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --tokenizer-type NullTokenizer "
            f"--vocab-size {self.vocabulary - 1} --padded-vocab-size {self.vocabulary}"
        ).split()

    def model(self, moe: bool) -> ModelShape:
        """The dense model, or the mixture of EXPERTS experts of the same width."""
        dense = ModelShape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            groups=self.kv_groups,
            channels=self.hidden // self.heads,
            ffn=self.ffn,
            gated=True,
            vocabulary=self.vocabulary,
        )
        if not moe:
            return dense
        return dataclasses.replace(dense, mixtures=self.layers, experts=EXPERTS, topk=TOPK, expert_ffn=self.ffn)


FULL = Shape(layers=22, hidden=2048, ffn=5632, heads=32, kv_groups=4, seq_length=4096, vocabulary=32000)
PICO = Shape(layers=2, hidden=64, ffn=176, heads=4, kv_groups=2, seq_length=64, vocabulary=256)

FLOPS_FORMULA = "per token: 6 x (weights multiplied for it) + 6 x layers x hidden x sequence (causal attention, halved)"


def flops_per_token(shape: Shape, moe: bool) -> float:
    """Floating-point operations of forward and backward, as FLOPS_FORMULA says; recomputation would not count."""
    return numbers.training_flops(shape.model(moe), 1, shape.seq_length)


def training_bytes(shape: Shape, moe: bool, micro_batch: int) -> float:
    """A cautious estimate of the memory for training in mixed precision with Adam, without recomputation.

    18 bytes per parameter (bf16 weight, fp32 gradient, master weight and two moments); activations as the local layers
    keep them, and half of it again for what kernels need in between.
    """
    model = shape.model(moe)
    parameters = numbers.all_weights(model)
    used = TOPK if moe else 1
    per_token_layer = 2 * (8 * shape.hidden + used * (3 * shape.ffn + 2 * shape.hidden))
    activations = micro_batch * shape.seq_length * (shape.layers * per_token_layer + 12 * shape.vocabulary)
    return 18.0 * parameters + 1.5 * activations


def fit(moe: bool, memory_bytes: float) -> tuple[Shape, int]:
    """The largest model and micro-batch that fit: all layers if possible, else fewer of the same width."""
    for layers in (22, 16, 11, 6, 2):
        for micro_batch in (4, 2, 1):
            shape = dataclasses.replace(FULL, layers=layers)
            if training_bytes(shape, moe, micro_batch) < 0.85 * memory_bytes:
                return shape, micro_batch
    raise SystemExit(f"error: {memory_bytes / 1e9:.0f} GB of GPU memory hold no model of this benchmark")


def measured_matmul_flops(device: str, size: int) -> float:
    """Median rate of a square matrix product, bf16 on a GPU, fp32 on the CPU, in FLOP/s."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / statistics.median(seconds[3:])


def write_corpus(prefix: Path, vocabulary: int, tokens: int) -> None:
    """An indexed dataset of random tokens: speed does not depend on what they say."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(tokens // 1024 + 1):
        document = torch.from_numpy(random.integers(0, vocabulary - 1, 1024).astype(np.int32))
        builder.add_document(document, [1024])
    builder.finalize(f"{prefix}.idx")


def training_flags(moe: bool, gpus: int, micro_batch: int, steps: int, folder: Path) -> list[str]:
    """The flags besides the model's shape: one global batch is two micro-batches per rank."""
    ranks = max(gpus, 1)
    flags = (
        f"--micro-batch-size {micro_batch} --global-batch-size {2 * micro_batch * ranks} --train-iters {steps} "
        "--lr 1e-4 --lr-decay-style constant --clip-grad 1.0 --weight-decay 0.1 --adam-beta2 0.95 --eval-iters 0 "
        "--log-interval 1 --tensorboard-log-interval 1 --use-distributed-optimizer "
        f"--btx-metrics {folder}/metrics.jsonl --train-data-path {folder.parent}/corpus "
        f"--data-cache-path {folder.parent}/cache"
    ).split()
    if gpus:
        flags += ["--bf16", "--log-memory-to-tensorboard"]
    if moe:
        spread = max(n for n in (1, 2, 4) if ranks % n == 0)
        flags += (
            f"--num-experts {EXPERTS} --moe-router-topk {TOPK} --moe-router-dtype fp32 --moe-aux-loss-coeff 0.01 "
            "--moe-router-load-balancing-type aux_loss --moe-token-dispatcher-type alltoall "
            f"--expert-model-parallel-size {spread}"
        ).split()
    return flags


def train(name: str, arguments: list[str], ranks: int, folder: Path, log: Path, seconds: float) -> list[dict]:
    """Run the training program and return its metrics, one dictionary per step.

    Raises:
        RuntimeError: it failed or took too long; its log says more.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "megatron_btx.pretrain", *arguments]
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with log.open("w") as output:
        output.write(" ".join(command) + "\n")
        output.flush()
        # timeout(1) ends torchrun by SIGTERM, which torchrun hands on to its workers.
        command = ["timeout", "--kill-after=20", str(seconds), *command]
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False)
    if done.returncode != 0:
        how = f"took more than {seconds:.0f} s" if done.returncode in (124, 137) else f"ended with {done.returncode}"
        raise RuntimeError(f"{name}: {how}; see {log.name}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summarize(steps: list[dict], shape: Shape, moe: bool, tokens: int, gpus: int, peak_flops: float) -> dict[str, Any]:
    """Speed from the second half of the steps, when compiling, caches and clocks have settled."""
    stamps = [step["time"] for step in steps]
    all_seconds = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    seconds = all_seconds[len(all_seconds) // 2 :]
    median = statistics.median(seconds)
    flops = flops_per_token(shape, moe) * tokens / median / max(gpus, 1)
    if gpus:
        memory = max(step["mem-max-allocated-bytes"] for step in steps)
    else:
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "step_seconds": {
            "median": median,
            "lower_quartile": quartiles[0],
            "upper_quartile": quartiles[2],
            "min": min(seconds),
            "max": max(seconds),
            "counted": len(seconds),
            "all": all_seconds,
        },
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / median,
        "tflops_per_gpu": flops / 1e12,
        "mfu": flops / peak_flops,
        "peak_memory_bytes": memory,
        "first_loss": steps[0]["lm loss"],
        "last_loss": steps[-1]["lm loss"],
    }


def measure(moe: bool, gpus: int, memory_bytes: float, peak_flops: float, options: Any, work: Path) -> dict[str, Any]:
    """Train one model and describe the run and its speed; a failure is a record too."""
    name = "moe" if moe else "dense"
    shape, micro_batch = fit(moe, memory_bytes) if gpus else (PICO, 1)
    tokens = 2 * micro_batch * max(gpus, 1) * shape.seq_length
    if not (work / "corpus.idx").exists():
        largest = 8 * max(gpus, 1) * shape.seq_length
        write_corpus(work / "corpus", shape.vocabulary, largest * (options.steps + 2))
    folder = work / name
    folder.mkdir()
    arguments = [*shape.flags(), *training_flags(moe, gpus, micro_batch, options.steps, folder), *options.more]
    record: dict[str, Any] = {
        "model": name,
        "shape": dataclasses.asdict(shape),
        "experts": EXPERTS if moe else None,
        "topk": TOPK if moe else None,
        "active_matmul_parameters": numbers.multiplied_weights(shape.model(moe)),
        "micro_batch": micro_batch,
        "flops_per_token": flops_per_token(shape, moe),
        "precision": "bf16" if gpus else "fp32",
        "arguments": " ".join(arguments).replace(str(work), "WORK"),
    }
    try:
        log = options.output / f"{name}.log"
        steps = train(name, arguments, max(gpus, 1), folder, log, options.timeout_seconds)
    except RuntimeError as failure:
        return record | {"failure": str(failure)}
    return record | summarize(steps, shape, moe, tokens, gpus, peak_flops)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description="Training speed of a dense model and a mixture of experts on this machine.")
    p.add_argument("--output", type=Path, required=True, help="folder for training.json and the logs")
    p.add_argument("--gpus", type=int, help="how many GPUs to use (default: all)")
    p.add_argument("--pico", action="store_true", help="the pico model on the CPU, to test this script")
    p.add_argument("--models", nargs="+", choices=("dense", "moe"), default=["dense", "moe"])
    p.add_argument("--steps", type=int, default=25, help="training steps; the second half counts (default: 25)")
    p.add_argument("--timeout-seconds", type=float, default=130, help="per model (default: 130)")
    options, options.more = p.parse_known_args(argv)
    return options


def main(argv: list[str] | None = None) -> int:
    """Measure, write training.json, print a line per model; unknown flags go to Megatron."""
    options = parse(argv)
    import torch

    found = torch.cuda.device_count()
    gpus = 0 if options.pico else found if options.gpus is None else min(options.gpus, found)
    name = torch.cuda.get_device_name(0) if gpus else "CPU"
    memory_bytes = torch.cuda.mem_get_info(0)[0] if gpus else 0
    matmul_flops = measured_matmul_flops("cuda" if gpus else "cpu", 8192 if gpus else 512)
    data_sheet = BF16_PEAK_FLOPS.get(name)
    options.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "dry_run": not gpus,
        "device": name,
        "gpus": gpus,
        "peak_flops_per_gpu": data_sheet or matmul_flops,
        "peak_is": "data sheet, dense bf16" if data_sheet else "measured matrix product: this card is not in the table",
        "measured_matmul_flops": matmul_flops,
        "flops_formula": FLOPS_FORMULA,
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as work:
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        else:
            torch.cuda.empty_cache()
        for model in options.models:
            run = measure(model == "moe", gpus, memory_bytes, result["peak_flops_per_gpu"], options, Path(work))
            result["runs"].append(run)
            (options.output / "training.json").write_text(json.dumps(result, indent=1))
            rate = f"{run['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in run else run["failure"]
            print(f"{model}: {rate}{' (CPU dry run, not a result)' if not gpus else ''}", flush=True)
    return int(any("failure" in run for run in result["runs"]))


if __name__ == "__main__":
    sys.exit(main())
