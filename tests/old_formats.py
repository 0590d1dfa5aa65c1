"""Checkpoints as other Megatron versions, Transformer Engine and other layouts of the layers leave them on disk.

``write_form`` rewrites a checkpoint of this version (local layers, stacked) into such a form, with the same weights to
the last bit. It writes with PyTorch's own code, so that what reads it is not checked against its own writer. Keys,
shapes and chunks were compared with what Megatron-core 0.12.3, 0.14.0, 0.16.1 and 0.19.2 save; for Transformer Engine
with their own wrappers around stand-ins of its modules.
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

from tests.unit.mix.checkpoints import byte_entry, iteration, tensors

LAYER = "decoder.layers."
EXPERTS = "mlp.experts.experts."


class Form(NamedTuple):
    """One way in which a checkpoint can lie on disk."""

    version: str
    implementation: str
    """The layers: ``local``, or ``te`` for Transformer Engine (of its first generation with Megatron 0.12)."""
    layers: str
    """``stacked`` on an axis, ``numbered`` in the key, or ``singleton``: numbered, experts too, gate and up apart."""
    experts: str = ""
    """Empty for a dense model, else how the chunks of a mixture's experts are cut: ``sequential`` or ``grouped``."""

    def __str__(self) -> str:
        return "-".join(filter(None, self))


FORMS = [
    Form(version, implementation, layers)
    for version, implementation in itertools.product(("0.12", "0.14", "0.16", "0.19"), ("local", "te"))
    for layers in ("stacked", "numbered", *(["singleton"] if version != "0.12" else []))
]
"""Of a dense model, which is what ``source`` has to be."""
MIXTURE_FORMS = [
    *(Form("0.12", "local", "stacked", "grouped"), Form("0.12", "te", "numbered", "sequential")),
    *(Form("0.14", "te", "stacked", "sequential"), Form("0.14", "local", "singleton", "sequential")),
    *(Form("0.16", "local", "numbered", "grouped"), Form("0.16", "te", "singleton", "sequential")),
    Form("0.19", "te", "numbered", "sequential"),
]
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
            chunk = whole[tuple(slice(start, start + length) for start, length in place)]
            self.chunks[MetadataIndex(key, torch.Size(start for start, _ in place))] = chunk.clone()

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
        file = io.BytesIO()
        torch.save([self.objects[write_item.index.fqn]], file)
        return file


def add_layers(content: Content, name: str, whole: torch.Tensor, gated: bool) -> None:
    """Add one tensor of all layers (``name`` is without them), in the form's keys and chunks."""
    form, expert = content.form, name.startswith(EXPERTS)
    halved = gated and name.split(".")[-2] == "linear_fc1" and name.endswith((".weight", ".bias"))
    if form.experts and form.implementation == "te":
        name = name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    keys = {LAYER + name: (whole, 1)}  # to a tensor, and how many of its first axes are layers or experts
    if form.layers != "stacked":
        keys = {f"{LAYER}{layer}.{name}": (tensor, 0) for layer, tensor in enumerate(whole)}
    if expert and form.layers == "singleton":
        numbered = [(key.split(EXPERTS), tensors) for key, (tensors, _) in keys.items()]
        keys = {f"{a}{EXPERTS}{i}.{b}": (t, 0) for (a, b), tensors in numbered for i, t in enumerate(tensors)}
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
    te, te_2 = form.implementation == "te", form.implementation == "te" and form.version != "0.12"
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules += ["self_attention.core_attention"] if te and form.version in ("0.12", "0.14") else []
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if te_2 and qk_norm else []
    modules += ["pre_mlp_layernorm"] if te_2 and experts else []
    modules += [] if experts else ["mlp.linear_fc1", "mlp.linear_fc2"]
    for layer in range(layers):
        stacked = form.layers == "stacked"
        for module in modules:
            place = f"{layer}_{layers}" if stacked else "0_1"
            yield f"{LAYER if stacked else f'{LAYER}{layer}.'}{module}._extra_state/shard_{place}"
        for i, linear in itertools.product(range(experts), ("linear_fc1._extra_state", "linear_fc2._extra_state")):
            yield {
                "stacked": f"{LAYER}{EXPERTS}{linear}/shard_{layer}.{i}_{layers}.{experts}",
                "numbered": f"{LAYER}{layer}.{EXPERTS}{linear}/shard_{i}_{experts}",
                "singleton": f"{LAYER}{layer}.{EXPERTS}{i}.{linear}/shard_0_1",
            }[form.layers]
    if te_2:
        yield "decoder.final_layernorm._extra_state/shard_0_1"


def add_optimizer(content: Content, weight: torch.Tensor) -> None:
    """A few entries of the version's optimizer, which a mix has to leave alone: all of them are infinite."""
    moments, group = torch.full_like(weight, float("inf")), "optimizer.distributed.dp_group_idx_0"
    if content.form.version == "0.12":  # flattened, and numbered where there are several optimizers
        content.add("chained_0.optimizer.state.exp_avg.output_layer.weight", moments.reshape(1, 1, -1))
        content.objects[f"chained_1.{group}.per_bucket_numel/shard_0_1"] = [{}]
    elif content.form.version == "0.19":
        content.add(f"optimizer.state.exp_avg.{LAYER}mlp.linear_fc2.weight", moments)
        content.add("optimizer.state.fp32_param.output_layer.weight", moments)
    else:
        buffer = f"{group}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
        content.add(f"{buffer}.exp_avg", moments)
        content.objects[f"{group}.optimizer/shard_0_1"] = {"param_groups": []}


def describe(common: dict[str, Any], form: Form, layers: int) -> dict[str, Any]:
    """The arguments and the rest of the common state, as the version would have stored them for this form."""
    arguments = Namespace(**vars(common["args"]))
    common = {**common, "args": arguments}
    arguments.transformer_impl = "transformer_engine" if form.implementation == "te" else "local"
    arguments.moe_grouped_gemm = form.experts == "grouped"
    kind = {"singleton_local_shards": form.layers == "singleton", "chained_optim_avoid_prefix": True}
    if form.layers == "numbered" and form.experts:
        arguments.moe_layer_freq = [1] * layers
    elif form.layers == "numbered":
        kind["non_homogeneous_layers"] = True
    common.pop("content_metadata")
    return common if form.version == "0.12" else {**common, "content_metadata": kind}


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
    state: Any = None
    if form.implementation == "te":
        state = io.BytesIO() if form.version == "0.12" else torch.empty(0, dtype=torch.uint8)
    content.objects.update(dict.fromkeys(extra_states(form, layers, experts, arguments.qk_layernorm), state))
    add_optimizer(content, weights["decoder.final_layernorm.weight"])
    common, backends = describe(common, form, layers), {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    folder.mkdir(parents=True)
    if form.version == "0.19":
        content.objects["common_state/shard_0_1"] = common
    else:
        torch.save(common, folder / "common.pt")
        backends |= {"common_backend": "torch", "common_backend_version": 1}
    name = folder if form.version == "0.12" else str(folder)
    writer = dcp.FileSystemWriter(name, sync_files=False, thread_count=1 if form.version == "0.19" else 2)
    dcp.save({}, storage_writer=writer, planner=content, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(backends))
    shutil.copy(source / "latest_checkpointed_iteration.txt", target)
    return target
