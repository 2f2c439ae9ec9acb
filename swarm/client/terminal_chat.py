"""What `swarm generate` and `swarm chat` do in a terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from transformers import TextStreamer, set_seed

from swarm.client.blocking import Swarm
from swarm.client.model import SwarmModelForCausalLM
from swarm.errors import RouteBroken, UserError


class _TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Writes text as it comes and keeps the time of every token."""

    def __init__(self, tokenizer: Any, out: TextIO | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._out = out
        self.token_times: list[float] = []
        self._is_prompt = True

    def put(self, value: Any) -> None:
        if self._is_prompt:
            self._is_prompt = False
            self.next_tokens_are_prompt = False
            return
        self.token_times.append(time.monotonic())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._out is not None:
            self._out.write(text + ("\n" if stream_end else ""))
            self._out.flush()


@dataclass(slots=True)
class Answer:
    """A generation and how it went."""

    text: str
    token_ids: list[int]
    num_prompt_tokens: int
    first_token_s: float
    tokens_per_s: float | None
    """Of the tokens after the first; None if there was only one."""
    route: list[str] = field(default_factory=list)
    num_reroutes: int = 0
    stall_s: float = 0.0


def _ask(
    model: SwarmModelForCausalLM, tokenizer: Any, prompt: Any, flags: dict[str, Any], out: TextIO | None
) -> Answer:
    if flags.get("seed") is not None:
        set_seed(flags["seed"])
    sampling: dict[str, Any] = {"do_sample": flags["temperature"] > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": flags["temperature"], "top_p": flags["top_p"] or 1.0, "top_k": flags["top_k"] or 0}
    else:
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        sampling["pad_token_id"] = tokenizer.eos_token_id
    streamer = _TimedStreamer(tokenizer, out)
    started = time.monotonic()
    output = model.generate(**prompt, max_new_tokens=flags["max_new_tokens"], streamer=streamer, **sampling)
    new_ids = output[0, prompt["input_ids"].shape[1] :].tolist()
    times = streamer.token_times
    session = model.last_session
    return Answer(
        text=tokenizer.decode(new_ids, skip_special_tokens=True),
        token_ids=new_ids,
        num_prompt_tokens=prompt["input_ids"].shape[1],
        first_token_s=times[0] - started,
        tokens_per_s=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        route=[f"{hop.span} at {hop.peer_id[-8:]} ({hop.record.numeric_class})" for hop in session.last_route]
        if session
        else [],
        num_reroutes=session.stats.num_reroutes if session else 0,
        stall_s=session.stats.stall_s if session else 0.0,
    )


def generate_once(swarm: Swarm, prompt: str, flags: dict[str, Any], *, as_chat: bool, as_json: bool) -> None:
    """One prompt, one answer."""
    model, tokenizer = swarm.model(), swarm.tokenizer()
    if as_chat:
        inputs = _templated(tokenizer, [{"role": "user", "content": prompt}])
    else:
        inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
        if inputs["input_ids"].shape[1] == 0:
            raise UserError("the prompt has no tokens; say something")
    answer = _ask(model, tokenizer, inputs, flags, None if as_json else sys.stdout)
    if as_json:
        fields = {name: getattr(answer, name) for name in Answer.__slots__}
        print(json.dumps({"model": swarm.client.checkpoint.name, "source": swarm.client.checkpoint.source, **fields}))
    else:
        print(f"\n{_summary(answer)}", file=sys.stderr)


def chat_loop(
    connect: Callable[[], Swarm],
    flags: dict[str, Any],
    *,
    max_length: int,
    system_prompt: str | None,
    follow: bool = False,
) -> None:
    """A conversation; the caches are kept from turn to turn, and freed at the end, at Ctrl-C or at an error.

    follow: with a run that is being trained, go on with the newest weights at each turn.
    """
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    with contextlib.ExitStack() as stack:

        def begin() -> tuple[Swarm, SwarmModelForCausalLM, Any]:
            swarm = stack.enter_context(connect())
            model, tokenizer = swarm.model(), swarm.tokenizer()
            stack.enter_context(model.session(max_length=max_length))
            return swarm, model, tokenizer

        swarm, model, tokenizer = begin()
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if not line.strip():
                return
            messages.append({"role": "user", "content": line})
            if follow and swarm.is_outdated():
                stack.close()
                swarm, model, tokenizer = begin()
                print(f"[now with {swarm.client.checkpoint.name.partition('@')[2]} epochs]", file=sys.stderr)
            try:
                answer = _ask(model, tokenizer, _templated(tokenizer, messages), flags, sys.stdout)
            except RouteBroken as error:
                if not swarm.is_outdated():
                    raise
                raise UserError(
                    f"{error}. The weights of this conversation are gone, as the run has newer ones: begin again, or use --follow"
                ) from error
            messages.append({"role": "assistant", "content": answer.text})
            print(f"{_summary(answer)}\n", file=sys.stderr)


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    if not tokenizer.chat_template:
        raise UserError("this model has no chat template; use `swarm generate` without --chat")
    return tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        tokenizer_kwargs={"verbose": False},  # no warning of its own about a long prompt: nodes say what fits
    )


def _summary(answer: Answer) -> str:
    """What happened, in a line or two."""
    rate = "" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f} tokens/s, "
    lines = [
        f"[{len(answer.token_ids)} tokens, {rate}first after {answer.first_token_s:.2f} s; route {' -> '.join(answer.route)}]"
    ]
    if answer.num_reroutes:
        lines.append(f"[{answer.num_reroutes} hop(s) were lost and replaced; {answer.stall_s:.1f} s stalled]")
    return "\n".join(lines)
