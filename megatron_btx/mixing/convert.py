"""One conversion, from a request to a published result: what all the command lines call."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_btx.ground.errors import InputError
from megatron_btx.ground.progress import byte_progress
from megatron_btx.mixing import proof
from megatron_btx.mixing.describe import explain, plan_text, router_text
from megatron_btx.mixing.execute import Execution, default_workers, refuse_output
from megatron_btx.mixing.plan import Plan, Request, make_plan
from megatron_btx.mixing.ranks import Ranks
from megatron_btx.mixing.sinks import Output, lay_out_result


def convert(request: Request, options: argparse.Namespace, explained: str | None = None) -> int:
    """Plan, print, write and, if asked for, verify.

    Args:
        options: those of :func:`megatron_btx.mixing.cli.add_output_options`.
        explained: a tensor of the result whose origin is to be printed, instead of writing anything.

    Raises:
        InputError: see the modules of this package; nothing was written then, or nothing that loads.
    """
    if options.workers is not None and not 1 <= options.workers <= 256:
        raise InputError(f"--workers {options.workers}: expected 1 to 256")
    workers = options.workers or default_workers()
    target = Path("result" if options.output is None else options.output)
    ranks = Ranks()
    made: list[tuple[Plan, Output, str]] = []

    def prepare() -> None:
        plan = make_plan(request)
        output = lay_out_result(plan, options.output_format, target)
        if explained is not None:
            made.append((plan, output, explain(plan, output, explained)))
            return
        made.append((plan, output, "\n".join([plan_text(plan, output, workers), *router_text(plan)])))
        if not options.dry_run:
            refuse_output(plan, output, target, options.overwrite)

    ranks.together(prepare)  # a file can be missing on one node alone, and nobody writes before everybody has looked
    plan, output, said = made[0]
    if ranks.rank == 0:
        print(said, flush=True)
    if options.dry_run or explained is not None:
        ranks.close()
        return 0
    written = sum(task.slot.length_bytes for task in output.tasks)
    total = written * (2 if options.verify else 1) // ranks.world
    total += sum(proof.manifest_bytes(source.root) for source in plan.sources)
    with byte_progress("mixing", total if ranks.rank == 0 else 0) as progress:
        execution = Execution(plan, output, target, ranks, workers, progress, options.overwrite)
        execution.run(options.verify)
    ranks.close()
    if ranks.rank == 0:
        if options.verify:
            print(f"verified: all {len(output.tensors)} tensors equal what their rules give; {execution.checked_rows}")
        hint = f"; continue with the flags in {target / 'megatron_args.txt'}" if output.format == "megatron" else ""
        print(f"wrote {target}{hint}")
    return 0


def check_old_output(folder: Path) -> int:
    """Check an old output, every byte of it, against its manifest.

    Raises:
        CheckpointError: names what differs.
    """
    with byte_progress("checking", proof.manifest_bytes(folder)) as progress:
        count = proof.check_manifest(folder, progress)
    print(f"verified: all {count} tensors and all files of {folder} are as they were written")
    return 0
