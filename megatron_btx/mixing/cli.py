"""``btx convert`` and ``tools/convert_experts.py``: mix experts into one mixture of experts."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_btx.checkpoint.frequency import layer_frequency
from megatron_btx.ground.errors import InputError, exits_with_one_line

if TYPE_CHECKING:
    from megatron_btx.mixing.plan import Request

METHODS = ("btx", "split", "blend", "upcycle", "average", "reroute")
"""Those of :mod:`megatron_btx.mixing.rules` that this command offers; named here so that --help needs no import."""


def parser() -> argparse.ArgumentParser:
    """The command line; importing and printing it needs neither torch nor Megatron."""
    p = argparse.ArgumentParser(
        prog="btx convert",
        description="Mix domain experts into one mixture of experts (Branch-Train-MiX): feed-forward blocks become the "
        "experts bit for bit, everything else is averaged, routers are new. Needs no GPU; under torchrun or srun every "
        "process writes its share. With --verify and --output alone, an old output is checked against its manifest.",
    )
    p.add_argument(
        "--expert",
        metavar="NAME=PATH",
        action="append",
        default=[],
        help="an expert: a name, and its Megatron torch_dist checkpoint (the root, or one iter_ folder in it) or its "
        "Hugging Face model folder; repeat, in the order the experts get in the mixture; give the seed too, to keep a "
        "generalist",
    )
    add_output_options(p)
    p.add_argument(
        "--method",
        choices=METHODS,
        default="btx",
        help="btx: every expert's feed-forward blocks become one expert; split: each is cut in --chunks experts; "
        "blend: expert n is chunk n of all; upcycle: --copies of one model; average: the plain average of all; "
        "reroute: one mixture with other routers (--router-init), all else bit for bit (default: btx)",
    )
    p.add_argument("--chunks", metavar="C", type=int, help="split: experts made of each source (no default)")
    p.add_argument("--copies", metavar="N", type=int, help="upcycle: experts made of the one source (no default)")
    p.add_argument(
        "--moe-router-topk", metavar="K", type=int, default=2, help="experts per token in the mixture (default: 2)"
    )
    p.add_argument(
        "--moe-layer-freq",
        metavar="FREQ",
        default="1",
        help="layers that become mixtures, as Megatron's flag: every FREQ-th from the first, or a list of 0 and 1 as "
        "[0,1,1,0] or ([0]+[1]*3)*2; the others are averaged (default: 1, all)",
    )
    p.add_argument(
        "--weight",
        metavar="NAME=W",
        action="append",
        default=[],
        help="weight of an expert in the averages, normalised over all; repeat (default: 1 each)",
    )
    p.add_argument(
        "--router-init",
        metavar="HOW",
        default="normal",
        help="normal, zeros, or an .npy file with rows [layers, experts, hidden] or [experts, hidden] (default: "
        "normal)",
    )
    p.add_argument(
        "--router-std", metavar="STD", type=float, default=0.02, help="standard deviation of normal (default: 0.02)"
    )
    p.add_argument("--router-seed", metavar="N", type=int, default=1234, help="seed of normal (default: 1234)")
    p.add_argument(
        "--take",
        metavar="FIELD=NAME",
        action="append",
        default=[],
        help="where the experts' configurations differ in FIELD (rotary_base, layernorm_epsilon, rope_scaling, "
        "max_position_embeddings, window_size, dtype, attention_dropout, hidden_dropout, init_method_std), take the "
        "value of the expert NAME; repeat",
    )
    p.add_argument(
        "--vocab",
        choices=("same", "union"),
        default="same",
        help="union: vocabularies may extend one another, each row is averaged over its owners (default: same)",
    )
    p.add_argument(
        "--allow-other-tokenizer", action="store_true", help="do not compare the experts' tokenizers by content"
    )
    p.add_argument("--explain", metavar="TENSOR", help="print where a tensor of the result comes from; write nothing")
    return p


def add_output_options(p: argparse.ArgumentParser, output_format: str = "") -> None:
    """What all conversions have in common; see :func:`megatron_btx.mixing.convert.convert`.

    Args:
        output_format: the only format that the command writes; "" to let the user choose.
    """
    p.add_argument("--output", metavar="PATH", help="folder for the result: a checkpoint root, or a model folder")
    if output_format:
        p.set_defaults(output_format=output_format)
    else:
        p.add_argument(
            "--output-format",
            choices=("megatron", "hf"),
            default="megatron",
            help="megatron: torch_dist, one release; hf: safetensors that transformers 4.57 and 5 read "
            "(default: megatron)",
        )
    p.add_argument(
        "--workers",
        metavar="W",
        type=int,
        help="threads that read, compute and write, in each process (default: the cores it may use, at most 4)",
    )
    p.add_argument(
        "--pad-vocab-to-multiple-of",
        metavar="N",
        type=int,
        default=1,
        help="add rows to the embedding and the head until N divides them, as tensor parallelism needs it; a new row "
        "is the mean of all tokens' rows, so its probability is below the tokens' average, and belongs to no token "
        "(default: 1, add none)",
    )
    p.add_argument(
        "--allow-other-ids",
        action="store_true",
        help="write the tokenizer even where it gives texts other ids than the source's own, or cannot be compared "
        "with it (by default that is refused)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    p.add_argument(
        "--verify",
        action="store_true",
        help="read the result back and compare it with its sources, before it gets its name",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing output, after success only")


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    if options.verify and options.output and not options.expert:
        from megatron_btx.mixing.convert import check_old_output

        return check_old_output(Path(options.output))
    request = request_of(options)
    if options.output is None and not options.dry_run and options.explain is None:
        raise InputError("--output is missing; name the folder for the result, or look at the plan with --dry-run")
    from megatron_btx.mixing.convert import convert

    return convert(request, options, options.explain)


def request_of(options: argparse.Namespace) -> Request:
    """The request that a command line makes.

    Raises:
        InputError: a flag's value is not of its form.
    """
    experts = tuple(
        _pair("--expert", text, "NAME=PATH, as --expert math=runs/math/checkpoint") for text in options.expert
    )
    weights = _each_once("--weight", [_pair("--weight", t, "NAME=W, as --weight math=2") for t in options.weight])
    taken = [_pair("--take", text, "FIELD=NAME, as --take rotary_base=code") for text in options.take]
    numbers = [n for n in (options.chunks, options.copies) if n is not None]
    if len(numbers) > 1:
        raise InputError("--chunks belongs to --method split, --copies to --method upcycle; give one of them")
    frequency = layer_frequency(options.moe_layer_freq)
    if not (options.router_std > 0 and math.isfinite(options.router_std)):
        raise InputError(
            f"--router-std {options.router_std}: expected a number above 0; --router-init zeros gives zeros"
        )
    if not 0 <= options.router_seed < 2**63:
        raise InputError(f"--router-seed {options.router_seed}: expected 0 to {2**63 - 1}")
    from megatron_btx.mixing.compatible import field_of
    from megatron_btx.mixing.plan import Request
    from megatron_btx.mixing.routers import RouterInit

    return Request(
        experts,
        options.method,
        options.moe_router_topk,
        numbers[0] if numbers else None,
        frequency,
        {name: _number("--weight", name, text) for name, text in weights.items()},
        _each_once("--take", [(field_of(field), name) for field, name in taken]),
        options.vocab == "union",
        options.allow_other_tokenizer,
        RouterInit(options.router_init, options.router_seed, options.router_std),
        options.pad_vocab_to_multiple_of,
        options.allow_other_ids,
    )


def _pair(flag: str, text: str, expected: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name or not value:
        raise InputError(f"{flag} {text}: expected {expected}")
    if flag == "--expert" and (not name.isprintable() or any(c in name for c in "/\\ \t,:")):
        raise InputError(
            f"--expert {name!r}: expected a name without slashes, commas, colons, blanks or control characters"
        )
    return name, value


def _each_once(flag: str, pairs: list[tuple[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            raise InputError(f"{flag} {name}= is given twice; give it once")
        found[name] = value
    return found


def _number(flag: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{flag} {name}={text}: expected a number") from error


if __name__ == "__main__":
    raise SystemExit(main())
