"""Programs on a terminal of their own, and how they hear signals."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time

from helpers_commands import ENVIRONMENT

OUTPUT = 60  # seconds to wait for it


def heard():
    """Run in a new process: it hears Ctrl-C, though nohup's children ignore it, and where its standard
    input is a terminal that is the one which sends it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program whose standard streams are a terminal of 80 columns, where ^C is Ctrl-C."""

    def __init__(self, state, *args):
        self.leader, follower = pty.openpty()
        environment = ENVIRONMENT | {"XDG_STATE_HOME": str(state), "TERM": "dumb", "COLUMNS": "80"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
        own = {"start_new_session": True, "preexec_fn": heard}
        self.process = subprocess.Popen([sys.executable, *map(str, args)], **streams, env=environment, **own)
        os.close(follower)
        self.seen = ""

    def send_until(self, send, text):
        """send(), then wait_for(text); again where nothing is shown for five seconds: Python's readline
        misses a signal that comes in the moment between its prompt and its waiting for a key."""
        send()
        while text not in self.seen:
            if select.select([self.leader], [], [], 5)[0]:
                self.seen += os.read(self.leader, 4096).decode(errors="replace")
            else:
                send()
        return self.wait_for(text)

    def wait_for(self, text):
        """All that was shown since the last call, which ends where `text` does."""
        end = time.monotonic() + OUTPUT
        while text not in self.seen:
            shown = self.seen[-999:]
            assert time.monotonic() < end and select.select([self.leader], [], [], OUTPUT)[0], shown
            self.seen += os.read(self.leader, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before + text

    def rest(self):
        """All that was shown since the last call, when the program has ended."""
        try:
            while more := os.read(self.leader, 4096):
                self.seen += more.decode(errors="replace")
        except OSError:  # as Linux says that nobody has the terminal open any more
            pass
        self.process.wait(OUTPUT)
        return self.seen

    def type(self, text):
        os.write(self.leader, text.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.leader)
