"""Loss per domain: ``torchrun ... -m megatron_btx.evaluate``; see :mod:`megatron_btx.evaluation.program`."""

import sys

from megatron_btx.evaluation.program import main

if __name__ == "__main__":
    sys.exit(main())
