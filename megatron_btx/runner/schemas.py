"""What the files of a run hold, typed; run_dir.py reads them.

A value of another type than it should have is None: one odd number must not hide the rest of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from megatron_btx.plan.fingerprint import LARGEST_COUNT, Identity
from megatron_btx.plan.stage import Stage


def read_number(value: object) -> float | None:
    """``value`` where it is a number that can be reckoned with; it may be NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and value.bit_length() >= 64:
        return None
    return value


def read_count(value: object) -> int | None:
    """``value`` where it is a whole number of things, from 0 to 2^53."""
    if type(value) is not int or not 0 <= value < LARGEST_COUNT:
        return None
    return value


def _only(*kinds: type, otherwise: object = None) -> BeforeValidator:
    """Takes a value of these types, and ``otherwise`` in place of any other."""
    return BeforeValidator(lambda value: value if isinstance(value, kinds) else otherwise)


def _read_parents(value: object) -> dict[str, str | None]:
    """Parents with their fingerprints; a list of names, as earlier versions wrote, has none."""
    if isinstance(value, list):
        return {str(name): None for name in value}
    if not isinstance(value, dict):
        return {}
    parents: dict[str, str | None] = {}
    for name, fingerprint in value.items():
        parents[str(name)] = fingerprint if isinstance(fingerprint, str) else None
    return parents


Number = Annotated[float | None, BeforeValidator(read_number)]
Count = Annotated[int | None, BeforeValidator(read_count)]
PlannedCount = Annotated[int | None, Field(strict=True, gt=-(2**64), lt=2**64), AfterValidator(read_count)]
"""Another type or a huge number is of no plan that btx wrote."""
Text = Annotated[str | None, _only(str)]
Words = Annotated[list[Any] | None, _only(list)]
Settings = Annotated[dict[str, Any] | None, _only(dict)]
Parents = Annotated[dict[str, str | None], BeforeValidator(_read_parents)]


class _Record(BaseModel):
    """What a file of a run holds. Whatever else it holds is kept: a later version may have written it."""

    model_config = ConfigDict(extra="allow", frozen=True)


class JobStart(_Record):
    """What a job of Slurm notes of its start, in its stage's manifest. Nothing of a stage that no job began."""

    model_config = ConfigDict(populate_by_name=True)

    job: Text = None
    """Its number."""
    nodes: Text = None
    step: Count = None
    """The last one saved before it."""
    stalled: Count = None
    """How many starts in a row before it saved no further step."""
    log_offset: Count = Field(default=None, alias="log offset")
    """Where its part of the log begins, in bytes."""
    problem: Text = None
    """Why it ended."""


class StageManifest(_Record):
    """A stage's manifest.json: what it was made from, by which versions, at what cost."""

    stage: Text = None
    """Its name; None where no manifest lies."""
    fingerprint: Text = None
    """Hash of the settings that decide the result, and of the parents' fingerprints."""
    status: Text = None
    """running (also after a kill), finished, failed, stopped, or made by hand."""
    parents: Parents = Field(default_factory=dict)
    """Stage -> its fingerprint when this one was made; None where an earlier version wrote none."""
    after: Words = None
    """Stages that had to be finished before it, and have no say in its result."""
    inputs: Words = None
    """What it read from outside the run."""
    settings: Settings = None
    """The settings that decide the result; None where an earlier version wrote none."""
    steps: Count = None
    tokens: Count = None
    flops: Number = None
    rerun: Settings = None
    """The --rerun that began it: its stages and its number."""
    versions: Settings = None
    """Of Python, Megatron and this package."""
    device: Text = None
    starts: Count = None
    started: Number = None
    """When its last start began, in seconds since 1970."""
    seconds: Number = None
    """Of all its starts."""
    slurm: Annotated[JobStart, _only(JobStart, dict, otherwise={})] = JobStart()
    """The job that made its last start."""
    exit: Annotated[int | None, _only(int)] = None
    """Status of its last program."""

    @classmethod
    def of_stage(cls, stage: Stage, identity: Identity, status: str, rerun: Mapping[str, Any] | None) -> StageManifest:
        """What the manifest of a stage says before it starts, beside what depends on the machine.

        ``rerun`` is the --rerun that began it, so that the same command goes on after a stop and does not begin again.
        """
        return cls(
            stage=stage.name,
            fingerprint=identity.fingerprint,
            status=status,
            parents=dict(identity.parents),
            after=list(stage.after),
            inputs=[str(path) for path in stage.inputs],
            settings=dict(identity.settings),
            steps=stage.iterations,
            tokens=stage.tokens,
            flops=stage.flops,
            rerun=dict(rerun) if rerun is not None else None,
        )

    def content(self) -> dict[str, Any]:
        """What is written of it."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @property
    def is_finished(self) -> bool:
        """Whether the stage came to its end."""
        return self.status == "finished"

    @property
    def rerun_number(self) -> int:
        """Which of the run's reruns began the stage, from 1; 0 when none did."""
        if self.rerun is None:
            return 0
        return read_count(self.rerun.get("number")) or 0


