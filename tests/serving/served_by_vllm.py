"""The numbers of vLLM on the CPU, in fp32: python -m tests.serving.served_by_vllm ROOT, in .venv-vllm."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import numpy as np
import vllm
from vllm.distributed import cleanup_dist_env_and_memory

from tests.serving import exchange


def main() -> None:
    """Write vllm below ROOT."""
    root = Path(sys.argv[1])
    found = exchange.Findings("vllm", vllm.__version__)
    for case in exchange.cases(root):
        try:
            server = load(root / exchange.MODELS / case, case == exchange.EXPORT)
        except (ValueError, KeyError, RuntimeError, AssertionError) as error:
            found.refusals[case] = f"{type(error).__name__}: {error}"
            continue
        serve(server, case, found)
        if case == exchange.EXPORT:
            tokenizer = server.get_tokenizer()
            found.ids = [tokenizer.encode(text, add_special_tokens=False) for text in exchange.texts(root)[0]]
        del server
        gc.collect()
        cleanup_dist_env_and_memory()
    found.write(root)


def load(folder: Path, with_tokenizer: bool) -> vllm.LLM:
    """Start vLLM's engine in this process."""
    return vllm.LLM(
        str(folder),
        skip_tokenizer_init=not with_tokenizer,
        dtype="float32",
        max_model_len=exchange.CONTEXT_TOKENS,
        max_num_seqs=len(exchange.PROMPTS),
        max_logprobs=-1,
        enforce_eager=True,
        enable_prefix_caching=False,
    )


def serve(server: vllm.LLM, case: str, found: exchange.Findings) -> None:
    """All prompts at once, as a server does; vLLM tells log-probabilities token by token."""
    asked = vllm.SamplingParams(
        temperature=0,
        max_tokens=exchange.GREEDY_TOKENS,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=-1,
        logprobs=-1,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in exchange.PROMPTS]
    for answer in server.generate(prompts, asked, use_tqdm=False):
        generated = answer.outputs[0]
        rows = [*answer.prompt_logprobs[1:], generated.logprobs[0]]
        array_SV = np.empty((len(rows), len(rows[0])))
        for at, row in enumerate(rows):
            for token, told in row.items():
                array_SV[at, token] = told.logprob
        found.add(case, array_SV, list(generated.token_ids))


if __name__ == "__main__":
    main()
