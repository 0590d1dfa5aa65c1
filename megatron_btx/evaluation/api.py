"""Losses of checkpoints, asked for from Python: ``megatron_btx.evaluate``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_btx.checkpoint.iterations import is_checkpoint
from megatron_btx.common.errors import InputError
from megatron_btx.distributed.launcher import without_launcher
from megatron_btx.mixing.loader import open_source
from megatron_btx.mixing.result import megatron_args_text
from megatron_btx.runner.run_dir import read_evaluation
from megatron_btx.runner.schemas import Evaluation


def evaluate(
    models: Mapping[str, str | Path],
    texts: Mapping[str, str | Path],
    *,
    tokens: int = 65536,
    processes: int = 1,
    flags: Sequence[str] = (),
    use_gpus: bool = True,
) -> Evaluation:
    """Mean losses of checkpoints on texts, and for mixtures who is routed where.

    >>> found = evaluate({"btx": "runs/btx"}, {"math": "math.jsonl"}, tokens=32768)
    >>> found.models["btx"].losses["math"]
    1.234

    Programs of their own do the work, as ``btx evaluate`` does: Megatron keeps its state in the process, and a second
    model could not be evaluated in yours. The model's flags are those that the first checkpoint stores.

    Args:
        models: name -> a Megatron checkpoint, its root or one iteration; all of one architecture.
        texts: domain -> a text file, or the prefix of an indexed dataset.
        tokens: per domain, rounded down to whole batches, from the start of each text.
        processes: one for each GPU. More than one also needs ``flags`` that say how the model is spread, else the
            texts are.
        flags: further flags of Megatron, as ``["--micro-batch-size", "8"]``; they win over what is stored.
        use_gpus: False to stay on the CPU whatever the machine has.

    Returns:
        losses in nats per token, tokens, parameters (all, and active for one token) and routing of every model.

    Raises:
        InputError: a model or text is missing or fits nothing else that is given; what the program says.
    """
    if not models or not texts:
        raise InputError("evaluate: no models or no texts; give at least one of each, by name")
    first = next(iter(models.values()))
    if not is_checkpoint(Path(first)):
        raise InputError(
            f"{first}: is no Megatron checkpoint; convert a Hugging Face model first (megatron_btx.convert)"
        )
    stored = open_source("the model", str(first)).arguments
    with tempfile.TemporaryDirectory(prefix="btx-evaluate-") as folder:
        output = Path(folder) / "evaluation.json"
        words = [*shlex.split(megatron_args_text(stored)), "--micro-batch-size", "1", *flags]
        words += ["--btx-eval-model", *(f"{name}={path}" for name, path in models.items())]
        words += ["--btx-eval-data", *(f"{name}={path}" for name, path in texts.items())]
        words += ["--btx-eval-tokens", str(tokens), "--btx-eval-output", str(output)]
        _run(processes, words, use_gpus)
        return read_evaluation(output)


def _run(processes: int, words: list[str], use_gpus: bool) -> None:
    """Run the evaluation program. Raises InputError with the program's own line, or the end of what it printed."""
    command = [sys.executable, "-W", "ignore"]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "megatron_btx.evaluate", *words]
    # As -P, for what torchrun starts, too: the working directory may be anybody's, and is searched for no module.
    environment = {**without_launcher(os.environ), "PYTHONSAFEPATH": "1"}
    if not use_gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode == 0:
        return
    lines = answer.stderr.strip().splitlines()
    for line in lines:
        if line.startswith("error: "):
            raise InputError(line.removeprefix("error: "))
    end = "; ".join(lines[-3:])
    raise InputError(f"the evaluation ended with status {answer.returncode}: {end}")
