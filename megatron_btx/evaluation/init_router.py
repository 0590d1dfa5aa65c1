"""Routers that start warm: filled from a few hundred documents per domain, without training.

    torchrun --nproc-per-node N tools/init_router.py [Megatron's model and layout flags] --btx-init-model MIX
        --btx-init-data EXPERT=TEXT ... --btx-init-output PATH

The inputs of every router are streamed through a forward pass, each token labelled with the expert of its document's
domain. Ridge regression on the one-hot labels, or the domains' centroids, gives the rows; documents that were held out
choose the strength of the ridge and the scale of the rows. Works under any layout.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import sys
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.common.files import refuse_unwritable, write_atomically, write_json
from megatron_btx.common.log import say
from megatron_btx.engine.checks.start import compare_with_stored
from megatron_btx.engine.program import start_tool
from megatron_btx.engine.restricted_loading import load_weights
from megatron_btx.evaluation.program import add_pairs, expert_names, require
from megatron_btx.mixing.operations import router_rows
from megatron_btx.mixing.request import RouterInit
from megatron_btx.model.build import build_model
from megatron_btx.model.step import batches_of

HELD_OUT_EVERY = 5
"""Every fifth document is held out."""
ROWS_SUFFIX, REPORT_SUFFIX = ".routers.npy", ".routers.json"
"""Of the files beside the output: the rows [mixture layers, experts, hidden], and what was measured."""


def add_init_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this program to Megatron's parser."""
    group = parser.add_argument_group("megatron_btx router initialisation", "used by tools/init_router.py")
    group.add_argument("--btx-init-model", metavar="PATH", help="the mixed checkpoint (required)")
    texts = "for every expert of the mixture the prefix of an indexed dataset, or a text file (docs/recipes.md): "
    add_pairs(group, "--btx-init-data", "EXPERT=TEXT", f"{texts}documents that are to go to it (required)")
    group.add_argument(
        "--btx-init-output", metavar="PATH", help="folder for the checkpoint with the new routers (required)"
    )
    group.add_argument(
        "--btx-init-method",
        choices=("ridge", "centroids"),
        default="ridge",
        help="ridge regression on the domains, or their centred means (default: ridge)",
    )
    group.add_argument(
        "--btx-init-documents",
        metavar="N",
        type=int,
        default=300,
        help="documents per domain, from the start of each dataset; every fifth is held out (default: 300)",
    )
    group.add_argument(
        "--btx-init-passes",
        metavar="N",
        type=int,
        default=2,
        help="times that all routers are fitted, each time on the inputs that the last fit leads to (default: 2)",
    )
    return parser


@exits_with_one_line
def main() -> int:
    """Fill the routers of a mixture; see --help."""
    args, data = start_tool(__doc__, add_init_arguments, _check_words, _check_inputs)
    import torch

    from megatron_btx.evaluation.router_fit import install_rows, measure, own_rows, refit
    from megatron_btx.model.watch import mixtures

    output = Path(args.btx_init_output).absolute()
    fit, held_out, sizes = _texts(data, args.btx_init_documents)
    model = build_model(args)
    load_weights(model, args.btx_init_model)
    before = own_rows(model)
    reports = {"before": measure(model, held_out)}
    drawn, layers = torch.zeros_like(before), mixtures()
    drawn[layers] = router_rows(RouterInit(), len(layers), args.num_experts, args.hidden_size).to(drawn)
    install_rows(model, drawn)
    reports["random"] = measure(model, held_out)
    install_rows(model, before)
    choices: list[dict[str, Any]] = []
    for _ in range(args.btx_init_passes):
        rows, choices = refit(model, fit, held_out, args.btx_init_method)
        install_rows(model, rows)
    reports["after"] = measure(model, held_out)
    rows = own_rows(model)
    # Writing can take longer than the other ranks would wait for.
    torch.distributed.destroy_process_group()
    if args.rank > 0:
        return 0
    say(_table(reports, choices, sizes))
    _write(args.btx_init_model, rows, {"texts": sizes, "reports": reports, "choices": choices}, output)
    return 0


def _check_words(args: argparse.Namespace) -> None:
    require(args, "btx_init_model", "btx_init_output", "btx_init_data")


def check_output(given: str) -> None:
    """Raises InputError where the folder to be made or a file beside it is there, or cannot be made."""
    output = Path(given).absolute()
    where = f"--btx-init-output {given}"
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise InputError(f"{where}: exists; name a new folder, or remove it first")
    for suffix in (ROWS_SUFFIX, REPORT_SUFFIX):
        beside = output.with_name(output.name + suffix)
        if beside.exists():
            raise InputError(f"{where}: {beside.name} is there already, beside it; move it, or name another folder")
    refuse_unwritable(str(output.parent), where)


def _check_inputs(args: argparse.Namespace) -> dict[str, str]:
    """Check the mixture, its texts and the output; return expert -> prefix, in the order of the mixture's experts."""
    stored = compare_with_stored(args.btx_init_model, vars(args))
    if not args.num_experts:
        raise InputError(f"--btx-init-model {args.btx_init_model}: has no routers; give a mixture and --num-experts")
    if args.add_bias_linear:
        raise InputError("routers with biases are not fitted here; the model must have --disable-bias-linear")
    if args.btx_init_documents < HELD_OUT_EVERY:
        raise InputError(f"--btx-init-documents {args.btx_init_documents}: expected at least {HELD_OUT_EVERY}")
    if args.btx_init_passes < 1:
        raise InputError(f"--btx-init-passes {args.btx_init_passes}: expected at least 1")
    data = _check_texts(args, expert_names({args.btx_init_model: stored}, args.num_experts) or [])
    check_output(args.btx_init_output)
    return data


