"""A stage of a run: a program with its words, what it takes, its parents, and its place among the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["data", "import", "train", "mix", "export", "evaluate", "report"]
PYTHON = "python"
"""Stands for the interpreter in a stage's command; scripts take this one unless $BTX_PYTHON names another."""


@dataclass(frozen=True)
class Program:
    """A program of ours: a module with its words. Paths are absolute, or relative to the run directory."""

    module: str
    words: tuple[str, ...] = ()
    is_distributed: bool = False
    """Whether it runs as one process per rank. torchrun starts them."""

    def command(self, processes: int) -> tuple[str, ...]:
        """The command that starts it on this machine."""
        if not self.is_distributed:
            return (PYTHON, "-m", self.module, *self.words)
        # With a rendezvous of its own (--standalone), because stages run side by side.
        torchrun = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
        return (*torchrun, "-m", self.module, *self.words)


@dataclass(frozen=True)
class Stage:
    """One node of the graph."""

    name: str
    program: Program | tuple[str, ...]
    """One of ours, or any command."""
    parents: tuple[str, ...] = ()
    """Stages that its result is made from."""
    after: tuple[str, ...] = ()
    """Stages that must be finished before it starts, and have no say in its result."""
    inputs: tuple[Path, ...] = ()
    """What the stage reads from outside the run: files, folders, or prefixes of .bin/.idx files."""
    settings: Mapping[str, Any] | None = None
    """What decides its result beside its parents; a Path stands for what lies there. None: its command and inputs."""
    product: str = ""
    """File or folder in the stage's directory that must exist when the stage is finished; empty for none."""
    processes: int = 1
    threads: int = 1
    """Of each process: OMP_NUM_THREADS."""
    on_gpu: bool = False
    """Whether each process takes a GPU where there are GPUs."""
    resumable: bool = False
    """Whether the command continues from what an earlier, stopped start left; else that is set aside first."""
    kind: Kind = "train"
    """What it does: resources, tables and the report go by it."""
    cluster: str = ""
    """Its section of the recipe's ``cluster``, beside cpu or gpu; "" for that of its kind."""
    model: str = ""
    """The row of the table of models that it makes; "" for none."""
    only_shows: bool = False
    """Whether it only shows what other stages made: it is made again, in place, whenever they change."""
    iterations: int | None = None
    """Steps of a stage that trains."""
    tokens: int | None = None
    flops: float | None = None
    """Estimate for the whole stage; see :func:`megatron_btx.recipe.budgets.training_flops`."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Resolved settings, for config.yaml."""

    @property
    def command(self) -> tuple[str, ...]:
        """The command that runs it on this machine."""
        if isinstance(self.program, Program):
            return self.program.command(self.processes)
        return self.program

    def deciding_settings(self) -> Mapping[str, Any]:
        """What decides its result beside its parents."""
        if self.settings is not None:
            return self.settings
        return {"command": list(self.command), "inputs": list(self.inputs)}

    def waits_for(self) -> tuple[str, ...]:
        """All stages that must be finished before it starts."""
        return tuple(dict.fromkeys((*self.parents, *self.after)))


def sort_stages(stages: Iterable[Stage]) -> list[Stage]:
    """The stages with parents before their children, otherwise as given. A parent that is no stage is a defect."""
    waiting = list(stages)
    sorted_stages: list[Stage] = []
    done: set[str] = set()
    while waiting:
        ready = next((stage for stage in waiting if done.issuperset(stage.waits_for())), None)
        if ready is None:
            names = [stage.name for stage in waiting]
            raise ValueError(f"stages wait for what is no stage, or for each other: {names}")
        sorted_stages.append(ready)
        done.add(ready.name)
        waiting.remove(ready)
    return sorted_stages
