"""What watching the routing costs: the same run with its routing telemetry switched on and off, block by block.

    python benchmarks/telemetry.py --output benchmarks/records/DATE-telemetry

One process trains a mixture through the real program, with TensorBoard and --btx-metrics. Steps come in blocks of the
log interval; of every two blocks one, drawn by chance, runs without telemetry (no sums, no all-reduce, no scalars; the
rest of Megatron's logging stays). A pair gives one ratio; the record has the median over pairs, quartiles, and a
bootstrapped 95 % interval of the median.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.record import machine
from benchmarks.training import FULL, REPOSITORY, Shape, write_corpus

QUICKSTART = Shape(layers=4, hidden=64, ffn=176, heads=4, kv_groups=4, seq_length=256, vocabulary=2048)
WIDER = Shape(layers=4, hidden=256, ffn=704, heads=4, kv_groups=4, seq_length=512, vocabulary=2048)
CASES: dict[str, tuple[Shape, int, int, int, int, float]] = {
    "quickstart, every step logged": (QUICKSTART, 2, 1, 2, 4, 1.0),
    "quickstart, every 10th step logged": (QUICKSTART, 2, 10, 2, 4, 0.2),
    "hidden 256, sequence 512, every step logged": (WIDER, 1, 1, 4, 8, 0.25),
}
"""Name -> shape, processes (expert parallel), log interval, micro-batch and global batch, share of the pairs taken."""
GPU_CASES: dict[str, tuple[Shape, int, int, int, int, float]] = {
    "one GPU, 1.1 B and 4 experts in bf16, every step logged": (FULL, 1, 1, 2, 4, 0.15),
    "one GPU, quickstart in bf16, every step logged": (QUICKSTART, 1, 1, 4, 4, 1.0),
}
"""The same for a machine with a GPU, of which one is used."""
WARM_UP_STEPS = 20
SWITCH_FILE = "BTX_TELEMETRY_BENCHMARK"


def worker() -> int:
    """Train as the command line says, with telemetry on or off by the block; the first rank writes when steps began."""
    from megatron.training import training

    from megatron_btx.training import program as pretrain
    from megatron_btx.training import telemetry

    plan = json.loads(Path(os.environ[SWITCH_FILE]).read_text())
    on, interval, began = plan["on"], plan["interval"], []
    state = {"on": True}
    add, extend, train_step = telemetry.RoutingSums.add, telemetry._extend, training.train_step

    def switched_add(self: Any, *rest: Any) -> None:
        if state["on"]:
            add(self, *rest)

    def switched_extend(tracker: type, *rest: Any) -> type:
        watching = extend(tracker, *rest)

        class Switched(watching):  # type: ignore[misc,valid-type]
            def report(self, *rest: Any, **named: Any) -> str:
                return str((watching if state["on"] else tracker).report(self, *rest, **named))  # type: ignore[attr-defined]

        return Switched

    @functools.wraps(train_step)
    def timed_step(*rest: Any, **named: Any) -> Any:
        began.append(time.perf_counter())
        step = len(began) - 1 - WARM_UP_STEPS
        state["on"] = on[step // interval] if 0 <= step < len(on) * interval else True
        return train_step(*rest, **named)

    telemetry.RoutingSums.add, telemetry._extend, training.train_step = switched_add, switched_extend, timed_step
    code = pretrain.main()
    if os.environ["RANK"] == "0":
        Path(plan["stamps"]).write_text(json.dumps(began))
    return code


def measure(name: str, case: tuple[Shape, int, int, int, int, float], pairs: int, work: Path) -> dict[str, Any]:
    """Run one case and compare its blocks."""
    shape, processes, interval, micro, batch, _ = case
    draw = random.Random(0)
    on = [first == half for _ in range(pairs) for first in [draw.random() < 0.5] for half in (True, False)]
    steps = WARM_UP_STEPS + len(on) * interval + 1
    folder = work / name.replace(" ", "-").replace(",", "")
    folder.mkdir()
    write_corpus(folder / "corpus", shape.vocabulary, shape.seq_length * batch * (steps + 2))
    plan = {"on": on, "interval": interval, "stamps": str(folder / "stamps.json")}
    (folder / "plan.json").write_text(json.dumps(plan))
    arguments = (
        shape.flags()
        + (
            f"--micro-batch-size {micro} --global-batch-size {batch} --train-iters {steps} --lr 1e-3 "
            "--lr-decay-style constant --eval-iters 0 --num-experts 4 --moe-router-topk 2 --moe-router-dtype fp32 "
            "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type allgather "
            f"--expert-model-parallel-size {processes} --log-interval {interval} --tensorboard-log-interval {interval} "
            f"--tensorboard-dir {folder}/tensorboard --btx-metrics {folder}/metrics.jsonl "
            f"--train-data-path {folder}/corpus --data-cache-path {folder}/cache"
        ).split()
    )
    if name in GPU_CASES:
        arguments += ["--bf16", "--use-distributed-optimizer"]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(processes), str(Path(__file__).resolve()), "--worker", *arguments]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1")
    environment[SWITCH_FILE] = str(folder / "plan.json")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"error: {name} ended with {done.returncode}:\n{(folder / 'log.txt').read_text()[-3000:]}")
    stamps = json.loads((folder / "stamps.json").read_text())[WARM_UP_STEPS:]
    blocks = [stamps[(i + 1) * interval] - stamps[i * interval] for i in range(len(on))]
    with_, without = ([b / interval for b, of in zip(blocks, on, strict=True) if of == kind] for kind in (True, False))
    ratios = [a / b for a, b in zip(with_, without, strict=True)]
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return {
        "case": name,
        "processes": processes,
        "pairs": pairs,
        "steps_per_block": interval,
        "arguments": " ".join(arguments).replace(str(folder), "WORK"),
        "step_seconds_with": statistics.median(with_),
        "step_seconds_without": statistics.median(without),
        "overhead": statistics.median(ratios) - 1,
        "overhead_quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)],
        "overhead_95_percent": [medians[49] - 1, medians[1949] - 1],
        "blocks_with": with_,
        "blocks_without": without,
    }


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    at = record["machine"]
    lines = [f"# Routing telemetry: its share of a step, {record['date']}", ""]
    lines += [
        f"{at['cpu']}, {at['cores']} cores, kernel {at['kernel']}, {at['gpus'] or 'no GPU'}, commit {at['commit']}",
        "",
    ]
    lines += ["| case | pairs | ms per step, with | without | overhead, median | 95 % interval | quartiles of pairs |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for run in record["runs"]:
        low, high = run["overhead_95_percent"]
        quartiles = run["overhead_quartiles"]
        times = f"{1e3 * run['step_seconds_with']:.1f} | {1e3 * run['step_seconds_without']:.1f}"
        lines.append(
            f"| {run['case']} | {run['pairs']} x {run['steps_per_block']} steps | {times} | {run['overhead']:+.2%} | "
            f"{low:+.2%} to {high:+.2%} | {quartiles[0]:+.1%} to {quartiles[2]:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure every case and write record.json and record.md."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--output", type=Path, required=True, help="folder for record.json and record.md")
    p.add_argument("--pairs", type=int, default=300, help="pairs of blocks per case (default: 300)")
    options = p.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "runs": [],
    }
    cases = GPU_CASES if record["machine"]["gpus"] else CASES
    with tempfile.TemporaryDirectory() as work:
        for name, case in cases.items():
            record["runs"].append(measure(name, case, max(int(options.pairs * case[-1]), 2), Path(work)))
            (options.output / "record.json").write_text(json.dumps(record, indent=1))
            (options.output / "record.md").write_text(markdown(record))
    print(markdown(record))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        del sys.argv[1]
        sys.exit(worker())
    sys.exit(main())
