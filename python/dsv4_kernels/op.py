"""How a public function reaches its kernel.

Through the C interface in eager mode, the torch op while something traces, the CPU implementation for host tensors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, TypeAlias

import torch
from torch.compiler import is_compiling

from dsv4_kernels import _native
from dsv4_kernels.workspace import Workspace

# While one of these holds, the dispatcher must see the call: torch.compile traces, a mode (fake tensors) is active.
# Anything but these types is a subclass that wants to see it too.
_PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
_dispatch_modes = torch._C._len_torch_dispatch_stack

# Shape and dtype of an output.
OutputSpec: TypeAlias = tuple[Sequence[int], torch.dtype]


@dataclass(frozen=True)
class Op:
    """One op. All else follows from its name: dsv4_<name> in C, _native.<name>, <family>.reference.<name>,
    torch.ops.dsv4.<name>.

    arguments: the inputs in torch's schema language, in the order of the binding. What it changes in place is marked
        there: `Tensor(a!) pool`.
    results: names of the outputs, as keyword arguments. None for an op that only changes its arguments.
    outputs: from the inputs to shape and dtype of each output. May raise for inputs that the op refuses.
    workspace_size: from the inputs to the bytes of zeroed workspace that a call needs, or None. An op that needs some
        takes it after its inputs: a tensor, or None for one that the library lends to calls on a device.
    """

    family: str
    name: str
    arguments: str
    results: tuple[str, ...] = ()
    outputs: Callable[..., tuple[OutputSpec, ...]] = lambda *_: ()
    workspace_size: Callable[..., int] | None = None

    def __call__(
        self,
        arguments: tuple[Any, ...],
        out: tuple[torch.Tensor | None, ...],
        workspace: Workspace | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Runs the op. out holds a tensor to write to, or None to allocate one, for each result."""
        if workspace is not None and isinstance(workspace, Workspace):
            workspace = self._memory_of(workspace, arguments)
        first = arguments[0]
        if (
            is_compiling()
            or _dispatch_modes()
            or (type(first) not in _PLAIN_TENSORS and isinstance(first, torch.Tensor))
        ):
            return self._call_torch_op(arguments, out, workspace)
        return self.run(arguments, out, workspace)

    def run(
        self,
        arguments: tuple[Any, ...],
        out: tuple[torch.Tensor | None, ...],
        workspace: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Runs the op on real tensors. What both the public function and the torch op end in."""
        try:
            for tensor in out:
                if tensor is None:
                    out = self._filled(arguments, out)
                    break
            if self.workspace_size is None:
                on_device = self.native(*arguments, *out)
            else:
                if workspace is None and not getattr(arguments[0], "is_cuda", True):
                    workspace = torch.zeros(self.workspace_size(*arguments), dtype=torch.uint8)
                on_device = self.native(*arguments, workspace, *out)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            self._explain(arguments, out, workspace, error)
        if not on_device:
            with torch.no_grad():
                self.reference(*arguments, *out)
        return out  # type: ignore[return-value]  # no None is left

    def _filled(self, arguments: tuple[Any, ...], out: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
        """out with a new tensor in place of each None."""
        empty = arguments[0].new_empty
        return tuple(
            tensor if tensor is not None else empty(shape, dtype=dtype)
            for tensor, (shape, dtype) in zip(out, self.outputs(*arguments), strict=True)
        )

    def allocate(self, arguments: tuple[Any, ...], device: torch.device | str) -> tuple[torch.Tensor, ...]:
        """Uninitialised outputs for these inputs."""
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.outputs(*arguments))

    @cached_property
    def schema(self) -> Any:
        """The inputs as torch parses them: names, types, defaults."""
        return torch._C.parse_schema(f"{self.name}({self.arguments}) -> ()").arguments

    @cached_property
    def mutated(self) -> tuple[int, ...]:
        """Positions of the inputs that the op changes in place."""
        return tuple(i for i, a in enumerate(self.schema) if a.alias_info is not None and a.alias_info.is_write)

    def mutated_of(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors among these inputs that the op changes in place."""
        return tuple(arguments[i] for i in self.mutated if i < len(arguments) and arguments[i] is not None)

    @cached_property
    def reference(self) -> Callable[..., None]:
        """The CPU implementation: inputs, then outputs, which it writes in whatever float dtype they have."""
        function: Callable[..., None] = getattr(
            importlib.import_module(f"dsv4_kernels.{self.family}.reference"), self.name
        )
        return function

    @cached_property
    def native(self) -> Callable[..., bool]:
        """The binding: inputs, workspace if the op takes one, outputs. False if they are valid but on the host."""
        function: Callable[..., bool] = getattr(_native, self.name)
        return function

    def _memory_of(self, workspace: Workspace, arguments: tuple[Any, ...]) -> torch.Tensor:
        """Enough memory for a call. What is being traced takes what there is: its calls check the size."""
        if is_compiling() or _dispatch_modes() or self.workspace_size is None:
            return workspace.tensor
        try:
            size = self.workspace_size(*arguments)
        except (AttributeError, LookupError, TypeError):  # wrong arguments: the call will say which
            return workspace.tensor
        return workspace.reserve(size)

    def _call_torch_op(
        self, arguments: tuple[Any, ...], out: tuple[torch.Tensor | None, ...], workspace: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        overloads = getattr(torch.ops.dsv4, self.name)
        given = () if workspace is None else (workspace,)
        if not self.results:
            overloads.default(*arguments, *given)
            return ()
        if all(tensor is None for tensor in out):
            results = overloads.default(*arguments, *given)
            return results if len(self.results) > 1 else (results,)
        tensors = self._filled(arguments, out)
        overloads.out(*arguments, *tensors, *given)
        return tensors

    def _explain(self, arguments: tuple[Any, ...], out: tuple[Any, ...], workspace: Any, error: Exception) -> NoReturn:
        """Raises what is wrong with the arguments in the package's words; `error` itself if they are not the cause."""
        from dsv4_kernels.errors import InvalidArgumentError, KernelError

        if isinstance(error, (KernelError, torch.OutOfMemoryError)):
            raise error
        given = [(parameter.name, str(parameter.type), a) for parameter, a in zip(self.schema, arguments, strict=True)]
        given += [(name, "Optional[Tensor]", tensor) for name, tensor in zip(self.results, out, strict=True)]
        given += [("workspace", "Optional[Tensor]", workspace)]
        for name, kind, value in given:
            need, holds = _ARGUMENT_KINDS[kind]
            if not holds(value):
                raise InvalidArgumentError(f"{self.name}: {name}: expected {need}, got {_describe(value)}") from None
        if not isinstance(arguments[0], torch.Tensor) and any(tensor is None for tensor in out):
            name = self.results[[tensor is None for tensor in out].index(True)]
            raise InvalidArgumentError(
                f"{self.name}: {name}: expected a tensor to write to, got None; "
                "outputs are allocated for torch tensors only"
            ) from None
        # Outputs could not be allocated for these inputs: the C checks say why.
        self.native(*arguments, *((workspace,) if self.workspace_size else ()), *out)
        raise error


def _is_tensor(value: object) -> bool:
    """Whether the binding can read it: memory of the host or of a CUDA device, with plain strides."""
    if isinstance(value, torch.Tensor):
        return value.device.type in ("cpu", "cuda") and value.layout == torch.strided
    return hasattr(value, "__dlpack__")


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {value.device.type} tensor with layout {str(value.layout).removeprefix('torch.')}"
    return f"int {value}" if type(value) is int else type(value).__name__


# Of each type in torch's schema language: what an argument must be, in words and as a test.
_ARGUMENT_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a dense tensor on cpu or cuda", _is_tensor),
    "Optional[Tensor]": ("a dense tensor on cpu or cuda, or None", lambda value: value is None or _is_tensor(value)),
    "int": ("an int of 32 bits", lambda value: type(value) is int and -(2**31) <= value < 2**31),
    "bool": ("a bool", lambda value: type(value) is bool),
    "float": ("a float", lambda value: type(value) in (int, float)),
}
