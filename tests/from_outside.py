"""What others on a machine and beside it see of processes: their command lines, and what listens beyond loopback."""
from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

import psutil


class Watch:
    """Looks every second, from `with` to its end, at the processes that pids() gives.

    commands: all their command lines; beyond: {(command line, port)} of what listens on more than loopback.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]):
        self.pids, self.looks = pids, 0
        self.commands: set[str] = set()
        self.beyond: set[tuple[str, int]] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look_again, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._end.set()
        self._thread.join()

    def _look_again(self) -> None:
        while not self._end.wait(1):
            for pid in self.pids():
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended
                    self._look(psutil.Process(pid))
            self.looks += 1

    def _look(self, process: psutil.Process) -> None:
        command = " ".join(process.cmdline())
        self.commands.add(command)
        for one in process.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN:
                address = ipaddress.ip_address(one.laddr.ip)
                if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
                    self.beyond.add((command, one.laddr.port))


def descendants(pid: int) -> list[int]:
    """A process and all that came of it."""
    with suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []
