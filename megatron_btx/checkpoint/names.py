"""THE table of names: what every tensor of a model is called in each kind of checkpoint, and where it lies.

A model is a set of *pieces*: the smallest tensors that mean something by themselves (the query projection of a layer,
the gate projection of an expert, ...). Checkpoints store pieces alone or fused, with layers and experts in the name or
on an axis. One row per piece says all of that, for every dialect; reading and writing, in either direction, use the
same row.

Axes: L layers, E experts, H hidden, F feed-forward, V vocabulary, D head size.
Sources: Megatron-core ``core/models/gpt/gpt_layer_specs.py``, ``core/transformer/{attention,mlp}.py`` and
``core/transformer/moe/experts.py``; transformers' model classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

Part = Literal["whole", "q", "k", "v", "gate", "up"]
DialectName = Literal["stacked", "numbered", "singleton", "llama", "mixtral", "qwen_moe", "fused_moe"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes that say how a model's tensors are shaped and fused."""

    layers: int
    hidden: int
    ffn: int
    expert_ffn: int
    heads: int
    groups: int
    """Query groups, which are the key-value heads."""
    head_size: int
    gated: bool
    experts: int
    """0 for a dense model."""
    mixture_layers: tuple[bool, ...]
    """For each layer whether it is a mixture of experts."""
    vocabulary: int | None = None
    positions: int | None = None

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Sizes:
        """The sizes of a model described by Megatron's arguments."""
        layers, heads = arguments["num_layers"], arguments["num_attention_heads"]
        experts = arguments.get("num_experts") or 0
        groups = arguments.get("num_query_groups") if arguments.get("group_query_attention") else heads
        ffn = arguments["ffn_hidden_size"]
        return Sizes(
            layers,
            arguments["hidden_size"],
            ffn,
            arguments.get("moe_ffn_hidden_size") or ffn,
            heads,
            groups or heads,
            arguments.get("kv_channels") or arguments["hidden_size"] // heads,
            bool(arguments.get("swiglu") or arguments.get("quick_geglu")),
            experts,
            mixture_layers(arguments.get("moe_layer_freq", 1), layers) if experts else (False,) * layers,
            arguments.get("padded_vocab_size"),
            arguments.get("max_position_embeddings"),
        )


