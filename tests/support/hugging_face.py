"""Pico Hugging Face models for tests: made by transformers, every number another, compared by what they compute.

Run as a program, it is the other side of :class:`Older`: it loads models with whatever transformers PYTHONPATH names.
"""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_btx.runner.run_dir import read_evaluation
from tests.support.runner import REPOSITORY, Zygote

OLDER = REPOSITORY / ".venv" / "transformers-4"

VOCABULARY = 96
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"model_type": "llama", "num_key_value_heads": 4},
    "llama-tied": _SIZES
    | {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "mistral": _SIZES | {"model_type": "mistral", "sliding_window": 8, "head_dim": 16},
    "qwen2": _SIZES | {"model_type": "qwen2", "rope_theta": 1e6, "use_sliding_window": False},
    "qwen3": _SIZES | {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": _SIZES | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": _SIZES | _EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 0},
    "qwen3_moe": _SIZES | _EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16, "mlp_only_layers": [1]},
}
"""One of every architecture, each with what sets it apart."""
DENSE = tuple(name for name in MODELS if not name.startswith("mixtral") and not name.endswith("moe"))

MIXED_AS = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""A dense model's type, and that of its mixtures."""


def quiet() -> Any:
    """transformers, without progress bars and remarks."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def make_model(config: Mapping[str, Any], seed: int = 0) -> Any:
    """A model of transformers with a configuration and random weights far from any initialisation."""
    transformers = quiet()
    dtype = getattr(torch, config["torch_dtype"])
    made = transformers.CONFIG_MAPPING[config["model_type"]](**config)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = max(1, parameter.shape[-1]) ** -0.5 if parameter.dim() > 1 else 0.2
            numbers = std * torch.randn(parameter.shape, generator=generator)
            # In the stored type's own precision, so that the model in memory is the model that is saved.
            parameter.copy_((numbers + ("norm" in name)).to(dtype))
    return model


def save(model: Any, folder: Path, dtype: str = "float32", shard_bytes: int = 10**9) -> Path:
    """Save with transformers' own code; the numbers must be exact in ``dtype``."""
    for parameter in model.parameters():
        assert torch.equal(parameter, parameter.to(getattr(torch, dtype)).to(parameter.dtype))
    # A copy: rounding in place would also round the rotary frequencies, which are no parameters.
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, read with the safetensors library."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json."""
    return json.loads((folder / "config.json").read_text())


