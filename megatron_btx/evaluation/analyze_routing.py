"""Who is routed where: one or several checkpoints over labelled texts, as numbers, figures and a page of tokens.

    torchrun --nproc-per-node N tools/analyze_routing.py [Megatron's model and layout flags]
        --btx-route-model NAME=PATH ... --btx-route-data LABEL=TEXT ... --btx-route-output FOLDER

A label is a domain, or ``domain/task``; the tasks of a domain are also added up. Works under any layout but context
parallelism; layouts that cut the texts into the same batches give the same counts (a capacity depends on its own).

FOLDER/routing.json holds ``experts``, ``checkpoints`` (model -> path), ``texts`` (label -> path), ``routing`` (flags),
``models`` (model -> label -> numbers, see ``megatron_btx.evaluation.routing.described``) and ``overlap`` (model ->
label -> label: 1 less the mean total variation distance of the shares of all choices).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import help_if_asked
from megatron_btx.ground.errors import InputError, exits_with_one_line


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
        help="the prefix of an indexed dataset, or a text file (docs/data.md), and its label: a domain, or "
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


@exits_with_one_line
def main() -> int:
    """Analyse what the command line names; see --help."""
    prepare_environment()
    help_if_asked(__doc__, add_analysis_arguments)
    install_cpu_stand_ins()
    from megatron.training import initialize

    from megatron_btx.data.texts import check_texts
    from megatron_btx.engine import repairs
    from megatron_btx.engine.checks.start import compare_with_stored
    from megatron_btx.engine.cpu import has_gpu
    from megatron_btx.engine.loading import load_weights
    from megatron_btx.engine.program import parse_arguments
    from megatron_btx.evaluation.inputs import expert_names
    from megatron_btx.evaluation.routing import described, overlaps, read_earlier, route_label, route_text
    from megatron_btx.model.build import build_model

    args = parse_arguments(add_analysis_arguments, quiet=True, check_own=_inputs)
    models, data = _inputs(args)
    if not args.num_experts:
        raise InputError("--btx-route-model: routing is of mixtures; give --num-experts and a mixture's checkpoint")
    stored = [compare_with_stored(path, vars(args)) for path in models.values()]
    _check_labels(data)
    check_texts(data, "--btx-route-data", args.btx_route_tokens, "--btx-route-tokens", args)
    given = _read_text(args.btx_route_text)
    if args.context_parallel_size > 1:
        raise InputError(
            f"--context-parallel-size {args.context_parallel_size}: tokens are told by their place, which it cuts "
            "up; use 1 to analyse"
        )
    experts = expert_names(dict(zip(models.values(), stored, strict=True)), args.num_experts) or []
    earlier = read_earlier([Path(file) for file in args.btx_route_beside], list(models), experts)
    folder = Path(args.btx_route_output)
    if int(os.environ.get("RANK", "0")) == 0:
        folder.mkdir(parents=True, exist_ok=True)
    repairs.install()
    initialize.initialize_megatron(allow_no_cuda=not has_gpu())
    model = build_model(args)
    flags = ("moe_router_topk", "moe_router_pre_softmax", "moe_expert_capacity_factor", "btx_sample_top1")
    result: dict[str, Any] = {"experts": experts, "checkpoints": models, "texts": data}
    result |= {"routing": {flag: getattr(args, flag) for flag in flags}, "models": {}, "overlap": {}}
    texts: dict[str, dict[str, Any]] = {}
    for name, path in models.items():
        load_weights(model, path)
        routed = {label: route_label(model, f"{label}: {prefix}", prefix) for label, prefix in data.items()}
        result["models"][name] = described(routed, len(experts))
        result["overlap"][name] = overlaps(result["models"][name])
        sources = {"text": given} if given is not None else data
        texts[name] = {label: route_text(model, text, is_text=given is not None) for label, text in sources.items()}
    if args.rank == 0:
        trained = []
        for name, arguments in zip(models, stored, strict=True):
            if not arguments.get("btx_untrained_routers"):
                trained.append(name)
        _write(folder, result, earlier, texts, trained)
    return 0


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
    from megatron_btx.evaluation.routing import table
    from megatron_btx.ground.files import write_json
    from megatron_btx.report.routing_figures import write_figures
    from megatron_btx.report.routing_page import write_page

    experts = result["experts"]
    write_json(folder / "routing.json", result)
    everything = {**earlier, **result["models"]}
    figures = write_figures(folder, everything, experts)
    write_page(folder / "tokens.html", texts, experts, trained)
    print(table(everything, experts))
    names = ["routing.json", *figures, "tokens.html"]
    print("\nwrote " + ", ".join(str(folder / name) for name in names), flush=True)


def _inputs(args: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    from megatron_btx.evaluation.inputs import inputs_of

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


if __name__ == "__main__":
    sys.exit(main())
