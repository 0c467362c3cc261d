"""Create data and tokenizer of the debug recipe: one-step grade-school word problems.

    python scripts/make_debug_data.py                           # assets/debug, as shipped
    python scripts/make_debug_data.py --sft-folder build/sft    # and the SFT data of both models

Writes, in GSM8K's format (`question`, and `answer` ending in `#### number`):

- `data/train.jsonl`: prompts for on-policy distillation;
- `data/test.jsonl`: held out; no other file has the same operation on the same two numbers;
- with `--sft-folder`, `student_sft.jsonl`: most answers follow a misconception (no carry, no
  borrow, adding where it should multiply); and `teacher_sft.jsonl`: nearly all answers are right.

It also writes the tokenizer into the folder of each model: byte-level BPE with the structure of
Qwen3's.

An answer goes digit by digit and writes down the carry. So a misconception is one wrong token
(`carry 0`, `borrow 0`, or `+` instead of `*`), and everything after it follows from the text so
far:

    27 + 15   right   7+5=12, carry 1, 2+1+1=4.     #### 42
              wrong   7+5=12, carry 0, 2+1+0=3.     #### 32

The output depends only on the constants below. tests/test_debug_data.py compares the shipped files
with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 2026
TRAIN_ROWS, TEST_ROWS = 4000, 500
SFT_ROWS = 40_000
# Shares of wrong answers among the problems to which a misconception applies. The few wrong answers
# of the teacher teach it to continue consistently after a wrong carry; without them it would also
# penalize the student where that carry is used. Its greedy answers stay right.
STUDENT_MISCONCEPTIONS, TEACHER_SLIPS = 0.7, 0.03
HELD_OUT_SHARE = 0.15  # of each operation's operand pairs, at most
VOCAB_SIZE = 448  # at most, special tokens included

# (operation, does a misconception apply): weight. If none applies, the student is right from the
# start, so its accuracy begins at about a quarter.
MIXTURE = {
    ("+", True): 0.25,
    ("-", True): 0.25,
    ("*", True): 0.24,
    ("+", False): 0.13,
    ("-", False): 0.13,
}

NAMES = ("Tom", "Ann", "Ben", "Mia", "Sam", "Eva", "Leo", "Zoe", "Max", "Ida", "Kim", "Ada")
THINGS = ("pens", "coins", "books", "cards", "shells", "apples", "stamps", "beads", "eggs", "cups")
PHRASINGS = {
    "+": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "{name} has {a} {things} and {other} has {b}. How many {things} do they have in all?",
        "There are {a} {things} in a box and {b} in a bag. How many {things} are there in all?",
        "A shop sold {a} {things} on Monday and {b} on Friday. How many {things} did it sell?",
    ),
    "-": (
        "{name} had {a} {things} and gave {b} to {other}. How many {things} does {name} have now?",
        "There were {a} {things} in a box and {name} took {b}. How many {things} are left?",
        "A shop had {a} {things} and sold {b}. How many {things} are left?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have?",
    ),
    "*": (
        "{name} has {b} boxes with {a} {things} in each. How many {things} does {name} have?",
        "There are {a} {things} in each bag. How many {things} are there in {b} bags?",
        "A shop sold {a} {things} a day. How many {things} did it sell in {b} days?",
        "{name} gets {a} {things} a day. How many {things} does {name} have after {b} days?",
    ),
}

PROMPT = "Question: {question}\nAnswer: Let's solve this step by step.\n"  # the `raw` template
# Qwen3's pre-tokenizer: words keep the space before them, and every digit is a separate token.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(frozen=True)
class Operands:
    """`a op b` with every operand, every answer, and every misconceived answer below 100."""

    op: str
    a: int
    b: int

    @property
    def result(self) -> int:
        """The right answer."""
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.op]

    @property
    def carry(self) -> int:
        """The carry from the ones to the tens, or the borrow (0 or 1)."""
        ones_a, ones_b = self.a % 10, self.b % 10
        if self.op == "-":
            return int(ones_a < ones_b)
        return (ones_a * ones_b if self.op == "*" else ones_a + ones_b) // 10

    @property
    def misconceivable(self) -> bool:
        """Whether the student's misconceptions change this answer."""
        return self.op == "*" or self.carry > 0

    @property
    def held_out_key(self) -> tuple[str, int, int]:
        """A key that is equal for 27 + 15 and 15 + 27, which are held out together."""
        return (self.op, self.a, self.b) if self.op == "-" else (self.op, *sorted((self.a, self.b)))

    @property
    def facts(self) -> tuple[tuple[str, int, int, int], ...]:
        """The one-digit facts that the answer uses: (operation and place, digit, digit, carry)."""
        tens_b = self.b if self.op == "*" else self.b // 10
        return (
            (self.op + "ones", self.a % 10, self.b % 10, 0),
            (self.op + "tens", self.a // 10, tens_b, self.carry),
        )


def work(operands: Operands, carry: int | None = None) -> str:
    """Return the text of the answer, computed with `carry` if one is given, even a wrong one."""
    op, a, b = operands.op, operands.a, operands.b
    carry = operands.carry if carry is None else carry
    ones_a, ones_b, tens_a, tens_b = a % 10, b % 10, a // 10, b // 10
    if op == "-":
        ones_a += 10 * operands.carry
        ones, tens = ones_a - ones_b, tens_a - tens_b - carry
        steps = f"{ones_a}-{ones_b}={ones}, borrow {carry}, {tens_a}-{tens_b}-{carry}={tens}"
    elif op == "+":
        ones, tens = ones_a + ones_b, tens_a + tens_b + carry
        steps = f"{ones_a}+{ones_b}={ones}, carry {carry}, {tens_a}+{tens_b}+{carry}={tens}"
    else:
        ones, tens = ones_a * ones_b, tens_a * b + carry
        steps = f"{ones_a}*{b}={ones}, carry {carry}, {tens_a}*{b}+{carry}={tens}"
    return f"{steps}.\n#### {10 * tens + ones % 10}"


def misconceived_work(operands: Operands) -> str:
    """Return a wrong answer: add instead of multiplying, or else drop the carry or borrow."""
    if operands.op == "*":
        return work(Operands("+", operands.a, operands.b))
    return work(operands, carry=0)


def all_operands() -> list[Operands]:
    """Return all problems. Answers have two digits, so that places stay aligned."""
    two_digits = range(11, 100)
    pairs = [(a, b) for a in two_digits for b in range(2, 100)]
    return [
        *(Operands("+", a, b) for a, b in pairs if a + b < 100),
        *(Operands("-", a, b) for a, b in pairs if a - b >= 10),
        *(Operands("*", a, b) for a, b in pairs if b < 10 and a * b < 100),
    ]


def split_operands(seed: int) -> tuple[list[Operands], list[Operands]]:
    """Return (seen, held out). Every one-digit fact of a held-out problem is also in a seen one."""
    groups: dict[tuple[str, int, int], list[Operands]] = {}
    for operands in all_operands():
        groups.setdefault(operands.held_out_key, []).append(operands)
    left = Counter(fact for group in groups.values() for one in group for fact in one.facts)
    room = Counter(key[0] for key in groups)
    room = Counter({op: int(HELD_OUT_SHARE * count) for op, count in room.items()})
    order = list(groups)
    random.Random(f"{seed}/split").shuffle(order)
    seen, held_out = [], []
    for key in order:
        used = Counter(fact for one in groups[key] for fact in one.facts)
        spare = all(left[fact] > count for fact, count in used.items())
        if spare and room[key[0]] > 0:
            room[key[0]] -= 1
            left -= used
            held_out += groups[key]
        else:
            seen += groups[key]
    return seen, held_out


@dataclass(frozen=True)
class Problem:
    """One row, and where it came from."""

    operands: Operands
    question: str
    answer: str
    misconceived: bool = False

    def to_json(self) -> str:
        """Return the row as a line in GSM8K's format."""
        return json.dumps({"question": self.question, "answer": self.answer})


def generate(pool: Iterable[Operands], seed: str, misconceptions: float = 0.0) -> Iterator[Problem]:
    """Yield random problems from `pool`, without end.

    Args:
        misconceptions: share of wrong answers among the problems that allow a misconception.
    """
    rng = random.Random(seed)
    by_kind: dict[tuple[str, bool], list[Operands]] = {kind: [] for kind in MIXTURE}
    for operands in pool:
        by_kind[operands.op, operands.misconceivable].append(operands)
    while True:
        (kind,) = rng.choices(list(MIXTURE), list(MIXTURE.values()))
        operands = rng.choice(by_kind[kind])
        name, other = rng.sample(NAMES, 2)
        question = rng.choice(PHRASINGS[operands.op]).format(
            name=name, other=other, things=rng.choice(THINGS), a=operands.a, b=operands.b
        )
        wrong = operands.misconceivable and rng.random() < misconceptions
        answer = misconceived_work(operands) if wrong else work(operands)
        yield Problem(operands, question, answer, wrong)


def make_splits(seed: int = SEED) -> dict[str, list[Problem]]:
    """Return the rows of `train`, `test` (no question twice), `teacher_sft` and `student_sft`."""
    seen, held_out = split_operands(seed)

    def distinct(pool: list[Operands], name: str, rows: int) -> list[Problem]:
        by_question: dict[str, Problem] = {}
        for problem in generate(pool, f"{seed}/{name}"):
            by_question.setdefault(problem.question, problem)
            if len(by_question) == rows:
                break
        return list(by_question.values())

    def repeated(name: str, share: float) -> list[Problem]:
        return list(itertools.islice(generate(seen, f"{seed}/{name}", share), SFT_ROWS))

    return {
        "train": distinct(seen, "train", TRAIN_ROWS),
        "test": distinct(held_out, "test", TEST_ROWS),
        "teacher_sft": repeated("teacher_sft", TEACHER_SLIPS),
        "student_sft": repeated("student_sft", STUDENT_MISCONCEPTIONS),
    }


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE as in Qwen3: any text round-trips, and digits are single tokens.

    The special tokens come last, as in Qwen3.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = [PAD, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(specials),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    # normalized=False: special tokens are matched before normalization.
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for `AutoTokenizer`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "model_max_length": 512,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def write_rows(problems: Iterable[Problem], path: Path) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(problem.to_json() + "\n" for problem in problems)
    path.write_text(lines, encoding="utf-8", newline="\n")


def main() -> None:
    """Write all files."""
    repository = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=repository / "assets" / "debug")
    parser.add_argument("--sft-folder", type=Path, help="also write the SFT sets here")
    options = parser.parse_args()

    splits = make_splits()
    for name in ("train", "test"):
        write_rows(splits[name], options.output / "data" / f"{name}.jsonl")
    texts = (PROMPT.format(question=p.question) + p.answer for p in splits["train"])
    tokenizer = train_tokenizer(texts)
    for model in ("teacher", "student"):
        write_tokenizer(tokenizer, options.output / model)
    if options.sft_folder is not None:
        for name in ("teacher_sft", "student_sft"):
            write_rows(splits[name], options.sft_folder / f"{name}.jsonl")


if __name__ == "__main__":
    main()
