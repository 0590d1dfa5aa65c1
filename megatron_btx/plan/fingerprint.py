"""What makes a stage the same stage: the settings that decide its result, and whether they are those of an earlier run.

A setting decides unless it is listed here. So a flag that nobody has thought of keeps a finished stage from being
taken for another, and never the other way round.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.checkpoint.iterations import TRACKER
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.flags import LAYOUT_FLAGS, Flags

# What is written while a stage runs, how often and where; when it stops; what it says.
_REPORTING = """
    log-interval log-memory-interval log-device-memory-used log-energy log-max-attention-logit log-memory-to-tensorboard
    log-num-zeros-in-grad log-params-norm log-progress log-straggler log-throughput log-timers-to-tensorboard
    log-validation-ppl-to-tensorboard log-world-size-to-tensorboard disable-log-loss-scale-to-tensorboard
    no-log-loss-scale-to-tensorboard logging-level timing-log-level timing-log-option no-barrier-with-level-1-timing
    moe-per-layer-logging tensorboard-dir tensorboard-log-interval tensorboard-queue-size
    wandb-entity wandb-exp-name wandb-project wandb-save-dir no-one-logger one-logger-async one-logger-project
    one-logger-run-name app-tag-run-name app-tag-run-version
    save-interval save-retain-interval persistent-save-interval non-persistent-save-interval
    exit-duration-in-mins exit-interval exit-signal exit-signal-handler exit-signal-handler-for-dataloader
    exit-signal-handler-for-training
    profile profile-ranks profile-step-start profile-step-end use-pytorch-profiler nvtx-ranges record-memory-history
    memory-snapshot-path
    eval-interval eval-iters eval-global-batch-size eval-micro-batch-size full-validation multiple-validation-sets
    valid-data-path test-data-path btx-valid-data btx-valid-tokens btx-first-loss-bound
"""
# Where files lie and how they are read and written.
_STORING = """
    save load data-cache-path btx-metrics object-storage-cache-path config-logger-dir
    btx-keep-last btx-keep-every verify-integrity
    non-persistent-ckpt-type non-persistent-global-ckpt-dir non-persistent-local-ckpt-dir non-persistent-local-ckpt-algo
    async-save async-strategy async-ckpt-cpu-priority async-ckpt-io-priority use-persistent-ckpt-worker
    ckpt-fully-parallel-save ckpt-fully-parallel-load no-ckpt-fully-parallel-save ckpt-assume-constant-structure
    ckpt-fully-parallel-load-exchange-algo ckpt-fully-parallel-load-process-group ckpt-fully-parallel-save-process-group
    dist-ckpt-workers dist-ckpt-strictness dist-ckpt-optim-fully-reshardable
    distrib-optim-fully-reshardable-mem-efficient
    num-workers num-dataset-builder-threads no-mmap-bin-files dataloader-fast-cache-load
    dataloader-defer-npy-index-mmap
"""
# How the work is spread over processes, what is computed twice to save memory, and what happens at the same time.
_SPREADING = """
    recompute-activations recompute-granularity recompute-method recompute-modules recompute-num-layers
    checkpoint-activations moe-layer-recompute distribute-saved-activations
    overlap-grad-reduce overlap-param-gather overlap-param-gather-with-optimizer-step no-overlap-p2p-communication
    overlap-p2p-communication-warmup-flush overlap-moe-expert-parallel-comm moe-shared-expert-overlap
    delay-wgrad-compute tp-comm-overlap no-align-grad-reduce no-align-param-gather ddp-bucket-size ddp-num-buckets
    manual-gc manual-gc-interval no-manual-gc-eval
    distributed-backend distributed-timeout-minutes distributed-timeout-seconds-after-init
    disable-gloo-process-groups use-tp-pp-dp-mapping nccl-communicator-config-path
    pipeline-model-parallel-layout decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers
    account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split
    microbatch-group-size-per-virtual-pipeline-stage pipeline-model-parallel-comm-backend
"""
NOT_DECIDING = frozenset((*LAYOUT_FLAGS, *_REPORTING.split(), *_STORING.split(), *_SPREADING.split()))
"""Flags without a say in what a stage computes."""
_UNORDERED = frozenset(("btx-freeze", "btx-lr-multiplier"))
"""Flags whose several values have no order."""
_BLOCKS, _BLOCK_BYTES = 64, 4096
LARGEST_COUNT = 2**53
"""Whole numbers above it are no counts of anything; floating point does not hold them exactly either."""


@dataclass(frozen=True)
class Identity:
    """What decides a stage's result, in the form in which its manifest holds it."""

    settings: Mapping[str, Any]
    parents: Mapping[str, str]
    """Fingerprints of the stages that the result is made from."""
    fingerprint: str
    """Hash of both."""


