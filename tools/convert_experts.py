#!/usr/bin/env python
"""Mix domain experts into one mixture of experts: the same as ``btx convert``."""

import sys

from megatron_btx.mixing.cli import main

sys.exit(main())