def _check_texts(args: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Expert -> prefix, in the order of ``names``; there for every expert, with documents enough."""
    from megatron_btx.data.texts import check_documents
    from megatron_btx.data.training import check_descriptions

    given: dict[str, str] = args.btx_init_data
    wrong = sorted(set(given) ^ set(names))
    if wrong:
        raise InputError(
            f"--btx-init-data: {', '.join(wrong)}: missing or unknown; every expert needs documents, and the mixture "
            f"has {', '.join(names)}"
        )
    data, flags = {}, {}
    for name in names:
        flag = f"--btx-init-data {name}="
        check_documents(given[name], flag, documents=args.btx_init_documents)
        data[name], flags[given[name]] = given[name], flag
    check_descriptions(flags, args)
    return data


def split_documents(count: int) -> tuple[list[int], list[int]]:
    """The numbers of the documents to fit on, and of those held out."""
    held_out = list(range(HELD_OUT_EVERY - 1, count, HELD_OUT_EVERY))
    return [number for number in range(count) if number % HELD_OUT_EVERY != HELD_OUT_EVERY - 1], held_out


def _texts(data: dict[str, str], documents: int) -> tuple[list[Any], list[Any], dict[str, list[int]]]:
    """This rank's batches of every domain, in the order of the experts: to fit on, and held out; and how much that is.

    Whole batches alone are used: name -> documents to fit on, their tokens, those used, and the same of those held out.
    """
    import numpy as np
    from megatron.core import mpu

    from megatron_btx.data.texts import documents_of

    parts: tuple[list[Any], list[Any]] = ([], [])
    sizes: dict[str, list[int]] = {}
    for name, prefix in data.items():
        found = list(itertools.islice(documents_of(prefix), documents))
        sizes[name] = []
        for part, numbers in zip(parts, split_documents(len(found)), strict=True):
            if not numbers:
                raise InputError(f"--btx-init-data {name}={prefix}: has {len(found)} documents, expected 5 or more")
            text = np.concatenate([found[number] for number in numbers])
            where = f"--btx-init-data {name}={prefix}, {len(numbers)} of --btx-init-documents {documents}"
            batches = batches_of(text, where)
            part.append(batches)
            used = sum(batch["tokens"].numel() for batch in batches) * int(mpu.get_data_parallel_world_size())
            sizes[name] += [len(numbers), len(text), used]
    return *parts, sizes


def _table(reports: dict[str, Any], choices: list[dict[str, Any]], sizes: dict[str, list[int]]) -> str:
    names = list(sizes)
    lines = []
    for name, (documents, tokens, used, held_out, held_out_tokens, held_out_used) in sizes.items():
        lines.append(
            f"{name}: fitted on {documents} documents ({used:,} of {tokens:,} tokens, whole batches), measured on "
            f"{held_out} held out ({held_out_used:,} of {held_out_tokens:,})"
        )
    lines += ["loss on held-out documents  " + "  ".join(f"{name:>10}" for name in [*names, "mean"])]
    for which, report in reports.items():
        losses = [*report["losses"], sum(report["losses"]) / len(names)]
        lines.append(f"  {which:<26}" + "  ".join(f"{loss:>10.4f}" for loss in losses))
    lines.append("layer  domain accuracy  entropy of even  smallest to largest load  lambda   scale")
    for choice, row in zip(choices, reports["after"]["layers"], strict=True):
        ridge = "-" if choice["lambda"] is None else f"{choice['lambda']:g}"
        load = f"{min(row['load']):.1%} to {max(row['load']):.1%}"
        lines.append(
            f"{row['layer'] + 1:>5}  {row['accuracy']:>15.1%}  {row['entropy'] / math.log(len(names)):>15.2f}  "
            f"{load:>24}  {ridge:<7}  {choice['scale']:g}"
        )
    return "\n".join(lines)


def _write(model: str, rows_LEH: Any, report: dict[str, Any], output: Path) -> None:
    """The checkpoint with the new rows, written and proved by the mixing engine."""
    import numpy as np

    from megatron_btx.mixing.api import mix

    rows_file = output.with_name(output.name + ROWS_SUFFIX)
    output.parent.mkdir(parents=True, exist_ok=True)
    mixtures = [row["layer"] for row in report["reports"]["after"]["layers"]]
    content = io.BytesIO()
    np.save(content, rows_LEH[mixtures].float().cpu().numpy())
    write_atomically(rows_file, content.getvalue())
    write_json(output.with_name(output.name + REPORT_SUFFIX), report)
    models = {"mixture": Path(model).resolve()}
    result = mix(models, output, method="reroute", router_init=rows_file.resolve(), verify=True, show_progress=True)
    print(result.summary)
    print(f"verified: {result.verification}")
    print(f"wrote {result.folder}")


if __name__ == "__main__":
    sys.exit(main())
