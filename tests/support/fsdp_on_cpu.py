"""Trains as `python -m sftkey.train` does, with FSDP2 on the CPU, where accelerate leaves it out.

Accelerate shards where several processes have accelerators of any kind; torch's own FSDP2 asks for
none. So the processes are said to have some.
"""

import runpy
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from sftkey.models import device

begin = PartialState.__init__


def begin_as_accelerator(self: PartialState, cpu: bool = False, **settings: Any) -> None:
    """Begin, and call processes on CPUs a kind of accelerators."""
    begin(self, cpu, **settings)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU


if __name__ == "__main__":
    PartialState.__init__ = begin_as_accelerator
    device.refuse_fsdp = lambda kind, env: None
    runpy.run_module("sftkey.train", run_name="__main__")
