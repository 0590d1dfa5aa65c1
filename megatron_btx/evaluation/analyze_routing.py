"""Who is routed where: one or several checkpoints over labelled texts, as numbers, figures and a page of tokens.

    torchrun --nproc-per-node N tools/analyze_routing.py [Megatron's model and layout flags]
        --btx-route-model NAME=PATH ... --btx-route-data LABEL=TEXT ... --btx-route-output FOLDER

A label is a domain, or ``domain/task``; the tasks of a domain are also added up. Works under any layout but context
parallelism; layouts that cut the texts into the same batches give the same counts (a capacity depends on its own).

FOLDER/routing.json holds ``experts``, ``checkpoints`` (model -> path), ``texts`` (label -> path), ``routing`` (flags),
``models`` (model -> label -> numbers, see ``megatron_btx.evaluation.routing.describe``) and ``overlap`` (model ->
label -> label: 1 less the mean total variation distance of the shares of all choices).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import write_json
from megatron_btx.common.log import say
from megatron_btx.engine.checks.start import compare_with_stored
from megatron_btx.engine.program import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.evaluation.program import expert_names, inputs_of
from megatron_btx.model.build import build_model
from megatron_btx.model.step import batches_of, forward

_ROUTING_FLAGS = ("moe_router_topk", "moe_router_pre_softmax", "moe_expert_capacity_factor", "btx_sample_top1")
"""Flags that decide how tokens are routed; routing.json holds them."""


def add_analysis_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this program to Megatron's parser."""
    group = parser.add_argument_group("megatron_btx routing analysis", "used by tools/analyze_routing.py")
    group.add_argument(
        "--btx-route-model",
        metavar="NAME=PATH",
        nargs="+",
        action="extend",
        default=[],
        help="a mixture, and the name it gets in the figures; several of one architecture side by side (required)",
    )
    group.add_argument(
        "--btx-route-data",
        metavar="LABEL=TEXT",
        nargs="+",
        action="extend",
        default=[],
        help="the prefix of an indexed dataset, or a text file (docs/recipes.md), and its label: a domain, or "
        "domain/task (required)",
    )
    group.add_argument("--btx-route-output", metavar="FOLDER", help="folder for routing.json, figures, page (required)")
    group.add_argument(
        "--btx-route-tokens",
        metavar="TOKENS",
        type=int,
        default=65536,
        help="tokens per label, rounded down to whole batches, from the start of each dataset (default: 65536)",
    )
    group.add_argument(
        "--btx-route-text",
        metavar="FILE",
        help="UTF-8 text whose tokens the page colours, up to one micro-batch (default: the start of every label)",
    )
    group.add_argument(
        "--btx-route-beside",
        metavar="FILE",
        nargs="+",
        default=[],
        help="routing.json files of earlier analyses, of other routing methods say, drawn beside (default: none)",
    )
    return parser


@dataclass(frozen=True)
class _Inputs:
    """What is analysed, checked."""

    models: dict[str, str]
    """Name -> path."""
    stored: dict[str, dict[str, Any]]
    """Model -> the arguments that its checkpoint holds."""
    data: dict[str, str]
    """Label -> path of its text."""
    experts: list[str]
    earlier: dict[str, Any]
    """Models of earlier analyses, drawn beside."""
    text: str | None
    """The text that the page colours; None for the start of every label's."""

    def page_texts(self) -> dict[str, str]:
        """Label -> the text that the page colours, or the path of the dataset that begins with it."""
        if self.text is None:
            return self.data
        return {"text": self.text}

    def trained(self) -> list[str]:
        """The models whose routers were trained."""
        return [name for name, arguments in self.stored.items() if not arguments.get("btx_untrained_routers")]


@exits_with_one_line
def main() -> int:
    """Analyse what the command line names; see --help."""
    args, inputs = start_tool(__doc__, add_analysis_arguments, _names_of, _check_inputs)
    from megatron_btx.evaluation.routing import describe, overlaps, route

    result: dict[str, Any] = {"experts": inputs.experts, "checkpoints": inputs.models, "texts": inputs.data}
    result |= {"routing": {flag: getattr(args, flag) for flag in _ROUTING_FLAGS}, "models": {}, "overlap": {}}
    model = build_model(args)
    texts: dict[str, dict[str, Any]] = {}
    for name, path in inputs.models.items():
        load_weights(model, path)
        routed = {}
        for label, text in inputs.data.items():
            routed[label] = route(model, f"{label}: {text}", text, args.btx_route_tokens)
        result["models"][name] = describe(routed)
        result["overlap"][name] = overlaps(result["models"][name])
        texts[name] = {}
        for label, text in inputs.page_texts().items():
            texts[name][label] = route_text(model, text, is_text=inputs.text is not None)
    if args.rank == 0:
        _write(Path(args.btx_route_output), result, inputs.earlier, texts, inputs.trained())
    return 0


def _check_inputs(args: argparse.Namespace) -> _Inputs:
    """Check the models and texts, and make the folder for the results."""
    from megatron_btx.data.texts import check_texts
    from megatron_btx.evaluation.routing import read_earlier

    models, data = _names_of(args)
    if not args.num_experts:
        raise InputError("--btx-route-model: routing is of mixtures; give --num-experts and a mixture's checkpoint")
    stored, stored_by_path = {}, {}
    for name, path in models.items():
        stored[name] = stored_by_path[path] = compare_with_stored(path, vars(args))
    _check_labels(data)
    check_texts(data, "--btx-route-data", args.btx_route_tokens, "--btx-route-tokens", args)
    text = _read_text(args.btx_route_text)
    if args.context_parallel_size > 1:
        raise InputError(
            f"--context-parallel-size {args.context_parallel_size}: tokens are told by their place, which it cuts "
            "up; use 1 to analyse"
        )
    experts = expert_names(stored_by_path, args.num_experts) or []
    earlier = read_earlier([Path(file) for file in args.btx_route_beside], list(models), experts)
    if args.rank == 0:
        Path(args.btx_route_output).mkdir(parents=True, exist_ok=True)
    return _Inputs(models, stored, data, experts, earlier, text)