def locate(path: str) -> str | Path:
    """A path as a setting: by content where it is given from outside, by name where the run makes it."""
    if Path(path).is_absolute():
        return Path(path)
    return path


def deciding_settings(flags: Flags) -> dict[str, Any]:
    """The settings that decide what a program does with ``flags``; files from outside count by their content."""
    left_out = NOT_DECIDING
    if not flags.get("num-experts"):  # a mixture's balancing losses are taken over each micro-batch
        left_out |= {"micro-batch-size"}
    settings: dict[str, Any] = {}
    for name, value in flags.items():
        if name in left_out:
            continue
        settings[name] = value
        if name in _UNORDERED and isinstance(value, tuple):
            settings[name] = sorted(map(str, value))
        elif name == "train-data-path" and isinstance(value, tuple):
            settings[name] = [locate(str(word)) for word in value]
        elif name in ("pretrained-checkpoint", "tokenizer-model") and isinstance(value, str):
            settings[name] = locate(value)
    return settings


def identities(stages: Iterable[Stage]) -> dict[str, Identity]:
    """The identity of each stage; ``stages`` in an order in which parents come first."""
    known: dict[str, Identity] = {}
    for stage in stages:
        settings: dict[str, Any] = {}
        for name, value in sorted(stage.deciding_settings().items()):
            settings[name] = _plain(value)
        parents = {parent: known[parent].fingerprint for parent in stage.parents}
        content = json.dumps({"settings": settings, "parents": parents}, sort_keys=True)
        known[stage.name] = Identity(settings, parents, hashlib.sha256(content.encode()).hexdigest())
    return known


def _plain(value: Any) -> Any:
    """``value`` as JSON keeps it, with one spelling for equal numbers: 3e-3, 0.003 and "0.003" are one."""
    if isinstance(value, Path):
        return content_of(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return value
    if not math.isfinite(number):
        return str(number)
    if abs(number) >= LARGEST_COUNT:
        return str(value)
    if number.is_integer():
        return int(number)
    return number


def content_of(path: Path) -> str:
    """What lies at ``path``: a file, a folder, or a prefix of .bin/.idx files. Neither its place, its name nor its
    times count, so that what was moved, copied or touched is the same.

    Of each file 64 blocks of 4 KiB, evenly spread, are read: corpora and checkpoints have terabytes, and a changed one
    nearly always has another size or another beginning. Of a checkpoint's root the iteration it points to counts.
    """
    files = _files_at(path)
    digest, total = hashlib.sha256(), 0
    for name, file in files:
        status = file.stat()
        total += status.st_size
        digest.update(f"{name}\0{status.st_size}\0{_sampled(file, status.st_size, status.st_mtime_ns)}\0".encode())
    return f"content of {len(files)} files, {total} bytes, {digest.hexdigest()[:32]}"


def _files_at(path: Path) -> list[tuple[str, Path]]:
    """(name that does not depend on where they lie, file) of the files that ``path`` stands for."""
    if not path.is_dir():
        candidates = [(suffix, Path(f"{path}{suffix}")) for suffix in ("", ".bin", ".idx")]
        return [(suffix, file) for suffix, file in candidates if file.is_file()]
    folder = path
    tracker = path / TRACKER
    if tracker.is_file():
        latest = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if latest.isdecimal():
            latest = f"iter_{int(latest):07d}"
        folder = path / latest
    found = []
    for file in sorted(path.rglob("*")):
        if file.is_file() and folder in file.parents:
            found.append((str(file.relative_to(path)), file))
    return found


@functools.lru_cache(maxsize=100_000)
def _sampled(file: Path, size: int, _changed: int) -> str:
    """Digest of blocks spread over ``file``; its time of change only says how long a digest may be remembered."""
    digest = hashlib.sha256()
    last = max(0, size - _BLOCK_BYTES)
    with file.open("rb") as stream:
        for number in range(_BLOCKS):
            stream.seek(last * number // (_BLOCKS - 1))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
