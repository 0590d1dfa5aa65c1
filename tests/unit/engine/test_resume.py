"""What a stored optimizer can be resumed with: everything else is refused, with flag, both values and remedy."""

from __future__ import annotations

import pytest

from megatron_btx.common.errors import InputError
from megatron_btx.engine.checks.start import check_resume

LAYOUT = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "use_distributed_optimizer": False,
    "train_iters": 10,
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
    "num_layers": 2,
    "num_experts": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "untie_embeddings_and_output_weights": True,
    "decoupled_lr": None,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "lr_decay_iters": 10,  # Megatron stores train_iters where it was not given
    "start_weight_decay": 0.1,
    "global_batch_size": 8,
    "btx_freeze": [],
    "btx_lr_multiplier": [],
}
SHARDED = {**LAYOUT, "use_distributed_optimizer": True}
FREE = {**SHARDED, "dist_ckpt_optim_fully_reshardable": True}
MOE = {**LAYOUT, "num_experts": 4}
SAMPLES = {"train_iters": None, "lr_decay_iters": None}
SPREAD = {**MOE, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("stored", "change", "named"),
    [
        (LAYOUT, {"tensor_model_parallel_size": 2}, None),
        (LAYOUT, {"train_iters": 20}, ["--train-iters 10", "given 20", "--override-opt-param-scheduler"]),
        (LAYOUT, {"train_iters": 20, "override_opt_param_scheduler": True}, None),
        (LAYOUT, {"lr_decay_iters": None}, None),
        (LAYOUT, {"lr_decay_iters": 5}, ["--lr-decay-iters 10", "given 5", "--use-checkpoint-opt-param-scheduler"]),
        (LAYOUT, {"start_weight_decay": 0.2}, ["--weight-decay", "0.1", "given 0.2"]),
        (LAYOUT, {"global_batch_size": 4}, ["--global-batch-size 8", "given 4"]),
        # Megatron stores the steps that it counted; its own command does not have them.
        ({**LAYOUT, "train_samples": 80, "lr_decay_samples": 80}, {**SAMPLES, "lr_decay_samples": None}, None),
        ({**LAYOUT, "train_samples": 80}, {**SAMPLES, "train_samples": 160}, ["--train-samples 80", "given 160"]),
        (
            {**LAYOUT, "train_samples": 80},
            {**SAMPLES, "global_batch_size": 4, "override_opt_param_scheduler": True},
            ["--global-batch-size 8, given 4", "--train-samples", "--pretrained-checkpoint path"],
        ),
        # These rates name the optimizer's groups, whoever decides about the schedule.
        (LAYOUT, {"lr": 0.02, "override_opt_param_scheduler": True}, ["--lr 0.01", "given 0.02", "--pretrained"]),
        (LAYOUT, {"min_lr": 0.0, "override_opt_param_scheduler": True}, ["--min-lr 0.001", "given 0.0", "--save"]),
        (LAYOUT, {"btx_freeze": ["norms"]}, ["--btx-freeze (none)", "given norms", "--pretrained-checkpoint path"]),
        ({**MOE, "btx_freeze": ["all-but:router"]}, {"btx_freeze": []}, ["--btx-freeze experts attention", "(none)"]),
        ({**MOE, "btx_freeze": ["all-but:router,norms,head,embeddings,attention"]}, {"btx_freeze": ["experts"]}, None),
        (MOE, {"btx_freeze": ["router"], "no_load_optim": True}, None),
        (MOE, {"btx_freeze": ["router"], "skip_train": True}, None),
        (MOE, {"btx_lr_multiplier": ["router=3"]}, ["--btx-lr-multiplier (none)", "given router=3.0"]),
        (
            {**MOE, "btx_lr_multiplier": ["router=3", "experts=0.5"]},
            {"btx_lr_multiplier": ["experts=.5", "router=3.0"]},
            None,
        ),
        (LAYOUT, {"use_distributed_optimizer": True}, ["--use-distributed-optimizer", "without"]),
        (SHARDED, {"use_distributed_optimizer": False}, ["--use-distributed-optimizer", "was saved with"]),
        (SHARDED, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size 1", "given 2", "reshardable"]),
        (SHARDED, {"pipeline_model_parallel_size": 2}, ["--pipeline-model-parallel-size 1", "given 2"]),
        (SHARDED, {"tensor_model_parallel_size": 2, "no_load_optim": True}, None),
        (FREE, {"tensor_model_parallel_size": 2}, None),
        (MOE, {"expert_model_parallel_size": 2}, ["--expert-model-parallel-size 1", "one optimizer;", "-size 2"]),
        (SPREAD, {"expert_model_parallel_size": 4}, None),
        (SPREAD, {"expert_model_parallel_size": 1}, ["--expert-model-parallel-size 2", "two optimizers;"]),
        (SPREAD, {"expert_model_parallel_size": 1, "tensor_model_parallel_size": 2}, None),
        (MOE, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size 1", "--expert-tensor-parallel-size 1"]),
        (MOE, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}, None),
        (MOE, {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": None}, None),
        ({**MOE, "btx_freeze": ["experts"]}, {"expert_model_parallel_size": 2}, None),
        ({**MOE, "no_save_optim": True}, {"expert_model_parallel_size": 2, "no_load_optim": True}, None),
        ({**MOE, "no_save_optim": True}, {}, ["saved without its optimizer", "--no-load-optim", "--pretrained"]),
    ],
)
def test_what_can_be_resumed(stored, change, named):
    """What Megatron can bring the stored optimizer to passes; the rest is refused with flag, both values and remedy."""
    given = {**stored, "no_save_optim": False, **change}
    if named is None:
        check_resume("path", stored, given)
        return
    with pytest.raises(InputError) as refusal:
        check_resume("path", stored, given)
    for text in ["path", *named]:
        assert text in str(refusal.value)


@pytest.mark.parametrize(("batch", "refused"), [(8, False), (16, False), (4, True)])
def test_a_run_that_would_read_beyond_its_data(batch, refused, tmp_path):
    """Ten steps of smaller batches have fewer samples than four of the old size and six of the new."""
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    stored = {**LAYOUT, "consumed_train_samples": 32}
    given = {**LAYOUT, "global_batch_size": batch, "override_opt_param_scheduler": True}
    if not refused:
        check_resume(str(folder), stored, given)
        return
    with pytest.raises(InputError, match="has read 32 samples in 4 steps; .*-size 4 .* resume it with 8 or more"):
        check_resume(str(folder), stored, given)


def test_a_finished_run_needs_no_optimizer():
    check_resume("path", {**LAYOUT, "no_save_optim": True}, LAYOUT, done=True)


def test_megatrons_own_checkpoints_are_of_a_run_without_our_flags():
    stored = {name: value for name, value in LAYOUT.items() if not name.startswith("btx_")}
    check_resume("path", stored, LAYOUT)
    with pytest.raises(InputError, match="--btx-freeze .none., given head"):
        check_resume("path", stored, {**LAYOUT, "btx_freeze": ["head"]})
