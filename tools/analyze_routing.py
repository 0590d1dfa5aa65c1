#!/usr/bin/env python
"""Who is routed where, as numbers, figures and a page of tokens: torchrun tools/analyze_routing.py --help."""

import sys

from megatron_btx.evaluation.analyze_routing import main

if __name__ == "__main__":
    sys.exit(main())
