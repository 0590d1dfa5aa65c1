"""What the job of a stage asks for: nodes, tasks and time, from the recipe's cluster section and the stage's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_btx.common.errors import InputError
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.cluster import ClusterSection, seconds_of

_TASKS_PER_NODE = 8
_AS_ASKED = ("signal_seconds", "retries", "container_image", "container_mounts", "python", "data_cache", "environment")


@dataclass(frozen=True)
class Resources:
    """What one job asks for."""

    nodes: int
    tasks_per_node: int
    tasks: int
    cpus_per_task: int
    gpus_per_node: int
    """0 for none."""
    signal_seconds: int = 90
    retries: int = 3
    options: Mapping[str, str | None] = field(default_factory=dict)
    """Long options of sbatch that are passed on as they are, as account and time; None for one without a value."""
    container_image: str | None = None
    container_mounts: Sequence[str] = ()
    python: str | None = None
    data_cache: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def find_resources(cluster: ClusterSection, stage: Stage, workers: int = 1) -> Resources:
    """What the job of ``stage`` asks for.

    Args:
        workers: processes that a stage starts itself which makes data.

    Raises:
        InputError: its processes do not spread evenly over its nodes, or it would be told to save when it starts.
    """
    makes_data = stage.kind == "data"
    if makes_data:
        stage = replace(stage, processes=1)  # one task, which starts its workers itself
    asked = cluster.merge(("gpu" if stage.on_gpu else "cpu", stage.cluster or stage.kind))
    nodes, tasks_per_node = _spread(stage, asked.get("nodes"), asked.get("tasks_per_node"))
    gpus = asked.get("gpus_per_task", 1) * tasks_per_node if stage.on_gpu else 0
    cpus = max(stage.threads, workers) if makes_data else stage.threads
    options: dict[str, str | None] = {}
    for name in ("account", "partition", "qos", "reservation", "constraint", "time", "memory"):
        if name in asked:
            options["mem" if name == "memory" else name] = asked[name]
    if asked.get("exclusive"):
        options["exclusive"] = None
    resources = Resources(
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        tasks=stage.processes,
        cpus_per_task=asked.get("cpus_per_task", cpus),
        gpus_per_node=gpus,
        options=options,
        **{name: asked[name] for name in _AS_ASKED if name in asked},
    )
    seconds = resources.signal_seconds
    if stage.resumable and "time" in asked and seconds + 60 > seconds_of(asked["time"]):
        told = f"would be told to save {seconds} s, or a minute more, before the end of its time of {asked['time']!r}"
        raise InputError(f"cluster: stage {stage.name} {told}; change time or signal-seconds")
    return resources


def _spread(stage: Stage, nodes: int | None, tasks_per_node: int | None) -> tuple[int, int]:
    """(nodes, tasks on each) for a stage's processes; every node has as many."""
    processes = stage.processes
    at_most = tasks_per_node or _TASKS_PER_NODE
    if nodes is None:
        nodes = -(-processes // at_most)
    elif tasks_per_node is None:
        at_most = processes
    on_each, left = divmod(processes, nodes)
    if left or on_each > at_most:
        raise InputError(
            f"cluster: stage {stage.name} has {processes} processes, which do not spread evenly over {nodes} nodes of "
            f"at most {at_most} tasks; change tasks-per-node or nodes, or the stage's layout"
        )
    return nodes, on_each
