"""Stand-ins for Transformer Engine's modules: their constructors, parameters and extra states, and no arithmetic.

Enough to build Megatron's wrappers and specifications on a machine without a GPU. Compared with the modules of version
2.20.2 over twelve models: the same names, shapes, checkpoint keys and extra states.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

VERSION = "2.20.2"
"""Decides which of its paths Megatron takes."""


class _Module(torch.nn.Module):
    fp8 = fp8_calibration = False
    fp8_meta = {"fp8_checkpoint": False}
    single_grouped_weight = single_grouped_bias = False

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """There is none."""

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is none."""


class Linear(_Module):
    """A matrix, cut over tensor-parallel ranks; Megatron passes much else that computing would need."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init_method: Callable[[torch.Tensor], Any],
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype | None = None,
        device: Any = "cpu",
        **_: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.parallel_mode, self.tp_size = bias, parallel_mode, tp_size
        made = {"dtype": params_dtype, "device": device}
        for suffix in self._suffixes():
            weight = Parameter(torch.empty(self.out_features, self.in_features, **made))
            init_method(weight)
            self.register_parameter(f"weight{suffix}", weight)
            if bias:
                self.register_parameter(f"bias{suffix}", Parameter(torch.zeros(self.out_features, **made)))

    def _suffixes(self) -> list[str]:
        return [""]


class LayerNormLinear(Linear):
    """A norm and the matrix after it."""

    def __init__(self, in_features: int, out_features: int, *, normalization: str, **rest: Any) -> None:
        super().__init__(in_features, out_features, **rest)
        made = {"dtype": rest.get("params_dtype"), "device": rest.get("device", "cpu")}
        self.layer_norm_weight = Parameter(torch.ones(in_features, **made))
        is_layer_norm = normalization == "LayerNorm"
        self.layer_norm_bias = Parameter(torch.zeros(in_features, **made)) if is_layer_norm else None


class GroupedLinear(Linear):
    """The matrices of several experts."""

    def __init__(self, num_gemms: int, *sizes: int, **rest: Any) -> None:
        self.__dict__["num_gemms"] = num_gemms  # before a Module takes attributes
        super().__init__(*sizes, **rest)

    def _suffixes(self) -> list[str]:
        return [str(number) for number in range(self.num_gemms)]


class RMSNorm(_Module):
    """A norm."""

    def __init__(self, normalized_shape: int, *, sequence_parallel: bool, params_dtype: Any, device: Any, **_: Any):
        super().__init__()
        self.weight = Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(RMSNorm):
    """A norm with a bias."""

    def __init__(self, normalized_shape: int, **rest: Any) -> None:
        super().__init__(normalized_shape, **rest)
        self.bias = Parameter(torch.zeros_like(self.weight))


class DotProductAttention(torch.nn.Module):
    """No parameters."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def install() -> None:
    """Make ``import transformer_engine`` find these; what is not named here is not there, and Megatron goes without."""
    modules = (Linear, LayerNormLinear, GroupedLinear, RMSNorm, LayerNorm, DotProductAttention)
    fused = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
    recomputation = ("activation_recompute_forward", "get_all_rng_states", "checkpoint")
    contents: dict[str, dict[str, Any]] = {
        "": {"__version__": VERSION},
        ".common": {},
        ".common.recipe": {"DelayedScaling": object, "Format": object},
        ".pytorch": {module.__name__: module for module in modules},
        ".pytorch.fp8": dict.fromkeys(("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")),
        ".pytorch.distributed": {
            **dict.fromkeys(recomputation),
            "CudaRNGStatesTracker": object,
            "is_fp8_activation_recompute_enabled": lambda: False,
        },
        ".pytorch.router": dict.fromkeys(fused),
        ".pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
    }
    for name, content in contents.items():
        full = f"transformer_engine{name}"
        module = types.ModuleType(full)
        module.__path__, module.__file__ = [], __file__
        module.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
        vars(module).update(content)
        sys.modules[full] = module
        parent, _, last = full.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
