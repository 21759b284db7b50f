"""torch_ops.register(): every op, from any thread, whenever it returns; and of a family every op or none."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.torch

# What both programs share: which ops torch lacks.
MISSING = """
import threading, time
import torch
from dsv4_kernels import torch_ops

def registered():
    return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dsv4::")}

def missing():
    from dsv4_kernels.ops import OPS
    wanted = {f"dsv4::{op.name}{suffix}" for op in OPS.values() for suffix in (("", ".out") if op.results else ("",))}
    return sorted(wanted - registered())

define = torch.library.Library.define
"""

# A second thread registers while the first one is amid it, which each definition holds up.
TWO_THREADS = (
    MISSING
    + """
begun = threading.Event()

def slowed(*arguments, **options):
    begun.set()
    time.sleep(0.01)
    return define(*arguments, **options)

torch.library.Library.define = slowed
first = threading.Thread(target=torch_ops.register)
first.start()
assert begun.wait(60)
torch_ops.register()
count = len(registered())
first.join()
assert count == len(registered()), "it returned too early"
print(missing())
"""
)

# The tenth definition fails, once; it is one of the router's.
FAILURE = (
    MISSING
    + """
count = 0

def failing(*arguments, **options):
    global count
    count += 1
    if count == 10:
        raise MemoryError("the tenth")
    return define(*arguments, **options)

torch.library.Library.define = failing
try:
    torch_ops.register()
except MemoryError:
    assert not registered(), "some are left behind"
    torch_ops.register()
    print(missing())
    weights, ids = torch.ops.dsv4.hash_router(torch.tensor([1]), torch.tensor([[4, 5], [6, 7]], dtype=torch.int32))
    assert ids.tolist() == [[6, 7]]
"""
)

# Families register their ops while they are imported.
IMPORTS = (
    MISSING
    + """
import importlib

families = [threading.Thread(target=importlib.import_module, args=(f"dsv4_kernels.{family}",), daemon=True)
            for family in ("cache", "moe", "router", "stash") for _ in range(2)]
for thread in families:
    thread.start()
for thread in families:
    thread.join(60)
assert not any(thread.is_alive() for thread in families), "a deadlock"
print(missing())
"""
)


@pytest.mark.parametrize("program", [TWO_THREADS, FAILURE, IMPORTS], ids=["two threads", "failure", "imports"])
def test_every_op_is_there_when_it_returns(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
