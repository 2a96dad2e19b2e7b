"""`megatron-dmc chat`: a conversation in the terminal, with what the answer's KV cache holds as it grows."""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.engine.flags import add_engine_arguments, is_follower, make_llm, model_path
from megatron_dmc.errors import DMCError, InvalidRequest

PROMPT = "> "
HELP = """/clear         forget the conversation
/system TEXT   forget it and begin with this system message; without TEXT: with none
/again         answer the last message once more
/quit          leave (also /exit, Ctrl-D)
Ctrl-C stops an answer; what there is of it stays in the conversation."""
REFRESH_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command: the engine's, and those of an answer."""
    add_engine_arguments(parser, max_num_seqs=1)
    group = parser.add_argument_group("answers", "default: the model's generation_config.json")
    group.add_argument("--system", metavar="TEXT", help="system message")
    group.add_argument("--chat-template", metavar="FILE", help="default: the tokenizer's")
    group.add_argument(
        "--max-tokens", type=int, help="of one answer; default: what the context holds"
    )
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-p", type=float)
    group.add_argument("--top-k", type=int)


@dataclass
class Figures:
    """Costs of an answer so far."""

    num_tokens: int = 0
    seconds: float = 0.0
    """Since the first token."""
    cache_bytes: int = 0
    """Pages that hold the whole conversation."""
    plain_bytes: int = 0
    """Size of an uncompressed cache in the model's dtype."""
    cr: float | None = None

    def line(self) -> str:
        """For the status line."""
        speed = (self.num_tokens - 1) / self.seconds if self.seconds > 0 else 0.0
        ratio = "" if self.cr is None else f", CR {self.cr:.2f}"
        return (
            f"{self.num_tokens} tokens, {speed:.1f} tokens/s · cache {_size(self.cache_bytes)}, "
            f"uncompressed {_size(self.plain_bytes)}{ratio}"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


@dataclass
class Conversation:
    """The messages so far, and the engine that answers them."""

    llm: Any
    template: Any
    params: Any
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    num_answers: int = 0

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, is_stopped: Any) -> Iterator[tuple[str, Figures]]:
        """Yield the answer to the last message so far, with its figures; then it is part of the conversation.

        Args:
            is_stopped: called after every step; true ends the answer.

        Raises:
            InvalidRequest: the conversation does not fit; the last message is taken out of it.
        """
        engine, figures, text = self.llm.engine, Figures(), ""
        self.num_answers += 1
        request_id = f"chat-{self.num_answers}"
        try:
            token_ids = self.template.token_ids(
                self.messages, add_generation_prompt=True, arguments=None
            )
            engine.add_request(request_id, {"prompt_token_ids": token_ids}, self.params)
        except InvalidRequest:
            self.messages.pop()
            raise
        stats = engine.stats()  # for the sizes, which stay
        while engine.has_unfinished_requests:
            for output in engine.step():
                if output.error is not None:
                    raise InvalidRequest(output.error)
                text = output.outputs[0].text
                _measure(figures, output, stats)
            yield text, figures
            if is_stopped():
                engine.abort_request(request_id)
        self.messages.append({"role": "assistant", "content": text})


def _measure(figures: Figures, output: Any, stats: Any) -> None:
    metrics = output.metrics
    figures.num_tokens = output.outputs[0].num_tokens
    if metrics.first_token_time is not None:
        figures.seconds = time.monotonic() - metrics.first_token_time
    figures.cache_bytes = metrics.num_pages * stats.page_bytes
    figures.plain_bytes = metrics.num_cached_tokens * stats.plain_entry_bytes
    figures.cr = metrics.measured_cr


