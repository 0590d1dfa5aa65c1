"""From a recipe to its graph of stages: every budget, step count, blend and flag that follows from it is derived here.

    data -> seed -> expert-* -> mix              -> finetune -> evaluate-moe -> report
                             -> evaluate-experts -> finetune    (bounds its first loss)
                 -> dense-domains -> dense       -> evaluate-dense

A stage whose checkpoint is given (``from``) has no node: its children read the given path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_btx.ground.errors import InputError
from megatron_btx.pipeline.budgets import (
    batch_tokens,
    padded_vocabulary,
    token_weighted,
    training_flops,
    training_steps,
)
from megatron_btx.pipeline.identity import deciding
from megatron_btx.pipeline.recipe.ablation import Ablation, stage_name
from megatron_btx.pipeline.recipe.flags import (
    Flags,
    check_layout,
    check_measured,
    check_saving,
    measured_batch,
    merged,
    number,
    to_argv,
)
from megatron_btx.pipeline.recipe.schema import GENERALIST, Evaluate, Recipe, Settings, Training
from megatron_btx.pipeline.stage import PYTHON, Stage, in_order

WARMUP_FRACTION = 0.05
"""Share of a stage's steps in which the learning rate rises, where the recipe does not say it."""
BOUND_STAGE = "evaluate-experts"
"""The stage that evaluates seed and experts."""
_EXPERT_LAYOUT_FLAGS = ("expert-model-parallel-size", "expert-tensor-parallel-size")


@dataclass(frozen=True)
class _Model:
    """A checkpoint as its children see it."""

    path: str
    stage: str | None
    """The stage that makes it; None when it is given."""

    def identity(self) -> str | Path:
        """What decides which model it is, beside the stages that it comes from."""
        return self.stage or Path(self.path)


def plan_stages(recipe: Recipe) -> list[Stage]:
    """The stages of ``recipe``, parents first. Raises InputError for budgets and layouts that do not fit."""
    return in_order(_Planner(recipe).stages())


class _Origins(NamedTuple):
    """What a stage is made from."""

    parents: tuple[str, ...]
    inputs: tuple[Path, ...]


