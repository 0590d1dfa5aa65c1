"""Mixture layers of the real Megatron against plain torch written from the paper, token by token, in fp64.

Runs as a rank of the zygote (``main``), because Megatron wants process groups; each function of CHECKS is one case of
``test_routing_reference.py`` and draws its own examples.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_btx.engine.cpu import install_cpu_stand_ins
from megatron_btx.model.sampling import Annealing, Step, gumbel_noise

TOLERANCE = 1e-6
"""fp32 against fp64, relative to the largest number compared (at least 1)."""

EXAMPLES = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclasses.dataclass(frozen=True)
class Case:
    """One drawn layer and batch."""

    sequence: int
    batch: int
    hidden: int
    ffn: int
    experts: int
    seed: int
    aux: float
    z: float


CASES = st.builds(
    Case,
    sequence=st.integers(1, 9),
    batch=st.integers(1, 3),
    hidden=st.sampled_from([4, 8, 12]),
    ffn=st.sampled_from([4, 6]),
    experts=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    aux=st.sampled_from([0.0, 0.01, 0.7]),
    z=st.sampled_from([0.0, 0.1]),
)


# --- the reference ------------------------------------------------------------------------------------------------


def route(logits_TE: torch.Tensor, method: str, k: int, noise_TE: torch.Tensor | None, tau: float) -> tuple:
    """Gates as a list of {expert: gate} per token, before anything is dropped."""
    tokens = []
    for number, row in enumerate(logits_TE):
        probability = row.exp() / row.exp().sum()
        order = sorted(range(len(row)), key=lambda i, row=row: -row[i].item())
        if method == "top-k":
            chosen = order[:k]
            total = sum(row[i].exp() for i in chosen)
            tokens.append({i: row[i].exp() / total for i in chosen})
        elif method in ("pre-softmax", "switch"):
            tokens.append({i: probability[i] for i in order[:k]})
        elif method == "soft":
            tokens.append({i: probability[i] for i in order})
        elif method == "hard":
            tokens.append({order[0]: torch.ones((), dtype=row.dtype)})
        elif method == "sample":
            noisy = (row + noise_TE[number]) / tau
            best = int(noisy.argmax())
            tokens.append({best: noisy[best].exp() / noisy.exp().sum()})
    return tokens


def drop(tokens: list[dict], experts: int, factor: float, k: int) -> list[dict]:
    """What is left when every expert takes its likeliest ``ceil(T k factor / E)`` tokens (policy probs)."""
    capacity = math.ceil(len(tokens) * k / experts * factor)
    kept = [dict(token) for token in tokens]
    for expert in range(experts):
        wanted = sorted((t for t in range(len(tokens)) if expert in tokens[t]), key=lambda t: -tokens[t][expert].item())
        for token in wanted[capacity:]:
            del kept[token][expert]
    return kept


def balance(form: str, logits_TE: torch.Tensor, tokens: list[dict], alpha: float, k: int) -> torch.Tensor:
    """The balancing loss: the paper's with mean gates, Megatron's with the share of hard choices."""
    count, experts = logits_TE.shape
    probability_TE = logits_TE.exp() / logits_TE.exp().sum(dim=1, keepdim=True)
    total = torch.zeros((), dtype=logits_TE.dtype)
    for expert in range(experts):
        if form == "paper":
            use = sum((token.get(expert, torch.zeros(())) for token in tokens), torch.zeros(())) / count
        else:
            use = sum(expert in token for token in tokens) / count / k
        total = total + use * probability_TE[:, expert].mean()
    return alpha * experts * total


def feed_forward(x_H: torch.Tensor, fc1_GH: torch.Tensor, fc2_HF: torch.Tensor) -> torch.Tensor:
    """One SwiGLU expert on one token: gate rows first, then up rows."""
    gate_F, up_F = (fc1_GH @ x_H).chunk(2)
    return fc2_HF @ (gate_F * torch.sigmoid(gate_F) * up_F)


# --- Megatron -----------------------------------------------------------------------------------------------------


def build(case: Case, method: str, k: int, form: str, sampling: Annealing | None, capacity: float | None) -> Any:
    """Megatron's mixture layer number 2 of 2 (1 of 2 for the soft first layer of sampled routing), and its step."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_btx.model.routers import RouterSettings, with_routers

    kinds = {"megatron": "aux_loss", "paper": "aux_loss", "paper-global": "global_aux_loss"}
    config = TransformerConfig(
        num_layers=2,
        hidden_size=case.hidden,
        num_attention_heads=2,
        ffn_hidden_size=case.ffn,
        moe_ffn_hidden_size=case.ffn,
        num_moe_experts=case.experts,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        moe_router_topk=k,
        moe_router_pre_softmax=method in ("pre-softmax", "switch") or sampling is not None,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type=kinds[form],
        moe_aux_loss_coeff=case.aux,
        moe_z_loss_coeff=case.z or None,
        moe_token_dispatcher_type="alltoall",
        moe_expert_capacity_factor=capacity,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        init_method_std=0.2,
    )
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    step = Step(iteration=7, first_sample=21)
    if sampling or form != "megatron":
        chosen = RouterSettings(sampling, form != "megatron", seed=5)
        block = with_routers(block, config, chosen, step)
    number = 0 if method == "soft" and sampling else 1
    groups = ProcessGroupCollection.use_mpu_process_groups()
    torch.manual_seed(case.seed)
    layer = block.layer_specs[number].submodules.mlp(config=config, pg_collection=groups, is_mtp_layer=False, name=None)
    layer.set_layer_number(number + 1)
    with torch.no_grad():
        layer.router.weight.normal_(0.0, 0.5)
    layer.train(method != "hard")
    return layer, step


