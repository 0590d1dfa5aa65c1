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
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import write_json
from megatron_btx.common.log import say
from megatron_btx.common.shares import overlaps
from megatron_btx.engine.checks.start import compare_with_stored
from megatron_btx.engine.program import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.evaluation.program import add_pairs, expert_names, require
from megatron_btx.model.build import build_model
from megatron_btx.model.step import batches_of, forward

_ROUTING_FLAGS = ("moe_router_topk", "moe_router_pre_softmax", "moe_expert_capacity_factor", "btx_sample_top1")
"""Flags that decide how tokens are routed; routing.json holds them."""


def add_analysis_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this program to Megatron's parser."""
    group = parser.add_argument_group("megatron_btx routing analysis", "used by tools/analyze_routing.py")
    models = "a mixture, and the name it gets in the figures; several of one architecture side by side (required)"
    add_pairs(group, "--btx-route-model", "NAME=PATH", models)
    texts = (
        "the prefix of an indexed dataset, or a text file (docs/recipes.md), and its label: a domain, or domain/task "
    )
    add_pairs(group, "--btx-route-data", "LABEL=TEXT", f"{texts}(required)")
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


@exits_with_one_line
def main() -> int:
    """Analyse what the command line names; see --help."""
    args, (trained, experts, earlier, own_text) = start_tool(
        __doc__, add_analysis_arguments, _check_words, _check_inputs
    )
    from megatron_btx.evaluation.routing import describe, make_table, route

    data: dict[str, str] = args.btx_route_data
    result: dict[str, Any] = {"experts": experts, "checkpoints": args.btx_route_model, "texts": data}
    result |= {"routing": {flag: getattr(args, flag) for flag in _ROUTING_FLAGS}, "models": {}, "overlap": {}}
    model = build_model(args)
    shown = data if own_text is None else {"text": own_text}
    texts: dict[str, dict[str, Any]] = {}
    for name, path in args.btx_route_model.items():
        load_weights(model, path)
        routed = {}
        for label, text in data.items():
            routed[label] = route(model, f"{label}: {text}", text, args.btx_route_tokens)
        numbers = result["models"][name] = describe(routed)
        result["overlap"][name] = overlaps({label: of_label["choices"] for label, of_label in numbers.items()})
        texts[name] = {}
        for label, text in shown.items():
            texts[name][label] = route_text(model, text, is_text=own_text is not None)
    if args.rank > 0:
        return 0
    from megatron_btx.report.routing import write_figures, write_page

    folder = Path(args.btx_route_output)
    write_json(folder / "routing.json", result)
    everything = {**earlier, **result["models"]}
    figures = write_figures(folder, everything, experts)
    write_page(folder / "tokens.html", texts, experts, trained)
    say(make_table(everything, experts))
    names = ["routing.json", *figures, "tokens.html"]
    say("\nwrote " + ", ".join(str(folder / name) for name in names))
    return 0


def _check_words(args: argparse.Namespace) -> None:
    require(args, "btx_route_model", "btx_route_data", "btx_route_output")


def _check_inputs(args: argparse.Namespace) -> tuple[list[str], list[str], dict[str, Any], str | None]:
    """Check the models and texts, and make the folder for the results.

    Returns:
        The models whose routers were trained; the names of the experts; models of earlier analyses, drawn beside; the
        text that the page colours, None for the start of every label's.
    """
    from megatron_btx.data.texts import check_texts
    from megatron_btx.evaluation.routing import read_earlier

    if not args.num_experts:
        raise InputError("--btx-route-model: routing is of mixtures; give --num-experts and a mixture's checkpoint")
    models: dict[str, str] = args.btx_route_model
    stored = {name: compare_with_stored(path, vars(args)) for name, path in models.items()}
    for label, prefix in args.btx_route_data.items():
        if label.count("/") > 1 or label.startswith("/") or label.endswith("/"):
            raise InputError(f"--btx-route-data {label}={prefix}: expected DOMAIN=TEXT or DOMAIN/TASK=TEXT")
    check_texts(args.btx_route_data, "--btx-route-data", args.btx_route_tokens, "--btx-route-tokens", args)
    text = _read_text(args.btx_route_text)
    if args.context_parallel_size > 1:
        raise InputError(
            f"--context-parallel-size {args.context_parallel_size}: tokens are told by their place, which it cuts "
            "up; use 1 to analyse"
        )
    experts = expert_names({models[name]: arguments for name, arguments in stored.items()}, args.num_experts) or []
    earlier = read_earlier([Path(file) for file in args.btx_route_beside], list(models), experts)
    if args.rank == 0:
        Path(args.btx_route_output).mkdir(parents=True, exist_ok=True)
    trained = [name for name, arguments in stored.items() if not arguments.get("btx_untrained_routers")]
    return trained, experts, earlier, text


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
    """The route of every token of a text, up to one micro-batch; or of the first sequence of the dataset ``text``.

    Returns:
        ``pieces``: the tokens' texts, or numbers where there is no tokenizer; ``layers``: numbers from 0; ``gates``:
        [L, T, E], rounded to 1/1000.
    """
    import torch
    from megatron.core import mpu
    from megatron.training import get_args, get_tokenizer

    from megatron_btx.data.texts import start_of
    from megatron_btx.model.watch import mixtures, watching

    args, tokenizer = get_args(), get_tokenizer()
    length, micro = args.seq_length, args.micro_batch_size
    if is_text:
        ids = list(map(int, tokenizer.tokenize(text)))[: micro * length]
    else:
        ids = start_of(text, length)[:length].tolist()
    batches = batches_of(_fill_batches(ids), "the text")
    gates_LBSE = torch.zeros(args.num_layers, micro, length, args.num_experts, device="cuda")
    first = mpu.get_tensor_model_parallel_rank()

    def add(layer: int, _router: Any, x_SBH: torch.Tensor, outputs: Any) -> None:
        """Keep the gates; under sequence parallelism a rank has its part of the sequence."""
        part = x_SBH.shape[0]
        start = first * part if part < length else 0
        gates_SBE = outputs[0].float().reshape(part, micro, -1)
        gates_LBSE[layer, :, start : start + part] = gates_SBE.transpose(0, 1)

    with watching(model, add):
        forward(model, batches)
    if mpu.get_data_parallel_rank() > 0:
        gates_LBSE.zero_()
    torch.distributed.all_reduce(gates_LBSE)
    layers = mixtures()
    gates_LTE = gates_LBSE[layers].flatten(1, 2)[:, : len(ids)]
    pieces = [f"{token} " for token in ids]
    if args.tokenizer_type != "NullTokenizer":
        pieces = pieces_of(ids, tokenizer)
    return {"pieces": pieces, "layers": layers, "gates": gates_LTE.double().round(decimals=3).tolist()}


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
