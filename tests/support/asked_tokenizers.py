"""What plain AutoTokenizer of a version of transformers makes of folders, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.support.hugging_face import OLDER, REPOSITORY

_ASK = """
import json, sys, transformers
transformers.logging.set_verbosity_error()
asked = json.load(open(sys.argv[1]))
answer = {"version": transformers.__version__}
for folder in asked["folders"]:
    t = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [[t.encode(x, add_special_tokens=whole) for x in asked["texts"]] for whole in (False, True)]
    answer[folder] = {"ids": ids, "special": [t.bos_token_id, t.eos_token_id, t.pad_token_id]}
    answer[folder] |= {"names": list(t("a")), "side": t.padding_side}
json.dump(answer, open(sys.argv[2], "w"))
"""


class Asked:
    """A question on its way: the ids of all texts by all folders, without and with what is added around them."""

    def __init__(self, folders: Iterable[Path], texts: Sequence[str], place: Path, older: bool) -> None:
        asked, self._answer = place / f"asked-{older}.json", place / f"answer-{older}.json"
        asked.write_text(json.dumps({"texts": list(texts), "folders": [str(folder) for folder in folders]}))
        path = os.pathsep.join([str(OLDER), str(REPOSITORY)]) if older else str(REPOSITORY)
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-W", "ignore", "-c", _ASK, str(asked), str(self._answer)]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)

    def answer(self) -> dict[str, Any]:
        """Wait for the answer: the version, and each folder's ``ids``, ``special`` tokens, ``names`` and ``side``."""
        _, said = self._process.communicate(timeout=280)
        assert self._process.returncode == 0, said[-3000:]
        return dict(json.loads(self._answer.read_text()))
