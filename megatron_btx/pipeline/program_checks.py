"""A recipe's flags and stages under the programs' own checks, before the first stage runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.recipe.flags import Flags, to_argv
from megatron_btx.pipeline.stage import Program, Stage


def check_with_megatron(
    file: str, sections: Mapping[str, Flags], stages: Iterable[Stage] = (), use_gpus: bool = True
) -> None:
    """Refuse what the installed Megatron does not know, and what the programs of ``stages`` would refuse themselves.

    Another process does it (:mod:`megatron_btx.training.check_stages`): importing Megatron takes some 10 s and 500 MB,
    which would stay in this one.

    Args:
        sections: place in ``file`` -> flags.
        stages: those that train or evaluate.
        use_gpus: False where they run on the CPU, whatever the machine has.
    """
    asked = {
        "sections": {where: to_argv(flags) for where, flags in sections.items()},
        "stages": {stage.name: (stage.processes, program_words(stage)) for stage in stages},
    }
    command = [sys.executable, "-P", "-W", "ignore", "-m", "megatron_btx.training.check_stages"]
    environment = os.environ if use_gpus else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, check=False, env=environment
    )
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"Megatron's parser ended with status {answer.returncode}"]
        raise InputError(f"{file}: {lines[-1].removeprefix('error: ')}")


def program_words(stage: Stage) -> list[str]:
    """The words of the program of ours that ``stage`` starts."""
    assert isinstance(stage.program, Program)
    return list(stage.program.words)