class _Planner:
    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seed = self._given_or("seed", recipe.seed.source)
        self.experts = {name: self._given_or(f"expert-{name}", part.source) for name, part in recipe.experts.items()}
        self.mix_flags: Flags = {}
        if recipe.mix:
            given, routing = recipe.mix.megatron, recipe.mix.routing
            self.mix_flags = merged(given, {"num-experts": len(recipe.mix.experts), **routing.flags(given)})

    def stages(self) -> list[Stage]:
        """Every stage of the recipe, in no particular order."""
        recipe = self.recipe
        stages = [self._corpora()] if recipe.data.corpora else []
        if not recipe.seed.source:
            stages.append(self._train("seed", recipe.seed, start=None))
        for name, expert in recipe.experts.items():
            if not expert.source:
                stages.append(self._train(f"expert-{name}", expert, self.seed))
        dense_models: dict[str, _Model] = {}
        moe_models: dict[str, _Model] = {}
        if recipe.average:
            stages.append(self._combine("average", ["--method", "average"]))
            dense_models["average"] = _made("average")
        if recipe.ablation and recipe.mix and recipe.finetune:
            return [*stages, *self._ablation(recipe.ablation, recipe.finetune)]
        if recipe.mix:
            if not recipe.mix.source:
                stages.append(self._combine("mix", self._router(recipe.mix.router_seed)))
            moe_models["mix"] = self._given_or("mix", recipe.mix.source)
        if recipe.evaluate:
            stages.append(self._evaluate_experts(recipe.evaluate))
        if recipe.finetune:
            if not recipe.finetune.source:
                flags = merged(self.mix_flags, self._watched(recipe.evaluate)) if recipe.evaluate else self.mix_flags
                bound = (BOUND_STAGE,) if recipe.evaluate else ()
                stages.append(self._train("finetune", recipe.finetune, moe_models["mix"], flags, after=bound))
            moe_models["btx"] = self._given_or("finetune", recipe.finetune.source)
        if recipe.dense and recipe.finetune:
            stages += self._dense(recipe.dense, recipe.finetune)
            dense_models["dense"] = _made("dense")
        if recipe.evaluate:
            if dense_models:
                stages.append(self._evaluate("evaluate-dense", dense_models, {}, recipe.evaluate))
            if moe_models:
                stages.append(self._evaluate("evaluate-moe", moe_models, self.mix_flags, recipe.evaluate))
            parents = tuple(stage.name for stage in stages if stage.name.startswith("evaluate-"))
            command = (PYTHON, "-m", "megatron_btx.report.build", ".")
            stages.append(_shows(command, parents, "report.md"))
        return stages

    def _router(self, seed: int) -> list[str]:
        assert self.recipe.mix is not None
        return ["--router-seed", str(seed), "--moe-router-topk", str(self.recipe.mix.routing.top_k)]

    def _ablation(self, ablation: Ablation, finetune: Training) -> list[Stage]:
        """A mix for every seed, finetuned by every variant; the experts' losses, which bound its first; the report."""
        evaluation = Evaluate(ablation.split, ablation.valid_tokens, Settings())
        stages = [self._evaluate_experts(evaluation)]
        for seed in ablation.seeds():
            stages.append(self._combine(f"mix-s{seed}", self._router(seed)))
            for variant in ablation.variants:
                if seed not in variant.seeds:
                    continue
                part = replace(finetune, source=None, tokens=variant.tokens or finetune.tokens)
                # Measured after the last step alone, unless the recipe says more.
                watched = {**self._watched(evaluation), "eval-interval": 10**9}
                own = {**variant.flags, "seed": seed}
                name = stage_name(variant.name, seed)
                stages.append(self._train(name, part, _made(f"mix-s{seed}"), watched, own, (BOUND_STAGE,)))
        parents = tuple(stage.name for stage in stages if stage.name.startswith("ablation-"))
        command = (PYTHON, "-m", "megatron_btx.report.ablation", ".")
        return [*stages, _shows(command, parents, "ablation.md")]

    def _evaluate_experts(self, how: Evaluate) -> Stage:
        """The losses of the seed and the experts, which bound the mixture's first."""
        experts = {GENERALIST: self.seed} | {f"expert-{name}": model for name, model in self.experts.items()}
        return self._evaluate(BOUND_STAGE, experts, {}, how)

    def _watched(self, how: Evaluate) -> Flags:
        """Flags of finetuning: loss per domain on the text that the experts are evaluated on, and their bound."""
        data = tuple(f"{domain}={self._prefixes(domain, how.split)[0][1]}" for domain in self.recipe.domains)
        bound = f"{BOUND_STAGE}/evaluation.json"
        return {"btx-valid-data": data, "btx-valid-tokens": how.tokens, "btx-first-loss-bound": bound}

    def _given_or(self, stage: str, source: Path | None) -> _Model:
        return _Model(str(source), None) if source else _made(stage)

    def _corpora(self) -> Stage:
        data = self.recipe.data
        command = (PYTHON, "-m", "megatron_btx.data.corpora.build", "--output", "data", *to_argv(data.corpora))
        settings = {name: value for name, value in data.corpora.items() if name != "workers"}
        return Stage("data", command, product="corpora.json", processes=data.workers, settings=settings)

    def _combine(self, stage: str, options: list[str]) -> Stage:
        """Mix or average: the sources of the mix, the seed among them, because the mix averages over the same."""
        names = self.recipe.mix.experts if self.recipe.mix else (*self.experts, GENERALIST)
        models = {name: self.seed if name == GENERALIST else self.experts[name] for name in names}
        command = [PYTHON, "-m", "megatron_btx.mixing.cli"]
        for name, model in models.items():
            command += ["--expert", f"{name}={model.path}"]
        command += ["--output", f"{stage}/checkpoint", *options]
        parents, inputs = _origins(models)
        settings: dict[str, Any] = {"options": options, "experts": list(models)}
        settings |= {f"expert {name}": model.identity() for name, model in models.items()}
        return Stage(stage, tuple(command), parents, inputs=inputs, product="checkpoint", settings=settings)

    def _dense(self, settings: tuple[Settings, Settings], finetune: Training) -> list[Stage]:
        """The seed continued on as many tokens of each domain as the mixture saw: its experts', then finetuning's."""
        experts = [self._as_trained(f"expert-{name}", part, {}) for name, part in self._mixed().items()]
        finetuned = self._as_trained("finetune", finetune, self.mix_flags)
        blend, tokens = token_weighted(experts)
        domains = Training(None, blend, tokens, settings[0].layout, settings[0].megatron)
        mixture = Training(None, finetuned.blend, finetuned.tokens, settings[1].layout, settings[1].megatron)
        first = self._train("dense-domains", domains, self.seed)
        return [first, self._train("dense", mixture, _made("dense-domains"))]

    def _mixed(self) -> dict[str, Training]:
        """The recipe's experts that are in its mix. Raises InputError when the mix has others, of unknown data."""
        assert self.recipe.mix is not None
        mixed = [name for name in self.recipe.mix.experts if name != GENERALIST]
        unknown = [name for name in mixed if name not in self.recipe.experts]
        if unknown:
            raise InputError(
                f"{self.recipe.file}: baselines.dense: the mix has {unknown[0]}, which is no expert of the recipe, so "
                "that its data are not known; name it under experts with its from, blend and tokens, or leave dense out"
            )
        return {name: part for name, part in self.recipe.experts.items() if name in mixed}

    def _as_trained(self, stage: str, part: Training, model_flags: Flags) -> Training:
        """``part`` with the tokens that its stage consumes: whole batches."""
        recipe = self.recipe
        flags = merged(recipe.model, model_flags, recipe.training, part.layout.flags, part.megatron)
        return replace(part, tokens=training_steps(stage, part.tokens, flags) * batch_tokens(flags))

    def _train(
        self,
        name: str,
        part: Training,
        start: _Model | None,
        model_flags: Flags | None = None,
        last: Flags | None = None,
        after: tuple[str, ...] = (),
    ) -> Stage:
        """A training stage.

        Args:
            last: flags that win over all others.
            after: stages whose files it reads, which only bound its first step.
        """
        recipe = self.recipe
        flags = merged(
            recipe.model,
            recipe.data.tokenizer,
            model_flags or {},
            recipe.training,
            part.layout.flags,
            part.megatron,
            {"seed": recipe.random_seed},
            last or {},
        )
        iterations = training_steps(name, part.tokens, flags)
        check_layout(name, part.layout.processes, flags)
        check_saving(name, flags)
        if "btx-valid-tokens" in flags:
            check_measured(name, number(flags, "btx-valid-tokens"), part.layout.processes, flags)
        flags["train-iters"] = iterations
        if not any(flag in flags for flag in ("lr-decay-iters", "lr-decay-samples")):
            flags["lr-decay-iters"] = iterations
        if not any(flag.startswith("lr-warmup-") and flag != "lr-warmup-init" for flag in flags):
            flags["lr-warmup-fraction"] = WARMUP_FRACTION
        flags["train-data-path"] = self._data_path(part.blend, "train")
        if flags.get("eval-iters") != 0:  # Megatron refuses a validation set of which it needs no sample
            flags["valid-data-path"] = self._data_path(part.blend, "valid")
        flags["data-cache-path"] = f"{name}/data-cache"
        flags |= {"save": f"{name}/checkpoint", "load": f"{name}/checkpoint"}
        if start:
            flags["pretrained-checkpoint"] = start.path
        flags["btx-metrics"] = f"{name}/metrics.jsonl"
        flags = merged(flags)
        tokens = iterations * batch_tokens(flags)
        vocabulary = padded_vocabulary(flags, recipe.data.corpora)
        parents, inputs = self._origins_and_data({"start": start} if start else {}, part.blend, ("train", "valid"))
        return Stage(
            name,
            (*_torchrun(part.layout.processes, "megatron_btx.pretrain"), *to_argv(flags)),
            parents,
            after,
            inputs,
            settings=self._deciding(flags, part.blend),
            product="checkpoint/latest_checkpointed_iteration.txt",
            processes=part.layout.processes,
            threads=part.layout.threads,
            on_gpu=True,
            resumable=True,
            iterations=iterations,
            tokens=tokens,
            flops=training_flops(flags, tokens, vocabulary) if vocabulary else None,
            config={"flags": {key: list(value) if isinstance(value, tuple) else value for key, value in flags.items()}},
        )

    def _evaluate(self, name: str, models: Mapping[str, _Model], model_flags: Flags, how: Evaluate) -> Stage:
        recipe = self.recipe
        layout, split = how.settings.layout, how.split
        dropped = () if model_flags else _EXPERT_LAYOUT_FLAGS
        spread = {key: value for key, value in layout.flags.items() if key not in dropped}
        flags = merged(
            recipe.model,
            recipe.data.tokenizer,
            model_flags,
            recipe.training,
            spread,
            how.settings.megatron,
            {"seed": recipe.random_seed},
        )
        check_layout(name, layout.processes, flags)
        check_measured(name, how.tokens, layout.processes, flags)
        command = [*_torchrun(layout.processes, "megatron_btx.evaluate"), *to_argv(flags)]
        for model_name, model in models.items():
            command += ["--btx-eval-model", f"{model_name}={model.path}"]
        for domain in recipe.domains:
            command += ["--btx-eval-data", f"{domain}={self._prefixes(domain, split)[0][1]}"]
        command += ["--btx-eval-tokens", str(how.tokens), "--btx-eval-output", f"{name}/evaluation.json"]
        parents, inputs = self._origins_and_data(models, recipe.domains, (split,))
        batch = measured_batch(layout.processes, flags)
        settings = self._deciding({**flags, "btx-eval-tokens": how.tokens // batch * batch}, {})
        settings["models"] = list(models)
        settings |= {f"model {model_name}": model.identity() for model_name, model in models.items()}
        settings |= {f"data {domain}": self._located(self._prefixes(domain, split)[0][1]) for domain in recipe.domains}
        return Stage(
            name,
            tuple(command),
            parents,
            inputs=inputs,
            settings=settings,
            product="evaluation.json",
            processes=layout.processes,
            threads=layout.threads,
            on_gpu=True,
        )

    def _prefixes(self, domain: str, split: str) -> tuple[tuple[float, str], ...]:
        """(weight, prefix) of a domain's data; prefixes are relative to the run directory when the run makes them."""
        if self.recipe.data.corpora:
            return ((1.0, f"data/{domain}_{split}_text_document"),)
        return self.recipe.data.domains[domain].get(split, ())

    def _data_path(self, blend: Mapping[str, float], split: str) -> tuple[str, ...] | None:
        """Weights and prefixes for Megatron's --<split>-data-path, or None when a domain has no such split."""
        words: list[str] = []
        for domain, share in blend.items():
            prefixes = self._prefixes(domain, split)
            if not prefixes:
                return None
            total = sum(weight for weight, _ in prefixes)
            for weight, prefix in prefixes:
                words += [f"{share * weight / total:.10g}", prefix]
        return tuple(words)

    def _located(self, prefix: str) -> str | Path:
        """A prefix of data as a setting: by name where the run makes them, else by content."""
        return prefix if self.recipe.data.corpora else Path(prefix)

    def _deciding(self, flags: Flags, blend: Mapping[str, float]) -> dict[str, Any]:
        """The settings that decide what a program does with ``flags``; files from outside count by their content."""
        settings = deciding(flags)
        if blend:
            words = self._data_path(blend, "train") or ()
            located = [self._located(prefix) for prefix in words[1::2]]
            settings["train-data-path"] = [item for pair in zip(words[::2], located, strict=True) for item in pair]
        start = flags.get("pretrained-checkpoint")
        if isinstance(start, str):
            settings["pretrained-checkpoint"] = Path(start) if Path(start).is_absolute() else start
        tokenizer = flags.get("tokenizer-model")
        if isinstance(tokenizer, str) and Path(tokenizer).is_absolute():
            settings["tokenizer-model"] = Path(tokenizer)
        return settings

    def _origins_and_data(
        self, models: Mapping[str, _Model], domains: Iterable[str], splits: Iterable[str]
    ) -> _Origins:
        """Where a stage comes from that reads ``models`` and the data of ``domains``."""
        origins = _origins(models)
        if self.recipe.data.corpora:
            return _Origins(("data", *origins.parents), origins.inputs)
        prefixes = [prefix for split in splits for domain in domains for _, prefix in self._prefixes(domain, split)]
        tokenizer = self.recipe.data.tokenizer.get("tokenizer-model")
        outside = (*prefixes, *([tokenizer] if isinstance(tokenizer, str) else []))
        return _Origins(origins.parents, (*origins.inputs, *map(Path, outside)))


def _origins(models: Mapping[str, _Model]) -> _Origins:
    return _Origins(
        tuple(model.stage for model in models.values() if model.stage),
        tuple(Path(model.path) for model in models.values() if not model.stage),
    )


def _shows(command: tuple[str, ...], parents: tuple[str, ...], product: str) -> Stage:
    """The stage that writes the report."""
    return Stage("report", command, parents, product=product, settings={}, only_shows=True)


def _made(stage: str) -> _Model:
    return _Model(f"{stage}/checkpoint", stage)


def _torchrun(processes: int, module: str) -> tuple[str, ...]:
    """torchrun with a rendezvous of its own (--standalone), because stages run side by side."""
    return (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module)