def write_folder(folder: Path, config: Mapping[str, Any], numbers: Mapping[str, torch.Tensor]) -> Path:
    """A model folder by hand: config.json and one file of tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in numbers.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def same_tensors(left: Path, right: Path) -> bool:
    """Whether two folders hold the same names, types and bits."""
    one, other = tensors(left), tensors(right)
    bits = {2: torch.int16, 4: torch.int32}
    return one.keys() == other.keys() and all(
        t.dtype == other[n].dtype and torch.equal(t.view(bits[t.itemsize]), other[n].view(bits[t.itemsize]))
        for n, t in one.items()
    )


def loaded(folder: Path) -> Any:
    """A model folder loaded by transformers, in fp32; fails where a tensor is missing or too many."""
    transformers = quiet()
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(told[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if told[key]}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    """Logits of a model, or of a folder loaded by transformers, for fixed tokens: [B, S, V]."""
    model = loaded(model) if isinstance(model, Path) else model
    tokens_BS = torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(tokens_BS).logits


def generated(model: Any) -> list[int]:
    """The likeliest four tokens after a few."""
    tokens = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return tokens[0, 3:].tolist()


def difference(left: torch.Tensor, right: torch.Tensor) -> tuple[float, float]:
    """Largest difference of two models' logits, and the largest KL divergence of any token's distribution."""
    log_p, log_q = (torch.log_softmax(logits_BSV.double(), dim=-1) for logits_BSV in (left, right))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).max()
    return float((left - right).abs().max()), float(divergence)


def assert_equal_logits(left: torch.Tensor, right: torch.Tensor) -> None:
    """To 1e-5 absolute and a KL divergence of 1e-9; sums in another order differ by about 1e-6 and 1e-13."""
    assert left.std() > 0.1, "logits that are all alike show nothing"
    largest, divergence = difference(left, right)
    assert largest <= 1e-5 and divergence <= 1e-9, (largest, divergence)


def router_rows(layers: int, experts: int, hidden: int) -> torch.Tensor:
    """Routers that decide clearly: [L, E, H]."""
    return torch.randn(layers, experts, hidden, generator=torch.Generator().manual_seed(11))


def reference_mixture(models: Sequence[Any], config: Mapping[str, Any], rows_LEH: torch.Tensor) -> Any:
    """The mixture of dense models, put together by hand in transformers' own class.

    Args:
        config: the dense models' configuration and what the mixture has beside it (``mlp_only_layers``, ...).
        rows_LEH: the routers of the mixture layers, in order.
    """
    transformers, count = quiet(), len(models)
    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    fields |= {"num_experts": count, "num_local_experts": count, "moe_intermediate_size": config["intermediate_size"]}
    fields |= {"shared_expert_intermediate_size": 0, "decoder_sparse_step": 1}
    # The mixtures' classes have other defaults than the dense ones, whose base is 10000.
    fields = {"norm_topk_prob": True, "num_experts_per_tok": 2, "rope_theta": 10000.0} | fields
    if config["model_type"] == "llama":
        fields["sliding_window"] = None
    made = transformers.CONFIG_MAPPING[MIXED_AS[config["model_type"]]](**fields)
    mixture = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    dtype = getattr(torch, config["torch_dtype"])
    states = [model.state_dict() for model in models]
    routers = iter(rows_LEH)
    with torch.no_grad():
        for name, tensor in mixture.state_dict().items():
            block = name.partition(".mlp.")[0] + ".mlp."
            if name.endswith("mlp.experts.gate_up_proj"):
                fused = [torch.cat([s[block + "gate_proj.weight"], s[block + "up_proj.weight"]]) for s in states]
                tensor.copy_(torch.stack(fused).to(dtype))
            elif name.endswith("mlp.experts.down_proj"):
                tensor.copy_(torch.stack([s[block + "down_proj.weight"] for s in states]).to(dtype))
            elif name.endswith("mlp.gate.weight"):
                tensor.copy_(next(routers).to(dtype))
            elif ".shared_expert" not in name:
                tensor.copy_((sum(s[name].double() for s in states) / count).to(dtype))
    return mixture


EVAL_LENGTH, EVAL_TOKENS = 32, 1024


def loss_in_megatron(zygote: Zygote, checkpoint: Path, corpus: Path, folder: Path) -> float:
    """The real Megatron's loss, with the flags that lie beside the checkpoint."""
    flags = shlex.split((checkpoint / "megatron_args.txt").read_text())
    flags += ["--seq-length", str(EVAL_LENGTH), "--micro-batch-size", "4", "--btx-eval-tokens", str(EVAL_TOKENS)]
    flags += ["--btx-eval-output", str(folder / "loss.json"), "--btx-eval-data", f"text={corpus}"]
    flags += ["--btx-eval-model", f"model={checkpoint}"]
    zygote.run(1, flags, folder / "log", entry="megatron_btx.evaluation.program")
    found = read_evaluation(folder / "loss.json").models["model"]
    assert found.tokens["text"] == EVAL_TOKENS
    return found.losses["text"]


def loss_in_transformers(model: Any, corpus: Path) -> float:
    """transformers' loss on the same tokens: the first of the dataset, one document after the other."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset, parts, have = IndexedDataset(str(corpus)), [], 0
    while have <= EVAL_TOKENS:
        parts.append(torch.from_numpy(dataset[len(parts)].astype("int64")))
        have += len(parts[-1])
    text_T = torch.cat(parts)[: EVAL_TOKENS + 1]
    with torch.no_grad():
        logits_TV = model(text_T[:-1].view(-1, EVAL_LENGTH)).logits.flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits_TV.double(), text_T[1:]))


class Older:
    """The older transformers, in a process of its own that starts while other tests run."""

    def __init__(self) -> None:
        if not OLDER.is_dir():
            pytest.skip(f"{OLDER} does not exist; bash tools/environment.sh --tests installs it")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(OLDER), str(REPOSITORY)])}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.support.hugging_face"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
        )

    def load(self, folder: Path) -> tuple[torch.Tensor, list[int]]:
        """A folder's logits and the tokens it generates."""
        print(folder, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["version"].startswith("4."), answer
        assert "error" not in answer, answer["error"]
        return torch.tensor(answer["logits"]), answer["generated"]

    def close(self) -> None:
        """End it by closing its input."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    version = quiet().__version__
    for line in sys.stdin:
        answer: dict[str, Any] = {"version": version}
        try:
            model = loaded(Path(line.strip()))
            answer |= {"logits": logits(model).tolist(), "generated": generated(model)}
        except Exception as error:  # the test that asks shows whatever it is
            answer["error"] = f"{type(error).__name__}: {error}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
