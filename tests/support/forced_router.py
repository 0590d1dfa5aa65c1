"""``megatron_btx.evaluate`` with every router forced to one expert: its logit is far above all others."""

from __future__ import annotations

import os
from typing import Any


def main() -> int:
    """Force the expert named by FORCED_EXPERT, then evaluate."""
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_btx.evaluation import program as evaluate

    expert = int(os.environ["FORCED_EXPERT"])

    def gating(self: Any, inputs: Any) -> Any:
        logits = inputs.new_zeros(*inputs.shape[:-1], self.config.num_moe_experts)
        logits[..., expert] = 1e4
        return logits

    TopKRouter.gating = gating
    return evaluate.main()
