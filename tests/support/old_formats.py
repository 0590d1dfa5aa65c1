"""Checkpoints as other Megatron versions, Transformer Engine and other layouts of the layers leave them on disk.

Keys, shapes and chunks are those that Megatron-core 0.12.3, 0.14.0, 0.16.1 and 0.19.2 save; for Transformer Engine,
their own wrappers around stand-ins of its modules. PyTorch's own code writes them, not the package's.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from tests.unit.mixing.checkpoints import byte_entry, iteration, tensors

LAYER, EXPERTS = "decoder.layers.", "mlp.experts.experts."


class Form(NamedTuple):
    """One way in which a checkpoint can lie on disk."""

    version: str
    implementation: str
    """``local``, or ``te`` for Transformer Engine (of its first generation with Megatron 0.12)."""
    layers: str
    """``stacked`` on an axis, ``numbered`` in the key, or ``singleton``: numbered, experts too, gate and up apart."""
    experts: str = ""
    """Empty for a dense model, else how the chunks of a mixture's experts are cut: ``sequential`` or ``grouped``."""

    def __str__(self) -> str:
        return "-".join(filter(None, self))


_ALL = itertools.product(("0.12", "0.14", "0.16", "0.19"), ("local", "te"), ("stacked", "numbered", "singleton"))
FORMS = [form for form in itertools.starmap(Form, _ALL) if form.version != "0.12" or form.layers != "singleton"]
"""Of a dense model, which is what ``source`` has to be."""
_MIXTURES = "0.12 local stacked grouped, 0.12 te numbered sequential, 0.14 te stacked sequential, "
_MIXTURES += "0.14 local singleton sequential, 0.16 te singleton sequential, 0.19 te numbered sequential"
MIXTURE_FORMS = [Form(*words.split()) for words in _MIXTURES.split(", ")]
"""Of a mixture with experts in every layer, which is what ``source`` has to be."""


class Content(SavePlanner):
    """What a checkpoint holds, chunk by chunk; PyTorch asks it for all it writes."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.chunks: dict[MetadataIndex, torch.Tensor] = {}
        self.sizes: dict[str, torch.Size] = {}
        self.objects: dict[str, Any] = {}

    def add(self, key: str, whole: torch.Tensor, alone: int = 0, halved: int | None = None) -> None:
        """Add a tensor, cut into single steps of its first ``alone`` axes and into two halves of one axis."""
        self.sizes[key] = whole.shape
        steps = [[(i, 1) for i in range(n)] if axis < alone else [(0, n)] for axis, n in enumerate(whole.shape)]
        if halved is not None:
            steps[halved] = [(i * whole.shape[halved] // 2, whole.shape[halved] // 2) for i in range(2)]
        for place in itertools.product(*steps):
            index = MetadataIndex(key, torch.Size(start for start, _ in place))
            self.chunks[index] = whole[tuple(slice(start, start + length) for start, length in place)].clone()

    def set_up_planner(self, *_: Any, **__: Any) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        """One item per chunk and per object."""
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        for index, chunk in self.chunks.items():
            where = ChunkStorageMetadata(index.offset, chunk.shape)
            data = TensorWriteData(where, TensorProperties.create_from_tensor(chunk), self.sizes[index.fqn])
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The index, with what Megatron adds to it: the plans, and until 0.14 its notes under a class of its own."""
        plans, metadata = create_default_global_save_plan(all_plans, rewrite_index_hints=False)
        metadata.all_local_plans = all_plans
        if self.form.version in ("0.12", "0.14"):
            from megatron.core.dist_checkpointing.strategies.torch import MCoreSavePlan

            metadata.mcore_data = {key: {} for key in self.sizes}
            metadata.all_local_plans = [MCoreSavePlan()]
            vars(metadata.all_local_plans[0]).update(vars(all_plans[0]), mcore_data=metadata.mcore_data)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The content of one item."""
        if write_item.type != WriteItemType.BYTE_IO:
            return self.chunks[write_item.index]
        torch.save([self.objects[write_item.index.fqn]], file := io.BytesIO())
        return file


def add_layers(content: Content, name: str, whole: torch.Tensor, gated: bool) -> None:
    """Add one tensor of all layers (``name`` is without them), in the form's keys and chunks."""
    form, expert = content.form, name.startswith(EXPERTS)
    halved = gated and name.endswith(("linear_fc1.weight", "linear_fc1.bias"))
    if form.experts and form.implementation == "te":
        name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    keys = {LAYER + name: (whole, 1)}  # to a tensor, and how many of its first axes are layers or experts
    if form.layers != "stacked":
        keys = {f"{LAYER}{layer}.{name}": (tensor, 0) for layer, tensor in enumerate(whole)}
    if expert and form.layers == "singleton":
        parts = [(key.split(EXPERTS), i, t) for key, (of_layer, _) in keys.items() for i, t in enumerate(of_layer)]
        keys = {f"{before}{EXPERTS}{i}.{after}": (tensor, 0) for (before, after), i, tensor in parts}
    elif expert:
        keys = {key: (tensor, axes + 1) for key, (tensor, axes) in keys.items()}
    for key, (tensor, axes) in keys.items():
        if halved and form.layers == "singleton":
            for half, letter in zip(tensor.chunk(2), "wv", strict=True):
                content.add(f"{key}_{letter}", half)
        else:
            content.add(key, tensor, axes - (expert and form.experts == "grouped"), axes if halved else None)


