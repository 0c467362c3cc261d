"""Render a record to the text that the student continues.

The text is tokenized with `add_special_tokens=False`, so that text and token ids always agree.
There is a BOS only if the chat template writes one.
"""

from __future__ import annotations

from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING

from opd_titan.data.sources import Record, RowError
from opd_titan.errors import ModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for "chat" if the tokenizer has no chat template."""
    if template == "chat" and not tokenizer.chat_template:
        raise ModelError(
            f'data.template = "chat", but the tokenizer in {tokenizer.name_or_path!r} has no '
            'chat template; set data.template = "raw" or use a tokenizer that has one'
        )


def render(
    record: Record,
    *,
    template: str,
    raw_format: str,
    tokenizer: PreTrainedTokenizerBase,
    enable_thinking: bool,
) -> str:
    """Return the text of the prompt.

    raw: `raw_format` around the only user turn. chat: the tokenizer's own template with a
    generation prompt. Without `enable_thinking`, Qwen3's template ends in an empty, closed think
    block.

    Raises:
        RowError: the template cannot show this record.
        ModelError: the chat template fails; the message names its file.
    """
    if template == "raw":
        if len(record.messages) != 1:
            raise RowError(
                f"the prompt has {len(record.messages)} turns, which the raw template would join; "
                'use template = "chat"'
            )
        return raw_format.format(record.messages[0]["content"])

    from jinja2 import TemplateError

    # transformers compiles the template in a sandbox without attributes that begin with "_".
    try:
        text = tokenizer.apply_chat_template(
            record.messages,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
    except Exception as error:  # a template can raise any error
        if type(error) is TemplateError:  # raised by the template's own raise_exception
            raise RowError(f"the chat template refuses this prompt: {error}") from error
        raise ModelError(
            f"{_template_file(tokenizer)}: the chat template fails ({type(error).__name__}: "
            f'{first_line(error)}); fix it, or set data.template = "raw"'
        ) from error
    assert isinstance(text, str)  # not tokenized
    return text


def template_warning(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, enable_thinking: bool
) -> str | None:
    """Return how the teacher's chat template differs from the student's on one question, or None.

    The teacher scores prompts in the student's form. If it was trained on another form, its scores
    are worse (tinker-cookbook issue 796).
    """
    if not teacher.chat_template:
        return (
            "the teacher's tokenizer has no chat template, so the teacher may not know the form of "
            "the prompts that it scores"
        )
    mine, other = (
        render(
            Record([{"role": "user", "content": "Why?"}]),
            template="chat",
            raw_format="",
            tokenizer=tokenizer,
            enable_thinking=enable_thinking,
        )
        for tokenizer in (student, teacher)
    )
    if mine == other:
        return None
    at = len(commonprefix([mine, other]))
    return (
        f"the chat templates of student and teacher render the same question differently: after "
        f"{mine[:at][-20:]!r} come {mine[at:][:20]!r} and {other[at:][:20]!r}; the teacher scores "
        f"prompts in the student's form; copy the teacher's chat template to the student's folder"
    )


def _template_file(tokenizer: PreTrainedTokenizerBase) -> Path:
    """Return the file that transformers reads the chat template from."""
    folder = Path(tokenizer.name_or_path)
    alone = (folder / name for name in ("chat_template.jinja", "chat_template.json"))
    return next((file for file in alone if file.is_file()), folder / "tokenizer_config.json")
