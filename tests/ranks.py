"""Processes of torch.distributed on one machine, for tests: a test hands a function of its module to all of them."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2


class Ranks:
    """Processes with the variables that torchrun sets; new ones after a call that raised in one of them.

    begin: what each does first; preload: modules that are imported once for all; world: how many there are.
    """

    def __init__(self, begin: Callable[[], None], preload: tuple[str, ...] = ("peft",), world: int = WORLD) -> None:
        self.begin, self.preload, self.world = begin, list(preload), world
        self.start()

    def start(self) -> None:
        # listens from now on, as torchrun's: a port that is only known to be free may be taken when a process needs it
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        arguments = [(rank, self.world, self.store.port, self.begin) for rank in range(self.world)]
        context = get_context("forkserver")
        context.set_forkserver_preload(self.preload)
        self.processes = [ProcessPoolExecutor(1, context, _enter, some) for some in arguments]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank."""
        calls = [process.submit(function, *arguments) for process in self.processes]
        try:
            return [call.result(timeout=120) for call in calls]
        except BaseException:
            self.stop(wait=False)
            self.start()
            raise

    def stop(self, *, wait: bool) -> None:
        for process in self.processes:
            process.shutdown(wait, cancel_futures=True)


def _enter(rank: int, world: int, port: int, begin: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    begin()


def join_group() -> None:
    """The timeout ends a rank's wait for one that has raised. Saving may take long where others write to the disk."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))


def leave_it_to_accelerate() -> None:
    pass
