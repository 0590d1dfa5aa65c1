"""``btx convert`` and ``tools/convert_experts.py``: mix experts into one mixture of experts."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.errors import InputError, exits_with_one_line

if TYPE_CHECKING:
    from megatron_btx.mix.plan import Plan


def parser() -> argparse.ArgumentParser:
    """The command line; importing and printing it needs neither torch nor Megatron."""
    p = argparse.ArgumentParser(
        prog="convert_experts.py",
        description="Mix domain experts into one mixture of experts (Branch-Train-MiX): feed-forward blocks become the "
        "experts bit for bit, everything else is averaged, routers are new. Needs no GPU.",
    )
    p.add_argument(
        "--expert",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="an expert: a name, and its Megatron torch_dist checkpoint (the root, or one iter_ folder in it); repeat, "
        "in the order the experts get in the mixture; give the seed too, to keep a generalist",
    )
    p.add_argument("--output", metavar="PATH", help="folder for the result, a checkpoint root with one release")
    p.add_argument(
        "--method",
        choices=("btx", "average"),
        default="btx",
        help="btx: a mixture of experts; average: the plain average, a dense model (default: btx)",
    )
    p.add_argument(
        "--moe-router-topk", metavar="K", type=int, default=2, help="experts per token in the mixture (default: 2)"
    )
    p.add_argument("--router-seed", metavar="N", type=int, default=1234, help="seed of the new routers (default: 1234)")
    p.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    p.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare it with its sources, before it gets its name",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output, after success only")
    p.add_argument(
        "--allow-other-tokenizer", action="store_true", help="do not compare the experts' tokenizers by content"
    )
    return p


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    named_paths = [_name_and_path(text) for text in options.expert]
    if options.output is None and not options.dry_run:
        raise InputError("--output is missing; name the folder for the result, or look at the plan with --dry-run")
    from megatron_btx.mix.execute import execute, refuse_output
    from megatron_btx.mix.plan import make_plan
    from megatron_btx.progress import byte_progress

    plan = make_plan(
        named_paths, options.method, options.moe_router_topk, options.router_seed, options.allow_other_tokenizer
    )
    print(plan_text(plan))
    if options.dry_run:
        return 0
    output = Path(options.output)
    refuse_output(plan, output, options.overwrite)
    with byte_progress("mixing", plan.output_bytes * (2 if options.verify else 1)) as progress:
        execute(plan, output, options.overwrite, options.verify, progress)
    if options.verify:
        print(f"verified: all {len(plan.tensors)} tensors equal what their rules give")
    print(f"wrote {output}; continue with the flags in {output / 'megatron_args.txt'}")
    return 0


def _name_and_path(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise InputError(f"--expert {text}: expected NAME=PATH, as --expert math=runs/math/checkpoint")
    return name, path


def plan_text(plan: Plan) -> str:
    """The plan as a table: the experts, and per kind of rule the tensors and bytes."""
    lines = [f"{plan.method}: {len(plan.experts)} experts"]
    lines += [f"  {i}  {e.name:<12} {e.folder}" for i, e in enumerate(plan.experts)]
    lines.append(f"  {'tensor of the result':<58} {'shape':<22} {'MiB':>9}  made by")
    made_by = {
        "average": "mean of all",
        "stack": "moved bit for bit",
        "normal": f"normal, seed {plan.router_seed}",
        "zeros": "zeros",
    }
    for tensor in plan.tensors:
        shape = "x".join(map(str, tensor.shape))
        size = tensor.size_bytes / 2**20
        lines.append(f"  {tensor.key:<58} {shape:<22} {size:>9.2f}  {made_by[tensor.rule.operation]}")
    count = collections.Counter(tensor.rule.operation for tensor in plan.tensors)
    lines.append(
        f"  {len(plan.tensors)} tensors ({', '.join(f'{n} {op}' for op, n in count.items())}), "
        f"{plan.input_bytes / 2**20:.1f} MiB to read, {plan.output_bytes / 2**20:.1f} MiB to write"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
