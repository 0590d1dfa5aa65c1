"""What a user asks of a conversion, on a command line, in Python or in a recipe, read before any source is opened.

Nothing here imports torch, so that a command line can be read and refused at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_btx.checkpoint.sizes import layer_frequency
from megatron_btx.common.cli_args import read_pairs
from megatron_btx.common.errors import InputError
from megatron_btx.mixing.options import DIFFERENCES, RESULT, WORK, Record, between, option

MULTIPLE_AT_MOST = 1 << 16
_ROPE_SCALING = ("use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor", "hf_rope_scaling")

TRAINING_ARGUMENTS = ("attention_dropout", "hidden_dropout", "init_method_std")
"""What changes no number of the model and counts when it is trained on."""
TAKEABLE: dict[str, tuple[str, ...]] = {
    "rotary_base": ("rotary_base",),
    "layernorm_epsilon": ("layernorm_epsilon",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
    "rope_scaling": _ROPE_SCALING,
    "window_size": ("window_size", "window_attn_skip_freq"),
    "dtype": ("bf16", "fp16", "params_dtype"),
    "tokenizer": (),  # no argument: whose files the result gets, where experts have the same tokens
    **{name: (name,) for name in TRAINING_ARGUMENTS},
}
"""What may be taken from one expert, because it shapes no tensor: field, and the arguments it stands for."""
_SYNONYMS = {
    "rope_theta": "rotary_base",
    "rms_norm_eps": "layernorm_epsilon",
    "norm_epsilon": "layernorm_epsilon",
    "sliding_window": "window_size",
    "torch_dtype": "dtype",
    "initializer_range": "init_method_std",
    "max_positions": "max_position_embeddings",
} | dict.fromkeys(_ROPE_SCALING, "rope_scaling")


@dataclasses.dataclass(frozen=True)
class RouterInit:
    """How the routers of a mix start."""

    how: str = "normal"
    """normal: drawn; zeros: all gates equal; else an .npy file, with rows [mixture layers, experts, hidden] or
    [experts, hidden]."""
    seed: int = 1234
    """Seed of normal."""
    std: float = 0.02
    """Standard deviation of normal; the paper is silent, this is how Megatron draws the other weights."""

    @property
    def file(self) -> Path | None:
        """The file of rows, where there is one."""
        if self.how in ("normal", "zeros"):
            return None
        return Path(self.how)


def _read_frequency(given: str | int | Sequence[int]) -> int | tuple[int, ...]:
    if isinstance(given, str):
        return layer_frequency(given)
    if isinstance(given, int):
        return given
    return tuple(given)


def _pairs_of(given: Mapping[str, Any] | list[str], flag: str, expected: str) -> Mapping[str, Any]:
    """A mapping, as Python gives it, or that of a repeated flag's words."""
    if isinstance(given, Mapping):
        return given
    return read_pairs(given, flag, expected)


def _read_weights(given: Mapping[str, Any] | list[str]) -> dict[str, float]:
    weights = {}
    for name, text in _pairs_of(given, "--weight", "NAME=W, as --weight math=2").items():
        try:
            weights[name] = float(text)
        except ValueError as error:
            raise InputError(f"--weight {name}={text}: expected a number") from error
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise InputError(f"--weight {name}={weights[name]}: expected a number of at least 0")
    return weights


