"""The training program: seed, expert, dense baseline and mixture alike.

    torchrun --nproc-per-node 8 -m megatron_btx.pretrain [Megatron's flags] [--btx-... flags]

It is Megatron's own ``megatron.training.pretrain`` with our layers and data, after checking what Megatron does not.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout

from megatron_btx.common.errors import exits_with_one_line
from megatron_btx.common.log import say
from megatron_btx.distributed.process_cleanup import leave_no_orphans
from megatron_btx.engine.cpu import install_cpu_stand_ins, prepare_environment
from megatron_btx.engine.flags import add_training_arguments, help_if_asked


@exits_with_one_line
def main() -> int:
    """Train what the command line describes; see --help."""
    prepare_environment()
    help_if_asked(__doc__, add_training_arguments)
    if "--btx-check" in sys.argv[1:]:
        return check()
    leave_no_orphans()
    faulthandler.enable()  # a dataset that is cut while it is mapped ends a process by a signal, without a word
    install_cpu_stand_ins()
    # Megatron may be imported only now, because what it finds on import was changed.
    from megatron_btx.training import run

    return run.train()


def check() -> int:
    """Check everything that needs no process group, and say in one line what would be trained."""
    # The last value of a flag wins: a check writes nowhere.
    sys.argv += ["--tensorboard-dir=", "--wandb-project=", "--no-one-logger"]
    # Megatron has no switch for its list of all arguments and what it says of them and of missing libraries. Errors of
    # ours and tracebacks are printed after this block.
    logging.disable()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            install_cpu_stand_ins()
            from megatron_btx.training import run

            found = run.check()
    finally:
        logging.disable(logging.NOTSET)
    say(f"checked: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
