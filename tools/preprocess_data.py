"""Turn text files into Megatron's indexed datasets; the same as ``btx preprocess``."""

import sys

from megatron_btx.data.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