def compare(
    case: Case,
    method: str,
    k: int,
    form: str = "megatron",
    sampling: Annealing | None = None,
    capacity: float | None = None,
) -> None:
    """Outputs, gates, balancing loss and every gradient."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    layer, step = build(case, method, k, form, sampling, capacity)
    generator = torch.Generator().manual_seed(case.seed)
    x_SBH = torch.randn(case.sequence, case.batch, case.hidden, generator=generator).requires_grad_()
    weight_SBH = torch.randn(x_SBH.shape, generator=generator)
    seen: list[torch.Tensor] = []
    layer.router.register_forward_hook(lambda _m, _i, out: seen.extend(out))
    tracker = get_moe_metrics_tracker()
    tracker.clear()
    output_SBH, _ = layer(x_SBH)
    (output_SBH * weight_SBH).sum().backward()

    twin_SBH = x_SBH.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    x_TH = twin_SBH.reshape(-1, case.hidden)
    logits_TE = x_TH @ parameters["router.weight"].T
    noise_TE, tau = None, 1.0
    if method == "sample":
        noise_TE = gumbel_noise(5, 21 + torch.arange(case.batch), torch.arange(case.sequence), 2, case.experts)
        noise_TE = noise_TE.reshape(-1, case.experts).double()
        tau = max(sampling.least, math.exp(-sampling.rate * step.iteration))
    wished = route(logits_TE, method, k, noise_TE, tau)
    tokens = drop(wished, case.experts, capacity, k) if capacity else wished
    rows = []
    for number, token in enumerate(tokens):
        row = torch.zeros(case.hidden, dtype=torch.float64)
        for expert, gate in token.items():
            fc1, fc2 = (parameters[f"experts.local_experts.{expert}.linear_{part}.weight"] for part in ("fc1", "fc2"))
            row = row + gate * feed_forward(x_TH[number], fc1, fc2)
        rows.append(row)
    expected_SBH = torch.stack(rows).view_as(x_SBH)
    loss = (expected_SBH * weight_SBH).sum()
    if layer.training:
        if case.aux:
            balancing = balance("paper" if form != "megatron" else form, logits_TE, wished, case.aux, k)
            name = "global_load_balancing_loss" if form == "paper-global" else "load_balancing_loss"
            logged = tracker.metrics[name].values[layer.layer_number - 1]
            close(logged, balancing.detach() / case.aux, "balancing loss")
            loss = loss + balancing
        loss = loss + case.z * torch.logsumexp(logits_TE, dim=1).square().mean()
    loss.backward()

    gates_TE = torch.zeros(len(tokens), case.experts, dtype=torch.float64)
    for number, token in enumerate(tokens):
        for expert, gate in token.items():
            gates_TE[number, expert] = gate
    close(seen[0], gates_TE, "gates")
    assert torch.equal(seen[1], torch.tensor([[e in t for e in range(case.experts)] for t in tokens])), "routing map"
    close(output_SBH, expected_SBH, "output")
    close(x_SBH.grad, twin_SBH.grad, "gradient of the input")
    for name, parameter in layer.named_parameters():
        expected = parameters[name].grad
        found = parameter.grad
        if found is None or expected is None:
            assert not (found if found is not None else expected if expected is not None else torch.zeros(1)).any(), (
                name
            )
            continue
        close(found, expected, f"gradient of {name}")


def close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Within TOLERANCE of the largest expected number, or of 1."""
    scale = max(1.0, float(expected.detach().abs().max()))
    worst = float((found.detach().double() - expected.detach()).abs().max())
    assert worst <= TOLERANCE * scale, f"{what}: differs by {worst:.3g} at scale {scale:.3g}"


# --- the cases ----------------------------------------------------------------------------------------------------


