"""What the megatron-core 0.19 wheel needs on every machine, with a GPU or without: repairs, each with its reason."""

from __future__ import annotations

from importlib.util import find_spec


def install() -> None:
    """Apply every repair; each first checks that what it repairs is there."""
    use_the_shipped_dataset_helper()


def use_the_shipped_dataset_helper() -> None:
    """Keep Megatron from compiling its dataset helper when the compiled one is installed.

    Its initialisation runs ``make`` inside the installed package, which in the wheel has no Makefile; make's failure
    ends the process without a word (``core/datasets/utils.py``).
    """
    from megatron.core.datasets import utils

    if find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None
