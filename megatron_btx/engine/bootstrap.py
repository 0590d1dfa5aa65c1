"""How a tool that runs a model starts: the same way for all of them, and in this order."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from megatron_btx.engine import repairs
from megatron_btx.engine.cpu import has_gpu, install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import help_if_asked
from megatron_btx.engine.program import parse


def start_tool[Checked](
    documentation: str | None,
    add_arguments: Callable[[ArgumentParser], ArgumentParser],
    check_words: Callable[[Namespace], object],
    check_inputs: Callable[[Namespace], Checked],
) -> tuple[Namespace, Checked]:
    """Parse the command line, check what it names, and initialise Megatron. The model is built by the caller.

    All that can be refused is refused before the ranks meet, so that no rank waits for one that has ended.

    Args:
        documentation: what ``--help`` shows above the flags.
        add_arguments: adds the flags of the tool to Megatron's parser.
        check_words: refuses what is wrong with the tool's own flags, before Megatron looks at its own.
        check_inputs: refuses what is wrong with the files that the flags name; returns what the tool needs of them.

    Returns:
        Megatron's arguments and ours; the result of ``check_inputs``.

    Raises:
        InputError: of the checks, or what Megatron refuses.
    """
    prepare_environment()
    help_if_asked(documentation, add_arguments)
    install_cpu_stand_ins()
    # Megatron may be imported only now, because what it finds on import was changed.
    from megatron.training import initialize

    args, _ = parse(add_arguments, check_words, trains=False)
    checked = check_inputs(args)
    repairs.install()
    initialize.initialize_megatron(allow_no_cuda=not has_gpu())
    return args, checked
