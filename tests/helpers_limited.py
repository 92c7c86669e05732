"""What a limited process may be asked to do, good and bad; it finds these functions by their names."""

import os
import resource
import sys
import time

from common.files import InputError


def echo(*values):
    return list(values)


def process_id():
    return os.getpid()


def endless():
    while True:
        pass


def asleep():
    time.sleep(1000)


def hungry():
    return len(bytearray(3 << 30))


def talkative():
    print("to stdout")
    os.write(1, b"to stdout\n")
    os.write(2, b"to stderr\n")
    return "answer"


def long_answer():
    return "a" * 20_000_000


def abort():
    os.abort()


def leave():
    os._exit(0)


def refuse():
    raise InputError("file: field is 1, expected 2")


def fail(text):
    raise ValueError(text)


def panic():
    raise BaseException("index out of bounds")  # as a panic in Rust


def no_json():
    return object()


def leave_politely():
    sys.exit(3)


def use_up():
    """Leaves a moment of the processor time that it may use."""
    while time.process_time() < resource.getrlimit(resource.RLIMIT_CPU)[0] - 0.2:
        pass
