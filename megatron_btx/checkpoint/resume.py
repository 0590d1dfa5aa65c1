"""Which layouts a run's optimizer state can be resumed under: what Megatron 0.19 cannot reshard is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_btx.errors import InputError

_MODEL_LAYOUT = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "virtual_pipeline_model_parallel_size": "--num-layers-per-virtual-pipeline-stage",
    "expert_model_parallel_size": "--expert-model-parallel-size",
    "expert_tensor_parallel_size": "--expert-tensor-parallel-size",
}


def check_resume_layout(path: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to resume under a layout that the stored optimizer state cannot be brought to.

    - Experts on one rank (EP 1) belong to one optimizer with the rest, spread experts (EP > 1) to a second one;
      Megatron cannot turn one into the other.
    - The distributed optimizer and the plain one store different things; the distributed one's default format is bound
      to the model's layout (``core/optimizer/distrib_optimizer.py``, dp_reshardable).

    Raises:
        InputError: names the flag, both values and the remedy.
    """
    if given.get("no_load_optim") or stored.get("no_save_optim"):
        return
    _check_schedule(path, stored, given)
    weights_only = "or start a new run from its weights with --pretrained-checkpoint"
    if stored.get("num_experts"):
        was, now = stored.get("expert_model_parallel_size", 1), given["expert_model_parallel_size"]
        if (was == 1) != (now == 1):
            raise InputError(
                f"{path}: its optimizer state was saved with --expert-model-parallel-size {was} and cannot be resumed "
                f"with {now}: one optimizer against two; resume with {was}, {weights_only}"
            )
    was, now = bool(stored.get("use_distributed_optimizer")), bool(given["use_distributed_optimizer"])
    if was != now:
        raise InputError(
            f"{path}: was saved {'with' if was else 'without'} --use-distributed-optimizer; resume it the same way, "
            f"{weights_only}"
        )
    if was and not stored.get("dist_ckpt_optim_fully_reshardable"):
        for name, flag in _MODEL_LAYOUT.items():
            if stored.get(name) != given[name]:
                raise InputError(
                    f"{path}: its distributed optimizer was saved with {flag} {stored.get(name)} in a format bound to "
                    f"that layout, given {given[name]}; resume with {stored.get(name)} (save with "
                    f"--dist-ckpt-optim-fully-reshardable to be free), {weights_only}"
                )


def _check_schedule(path: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Megatron stops with an assertion when the schedule's length changes and neither of its two flags decides."""
    was, now = stored.get("train_iters"), given["train_iters"]
    decided = given["override_opt_param_scheduler"] or given["use_checkpoint_opt_param_scheduler"]
    if was and now and was != now and not decided:
        raise InputError(
            f"{path}: its schedule was made for --train-iters {was}, given {now}; take the new schedule with "
            "--override-opt-param-scheduler, or keep the stored one with --use-checkpoint-opt-param-scheduler"
        )
