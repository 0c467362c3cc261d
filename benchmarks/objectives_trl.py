"""TRL's DistillationTrainer on the debug recipe's task: as many samples, the same rate and length.

    <python with trl> benchmarks/objectives_trl.py --out OUT [--seed 0]

Then what its students get right, by opd_titan's own validation (step 0 is the folder as it is):

    python -m opd_titan.train --job.config_file train_configs/debug.toml --training.steps 1 \
        --student.hf_path OUT/step-40 --job.dump_folder OUT/graded

Exact reverse KL over the vocabulary, temperature 1; AdamW, warm-up, decay and clipping as in
train_configs/debug.toml. 128 prompts a step with one response each (the recipe: 64 with two).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "debug"
STEPS, SAMPLES, EVERY = 40, 128, 10


class Saver(TrainerCallback):
    """Save the student of every tenth step, and measure the seconds of each step."""

    def __init__(self, out: Path, tokenizer) -> None:  # noqa: ANN001
        self.out, self.tokenizer, self.seconds = out, tokenizer, []

    def on_step_begin(self, *_, **__) -> None:  # noqa: ANN002, ANN003
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **_) -> None:  # noqa: ANN001, ANN003
        self.seconds.append(time.perf_counter() - self.start)
        if state.global_step % EVERY == 0:
            folder = self.out / f"step-{state.global_step}"
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student", padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(ASSETS / role, dtype=torch.float32)
        for role in ("student", "teacher")
    )
    lines = (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    prompts = [f"Question: {q}\nAnswer: Let's solve this step by step.\n" for q in questions]
    config = trl.DistillationConfig(
        output_dir=str(a.out / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=SAMPLES,
        max_completion_length=32,
        learning_rate=2e-4,
        adam_beta2=0.95,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=5,
        max_grad_norm=1.0,
        beta=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        seed=a.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    saver = Saver(a.out, tokenizer)
    trainer = trl.DistillationTrainer(
        model=student,
        teacher_model=teacher,
        train_dataset=Dataset.from_list([{"prompt": p} for p in prompts]),
        processing_class=tokenizer,
        args=config,
        callbacks=[saver],
    )
    trainer.train()
    print(json.dumps({"trl": trl.__version__, "step_s": statistics.median(saver.seconds[1:])}))


if __name__ == "__main__":
    main()
