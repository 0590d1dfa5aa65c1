"""Hold a server's numbers against transformers', and megatron_btx/checkpoint/huggingface/servers.py against the server.

python -m tests.serving.compare ROOT NAME: exit code 1 where anything is otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from megatron_btx.checkpoint.huggingface.servers import OTHER, REFUSES, deviations
from tests.serving import exchange

NAMES = {"vllm": "vLLM", "llama": "llama.cpp"}
EQUAL_NATS, OTHER_NATS = 1e-5, 1e-3
"""Largest difference of a log-probability in fp32 from that in fp64, of equal models; smallest one between models that
differ."""


def main() -> int:
    """Print a line per model; the exit code."""
    root, name = Path(sys.argv[1]), sys.argv[2]
    reference, found = exchange.read_findings(root, exchange.REFERENCE), exchange.read_findings(root, name)
    print(f"{name} {found.version} against transformers {reference.version} in fp64")
    failures = [line for case in exchange.cases(root) for line in judged(root, case, name, reference, found)]
    failures += tokenizer_failures(root, found)
    for line in failures:
        print(f"FAILED: {name}: {line}")
    return 1 if failures else 0


def judged(root: Path, case: str, name: str, reference: exchange.Findings, found: exchange.Findings) -> list[str]:
    """Compare one model with what is expected of it; what is wrong, in words."""
    config = exchange.config_of(root, case)
    server = NAMES.get(name, "")
    expected, _ = deviations(config).get(server, ("equal", []))
    if case in found.refusals:
        why = " ".join(found.refusals[case].split())
        print(f"  {case:<24} {REFUSES:<24} {why[:120]}")
        return [] if expected == REFUSES else [f"{case}: not loaded, expected: {expected} ({why[:1000]})"]
    pairs = zip(reference.log_probabilities[case], found.log_probabilities[case], strict=True)
    largest = max(float(np.abs(one - other).max()) for one, other in pairs)
    same_tokens = reference.greedy[case] == found.greedy[case]
    outcome = "equal" if largest <= EQUAL_NATS and same_tokens else OTHER if largest > OTHER_NATS else "in between"
    print(f"  {case:<24} {outcome:<24} {largest:.1e}  greedy tokens {'equal' if same_tokens else 'differ'}")
    return [] if outcome == expected else [f"{case}: {outcome} ({largest:.1e}), expected: {expected}"]


def tokenizer_failures(root: Path, found: exchange.Findings) -> list[str]:
    """Compare the ids of all texts with those of training."""
    texts, trained = exchange.texts(root)
    wrong = [at for at, ids in enumerate(trained) if found.ids[at] != ids] if found.ids else list(range(len(texts)))
    print(f"  {'export: ids of texts':<24} {len(texts) - len(wrong)} of {len(texts)} as in training")
    if not wrong or not found.ids:
        return ["export: its tokenizer was not loaded"] if wrong else []
    first = wrong[0]
    shown = f"{texts[first][:60]!r}: {found.ids[first][:12]}, in training {trained[first][:12]}"
    return [f"export: other ids for {len(wrong)} of {len(texts)} texts; {shown}"]


if __name__ == "__main__":
    raise SystemExit(main())
