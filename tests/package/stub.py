"""The binding's functions for type checkers, python/dsv4_kernels/_native.pyi.

    python -m tests.package.stub        writes the ops anew, from the declarations of the installed package

Other functions are written by hand; test_interfaces.py holds all of it to what the module has.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from dsv4_kernels.op import Op
from dsv4_kernels.ops import OPS

STUB = Path(__file__).resolve().parents[2] / "python" / "dsv4_kernels" / "_native.pyi"
BINDING = Path(__file__).resolve().parents[2] / "csrc" / "python"
MARK = "# The ops, "

# Of a parameter's type in torch's terms.
TYPES = {"Tensor": "Tensor", "Optional[Tensor]": "Tensor | None", "int": "int", "bool": "bool", "float": "float"}


def parameters(op: Op) -> dict[str, str]:
    """Name to type of what the binding takes: the inputs, a workspace if the op needs one, the outputs."""
    inputs = {argument.name: TYPES[str(argument.type)] for argument in op.parameters}
    workspace = {"workspace": "Tensor | None"} if op.workspace_size else {}
    return inputs | workspace | dict.fromkeys(op.results, "Tensor")


def main() -> None:
    by_hand, mark, rest = STUB.read_text().partition(MARK)
    lines = [
        f"def {op.name}({', '.join(f'{name}: {of}' for name, of in parameters(op).items())}) -> bool: ..."
        for op in OPS.values()
    ]
    STUB.write_text("\n".join([by_hand + mark + rest.partition("\n")[0], *lines]) + "\n")
    subprocess.run(["ruff", "format", "--quiet", STUB], check=True)


if __name__ == "__main__":
    main()
