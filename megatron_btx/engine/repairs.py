"""What the megatron-core 0.19 wheel needs on every machine, with a GPU or without: repairs, each with its reason."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from megatron_btx.data.tokenizers import count_numbers
from megatron_btx.engine import patch
from megatron_btx.engine.patch import Call

if TYPE_CHECKING:
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput


def install() -> None:
    """Apply every repair; each first checks that what it repairs is there.

    Raises:
        MegatronVersionError: the installed Megatron has another form.
    """
    use_the_shipped_dataset_helper()
    use_an_optimizer_that_resumes()
    recompute_norms_without_fp8()
    route_without_noise_in_evaluation()


def count_numbers_of_tokenizers() -> None:
    """Give a Hugging Face tokenizer the size that its numbers need, before Megatron counts the rows of the model."""
    from megatron.core.tokenizers.text.libraries.huggingface_tokenizer import HuggingFaceTokenizer

    size = functools.cached_property(count_numbers)
    size.__set_name__(HuggingFaceTokenizer, "vocab_size")  # batches ask for it
    patch.replace(HuggingFaceTokenizer, "vocab_size", size)


def use_the_shipped_dataset_helper() -> None:
    """Keep Megatron from compiling its dataset helper when the compiled one is installed.

    Its initialisation runs ``make`` inside the installed package, which in the wheel has no Makefile; make's failure
    ends the process without a word (``core/datasets/utils.py``).
    """
    from megatron.core.datasets import utils

    patch.expect(utils, "compile_helpers")
    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        patch.replace(utils, "compile_helpers", lambda: None)


def use_an_optimizer_that_resumes() -> None:
    """Without Transformer Engine and apex, give Megatron an Adam of the form it is written for.

    See :mod:`megatron_btx.engine.optimizer` for why. One more repair belongs to it: the distributed optimizer loads
    fp32 parameters by copying into leaves that require gradients, which autograd refuses outside ``no_grad``.
    """
    import torch
    from megatron.core import optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    patch.expect(optimizers, "USING_PYTORCH_OPTIMIZER")
    if not optimizers.USING_PYTORCH_OPTIMIZER:
        return
    from megatron_btx.engine.optimizer import GroupStepAdam

    patch.replace(optimizers, "Adam", GroupStepAdam)
    patch.replace(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    patch.replace(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    patch.replace(distrib_optimizer, "USING_APEX_OPTIMIZER", True)
    patch.replace(distrib_optimizer, "Adam", GroupStepAdam)
    patch.wrap(distrib_optimizer.DistributedOptimizer, "_set_main_param_and_optimizer_states", torch.no_grad())


def recompute_norms_without_fp8() -> None:
    """Without Transformer Engine, let ``--recompute-modules layernorm`` run.

    ``CheckpointWithoutOutput(fp8=False)`` takes any ``fp8`` but None for True, the norms' False among them, and asks
    Transformer Engine for its fp8 state (``core/tensor_parallel/random.py``).
    """
    from megatron.core.tensor_parallel import random

    patch.expect(random, "HAVE_TE", "CheckpointWithoutOutput")
    if random.HAVE_TE:
        return

    def without_fp8(init: Callable[..., None], norm: CheckpointWithoutOutput, fp8: object = None) -> None:
        init(norm, fp8)
        norm.fp8 = False

    patch.around(random.CheckpointWithoutOutput, "__init__", without_fp8)


ROUTING_NOISE = {
    "moe_input_jitter_eps": None,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
}
"""Settings of a router that make it draw random numbers, each with the value that makes it draw none."""


def route_without_noise_in_evaluation() -> None:
    """Keep the noise of ``--moe-input-jitter-eps`` and ``--moe-router-force-...`` for training.

    ``TopKRouter.forward`` (``core/transformer/moe/router.py``) draws it in evaluation too: a loss would depend on the
    seed, and a validation would move the random state of the training that goes on after it.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    patch.expect(TopKRouter, "apply_input_jitter")

    def forward(original: Call, router: TopKRouter, *given: object, **named: object) -> Any:
        config = router.config
        if router.training or all(getattr(config, name) == value for name, value in ROUTING_NOISE.items()):
            return original(router, *given, **named)
        router.config = copy.copy(config)
        vars(router.config).update(ROUTING_NOISE)
        try:
            return original(router, *given, **named)
        finally:
            router.config = config

    patch.around(TopKRouter, "forward", forward)
