"""``btx convert`` and ``tools/convert_experts.py``: mix experts into one mixture of experts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_btx.checkpoint.sizes import layer_frequency
from megatron_btx.common.cli_args import read_pairs, split_pair
from megatron_btx.common.errors import InputError, exits_with_one_line
from megatron_btx.mixing.methods import METHODS
from megatron_btx.mixing.output_options import DIFFERENCES, MIXTURE, add_output_options, carry_out, option_group
from megatron_btx.mixing.request import Request, RouterInit


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
    _add_mixture(option_group(p, MIXTURE))
    _add_differences(option_group(p, DIFFERENCES))
    _add_routers(option_group(p, MIXTURE))
    p.add_argument("--explain", metavar="TENSOR", help="print where a tensor of the result comes from; write nothing")
    return p


def _add_mixture(p: argparse._ArgumentGroup) -> None:
    """Which parts make which experts, and in which layers."""
    p.add_argument(
        "--method",
        choices=tuple(METHODS),
        default="btx",
        help="btx: every expert's feed-forward blocks become one expert; split: each is cut in --chunks experts; "
        "blend: expert n is chunk n of all; upcycle: --copies of one model; average: the plain average of all; "
        "reroute: one mixture with other routers (--router-init), all else bit for bit; copy: one model as it is, in "
        "the other format or as one iteration's own checkpoint (default: btx)",
    )
    p.add_argument("--chunks", metavar="C", type=int, help="split: experts made of each source (no default)")
    p.add_argument("--copies", metavar="N", type=int, help="upcycle: experts made of the one source (no default)")
    p.add_argument(
        "--moe-router-topk",
        metavar="K",
        type=int,
        default=Request.topk,
        help="experts per token in the mixture (default: %(default)s)",
    )
    p.add_argument(
        "--moe-layer-freq",
        metavar="FREQ",
        default="1",
        help="layers that become mixtures, as Megatron's flag: every FREQ-th from the first, or a list of 0 and 1 as "
        "[0,1,1,0] or ([0]+[1]*3)*2; the others are averaged (default: 1, all)",
    )


def _add_differences(p: argparse._ArgumentGroup) -> None:
    """What the sources count for, and what of them may differ."""
    p.add_argument(
        "--weight",
        metavar="NAME=W",
        action="append",
        default=[],
        help="weight of an expert in the averages, normalised over all; repeat (default: 1 each)",
    )
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


def _add_routers(p: argparse._ArgumentGroup) -> None:
    """How new routers start."""
    p.add_argument(
        "--router-init",
        metavar="HOW",
        default="normal",
        help="normal, zeros, or an .npy file with rows [layers, experts, hidden] or [experts, hidden] (default: "
        "normal)",
    )
    p.add_argument(
        "--router-std",
        metavar="STD",
        type=float,
        default=RouterInit.std,
        help="standard deviation of normal (default: %(default)s)",
    )
    p.add_argument(
        "--router-seed", metavar="N", type=int, default=RouterInit.seed, help="seed of normal (default: %(default)s)"
    )


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    """Plan, print, write and verify; see --help."""
    options = parser().parse_args(argv)
    if options.verify and options.output and not options.expert:
        return _check_old_output(Path(options.output))
    return carry_out(request_of(options), options, options.explain)


def _check_old_output(folder: Path) -> int:
    from megatron_btx.mixing.conversion import check_result

    count = check_result(folder, show_progress=True)
    print(f"verified: all {count} tensors and all files of {folder} are as they were written")
    return 0


def request_of(options: argparse.Namespace) -> Request:
    """The request that a command line makes.

    Raises:
        InputError: a flag's value is not of its form.
    """
    expected = "NAME=PATH, as --expert math=runs/math/checkpoint"
    experts = [split_pair(text, "--expert", expected) for text in options.expert]
    weights = {}
    for name, text in read_pairs(options.weight, "--weight", "NAME=W, as --weight math=2").items():
        weights[name] = _number("--weight", name, text)
    return Request(
        experts=tuple(experts),
        method=options.method,
        topk=options.moe_router_topk,
        chunks=options.chunks,
        copies=options.copies,
        layer_frequency=layer_frequency(options.moe_layer_freq),
        weights=weights,
        take=read_pairs(options.take, "--take", "FIELD=NAME, as --take rotary_base=code"),
        vocabulary=options.vocab,
        allow_other_tokenizer=options.allow_other_tokenizer,
        router=RouterInit.parse(options.router_init, options.router_seed, options.router_std),
        pad_vocabulary=options.pad_vocab_to_multiple_of,
        allow_other_ids=options.allow_other_ids,
    )


def _number(flag: str, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{flag} {name}={text}: expected a number") from error


if __name__ == "__main__":
    raise SystemExit(main())