def _check_labels(data: dict[str, str]) -> None:
    for label, prefix in data.items():
        if label.count("/") > 1 or label.startswith("/") or label.endswith("/"):
            raise InputError(f"--btx-route-data {label}={prefix}: expected DOMAIN=TEXT or DOMAIN/TASK=TEXT")


def _write(
    folder: Path, result: dict[str, Any], earlier: dict[str, Any], texts: dict[str, Any], trained: list[str]
) -> None:
    """Write what was found, draw it, and print its table.

    Args:
        earlier: models of other analyses, drawn beside.
        texts: model -> label -> the tokens that the page colours.
        trained: models whose routers were trained; the page opens on the first.
    """
    from megatron_btx.evaluation.routing import make_table
    from megatron_btx.report.routing import write_figures, write_page

    experts = result["experts"]
    write_json(folder / "routing.json", result)
    everything = {**earlier, **result["models"]}
    figures = write_figures(folder, everything, experts)
    write_page(folder / "tokens.html", texts, experts, trained)
    say(make_table(everything, experts))
    names = ["routing.json", *figures, "tokens.html"]
    say("\nwrote " + ", ".join(str(folder / name) for name in names))


def _names_of(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    return inputs_of(args, "route", "a folder")


def _read_text(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"--btx-route-text {file}: is no UTF-8 text ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise InputError(f"--btx-route-text {file}: is empty; give a text of some words")
    return text


# --- the page of tokens ---------------------------------------------------------------------------------------


def route_text(model: list[Any], text: str, is_text: bool) -> dict[str, Any]:
    """The route of every token of a text (or of the start of the dataset ``text``), up to one micro-batch.

    Returns:
        ``pieces``: the tokens' texts; ``layers``: numbers from 0; ``gates``: [L, T, E], rounded to 1/1000.
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args

    from megatron_btx.model.watch import mixtures, watching

    args = get_args()
    length, micro = args.seq_length, args.micro_batch_size
    ids = _token_ids(text, is_text)
    batches = batches_of(_fill_batches(ids), "the text")
    gates_LBSE = torch.zeros(args.num_layers, micro, length, args.num_experts, device="cuda")
    first = mpu.get_tensor_model_parallel_rank()

    def add(layer: int, _router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        """Keep the gates; under sequence parallelism a rank has its part of the sequence."""
        part = x_SBH.shape[0]
        start = 0
        if part < length:
            start = first * part
        gates_SBE = outputs[0].float().reshape(part, micro, -1)
        gates_LBSE[layer, :, start : start + part] = gates_SBE.transpose(0, 1)

    with watching(model, add):
        forward(model, batches)
    if mpu.get_data_parallel_rank() > 0:
        gates_LBSE.zero_()
    torch.distributed.all_reduce(gates_LBSE)
    layers = mixtures()
    gates_LTE = gates_LBSE[layers].flatten(1, 2)[:, : len(ids)]
    return {"pieces": _show_tokens(ids), "layers": layers, "gates": gates_LTE.double().round(decimals=3).tolist()}


def _token_ids(text: str, is_text: bool) -> list[int]:
    """The tokens of a text, as many as a micro-batch holds; or of a dataset's first sequence."""
    from megatron.training import get_args, get_tokenizer

    from megatron_btx.data.texts import start_of

    args = get_args()
    if is_text:
        tokens, most = get_tokenizer().tokenize(text), args.micro_batch_size * args.seq_length
    else:
        tokens, most = start_of(text, args.seq_length), args.seq_length
    return list(map(int, tokens))[:most]


def _fill_batches(ids: list[int]) -> Any:
    """One micro-batch, the same on every data-parallel rank and as often as a pipeline needs.

    What follows the text changes nothing before it (but under a capacity, which looks at later tokens).
    """
    import numpy as np
    from megatron.core import mpu
    from megatron.training import get_args

    args = get_args()
    repeats = mpu.get_data_parallel_world_size() * mpu.get_pipeline_model_parallel_world_size()
    padded = np.resize(np.array(ids, dtype=np.int64), args.micro_batch_size * args.seq_length)
    padded[len(ids) :] = 0
    return np.append(np.tile(padded, repeats), 0)


def _show_tokens(ids: list[int]) -> list[str]:
    """The texts of tokens; their numbers where there is no tokenizer."""
    from megatron.training import get_args, get_tokenizer

    if get_args().tokenizer_type == "NullTokenizer":
        return [f"{token} " for token in ids]
    return pieces_of(ids, get_tokenizer())


def pieces_of(ids: list[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; together they are the text, even where a character takes several tokens.

    A token's text depends on the one before it (SentencePiece's blanks), so that two pieces are decoded at a time.
    """
    pieces: list[str] = []
    start = read = 0
    for count in range(1, len(ids) + 1):
        before = ""
        if read > start:
            before = tokenizer.detokenize(ids[start:read])
        after = tokenizer.detokenize(ids[start:count])
        if after.endswith("\N{REPLACEMENT CHARACTER}") and count < len(ids):  # in a character: its last token shows it
            pieces.append("")
            continue
        if after.startswith(before):
            pieces.append(after[len(before) :])
        else:
            pieces.append(tokenizer.detokenize(ids[read:count]))
        start, read = read, count
    return pieces


if __name__ == "__main__":
    sys.exit(main())
