"""The training program: ``torchrun ... -m megatron_btx.pretrain``; see :mod:`megatron_btx.training.program`."""

import sys

from megatron_btx.training.program import main

if __name__ == "__main__":
    sys.exit(main())