@EXAMPLES
@given(CASES, st.integers(2, 6), st.sampled_from(["megatron", "paper", "paper-global"]))
def top_k(case: Case, k: int, form: str) -> None:
    """Softmax over the k largest logits."""
    compare(case, "top-k", min(k, case.experts), form)


@EXAMPLES
@given(CASES, st.integers(1, 6), st.sampled_from(["megatron", "paper", "paper-global"]))
def pre_softmax(case: Case, k: int, form: str) -> None:
    """The k largest of the full softmax."""
    compare(case, "pre-softmax", min(k, case.experts), form)


@EXAMPLES
@given(CASES, st.sampled_from([1.0, 1.5]), st.sampled_from(["megatron", "paper"]))
def switch(case: Case, capacity: float, form: str) -> None:
    """Top-1 of the full softmax with a capacity: dropped tokens get nothing, the paper's loss sees the wish."""
    compare(case, "switch", 1, form, capacity=capacity)


@EXAMPLES
@given(CASES, st.sampled_from(["megatron", "paper", "paper-global"]))
def soft(case: Case, form: str) -> None:
    """All experts."""
    compare(case, "soft", case.experts, form)


@EXAMPLES
@given(CASES, st.sampled_from([0.0, 0.05, 1.0]), st.sampled_from([0.3, 1.0]), st.sampled_from(["megatron", "paper"]))
def sample(case: Case, rate: float, least: float, form: str) -> None:
    """Sampled top-1 in training."""
    compare(case, "sample", 1, form, Annealing(rate, least))


@EXAMPLES
@given(CASES)
def sample_in_evaluation(case: Case) -> None:
    """Sampled top-1 in evaluation: the largest logit, gate 1, twice the same."""
    compare(case, "hard", 1, sampling=Annealing())


@EXAMPLES
@given(CASES, st.sampled_from(["megatron", "paper"]))
def soft_first_layer(case: Case, form: str) -> None:
    """The first mixture layer of sampled routing takes all experts, in training."""
    if form == "megatron":
        case = dataclasses.replace(case, aux=0.0)  # hard counts of all experts: constant
    compare(case, "soft", 1, form, Annealing())


@EXAMPLES
@given(CASES, st.integers(1, 4), st.booleans())
def accumulated(case: Case, microbatches: int, alike: bool) -> None:
    """The global loss over a step's micro-batches pulls as hard as over one batch of them all.

    The gradient is that of alpha N sum u p with means so far, earlier micro-batches fixed, summed in the units in which
    Megatron averages over micro-batches: for micro-batches that are alike, each gives the whole batch's gradient.
    """
    case = dataclasses.replace(case, aux=0.7, z=0.0)
    layer, _ = build(case, "top-k", min(2, case.experts), "paper-global", None, None)
    weight_EH = layer.router.weight.detach().double().requires_grad_()
    generator = torch.Generator().manual_seed(case.seed)
    texts = [torch.randn(case.sequence, case.batch, case.hidden, generator=generator) for _ in range(microbatches)]
    earlier, tokens = torch.zeros(2, case.experts, dtype=torch.float64), 0
    for number, x_SBH in enumerate([texts[0]] * microbatches if alike else texts, start=1):
        (layer(x_SBH)[0] * 0.0).sum().backward()
        logits_TE = x_SBH.double().reshape(-1, case.hidden) @ weight_EH.T
        gates = route(logits_TE, "top-k", min(2, case.experts), None, 1.0)
        zero = torch.zeros((), dtype=torch.float64)
        use_E = torch.stack([sum((g.get(e, zero) for g in gates), zero) for e in range(case.experts)])
        sums = torch.stack([use_E, torch.softmax(logits_TE, dim=1).sum(dim=0)])
        tokens += len(gates)
        use_E, probability_E = (earlier + sums) / tokens
        earlier = (earlier + sums).detach()
        (number * case.aux * case.experts * (use_E * probability_E).sum()).backward()
    close(layer.router.weight.grad, weight_EH.grad, "gradient of the router")
    if alike:
        once = weight_EH.detach().requires_grad_()
        logits_TE = texts[0].double().reshape(-1, case.hidden) @ once.T
        balance("paper", logits_TE, route(logits_TE, "top-k", min(2, case.experts), None, 1.0), case.aux, 2).backward()
        close(layer.router.weight.grad, microbatches * once.grad, "gradient of the whole batch")


CHECKS = {
    f.__name__: f
    for f in (top_k, pre_softmax, switch, soft, sample, sample_in_evaluation, soft_first_layer, accumulated)
}


def main() -> int:
    """Run the check named by CHECK in a world of one."""
    install_cpu_stand_ins()
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    CHECKS[os.environ["CHECK"]]()
    print("checked", flush=True)
    return 0
