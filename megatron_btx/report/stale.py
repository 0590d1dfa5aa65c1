"""Which stages of a run directory belong to the run's recipe.

A stage belongs when the run's plan has it with the same fingerprint. Where the plan has no fingerprints, an earlier
version wrote it. Then the manifests are compared among themselves: a stage is made from the stages beside it when it
names their fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_btx.runner.run_dir import read_plan
from megatron_btx.runner.schemas import StageManifest


def find_left_out(run: Path, manifests: Mapping[str, StageManifest]) -> dict[str, str]:
    """Folders whose stage is not of the run's recipe, and why. A stage without a manifest has an empty one."""
    planned = planned_fingerprints(run)
    reasons: dict[str, str] = {}
    doubtful = []
    for name, manifest in manifests.items():
        own, due = manifest.fingerprint, (planned or {}).get(name)
        if planned is not None and name not in planned:
            reasons[name] = "not a stage of this run's recipe"
        elif own and due and own != due:
            reasons[name] = "made with other settings, or from other stages, than this run's recipe has"
        if not own or own != due:
            doubtful.append(name)
    for name in doubtful:
        others = _other_parents(manifests[name], manifests)
        if others and name not in reasons:
            reasons[name] = f"made from another {', '.join(others)}"
    for _ in doubtful:  # what is made from a stage that is left out, however many stages on
        for name in doubtful:
            gone = [parent for parent in manifests[name].parents if parent in reasons]
            if gone and name not in reasons:
                reasons[name] = f"made from {', '.join(gone)}, which is left out"
    return reasons


def planned_fingerprints(run: Path) -> dict[str, str | None] | None:
    """Stage -> fingerprint, of the run's plan; None without a plan."""
    plan = read_plan(run)
    if plan is None:
        return None
    return {entry.stage: entry.fingerprint for entry in plan}


def _other_parents(manifest: StageManifest, manifests: Mapping[str, StageManifest]) -> list[str]:
    """Parents that were another stage when this one was made, by their fingerprints, where both are known."""
    others = []
    for parent, fingerprint_then in manifest.parents.items():
        fingerprint_now = manifests.get(parent, StageManifest()).fingerprint
        if fingerprint_now and fingerprint_then and fingerprint_now != fingerprint_then:
            others.append(parent)
    return others