class Screen:
    """The display of answers: in a terminal with a status line below, else as plain text."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def show(self, answer: Iterator[tuple[str, Figures]]) -> None:
        """Print an answer as it comes, and at the end its figures."""
        if not self.console.is_terminal:
            self._print(answer)
            return
        from rich.live import Live
        from rich.text import Text

        shown, figures, drawn_at, text = 0, Figures(), 0.0, ""
        with Live(
            Text(""), console=self.console, transient=True, auto_refresh=False,
            vertical_overflow="visible",
        ) as live:  # fmt: skip
            for text, figures in answer:
                # whole lines scroll away; the last one is redrawn with the status below
                end = text.rfind("\n") + 1
                if end > shown:
                    self.console.print(Text(text[shown : end - 1]))
                    shown = end
                if time.monotonic() - drawn_at >= REFRESH_S:
                    drawn_at = time.monotonic()
                    live.update(
                        Text.assemble(text[shown:] + "\n", (figures.line(), "dim")), refresh=True
                    )
        self.console.print(Text(text[shown:]))
        self.console.print(Text(figures.line(), "dim"))

    @staticmethod
    def _print(answer: Iterator[tuple[str, Figures]]) -> None:
        shown, last = 0, Figures()
        for text, last in answer:  # noqa: B007 - the last one is printed
            print(text[shown:], end="", flush=True)
            shown = len(text)
        print(f"\n{last.line()}", flush=True)


@contextmanager
def interrupts() -> Iterator[Any]:
    """Within it Ctrl-C raises nothing: the function that it yields says whether it was pressed."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def run(args: argparse.Namespace) -> int:
    """Talk until /quit or the end of the input.

    Raises:
        DMCError: the model cannot be loaded, or has no chat template.
    """
    if is_follower(args):
        make_llm(args).follow()
        return 0
    conversation = _begin(args)
    screen = Screen()
    if sys.stdin.isatty():
        _enable_line_editing()
        print(f"{model_path(args)}; /help lists the commands")
    while (text := _read()) is not None:
        word, _, rest = text.partition(" ")
        if word in ("/quit", "/exit"):
            break
        if word.startswith("/") and not _obey(conversation, word, rest.strip()):
            continue
        if not word.startswith("/"):
            conversation.messages.append({"role": "user", "content": text})
        try:
            with interrupts() as is_stopped:
                screen.show(conversation.answer(is_stopped))
        except InvalidRequest as e:
            print(f"{e}; /clear forgets the conversation", file=sys.stderr)
    conversation.llm.close()
    return 0


def _begin(args: argparse.Namespace) -> Conversation:
    from dataclasses import replace

    llm = make_llm(args)
    template = load_template(llm, args.chat_template)
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    changes = {name: value for name, value in given.items() if value is not None}
    params = replace(llm.get_default_sampling_params(), max_tokens=args.max_tokens, **changes)
    return Conversation(llm, template, params, args.system)


def load_template(llm: Any, template: str | None) -> Any:
    """The chat template of a model.

    Raises:
        DMCError: it has none.
    """
    from megatron_dmc.checkpoint.chat_template import load_chat_template

    found = load_chat_template(llm.get_tokenizer(), template)
    if found is None or not found.exists:
        raise DMCError(
            "the model has no chat template; give one with --chat-template, or use `megatron-dmc generate`"
        )
    return found


def _obey(conversation: Conversation, word: str, rest: str) -> bool:
    """Follow a command. True: the last message is to be answered."""
    if word == "/help":
        print(HELP)
    elif word == "/clear":
        conversation.clear()
    elif word == "/system":
        conversation.system = rest or None
        conversation.clear()
    elif word == "/again":
        while conversation.messages and conversation.messages[-1]["role"] == "assistant":
            conversation.messages.pop()
        return bool(conversation.messages) and conversation.messages[-1]["role"] == "user"
    else:
        print(f"{word}: no such command\n{HELP}")
    return False


def _read() -> str | None:
    """The next message that is not empty; None at the end."""
    is_terminal = sys.stdin.isatty()
    while True:
        try:
            text = input(PROMPT if is_terminal else "").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            if is_terminal:
                print()
            return None
        if text:
            return text


def _enable_line_editing() -> None:
    try:
        import readline  # noqa: F401 - `input` uses it once it is imported
    except ImportError:
        pass
