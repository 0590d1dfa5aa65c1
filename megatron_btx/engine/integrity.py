"""``--verify-integrity`` for runs that start from a checkpoint without checksums.

Megatron writes ``integrity.json`` beside every checkpoint that it saves with the flag, and verifies with it every one
that it loads, also that of another stage or of somebody else, which may have none. Such a start is let through, and
said. A run that resumes its own checkpoint is not.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from megatron_btx.engine import patch
from megatron_btx.ground.log import say

CHECKSUMS = "integrity.json"
"""Source: ``core/dist_checkpointing/validation.py``, INTEGRITY_FNAME."""


def verify_where_checksums_are(args: argparse.Namespace, resumes: bool) -> None:
    """Have Megatron verify a checkpoint that it starts from only where that has checksums.

    Raises:
        MegatronVersionError: the installed Megatron verifies in another way.
    """
    if not args.verify_integrity or resumes:
        return
    from megatron.core.dist_checkpointing import serialization

    def if_there(verify: Any) -> Any:
        @functools.wraps(verify)
        def verify_integrity_manifest(checkpoint_dir: str) -> None:
            if (Path(checkpoint_dir) / CHECKSUMS).is_file():
                verify(checkpoint_dir)
            else:
                say(f"{checkpoint_dir}: has no {CHECKSUMS}, so --verify-integrity cannot verify it; it is loaded as is")

        return verify_integrity_manifest

    patch.wrap(serialization, "verify_integrity_manifest", if_there, ("checkpoint_dir",))
