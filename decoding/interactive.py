"""The prompt loop of generate.py --interactive, between whose prompts the pool and the method may
change."""

import sys

from common.files import InputError
from decoding.respond import respond
from methods.batch import check_method
from methods.session import add_adapter
from pool.load import read_adapters

HELP = """/add NAME=DIR    one more PEFT adapter    /adapters     what the pool holds
/remove NAME     one less                 /method M     how to choose from now on (ramole, meteora, adapter:NAME, ...)
/quit, Ctrl-D    leave                    anything else is a prompt"""


def interact(mole, method, args):
    """A prompt loop; between prompts the pool and the method may change. Ctrl-C stops an answer."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # bytes of another encoding: an error of that prompt alone
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
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
            elif word == "/adapters":
                print_pool(mole)
            elif word in ("/quit", "/exit"):
                return
            elif word.startswith("/"):
                print(HELP)
            elif line:
                respond(mole, [line], [check_method(mole, method, args.top_k)], args)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)


def print_pool(mole):
    """One line an adapter: name, rank, alpha, hash, Linears, a prompt that it was trained on."""
    if not (mole.pool and mole.pool.members):
        print("no adapters")
        return
    width = max(map(len, mole.pool.names))
    for name in mole.pool.names:
        member = mole.pool.members[name]
        modules = " ".join(sorted({path.rpartition(".")[2] for path in member.adapter.scale}))
        r = member.adapter.config["r"]
        alpha = member.adapter.config["lora_alpha"]
        modules = "all Linears" if len(member.adapter.scale) == len(mole.shapes) else modules
        sample = "  ".join(member.adapter.samples[:1]).partition("\n")[0]  # a prompt that it was trained on
        where = member.hash[:12] if member.slot is not None else "on disk     "
        print(f"{name:<{width}}  r {r}  alpha {alpha}  {where}  {modules}  {sample}".rstrip())