@dataclass(frozen=True)
class StageRecord:
    """A stage as it was planned, for whoever starts it: the local runner, or a job that reads it from a file."""

    stage: Stage
    identity: Identity
    parents: Mapping[str, str]
    """Stages that must be finished -> the fingerprint that they must have."""
    rerun: Mapping[str, Any] | None
    """The --rerun that it starts for; see :class:`megatron_btx.runner.decisions.Action`."""
    is_rerun: bool
    """Whether the stage is one of those that it names."""


class PlannedStage(_Record):
    """One entry of plan.json."""

    stage: str
    steps: PlannedCount = None
    tokens: PlannedCount = None
    fingerprint: Text = None
    """None for a stage that only shows what others made."""


class MetricsLine(_Record):
    """One line of metrics.jsonl: what was logged after one step. Metrics by other names are in ``model_extra``."""

    iteration: int
    time: Number = None
    """Seconds since 1970."""
    loss: Number = Field(default=None, alias="lm loss")
    """Training loss, nats per token; may be NaN. None of a skipped step, which trained nothing."""

    def numbers(self) -> Iterator[tuple[str, float]]:
        """(name, value) of every other metric that is a number."""
        for name, value in (self.model_extra or {}).items():
            found = read_number(value)
            if found is not None:
                yield name, found


class ModelRow(_Record):
    """One row of models.json, the run's table of models."""

    name: str
    """As evaluations call it."""
    role: str
    """seed, expert, average, mix, btx, dense, or what a later version knows."""
    home: Text = None
    """An expert's domain."""
    variant: Text = None
    """Of an ablation."""
    seed: Count = None
    """Of an ablation's row: what draws its routers and shuffles its data."""
    stage: Text = None
    """The stage that makes it; None or empty for a given model."""
    meaning: Text = None
    """What it is, as a phrase."""
    traits: Annotated[dict[str, str], _only(dict, otherwise={})] = Field(default_factory=dict)
    """How a mixture was finetuned, by the words of a recipe: routing, load-balancing, freeze."""


LOSS = "loss"
"""The measure of every evaluation: mean cross-entropy, nats per token."""
BITS_PER_BYTE = "bits-per-byte"
"""The same per byte of the text, in bits, so that models of different tokenizers compare."""


class Score(_Record):
    """One number that was measured of a model."""

    model: str
    measure: str
    data: str
    """The domain or the task."""
    value: float
    """May be NaN."""
    stderr: Number = None
    """Its standard error over the data; None where it was not taken."""
    count: Count = None
    """Of what it is the mean: tokens of a loss, items of a task."""
    unit: str = ""


class ModelEvaluation(_Record):
    """What evaluation.json says of one model. An earlier version has its losses here, and no scores."""

    losses: dict[str, float] = Field(default_factory=dict)
    """Domain -> loss, nats per token; may be NaN."""
    tokens: dict[str, int] = Field(default_factory=dict)
    """Domain -> evaluated tokens."""
    parameters: Count = None
    active_parameters: Count = None
    """Parameters that work on one token."""
    routing: dict[str, list[list[float]]] | None = None
    """Domain -> layer -> share of the routed (token, expert) pairs per expert; a layer's shares sum to one."""


class Evaluation(_Record):
    """An evaluation.json."""

    scores: list[Score] = Field(default_factory=list)
    """All that was measured."""
    models: dict[str, ModelEvaluation]
    experts: list[str] | None = None
    """Names of the experts, in the order of the routing's shares; None where no mixture was evaluated."""
    eod_mask_loss: Annotated[bool | None, _only(bool)] = None
    """Whether the loss of the tokens behind documents was left out; None where an earlier version wrote it."""
