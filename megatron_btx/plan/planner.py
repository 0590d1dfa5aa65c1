"""From a recipe to its graph of stages. What follows from the recipe is derived here and in the modules of the stages.

    data -> seed -> expert-* -> mix              -> finetune -> evaluate-moe -> report
                             -> evaluate-experts -> finetune    (bounds its first loss)
                 -> dense-domains -> dense       -> evaluate-dense

A stage whose model is given (``from``) has no node: its children read the given path, or its import.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_btx.common.errors import InputError
from megatron_btx.mixing.options import DIFFERENCES, RESULT
from megatron_btx.plan.convert import plan_data, plan_export, plan_import
from megatron_btx.plan.evaluation import plan_evaluation
from megatron_btx.plan.sources import DataPaths, Model, origins_of
from megatron_btx.plan.stage import Program, Stage, sort_stages
from megatron_btx.plan.training import TrainingJob, merge_given_flags, plan_training
from megatron_btx.recipe.ablation import Ablation, Variant, stage_name
from megatron_btx.recipe.budgets import batch_tokens, token_weighted, training_steps
from megatron_btx.recipe.flags import Flags, merged
from megatron_btx.recipe.names import (
    ABLATION_REPORT_FILE,
    AVERAGE_MODEL,
    AVERAGE_STAGE,
    BTX_MODEL,
    CHECKPOINT_FOLDER,
    DENSE_DOMAINS_STAGE,
    DENSE_MODEL,
    DENSE_STAGE,
    EVALUATE_EXPERTS_STAGE,
    EVALUATION_FILE,
    EVALUATION_PREFIX,
    EXPERT_PREFIX,
    FINETUNE_STAGE,
    GENERALIST,
    MIX_MODEL,
    MIX_STAGE,
    REPORT_FILE,
    REPORT_STAGE,
    SEED_STAGE,
)
from megatron_btx.recipe.options import option_words, takes_base, words_of
from megatron_btx.recipe.schema import Mix, Recipe, Training
from megatron_btx.recipe.sections import DenseSection, EvaluateSection

_NEVER = 10**9
"""Steps between two evaluations of which only the one after the last step is wanted."""


def plan_stages(recipe: Recipe) -> list[Stage]:
    """The stages of ``recipe``, parents first. Raises InputError for budgets and layouts that do not fit."""
    return sort_stages(_Planner(recipe).stages())


class _Planner:
    """Makes the stages of one recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.seed = Model.given_or_made(recipe.seed.source, SEED_STAGE, recipe.seed.options)
        self.experts: dict[str, Model] = {}
        for name, part in recipe.experts.items():
            self.experts[name] = Model.given_or_made(part.source, expert_stage(name), part.options)
        self.mixture_flags: Flags = {}
        if recipe.mix:
            self.mixture_flags = _mixture_flags(recipe.mix)

    def stages(self) -> list[Stage]:
        """Every stage of the recipe, in no particular order."""
        stages = self._stages()
        return [*self._imports(stages), *stages]

    def _imports(self, stages: list[Stage]) -> list[Stage]:
        """The stages that import those given models that one of ``stages`` loads."""
        loaded: set[str] = set()
        for stage in stages:
            loaded.update(stage.parents)
        imports = []
        for model in (self.seed, *self.experts.values(), self._mixture(), self._finetuned()):
            if model.source is not None and model.stage in loaded:
                imports.append(plan_import(model.stage, model.source, model.options))
        return imports

    def _stages(self) -> list[Stage]:
        """All stages but the imports."""
        recipe = self.recipe
        stages = [plan_data(recipe.data)] if recipe.data.are_made() else []
        stages += self._seed_and_experts()
        if recipe.average:
            stages.append(self._combine(AVERAGE_STAGE, _average_words(recipe.mix)))
        if recipe.ablation and recipe.mix and recipe.finetune:
            return [*stages, *self._ablation(recipe.ablation, recipe.mix, recipe.finetune)]
        if recipe.mix and not recipe.mix.source:
            stages.append(self._combine(MIX_STAGE, _router_words(recipe.mix, recipe.mix.router_seed)))
        if recipe.evaluate:
            stages.append(self._evaluate_experts(recipe.evaluate))
        if recipe.finetune and not recipe.finetune.source:
            stages.append(self._finetune(recipe.finetune))
        if recipe.export:
            stages.append(plan_export(self._finetuned(), recipe.export.format, option_words(recipe.export)))
        if recipe.dense and recipe.finetune:
            stages += self._dense(recipe.dense, recipe.finetune)
        if recipe.evaluate:
            stages += self._evaluate_combined(recipe.evaluate)
        return stages

    def _seed_and_experts(self) -> list[Stage]:
        """The stages of those that are not given."""
        stages = []
        if not self.recipe.seed.source:
            stages.append(self._train(TrainingJob(SEED_STAGE, self.recipe.seed)))
        for name, expert in self.recipe.experts.items():
            if not expert.source:
                stages.append(self._train(TrainingJob(expert_stage(name), expert, self.seed)))
        return stages

    def _train(self, job: TrainingJob) -> Stage:
        return plan_training(self.recipe, job)

    def _combine(self, stage: str, options: list[str]) -> Stage:
        """Mix or average: the sources of the mix, the seed among them, because the mix averages over the same."""
        models = self._mixed_models()
        words: list[str] = []
        settings: dict[str, Any] = {"options": options, "experts": list(models)}
        for name, model in models.items():
            words += ["--expert", f"{name}={model.path}"]
            settings[f"expert {name}"] = model.identity()
        if takes_base(options):
            models["base"] = self.seed.as_given()
            settings["base"] = models["base"].identity()
            words += ["--base", models["base"].path]
        words += ["--output", f"{stage}/{CHECKPOINT_FOLDER}", *options, "--verify"]
        parents, inputs = origins_of(models.values())
        for number, option in enumerate(options):
            flag, _, path = option.partition("=")
            if path.startswith("/"):  # the routers' rows count by their content
                settings |= {"options": [*options[:number], flag, *options[number + 1 :]], flag: Path(path)}
                inputs = (*inputs, Path(path))
        program = Program("megatron_btx.mixing.cli", tuple(words))
        return Stage(stage, program, parents, inputs=inputs, product=CHECKPOINT_FOLDER, settings=settings)

    def _mixed_models(self) -> dict[str, Model]:
        names = (*self.experts, GENERALIST)
        if self.recipe.mix:
            names = self.recipe.mix.experts
        models = {}
        for name in names:
            model = self.seed if name == GENERALIST else self.experts[name]
            models[name] = model.as_given()
        return models

    def _mixture(self) -> Model:
        """What finetuning starts from."""
        mix = self.recipe.mix
        if mix is None or mix.source is None:
            return Model.made_by(MIX_STAGE)
        return Model.given_or_made(mix.source, MIX_STAGE, mix.options)

    def _finetuned(self) -> Model:
        """The finished mixture."""
        finetune = self.recipe.finetune
        if finetune is None:
            return Model.made_by(FINETUNE_STAGE)
        return Model.given_or_made(finetune.source, FINETUNE_STAGE, finetune.options)

    def _finetune(self, finetune: Training) -> Stage:
        """The mixture's training. Where the recipe evaluates, it is watched per domain, and its first loss is bound."""
        if not self.recipe.evaluate:
            return self._train(TrainingJob(FINETUNE_STAGE, finetune, self._mixture(), self.mixture_flags))
        flags = merged(self.mixture_flags, self._watching_flags(self.recipe.evaluate))
        job = TrainingJob(FINETUNE_STAGE, finetune, self._mixture(), flags, after=(EVALUATE_EXPERTS_STAGE,))
        return self._train(job)

    def _watching_flags(self, how: EvaluateSection) -> Flags:
        """Flags of finetuning: loss per domain on the text that the experts are evaluated on, and their bound."""
        data = DataPaths(self.recipe.data)
        words = tuple(f"{domain}={data.evaluation_prefix(domain, how.split)}" for domain in self.recipe.domains)
        bound = f"{EVALUATE_EXPERTS_STAGE}/{EVALUATION_FILE}"
        return {"btx-valid-data": words, "btx-valid-tokens": how.tokens, "btx-first-loss-bound": bound}

    def _dense(self, dense: DenseSection, finetune: Training) -> list[Stage]:
        """The seed continued on as many tokens of each domain as the mixture saw: its experts', then finetuning's."""
        experts = [self._as_trained(expert_stage(name), part, {}) for name, part in self._mixed_experts().items()]
        finetuned = self._as_trained(FINETUNE_STAGE, finetune, self.mixture_flags)
        blend, tokens = token_weighted(experts)
        domains = Training(None, blend, tokens, dense.domains.layout, dense.domains.megatron)
        mixture = Training(None, finetuned.blend, finetuned.tokens, dense.mixture.layout, dense.mixture.megatron)
        return [
            self._train(TrainingJob(DENSE_DOMAINS_STAGE, domains, self.seed)),
            self._train(TrainingJob(DENSE_STAGE, mixture, Model.made_by(DENSE_DOMAINS_STAGE))),
        ]

    def _mixed_experts(self) -> dict[str, Training]:
        """The recipe's experts that are in its mix. Raises InputError when the mix has others, of unknown data."""
        mixed = self.recipe.mix.experts if self.recipe.mix else ()
        for name in mixed:
            if name != GENERALIST and name not in self.recipe.experts:
                raise InputError(
                    f"baselines.dense: the mix has {name}, which is no expert of the recipe, so "
                    "that its data are not known; name it under experts with its from, blend and tokens, or leave "
                    "dense out"
                )
        return {name: part for name, part in self.recipe.experts.items() if name in mixed}

    def _as_trained(self, stage: str, part: Training, model_flags: Flags) -> Training:
        """``part`` with the tokens that its stage consumes: whole batches."""
        flags = merge_given_flags(self.recipe, part, model_flags, {})
        return replace(part, tokens=training_steps(stage, part.tokens, flags) * batch_tokens(flags))

    def _evaluate_combined(self, how: EvaluateSection) -> list[Stage]:
        """The losses of the baselines and the mixtures, and the report of all evaluations."""
        recipe = self.recipe
        stages: list[Stage] = []
        dense_models: dict[str, Model] = {}
        if recipe.average:
            dense_models[AVERAGE_MODEL] = Model.made_by(AVERAGE_STAGE)
        if recipe.dense:
            dense_models[DENSE_MODEL] = Model.made_by(DENSE_STAGE)
        if dense_models:
            stages.append(plan_evaluation(recipe, f"{EVALUATION_PREFIX}dense", dense_models, how))
        mixtures: dict[str, Model] = {}
        if recipe.mix:
            mixtures[MIX_MODEL] = self._mixture()
        if recipe.finetune:
            mixtures[BTX_MODEL] = self._finetuned()
        if mixtures:
            stages.append(plan_evaluation(recipe, f"{EVALUATION_PREFIX}moe", mixtures, how, self.mixture_flags))
        parents = (EVALUATE_EXPERTS_STAGE, *(stage.name for stage in stages))
        return [*stages, _report(parents, REPORT_FILE)]

    def _evaluate_experts(self, how: EvaluateSection) -> Stage:
        """The losses of the seed and the experts, which bound the mixture's first."""
        models = {GENERALIST: self.seed}
        for name, model in self.experts.items():
            models[expert_stage(name)] = model
        return plan_evaluation(self.recipe, EVALUATE_EXPERTS_STAGE, models, how)

    def _ablation(self, ablation: Ablation, mix: Mix, finetune: Training) -> list[Stage]:
        """A mix for every seed, finetuned by every variant; the experts' losses, which bound its first; the report."""
        stages = [self._evaluate_experts(ablation.evaluation)]
        finetunings: list[str] = []
        for seed in ablation.seeds():
            stages.append(self._combine(_seeded_mix(seed), _router_words(mix, seed)))
            for variant in ablation.variants:
                if seed in variant.seeds:
                    stages.append(self._variant(variant, seed, finetune, ablation.evaluation))
                    finetunings.append(stages[-1].name)
        return [*stages, _report(tuple(finetunings), ABLATION_REPORT_FILE)]

    def _variant(self, variant: Variant, seed: int, finetune: Training, evaluation: EvaluateSection) -> Stage:
        """One finetuning, measured after its last step alone unless the recipe says more."""
        part = replace(finetune, source=None, tokens=variant.tokens or finetune.tokens)
        return self._train(
            TrainingJob(
                stage_name(variant.name, seed),
                part,
                Model.made_by(_seeded_mix(seed)),
                {**self._watching_flags(evaluation), "eval-interval": _NEVER},
                {**variant.flags, "seed": seed},
                (EVALUATE_EXPERTS_STAGE,),
            )
        )


def expert_stage(name: str) -> str:
    """The stage that trains an expert; its model has the same name in an evaluation."""
    return f"{EXPERT_PREFIX}{name}"


def _seeded_mix(seed: int) -> str:
    """The stage of an ablation's mix whose routers are drawn from ``seed``."""
    return f"{MIX_STAGE}-s{seed}"


def _mixture_flags(mix: Mix) -> Flags:
    """Flags of the mixture, in finetuning and evaluation alike."""
    return merged(mix.megatron, mix.shape, mix.routing.flags(mix.megatron))


def _router_words(mix: Mix, seed: int) -> list[str]:
    return ["--router-seed", str(seed), "--moe-router-topk", str(mix.routing.top_k), *mix.options]


def _average_words(mix: Mix | None) -> list[str]:
    """The converter's words for the plain average, of the models that differ as the mix's may."""
    words = ["--method", "average"]
    if mix is not None:
        words += words_of(mix.options, RESULT, DIFFERENCES)
    return words


def _report(parents: tuple[str, ...], product: str) -> Stage:
    """The stage that writes the report of the run directory."""
    program = Program("megatron_btx.report.build", (".",))
    return Stage(REPORT_STAGE, program, parents, product=product, settings={}, only_shows=True)
