"""Make the corpora of the quickstart out of what the machine has; downloads nothing."""

import sys

from megatron_btx.data.corpora.build import main

if __name__ == "__main__":
    sys.exit(main())
