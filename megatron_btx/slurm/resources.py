"""What the job of a stage asks for: nodes, tasks and time, from the recipe's cluster section and the stage's layout."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_btx.common.errors import InputError
from megatron_btx.plan.stage import Stage
from megatron_btx.recipe.cluster import ClusterSection, ResourcesSection, seconds_of

_TASKS_PER_NODE = 8


@dataclass(frozen=True)
class Resources:
    """What one job asks for."""

    asked: ResourcesSection
    """What the recipe says for a stage of its kinds."""
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    """0 for none."""


def find_resources(cluster: ClusterSection, stage: Stage, workers: int = 1) -> Resources:
    """What the job of ``stage`` asks for; every node has as many tasks.

    Args:
        workers: processes that a stage starts itself which makes data.

    Raises:
        InputError: its processes do not spread evenly over its nodes, or it would be told to save when it starts.
    """
    asked = cluster.merge(("gpu" if stage.on_gpu else "cpu", stage.cluster or stage.kind))
    processes, cpus = stage.processes, stage.threads
    if stage.kind == "data":  # one task, which starts its workers itself
        processes, cpus = 1, max(stage.threads, workers)
    at_most = asked.tasks_per_node or _TASKS_PER_NODE
    nodes = asked.nodes or -(-processes // at_most)
    if asked.nodes and not asked.tasks_per_node:
        at_most = processes
    tasks_per_node, left = divmod(processes, nodes)
    if left or tasks_per_node > at_most:
        raise InputError(
            f"cluster: stage {stage.name} has {processes} processes, which do not spread evenly over {nodes} nodes of "
            f"at most {at_most} tasks; change tasks-per-node or nodes, or the stage's layout"
        )
    seconds = asked.signal_seconds
    if stage.resumable and asked.time and seconds + 60 > seconds_of(asked.time):
        told = f"would be told to save {seconds} s, or a minute more, before the end of its time of {asked.time!r}"
        raise InputError(f"cluster: stage {stage.name} {told}; change time or signal-seconds")
    gpus = asked.gpus_per_task * tasks_per_node if stage.on_gpu else 0
    return Resources(asked, nodes, tasks_per_node, asked.cpus_per_task or cpus, gpus)