def mixture_layers(frequency: int | list[int] | None, layers: int) -> tuple[bool, ...]:
    """For each layer whether it is a mixture, as Megatron reads ``moe_layer_freq`` (core/models/gpt)."""
    if isinstance(frequency, list | tuple):
        return tuple(bool(n) for n in frequency)
    return tuple(layer % (frequency or 1) == 0 for layer in range(layers))


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of piece: its name, and its names in the dialects.

    ``{layer}`` and ``{expert}`` are numbers that some dialects have in the name and others on an axis; ``{kind}`` is
    weight or bias.
    """

    piece: str
    megatron: str
    llama: str = ""
    mixtral: str = ""
    """"" for the same as llama."""
    qwen_moe: str = ""
    fused_moe: str = ""
    part: Part = "whole"
    """Which rows of the Megatron tensor (and of the fused Hugging Face one) are this piece."""
    also: tuple[str, ...] = ()
    """Other Megatron names: read as well, and written where mixture layers of the other kind look for them."""
    optional: bool = False
    """Whether a model can lack it; biases always may be lacking."""


_L = "decoder.layers.{layer}."
_E = _L + "mlp.experts.experts.{expert}."
_HF = "model.layers.{layer}."
_QKV = _L + "self_attention.linear_qkv.{kind}"
_HF_A = _HF + "self_attn."

ROWS = (
    Row("embedding.weight", "embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Row("positions.weight", "embedding.position_embeddings.weight", optional=True),
    Row(
        "layers.{layer}.input_norm.{kind}",
        _L + "self_attention.linear_qkv.layer_norm_{kind}",
        _HF + "input_layernorm.{kind}",
        also=(_L + "input_layernorm.{kind}",),
    ),
    Row("layers.{layer}.attention.q.{kind}", _QKV, _HF_A + "q_proj.{kind}", part="q"),
    Row("layers.{layer}.attention.k.{kind}", _QKV, _HF_A + "k_proj.{kind}", part="k"),
    Row("layers.{layer}.attention.v.{kind}", _QKV, _HF_A + "v_proj.{kind}", part="v"),
    Row(
        "layers.{layer}.attention.q_norm.{kind}",
        _L + "self_attention.q_layernorm.{kind}",
        _HF_A + "q_norm.{kind}",
        optional=True,
    ),
    Row(
        "layers.{layer}.attention.k_norm.{kind}",
        _L + "self_attention.k_layernorm.{kind}",
        _HF_A + "k_norm.{kind}",
        optional=True,
    ),
    Row("layers.{layer}.attention.o.{kind}", _L + "self_attention.linear_proj.{kind}", _HF_A + "o_proj.{kind}"),
    # Local mixture layers look for the dense name of this norm, Transformer Engine ones for their own
    # (gpt_layer_specs.py, sharded_state_dict_keys_map): mixtures are written with both.
    Row(
        "layers.{layer}.mlp_norm.{kind}",
        _L + "mlp.linear_fc1.layer_norm_{kind}",
        _HF + "post_attention_layernorm.{kind}",
        also=(_L + "pre_mlp_layernorm.{kind}",),
    ),
    Row("layers.{layer}.ffn.gate.{kind}", _L + "mlp.linear_fc1.{kind}", _HF + "mlp.gate_proj.{kind}", part="gate"),
    Row("layers.{layer}.ffn.up.{kind}", _L + "mlp.linear_fc1.{kind}", _HF + "mlp.up_proj.{kind}", part="up"),
    Row("layers.{layer}.ffn.down.{kind}", _L + "mlp.linear_fc2.{kind}", _HF + "mlp.down_proj.{kind}"),
    Row(
        "layers.{layer}.router.{kind}",
        _L + "mlp.router.{kind}",
        mixtral=_HF + "block_sparse_moe.gate.{kind}",
        qwen_moe=_HF + "mlp.gate.{kind}",
        fused_moe=_HF + "mlp.gate.{kind}",
    ),
    Row(
        "layers.{layer}.experts.{expert}.gate.{kind}",
        _E + "linear_fc1.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w1.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.gate_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.gate_up_proj",
        part="gate",
    ),
    Row(
        "layers.{layer}.experts.{expert}.up.{kind}",
        _E + "linear_fc1.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w3.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.up_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.gate_up_proj",
        part="up",
    ),
    Row(
        "layers.{layer}.experts.{expert}.down.{kind}",
        _E + "linear_fc2.{kind}",
        mixtral=_HF + "block_sparse_moe.experts.{expert}.w2.{kind}",
        qwen_moe=_HF + "mlp.experts.{expert}.down_proj.{kind}",
        fused_moe=_HF + "mlp.experts.{expert}.down_proj",
    ),
    Row("final_norm.{kind}", "decoder.final_layernorm.{kind}", "model.norm.{kind}"),
    Row("head.{kind}", "output_layer.{kind}", "lm_head.{kind}", optional=True),
)
"""Every piece of every model the project knows."""

IGNORED_MEGATRON = (
    r"optimizer\..*",
    r"chained_\d+\..*",
    r".*\._extra_state(/.*)?",
    r"rng_state(/.*)?",
    r"rerun_state_machine_state(/.*)?",
    r"common_state(/.*)?",
    r"content_metadata(/.*)?",
)
"""Entries that are no part of the model: a mix starts with a fresh optimizer, and empty extra states."""

IGNORED_HF = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
"""Tensors that mean nothing: rotary frequencies follow from the configuration."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """A kind of checkpoint: which column names its tensors, and which numbers are axes there."""

    name: DialectName
    column: str
    axes: tuple[str, ...] = ()
    """Numbers that are no part of the name but a leading axis."""
    fused: bool = True
    """Whether pieces of one tensor are stored together."""


DIALECTS = {
    "stacked": Dialect("stacked", "megatron", ("layer", "expert")),
    "numbered": Dialect("numbered", "megatron", ("expert",)),
    # Megatron-core 0.14 to 0.19 with singleton_local_shards: a name for every layer, expert and half of a gated fc1.
    "singleton": Dialect("singleton", "megatron"),
    "llama": Dialect("llama", "llama", fused=False),
    "mixtral": Dialect("mixtral", "mixtral", fused=False),
    "qwen_moe": Dialect("qwen_moe", "qwen_moe", fused=False),
    # How transformers 5 holds the experts of any mixture in memory.
    "fused_moe": Dialect("fused_moe", "fused_moe", ("expert",)),
}


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a piece lies in a checkpoint: a tensor, the index on its leading axes, and its rows.

    The tensor (after the leading axes) has ``groups`` groups of ``per_group`` units of ``unit`` rows; the piece is the
    units ``first`` to ``last`` of every group, one group after the other. A piece of its own is one group of one unit.
    """

    key: str
    lead: tuple[int, ...]
    groups: int
    per_group: int
    unit: int
    first: int
    last: int

    @property
    def stored_rows(self) -> int:
        """Rows of the stored tensor (per index of the leading axes)."""
        return self.groups * self.per_group * self.unit

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where rows ``start`` to ``stop`` are stored: (row there, row of the piece, rows) of each run."""
        length = (self.last - self.first) * self.unit
        for group in range(start // length, -(-stop // length)) if length else ():
            low, high = max(start, group * length), min(stop, (group + 1) * length)
            there = (group * self.per_group + self.first) * self.unit + low - group * length
            yield there, low, high - low


def _extent(part: Part, sizes: Sizes, rows: int) -> tuple[int, int, int, int, int]:
    """(groups, per_group, unit, first, last) of a part; ``rows`` is the piece's own count."""
    queries = sizes.heads // sizes.groups
    if part == "q":
        return sizes.groups, queries + 2, sizes.head_size, 0, queries
    if part in ("k", "v"):
        first = queries + (part == "v")
        return sizes.groups, queries + 2, sizes.head_size, first, first + 1
    if part in ("gate", "up") and sizes.gated:
        first = int(part == "up")
        return 1, 2, rows, first, first + 1
    return 1, 1, rows, 0, 1


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece of a model: its name and shape, and the row and numbers that say where it lies."""

    name: str
    shape: tuple[int, ...]
    row: Row
    numbers: Mapping[str, Any]
    """layer, expert, kind: those that the name has."""
    required: bool

    def location(self, dialect: Dialect, sizes: Sizes) -> Location | None:
        """Where the piece lies in a dialect; None where the dialect has no name for it."""
        return next(self.locations(dialect, sizes), None)

    def locations(self, dialect: Dialect, sizes: Sizes) -> Iterator[Location]:
        """As :meth:`location`, the other names after the first."""
        template: str = getattr(self.row, dialect.column)
        if not template and dialect.column != "megatron":
            template = self.row.llama
        others = self.row.also if dialect.column == "megatron" else ()
        for text in (template, *others):
            if text and ("{kind}" in text or self.numbers.get("kind", "weight") == "weight"):
                yield self._located(text, dialect, sizes)

    def _located(self, template: str, dialect: Dialect, sizes: Sizes) -> Location:
        for axis in dialect.axes:
            template = template.replace("{" + axis + "}.", "")
        lead = tuple(self.numbers[axis] for axis in dialect.axes if axis in self.numbers)
        part = self.row.part
        key = template.format(**self.numbers)
        # In fused Hugging Face forms only the experts are; dense layers among them keep their own names.
        fused = dialect.fused and (dialect.column == "megatron" or key.endswith(".gate_up_proj"))
        if dialect.name == "singleton" and part in ("gate", "up") and sizes.gated:
            key, fused = key + {"gate": "_w", "up": "_v"}[part], False
        extent = _extent(part if fused else "whole", sizes, self.shape[0])
        return Location(key, lead, *extent)


def pieces_of(sizes: Sizes) -> Iterator[Piece]:
    """All pieces a model of these sizes can have, in the order of the table, layer by layer.

    A model may lack biases, norms' biases and what a row calls optional; the checkpoint shows which.
    """
    per_layer = [row for row in ROWS if "{layer}" in row.piece]
    for row in ROWS:
        if row in per_layer[1:]:
            continue
        if row is not per_layer[0]:
            yield from _pieces(row, sizes, {})
            continue
        for layer in range(sizes.layers):
            for layer_row in per_layer:
                if _in_layer(layer_row, sizes, sizes.mixture_layers[layer]):
                    experts = range(sizes.experts) if "{expert}" in layer_row.piece else (None,)
                    for expert in experts:
                        numbers = {"layer": layer} | ({} if expert is None else {"expert": expert})
                        yield from _pieces(layer_row, sizes, numbers)


def _in_layer(row: Row, sizes: Sizes, mixture: bool) -> bool:
    if ".gate." in row.piece and not sizes.gated:
        return False
    if ".router." in row.piece or ".experts." in row.piece:
        return mixture
    return not (".ffn." in row.piece and mixture)


def _pieces(row: Row, sizes: Sizes, numbers: dict[str, Any]) -> Iterator[Piece]:
    for kind in ("weight", "bias") if "{kind}" in row.piece else ("weight",):
        named = numbers | {"kind": kind}
        shape = _shape(row, sizes)
        required = not row.optional and kind == "weight"
        yield Piece(row.piece.format(**named), shape[:1] if kind == "bias" else shape, row, named, required)


def _shape(row: Row, sizes: Sizes) -> tuple[int, ...]:
    """The shape of a piece's weight; a size that the configuration does not say is -1."""
    name = row.piece.replace("layers.{layer}.", "").replace(".{kind}", "").replace(".weight", "")
    ffn = sizes.expert_ffn if name.startswith("experts.") else sizes.ffn
    queries, keys = sizes.heads * sizes.head_size, sizes.groups * sizes.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "embedding": (sizes.vocabulary or -1, sizes.hidden),
        "head": (sizes.vocabulary or -1, sizes.hidden),
        "positions": (sizes.positions or -1, sizes.hidden),
        "attention.q": (queries, sizes.hidden),
        "attention.k": (keys, sizes.hidden),
        "attention.v": (keys, sizes.hidden),
        "attention.o": (sizes.hidden, queries),
        "attention.q_norm": (sizes.head_size,),
        "attention.k_norm": (sizes.head_size,),
        "gate": (ffn, sizes.hidden),
        "up": (ffn, sizes.hidden),
        "down": (sizes.hidden, ffn),
        "router": (sizes.experts, sizes.hidden),
    }
    short = name.removeprefix("ffn.").removeprefix("experts.{expert}.")
    return shapes.get(short, (sizes.hidden,))
