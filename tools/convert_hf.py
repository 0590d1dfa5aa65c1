#!/usr/bin/env python
"""Move one model between Hugging Face and Megatron: the same as ``btx convert-hf``."""

import sys

from megatron_btx.mixing.convert_hf import main

sys.exit(main())
