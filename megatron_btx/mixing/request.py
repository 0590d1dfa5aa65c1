"""What a user asks of a conversion: plain records, filled by the command line or by :mod:`megatron_btx.mixing.api`.

Nothing here imports torch, so that a command line can be read and refused at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

RouterKind = Literal["normal", "zeros", "file"]
Vocabulary = Literal["same", "union"]
OutputFormat = Literal["megatron", "hf"]


@dataclasses.dataclass(frozen=True)
class RouterInit:
    """How the routers of a mix start."""

    kind: RouterKind = "normal"
    """normal: drawn; zeros: all gates equal; file: read from :attr:`file`."""
    seed: int = 1234
    """Seed of normal: 0 to 2**63 - 1."""
    std: float = 0.02
    """Standard deviation of normal; the paper is silent, this is how Megatron draws the other weights."""
    file: Path | None = None
    """An .npy file with rows [mixture layers, experts, hidden] or [experts, hidden]."""

    @classmethod
    def parse(cls, text: str | Path, seed: int, std: float) -> RouterInit:
        """The start that a word or a path stands for, as in ``--router-init``."""
        if text == "normal":
            return cls("normal", seed, std)
        if text == "zeros":
            return cls("zeros", seed, std)
        return cls("file", seed, std, Path(text))

    def __str__(self) -> str:
        if self.kind == "file":
            return str(self.file)
        return self.kind


@dataclasses.dataclass(frozen=True)
class Request:
    """What the result is made of and how: all that decides its bytes, but for the format."""

    experts: tuple[tuple[str, str], ...]
    """(name, path) of each source, in the order of the result's experts."""
    method: str = "btx"
    """A key of ``METHODS`` in :mod:`megatron_btx.mixing.methods`."""
    topk: int = 2
    """Experts per token."""
    chunks: int | None = None
    """For split: the experts that each source is cut into."""
    copies: int | None = None
    """For upcycle: the experts made of the one source."""
    layer_frequency: int | tuple[int, ...] = 1
    """Which layers become mixtures, as Megatron's --moe-layer-freq: every n-th, or 0 or 1 for each layer."""
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Weight of each source in the averages, by name; 1 where not given."""
    take: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Configuration fields that may differ: for each the source whose value the result gets."""
    vocabulary: Vocabulary = "same"
    """union: vocabularies may extend one another, and each row is averaged over its owners."""
    allow_other_tokenizer: bool = False
    """Do not compare the sources' tokenizers by content."""
    router: RouterInit = RouterInit()
    """How new routers start."""
    pad_vocabulary: int = 1
    """The rows of embedding and head become a multiple of this."""
    allow_other_ids: bool = False
    """Write a tokenizer even where it gives texts other ids than the source's own, or cannot be compared with it."""

    @property
    def vocabulary_union(self) -> bool:
        """Whether vocabularies may extend one another."""
        return self.vocabulary == "union"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a conversion is carried out: nothing here changes a number of the result."""

    output_format: OutputFormat = "megatron"
    """megatron: torch_dist, one release; hf: safetensors."""
    workers: int | None = None
    """Threads of each process that read, compute and write; None: the cores it may use, at most 4."""
    verify: bool = False
    """Read the result back and compare it with its sources, before it gets its name."""
    overwrite: bool = False
    """Replace an existing output, after success only."""
    dry_run: bool = False
    """Plan, and write nothing."""
    show_progress: bool = False
    """Show bytes, rate and time left on stderr."""
