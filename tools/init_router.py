#!/usr/bin/env python
"""Fill the routers of a mixture from a few hundred documents per domain: torchrun tools/init_router.py --help."""

import sys

from megatron_btx.evaluation.init_router import main

if __name__ == "__main__":
    sys.exit(main())
