"""Seconds and private memory that a rank needs for its prompts: at the first start, and later.

python benchmarks/data_start.py TOKENIZER_FOLDER gsm8k/train.jsonl 1000000
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def private_mib() -> float:
    """Return the anonymous memory of this process, which is without the page cache."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def start(tokenizer_folder: str, file: str) -> None:
    """Get the prompts and a first batch as a rank does, and print what it takes."""
    import pyarrow.dataset  # noqa: F401  large libraries are imported before the measurement

    from opd_titan.data.loader import PromptLoader
    from opd_titan.data.prompts import build_prompts
    from opd_titan.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(tokenizer_folder), "tokenizer")
    tokenizer(["a text"])
    options = dict(dataset="prompts", path=file, split="train", template="raw", tokenizer=tokenizer)
    options |= dict(enable_thinking=False, max_prompt_tokens=1024, keep_responses=False)
    before, wall, cpu = private_mib(), time.perf_counter(), time.process_time()
    prompts = build_prompts(**options).prompts
    next(PromptLoader([prompts], prompts_per_step=64, seed=0))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    used = f"{wall:.1f} s ({cpu:.1f} s of CPU), {private_mib() - before:.0f} MiB"
    print(f"{len(prompts):,} prompts: {used}")


def main(tokenizer_folder: str, data: str, count: str) -> None:
    questions = [json.loads(line)["question"] for line in Path(data).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "train.jsonl")
        with file.open("w") as rows:
            for i in range(int(count)):
                two = " ".join(questions[n % len(questions)] for n in (i, i // 7))
                rows.write(json.dumps({"prompt": f"{i}: {two}"[:640]}) + "\n")
        time.sleep(3)  # files that have just changed are read again
        environment = {**os.environ, "HF_DATASETS_CACHE": folder}
        for name in ("first start", "later start"):
            print(name, end=": ", flush=True)
            words = [sys.executable, __file__, tokenizer_folder, str(file)]
            subprocess.run(words, env=environment, check=True)


if __name__ == "__main__":
    (main if len(sys.argv) == 4 else start)(*sys.argv[1:])
