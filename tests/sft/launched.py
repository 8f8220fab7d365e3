"""What torchrun starts in a test: ``launched.py BACKEND FOLDER``. One step, prepared by an `Accelerator`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from sft.ranks import model, save, step


def main() -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=sys.argv[1] == "gloo")
    inner = model()
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], lr=0.1)
    found, optimizer = accelerator.prepare(inner, optimizer)
    assert accelerator.num_processes == 2
    step(found, accelerator.process_index, accelerator.num_processes, accelerator.device)
    save(found, Path(sys.argv[2]))
    optimizer.step()
    accelerator.wait_for_everyone()
    # At once: a Gloo group that DDP frees may wait for its own thread, which waits for the interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