def extra_states(form: Form, layers: int, experts: int, qk_norm: bool) -> Iterator[str]:
    """The keys of the modules' extra states: which modules have one, and how their places are written."""
    te, stacked = form.implementation == "te", form.layers == "stacked"
    te_2 = te and form.version != "0.12"
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += [] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    modules += ["self_attention.core_attention"] if te and form.version in ("0.12", "0.14") else []
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if te_2 and qk_norm else []
    modules += ["pre_mlp_layernorm"] if te_2 and experts else []
    for layer in range(layers):
        prefix, place = (LAYER, f"{layer}_{layers}") if stacked else (f"{LAYER}{layer}.", "0_1")
        yield from (f"{prefix}{module}._extra_state/shard_{place}" for module in modules)
        for i, linear in itertools.product(range(experts), ("linear_fc1", "linear_fc2")):
            of_expert = f"{layer}.{i}_{layers}.{experts}" if stacked else f"{i}_{experts}"
            linear, of_expert = (f"{i}.{linear}", place) if form.layers == "singleton" else (linear, of_expert)
            yield f"{prefix}{EXPERTS}{linear}._extra_state/shard_{of_expert}"
    yield from ["decoder.final_layernorm._extra_state/shard_0_1"] * te_2


def add_optimizer(content: Content, weight: torch.Tensor) -> None:
    """A few entries of the version's optimizer, which a mix has to leave alone: all of them are infinite."""
    moments, group = torch.full_like(weight, float("inf")), "optimizer.distributed.dp_group_idx_0"
    if content.form.version == "0.12":  # flattened, and numbered where there are several optimizers
        content.add("chained_0.optimizer.state.exp_avg.output_layer.weight", moments.reshape(1, 1, -1))
    elif content.form.version == "0.19":
        content.add("optimizer.state.fp32_param.output_layer.weight", moments)
    else:  # the buffers of the distributed optimizer
        content.add(f"{group}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg", moments)
        content.objects[f"{group}.optimizer/shard_0_1"] = {"param_groups": []}


def describe(common: dict[str, Any], form: Form, layers: int) -> dict[str, Any]:
    """The arguments and the rest of the common state, as the version would have stored them for this form."""
    changed: dict[str, Any] = {"transformer_impl": "transformer_engine" if form.implementation == "te" else "local"}
    kind = {"singleton_local_shards": form.layers == "singleton", "chained_optim_avoid_prefix": True}
    if form.layers == "numbered":
        changed["moe_layer_freq"] = [1] * layers if form.experts else 1
        kind |= {} if form.experts else {"non_homogeneous_layers": True}
    rest: dict[str, Any] = {} if form.version == "0.12" else {"content_metadata": kind}
    rest["args"] = Namespace(**{**vars(common["args"]), **changed})
    return {key: value for key, value in common.items() if key != "content_metadata"} | rest


def write_form(source: Path, target: Path, form: Form) -> Path:
    """Write the weights of ``source`` to the new folder ``target``, both checkpoint roots; returns ``target``."""
    weights, common = tensors(source), byte_entry(source, "common_state/shard_0_1")[0]
    arguments, folder = common["args"], target / iteration(source).name
    layers, experts = arguments.num_layers, arguments.num_experts or 0
    assert bool(experts) == bool(form.experts), f"{form} is not a form of a model with {experts} experts"
    content = Content(form)
    for key, whole in weights.items():
        if key.startswith(LAYER):
            add_layers(content, key.removeprefix(LAYER), whole, arguments.swiglu)
        else:
            content.add(key, whole)
    state = io.BytesIO() if form.version == "0.12" else torch.empty(0, dtype=torch.uint8)
    names = extra_states(form, layers, experts, arguments.qk_layernorm)
    content.objects.update(dict.fromkeys(names, state if form.implementation == "te" else None))
    add_optimizer(content, weights["decoder.final_layernorm.weight"])
    common, backends = describe(common, form, layers), {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    folder.mkdir(parents=True)
    if form.version == "0.19":
        content.objects["common_state/shard_0_1"] = common
    else:
        torch.save(common, folder / "common.pt")
        backends |= {"common_backend": "torch", "common_backend_version": 1}
    writer = dcp.FileSystemWriter(folder, sync_files=False, thread_count=1 if form.version == "0.19" else 2)
    dcp.save({}, storage_writer=writer, planner=content, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(backends))
    shutil.copy(source / "latest_checkpointed_iteration.txt", target)
    return target
