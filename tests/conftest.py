"""Order, and a terminal: what more than one test file needs."""

from __future__ import annotations

import fcntl
import gc
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN_FILE = "import runpy; runpy.run_path({file!r}, run_name='__main__')"

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker for each core: with a thread for each core besides, they would wait for one another (up to 20 times as long).
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: "test_offline_compile" not in item.nodeid)


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: the garbage collector need not walk through it again and again."""
    gc.collect()
    gc.freeze()


class Terminal:
    """`triton-tutorial` in a pseudo-terminal: `until` reads until a text comes, `type` answers."""

    def __init__(self, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "triton_tutorial", *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, start_new_session=True, preexec_fn=self.login
        )
        os.close(theirs)
        self.text = ""

    @staticmethod
    def login() -> None:
        """What a shell in a terminal leaves: Ctrl-C reaches the program, which does not ignore it as a background job does."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def until(self, pattern: str, seconds: float = 240) -> None:
        """Read until the pattern comes, in what came after the last."""
        end, start = time.monotonic() + seconds, len(self.text)
        while not re.search(pattern, self.text[start:]):
            assert time.monotonic() < end, f"{pattern!r} did not come; there is:\n{self.text}"
            if not self.read() and self.process.poll() is not None and not self.read():
                assert re.search(pattern, self.text[start:]), f"ended before {pattern!r} came:\n{self.text}"

    def read(self, seconds: float = 0.2) -> bool:
        """Whether something came within the time."""
        if not select.select([self.ours], [], [], seconds)[0]:
            return False
        try:
            part = os.read(self.ours, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.text += part.decode(errors="replace").replace("\r\n", "\n")
        return bool(part)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def interrupt(self, seconds: float = 240) -> int:
        """Ctrl-C, again after a silence: CPython misses one that comes just before it waits for a
        line. Gives the exit status."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.type("\x03")
            while self.read(20):
                pass
        return self.wait(0)

    def wait(self, seconds: float = 240) -> int:
        """The exit status."""
        end = time.monotonic() + seconds
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < end or self.process.poll() is not None, f"did not end; there is:\n{self.text}"
        return self.process.returncode


@pytest.fixture
def interpreted() -> Callable[..., str]:
    """Runs `python FILE` or `python -c PROGRAM` with the kernels in Triton's interpreter, and gives what it prints."""

    def run(*arguments: str) -> str:
        start = "from triton_tutorial.interpreted import quicken; quicken()\n"
        program = arguments[1] if arguments[0] == "-c" else RUN_FILE.format(file=arguments[0])
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", start + program],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        return done.stdout.strip()

    return run


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """Opens terminals, and closes them after the test."""
    opened: list[Terminal] = []

    def open_terminal(*arguments: str) -> Terminal:
        opened.append(Terminal(*arguments))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.process.kill()
        each.process.wait()
        os.close(each.ours)
