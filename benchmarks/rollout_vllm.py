"""vLLM as a rollout engine for `rollout.py`: JSON lines in, JSON lines out.

It runs in an environment of its own, which needs vLLM and nothing of this project. Each line
{"prompts": [[token, ...], ...], "new_tokens": [n, ...]} on stdin is answered by one line with the
tokens sampled for each prompt and the seconds they took.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time

# Before vLLM is imported. On a GPU the CPU's are ignored.
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "auto",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in os.environ})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder with a config.json; weights are random")
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    a = parse_arguments()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's processes write their logs to stdout as well
    import vllm

    llm = vllm.LLM(
        a.model,
        dtype="bfloat16",
        load_format="dummy",
        max_num_seqs=a.max_num_seqs,
        max_model_len=a.max_model_len,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every round brings the same prompts
    )
    print(json.dumps({"vllm": vllm.__version__}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(generate(vllm, llm, **request)), file=answers)


def generate(vllm, llm, prompts: list[list[int]], new_tokens: list[int]) -> dict:
    """Sample from the whole distribution; the log-probs of what was sampled come with it."""
    common = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True}
    params = [
        vllm.SamplingParams(**common, max_tokens=n, logprobs=0, detokenize=False)
        for n in new_tokens
    ]
    inputs = [{"prompt_token_ids": p} for p in prompts]
    start = time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    answers = [o.outputs[0] for o in outputs]
    # log-probs: one for each token, and true ones
    assert all(len(x.logprobs) == len(x.token_ids) for x in answers)
    assert all(math.isfinite(x.cumulative_logprob) for x in answers)
    return {"tokens": [len(x.token_ids) for x in answers], "seconds": seconds}


if __name__ == "__main__":
    main()