def _read_take(given: Mapping[str, str] | list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for written, name in _pairs_of(given, "--take", "FIELD=NAME, as --take rotary_base=code").items():
        plain = written.removeprefix("--").replace("-", "_")
        field = _SYNONYMS.get(plain, plain)  # Megatron's name, its flag's, or Hugging Face's
        if field not in TAKEABLE:
            raise InputError(
                f"--take {written}: shapes tensors or is not known; fields that can be taken: {', '.join(TAKEABLE)}"
            )
        if field in found:
            raise InputError(f"--take {field}= is given twice; give it once")
        found[field] = name
    return found


@dataclasses.dataclass(frozen=True)
class Request(Record):
    """What the result is made of and how: all that decides its bytes, but for the format."""

    experts: tuple[tuple[str, str], ...]
    """(name, path) of each source, in the order of the result's experts."""
    method: str = "btx"
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The values of the method's own options."""
    topk: int = option(2, "experts per token in the mixture", kind=int, flag="moe-router-topk", metavar="K")
    layer_frequency: int | tuple[int, ...] = option(
        1,
        "layers that become mixtures, as Megatron's flag: every FREQ-th from the first, or a list of 0 and 1 as "
        "[0,1,1,0] or ([0]+[1]*3)*2; the others are averaged (default: 1, all)",
        flag="moe-layer-freq",
        metavar="FREQ",
        read=_read_frequency,
    )
    weights: Mapping[str, float] = option(
        {},
        "weight of an expert in the averages, normalised over all; repeat (default: 1 each)",
        kind=dict,
        flag="weight",
        metavar="NAME=W",
        group=DIFFERENCES,
        read=_read_weights,
    )
    take: Mapping[str, str] = option(
        {},
        f"where the experts' configurations differ in FIELD ({', '.join(TAKEABLE)}), take the value of the expert "
        "NAME; repeat",
        kind=dict,
        metavar="FIELD=NAME",
        group=DIFFERENCES,
        read=_read_take,
    )
    vocabulary: Literal["same", "union"] = option(
        "same",
        "union: vocabularies may extend one another, each row is averaged over its owners",
        flag="vocab",
        group=DIFFERENCES,
        choices=("same", "union"),
    )
    allow_other_tokenizer: bool = option(
        False, "do not compare the experts' tokenizers by content", kind=bool, group=DIFFERENCES
    )
    router_init: str | Path = option(
        "normal",
        "how new routers start: normal, zeros, or an .npy file with rows [layers, experts, hidden] or [experts, "
        "hidden]",
        metavar="HOW",
        read=str,
    )
    router_std: float = option(
        RouterInit.std,
        "standard deviation of normal",
        kind=float,
        metavar="STD",
        expect=lambda std: "" if 0 < std < math.inf else "a number above 0; --router-init zeros gives zeros",
    )
    router_seed: int = option(RouterInit.seed, "seed of normal", kind=int, metavar="N", expect=between(0, 2**63 - 1))
    pad_vocabulary: int = option(
        1,
        "add rows to the embedding and the head until N divides them, as tensor parallelism needs it; a new row is the "
        "mean of all tokens' rows, so its probability is below the tokens' average, and belongs to no token (default: "
        "1, add none)",
        kind=int,
        flag="pad-vocab-to-multiple-of",
        metavar="N",
        group=RESULT,
        expect=between(1, MULTIPLE_AT_MOST, "; 128 suits every tensor parallel size up to 128"),
    )
    allow_other_ids: bool = option(
        False,
        "write the tokenizer even where it gives texts other ids than the source's own, or cannot be compared with it "
        "(by default that is refused)",
        kind=bool,
        group=RESULT,
    )

    @property
    def router(self) -> RouterInit:
        """How new routers start."""
        return RouterInit(str(Path(self.router_init)), self.router_seed, self.router_std)


@dataclasses.dataclass(frozen=True)
class Options(Record):
    """How a conversion is carried out: nothing here changes a number of the result."""

    output_format: Literal["megatron", "hf"] = option(
        "megatron",
        "megatron: torch_dist, one release; hf: safetensors that transformers 4.57 and 5 read",
        group=WORK,
        choices=("megatron", "hf"),
    )
    workers: int | None = option(
        None,
        "threads that read, compute and write, in each process (default: the cores it may use, at most 4)",
        kind=int,
        metavar="W",
        group=WORK,
        expect=lambda workers: "" if workers is None or 1 <= workers <= 256 else "1 to 256",
    )
    dry_run: bool = option(False, "print the plan and write nothing", kind=bool, group=WORK)
    verify: bool = option(
        False,
        "read the result back and compare it with its sources, before it gets its name",
        kind=bool,
        group=WORK,
    )
    overwrite: bool = option(False, "replace an existing output, after success only", kind=bool, group=WORK)
    show_progress: bool = False
    """Show bytes, rate and time left on stderr."""
