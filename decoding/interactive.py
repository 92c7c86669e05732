"""The prompt loop of generate.py --interactive; between prompts, pool and method may change."""

import re
import shutil
import sys

from common.endings import print_error
from common.files import InputError, say
from common.history import line_history
from common.printable import printable
from common.signals import Terminated, raise_once
from common.template import CHAT
from decoding.respond import respond
from methods.batch import check_method
from methods.session import Mole, add_adapter
from pictures.heat_map import heat_map
from pictures.palette import Trace
from pool.load import read_adapters

HELP = """/add NAME=DIR    one more PEFT adapter    /adapters     what the pool holds
/remove NAME     one less                 /method M     how to choose from now on (ramole, adapter:NAME, ...)
/mix A=0.7,B=0.5 a sum of adapters        /new          in a chat: a new conversation
/quit, Ctrl-D    leave                    /route        which adapters the last answer used, and where
anything else is a prompt"""


def interact(mole: Mole, method: str, args) -> None:
    """Answers each line with `method`, or follows its command. With the chat template a line is a
    turn of one conversation. Ctrl-C stops an answer, and its turn is forgotten; SIGTERM ends it all."""
    if hasattr(sys.stdin, "reconfigure"):
        # Bytes that aren't UTF-8 are an error of that prompt alone, not the end of the loop.
        sys.stdin.reconfigure(errors="surrogateescape")
    commands = re.findall(r"/\w+", HELP)
    with line_history(lambda: commands + (mole.pool.names if mole.pool else [])):
        _interact(mole, method, args)


def _interact(mole, method, args):
    turns = []
    traces = None  # of the last prompt and its answer
    while True:
        line = _read_line()
        if line is None:
            return
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if word == "/add":
                [(name, folder)] = read_adapters([rest])
                add_adapter(mole, name, folder)
            elif word == "/remove":
                if mole.pool is None:
                    raise InputError("there are no adapters")
                mole.pool.remove(rest)
            elif word == "/method":
                method = check_method(mole, rest, args.top_k)
            elif word == "/mix":
                method = check_method(mole, f"mix:{rest}", args.top_k)
            elif word == "/adapters":
                print_pool(mole)
            elif word == "/route":
                print_route(traces)
            elif word == "/new":
                turns = []
            elif word in ("/quit", "/exit"):
                return
            elif word.startswith("/"):
                print(HELP)
            elif line:
                methods = [check_method(mole, method, args.top_k)]
                (traces,) = respond(mole, [line], methods, args, turns=turns)
                if mole.template == CHAT:
                    text = "".join(text for text, _ in traces[1])
                    turns.append({"role": "user", "content": line})
                    turns.append({"role": "assistant", "content": text})
        except BrokenPipeError:  # of whoever reads the answers
            raise
        except (InputError, OSError) as error:
            print_error(error)
        except KeyboardInterrupt:
            raise_once()  # the next Ctrl-C stops the next answer
            say("stopped")


def _read_line():
    """The next line, None at the end of the input. On a terminal Ctrl-C forgets what was typed."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            _end_prompt(prompt)
            return None
        except KeyboardInterrupt:
            if not prompt:
                raise
            raise_once()
            _end_prompt(prompt)
        except Terminated:
            _end_prompt(prompt)
            raise


def _end_prompt(prompt):
    """What the terminal shows next begins on a line of its own."""
    if prompt:
        print(flush=True)


def print_route(traces: tuple[Trace, Trace] | None) -> None:
    """A prompt's and its answer's tokens with the adapters that computed them, as wide as the
    terminal. Raises InputError where there was no answer yet."""
    if traces is None:
        raise InputError("no answer yet, whose routing /route could show")
    width = shutil.get_terminal_size((100, 24)).columns
    print(heat_map(*traces, width, sys.stdout.encoding or "utf-8"))


def print_pool(mole: Mole) -> None:
    """One line an adapter: name, rank, alpha, hash, Linears, a prompt that it was trained on."""
    if not (mole.pool and mole.pool.members):
        print("no adapters")
        return
    width = max(map(len, mole.pool.names))
    for name in mole.pool.names:
        member = mole.pool.members[name]
        adapter = member.adapter
        r = adapter.config["r"]
        alpha = adapter.config["lora_alpha"]
        where = "on disk     " if member.slot is None else member.hash[:12]
        modules = " ".join(sorted({path.rpartition(".")[2] for path in adapter.scale}))
        if len(adapter.scale) == len(mole.shapes):
            modules = "all Linears"
        prompt = printable(adapter.samples[0].partition("\n")[0]) if adapter.samples else ""
        line = f"{printable(name):<{width}}  r {r}  alpha {alpha}  {where}  {modules}  {prompt}"
        print(line.rstrip())
