"""`megatron-dmc chat` in a pseudo-terminal and through pipes, and `LLM.chat`."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from text_models import CHAT, byte_level_tokenizer, random_llama

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.cli.main import main
from megatron_dmc.errors import InvalidRequest

TURNS = [{"role": "user", "content": "keys and values"}]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    byte_level_tokenizer(folder)
    random_llama(folder, 300).float().save_pretrained(folder)
    return folder


def test_llm_chat_is_generate_of_the_template(model):
    llm = LLM(model)
    tokenizer = llm.get_tokenizer().inner

    def expected(turns, **options):
        ids = tokenizer.apply_chat_template(turns, **{"add_generation_prompt": True, **options})
        prompt = {"prompt_token_ids": ids["input_ids"]}
        return llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids

    def given(*arguments, **options):
        outputs = llm.chat(*arguments, GREEDY, use_tqdm=False, **options)
        return [output.outputs[0].token_ids for output in outputs]

    longer = [*TURNS, {"role": "assistant", "content": "go"}, {"role": "user", "content": "pages"}]
    assert given(TURNS) == [expected(TURNS)]
    assert given([TURNS, longer]) == [expected(TURNS), expected(longer)]
    bare = "{% for m in messages %}{{ m.content }}{{ tail }}{% endfor %}"
    assert given(TURNS, chat_template=bare, chat_template_kwargs={"tail": "!"}) == [
        llm.generate(
            {"prompt": "keys and values!", "add_special_tokens": False}, GREEDY, use_tqdm=False
        )[0].outputs[0].token_ids
    ]  # fmt: skip
    assert given(TURNS, add_generation_prompt=False) == [
        expected(TURNS, add_generation_prompt=False)
    ]
    with pytest.raises(InvalidRequest, match="refuses these messages"):
        llm.chat(TURNS, chat_template="{{ raise_exception('no') }}")
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat(TURNS)
    tokenizer.chat_template = CHAT


class Terminal:
    """The command at the other end of a pseudo-terminal."""

    def __init__(self, *arguments):
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="200", LINES="50")
            os.execv(sys.executable, [sys.executable, "-m", "megatron_dmc.cli.main", *arguments])
        self.seen = ""

    def wait_for(self, pattern, seconds=240):
        """Read until the pattern is seen; returns what came before it and the match, without colours."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.seen)) is None:
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.end], [], [], left)[0], self.seen
            try:
                new = os.read(self.end, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(self.seen) from None
            self.seen += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", new)
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def type(self, text):
        os.write(self.end, text.encode())

    def interrupt(self, pattern, times=10):
        """Ctrl-C until the pattern is seen: `input` acts on one that comes just before it waits at the next key only."""
        for _ in range(times - 1):
            self.type("\x03")
            try:
                return self.wait_for(pattern, seconds=10)
            except AssertionError:
                continue
        self.type("\x03")
        return self.wait_for(pattern)

    def code(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_terminal(model):
    """Answers stream above figures that grow; Ctrl-C stops one; commands; a second turn; /quit."""
    terminal = Terminal(
        "chat", str(model), "--temperature", "0", "--max-tokens", "24", "--device", "cpu"
    )
    figures = r"(\d+) tokens, [\d.]+ tokens/s · cache (\d+) KiB, uncompressed (\d+) KiB, CR 1.00"
    last = figures + r"\s+> "
    terminal.wait_for("/help lists the commands\r\n> ")
    terminal.type("keys\r")
    first = re.findall(figures, terminal.wait_for(last))
    assert int(first[-1][0]) <= 24 and int(first[-1][1]) >= int(first[-1][2]) > 0
    terminal.type("pages\r")
    second = re.findall(figures, terminal.wait_for(last))
    assert int(second[-1][2]) > int(first[-1][2]), "the first turn is part of the second"
    terminal.type("/help\r")
    assert "Ctrl-C" in terminal.wait_for(r"stays in the conversation\.\r\n> ")
    terminal.type("/clear\r")
    terminal.wait_for("> ")
    terminal.type("keys\r")
    assert re.findall(figures, terminal.wait_for(last))[-1][2] == first[-1][2]
    terminal.type("/nonsense\r")
    terminal.wait_for(r"/nonsense: no such command[\s\S]*> ")
    terminal.interrupt("> ")
    terminal.type("/quit\r")
    assert terminal.code() == 0


def test_ctrl_c_stops_an_answer(model, monkeypatch):
    """The answer ends after the step that it comes in; the conversation continues."""
    from megatron_dmc.cli import chat

    llm = LLM(model, max_num_seqs=1)
    template = chat.load_template(llm, None)
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    conversation = chat.Conversation(llm, template, params, system="short")
    conversation.messages.append(TURNS[0])
    with chat.interrupts() as is_stopped:
        seen = []
        for text, figures in conversation.answer(is_stopped):  # noqa: B007 - the last ones
            seen.append(text)
            if len(seen) == 7:
                signal.raise_signal(signal.SIGINT)
    assert 6 <= figures.num_tokens <= 8 and not llm.engine.has_unfinished_requests
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    assert conversation.messages[-1]["content"] == seen[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    conversation.messages.append({"role": "user", "content": "go " * 500})
    with pytest.raises(InvalidRequest, match="256"):
        list(conversation.answer(lambda: False))
    assert len(conversation.messages) == 3, "what does not fit is not kept"


def test_pipes(model):
    """Without a terminal: plain text, and an end at the end of the input."""
    out = subprocess.run(
        [sys.executable, "-m", "megatron_dmc.cli.main", "chat", str(model), "--temperature", "0",
         "--max-tokens", "8", "--system", "brief"],
        input="keys\n/again\n\n", text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert "\x1b" not in out and out.count("tokens/s") == 2
    answers = re.split(r"\n\d+ tokens, .*\n", out)
    assert answers[0] == answers[1] and answers[0], "greedy answers of the same message"


def test_a_model_without_a_template_is_refused(tmp_path, capsys):
    byte_level_tokenizer(tmp_path, chat_template=None)
    random_llama(tmp_path, 300).float().save_pretrained(tmp_path)
    assert main(["chat", str(tmp_path)]) == 2
    assert "no chat template; give one with --chat-template" in capsys.readouterr().err
