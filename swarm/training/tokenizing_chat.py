"""Chats to tokens: which of them the assistant says. Works with any chat template; knows none."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

from swarm.errors import UserError
from swarm.training.data_document import Chat

_GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Some templates write today's date, but a sample must be the same on all days.
_DATE = {
    **{"%Y": "2025", "%y": "25", "%m": "01", "%d": "01", "%-m": "1", "%-d": "1", "%B": "January", "%b": "Jan"},
    **{"%A": "Wednesday", "%a": "Wed", "%H": "00", "%M": "00", "%S": "00"},
}
_REPLACEMENTS = "".join(f" | replace('{code}', '{text}')" for code, text in _DATE.items())
# The newline is not rendered: transformers trims the one after a block.
_FIXED_DATE = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACEMENTS} }}}}{{% endmacro %}}\n"


def tokenize_chat(tokenizer: Any, messages: Chat, where: str) -> tuple[list[int], list[bool], bool]:
    """The rendered chat's tokens, whether each is learned, and whether an end-of-text token after them is to be learned.

    Learned is what the template marks with {% generation %}. If it marks nothing: what each message of the assistant brings
    into the chat, and the special tokens that end it. A token that is the assistant's in part is learned.
    where: names the chat in errors. Raises UserError if the template refuses it, or the tokenizer has none.
    """
    if not tokenizer.is_fast:
        raise UserError("chats need a tokenizer with a tokenizer.json: convert the tokenizer, or train on texts")
    template = _ChatTemplate(tokenizer, where)
    text = template.render(messages)
    learns_end = False
    if template.has_marks:
        spans = template.marked_spans(messages, text)
    else:
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = template.said_span(messages, number, text)
                stop = template.stop_after(messages, number, text, end)
                spans.append((start, end + len(stop)))
                learns_end = number == len(messages) - 1 and not stop
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], _covered(encoded["offset_mapping"], spans, len(text)), learns_end


class _ChatTemplate:
    """A tokenizer's template, rendering on a fixed day."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError("the tokenizer has no chat template: take one that has, or train on texts") from error
        self._tokenizer, self._where = tokenizer, where
        self._template = _FIXED_DATE + template if "strftime_now" in template else template
        self.has_marks = _GENERATION.search(template) is not None
        specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._stop = re.compile(rf"(?:\s*(?:{'|'.join(map(re.escape, sorted(specials)))}))+") if specials else None

    def render(self, messages: Chat, template: str | None = None) -> str:
        from jinja2 import TemplateError

        template = self._template if template is None else template
        try:
            return str(self._tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"{self._where}: the chat template refuses it ({error}): correct or remove it") from error

    def marked_spans(self, messages: Chat, text: str) -> list[tuple[int, int]]:
        """Where the template's marks are in text, by rendering them as characters that text does not have."""
        start_mark, end_mark = _absent_from(text)

        def shown(mark: re.Match[str]) -> str:
            # Blocks on both sides, so that blanks around them are trimmed as around the mark itself.
            left, is_end, right = mark.groups()
            return f"{{%{left} if true %}}{end_mark if is_end else start_mark}{{% endif {right}%}}"

        rendered = self.render(messages, _GENERATION.sub(shown, self._template))
        spans, start = [], 0
        for num_before, mark in enumerate(re.finditer(f"[{start_mark}{end_mark}]", rendered)):
            if mark[0] == start_mark:
                start = mark.start() - num_before
            else:
                spans.append((start, mark.start() - num_before))
        return spans

    def said_span(self, messages: Chat, number: int, text: str) -> tuple[int, int]:
        """What message `number` brings into text: what differs when it says something else. Empty if it leaves no trace."""
        message = {"role": messages[number]["role"], "content": "".join(_absent_from(text))}
        other = self.render([*messages[:number], message, *messages[number + 1 :]])
        if other == text:
            return 0, 0
        start = _num_common(text, other)
        return start, max(start, len(text) - _num_common(text[::-1], other[::-1]))

    def stop_after(self, messages: Chat, number: int, text: str, end: int) -> str:
        """The special tokens, and blanks before them, by which message `number` ends; text[end:] is what comes after its words.

        The next message's own beginning is told apart by a chat that ends with message `number`.
        """
        after = text[end:]
        if number < len(messages) - 1:
            try:
                shorter = self.render(messages[: number + 1])
                _, its_end = self.said_span(messages[: number + 1], number, shorter)
            except UserError:  # a template may refuse chats that end here
                return ""
            after = after[: _num_common(after, shorter[its_end:])]
        stop = self._stop.match(after) if self._stop and end else None
        return stop[0] if stop else ""


def _absent_from(text: str) -> tuple[str, str]:
    """Two characters, of those that Unicode leaves to private use, that text does not have."""
    first, second = islice((char for char in map(chr, range(0xE000, 0xF900)) if char not in text), 2)
    return first, second


def _num_common(left: str, right: str) -> int:
    """How many characters both begin with."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def _covered(offsets: list[tuple[int, int]], spans: list[tuple[int, int]], num_chars: int) -> list[bool]:
    """Whether each token, from .. to characters, is at least in part in a span."""
    inside = bytearray(num_chars + 1)
    for start, end in spans:
        inside[start:end] = b"\1" * (end - start)
    # A tokenizer may count blanks as no part of a token, so that one of blanks alone begins where it ends.
    return [
        inside.find(1, start, end) >= 0 if start < end else start > 0 and bool(inside[start - 1] and inside[start])
        for start, end in offsets
    ]
