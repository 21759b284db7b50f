"""How a public function reaches its kernel.

Through the C interface in eager mode, the torch op while something traces, the CPU implementation for host tensors.
"""

from __future__ import annotations

import importlib
import inspect
import string
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, update_wrapper
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeAlias, TypeVar

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from dsv4_kernels import _native
from dsv4_kernels.errors import InvalidArgumentError, KernelError
from dsv4_kernels.workspace import Workspace

# While one of these holds, the dispatcher must see the call: torch.compile traces, a mode (fake tensors) is active.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_mark_written = _native.mark_written

# Every op of the families that were imported, by name. dsv4_kernels.ops has all of them.
OPS: dict[str, Op] = {}

P = ParamSpec("P")
R = TypeVar("R")

InOut: TypeAlias = torch.Tensor  # the annotation of an input that the op changes in place


def op(
    binding: Callable[..., bool], *, workspace_size: Callable[..., int] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares an op by its typed function: everything else in Python follows from the signature.

        @op(_native.hash_router)
        def hash_router(
            token_ids: Tensor, hash_lut: Tensor, *, padding_mask: Tensor | None = None,
            out_weights: Tensor | None = None, out_ids: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:
            # The documentation, then:
            shape = token_ids.shape[0], hash_lut.shape[1]
            return (
                output(out_weights, token_ids, shape, torch.float32), output(out_ids, token_ids, shape, torch.int32)
            )

    The function that callers get runs the op. The one written here gives its outputs, not yet computed: each the tensor
    that was given, or a new one (see output()). It runs where outputs are allocated, and for fake tensors. An op that
    only changes its inputs has no body but its documentation.

    Parameters: Tensor, Tensor | None, int, bool, float, and InOut or InOut | None for what the op changes in place, in
    the order of the binding. `workspace` and the results, `out` and `out_*`, are keyword arguments of their own.

    Where callers see other types than the op has (names for numbers, None for a default, FP8 for bytes), the op is a
    function with an underscore, and the public one converts its arguments and calls it.

    Args:
        binding: the op's function of _native; its name is the op's.
        workspace_size: from some of the inputs, by name, to the bytes of zeroed workspace that a call needs.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        declared = _parse(binding.__name__, function, signature, workspace_size)
        if OPS.setdefault(declared.name, declared).module != declared.module:
            raise TypeError(f"{declared.name} is declared in {OPS[declared.name].module} and in {declared.module}")
        OPS[declared.name] = declared
        return _generate(declared, function, signature)

    return declare


def output(given: torch.Tensor | None, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that was given to write to, or a new one on the device of `like`."""
    return like.new_empty(shape, dtype=dtype) if given is None else given


class Parameter(NamedTuple):
    """An input of an op. type: in torch's terms, Tensor, Optional[Tensor], int, bool or float. mutated: whether the op
    changes it in place. default_value: None where there is no default as well; see optional.
    """

    name: str
    type: str
    mutated: bool
    optional: bool
    default_value: Any


@dataclass(frozen=True, eq=False, repr=False)  # what is not generated costs no time at import
class Op:
    """One op, as @op declares it. All else follows from its name: dsv4_<name> in C, _native.<name>, <name> in the
    module of dsv4_kernels.cpu that has the name of the declaring one, torch.ops.dsv4.<name>.

    module: where it is declared: <family>.<module>.
    parameters: the inputs, in the order of the binding.
    results: names of the outputs, as keyword arguments. Empty for an op that only changes its inputs.
    function: as it was written: its body gives the outputs.
    workspace_size: from inputs by name to the bytes of zeroed workspace that a call needs, or None. An op that needs
        some takes it after its inputs: a tensor, or None for one that the library lends to calls on a device.
    """

    name: str
    module: str
    parameters: tuple[Parameter, ...]
    results: tuple[str, ...]
    function: Callable[..., Any]
    workspace_size: Callable[..., int] | None = None
    # From the inputs, and a tensor or None for each output, to the outputs; and from the inputs to bytes of workspace.
    outputs: Callable[[tuple[Any, ...], tuple[Any, ...]], Any] = field(init=False, repr=False, compare=False)
    workspace_bytes: Callable[[tuple[Any, ...]], int] = field(init=False, repr=False, compare=False)

    @cached_property
    def family(self) -> str:
        """The package that declares it."""
        return self.module.partition(".")[0]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the inputs."""
        return tuple(parameter.name for parameter in self.parameters)

    @cached_property
    def inputs(self) -> Any:
        """The inputs as a named tuple, with the declared defaults."""
        defaults = [parameter.default_value for parameter in self.parameters if parameter.optional]
        return namedtuple(self.name, self.names, defaults=defaults)

    @cached_property
    def schema(self) -> str:
        """The inputs in torch's schema language; what the op changes in place is marked: `Tensor(a!) pool`."""
        marks, inputs = iter(string.ascii_lowercase), []
        for name, of, mutated, optional, default in self.parameters:
            tensor = f"Tensor({next(marks)}!)" if mutated else "Tensor"
            kind = {"Tensor": tensor, "Optional[Tensor]": f"{tensor}?"}.get(of, of)
            inputs.append(f"{kind} {name}={default!r}" if optional else f"{kind} {name}")
        return ", ".join(inputs)

    def __call__(
        self,
        arguments: tuple[Any, ...],
        out: tuple[torch.Tensor | None, ...],
        workspace: Workspace | torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Runs the op. out holds a tensor to write to, or None to allocate one, for each result."""
        if workspace is not None and isinstance(workspace, Workspace):
            workspace = self._memory_of(workspace, arguments)
        if is_compiling() or _dispatch_modes():
            return self._call_torch_op(arguments, out, workspace)
        return self.run(arguments, out, workspace)

    def run(
        self,
        arguments: tuple[Any, ...],
        out: tuple[torch.Tensor | None, ...],
        workspace: torch.Tensor | None = None,
        *,
        dispatched: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Runs the op on real tensors. What both the public function and the torch op end in.

        dispatched: the call comes from torch's dispatcher, so tensors that are the dispatcher's to read are not sent
            there once more.
        """
        given = out
        if forward_ad._current_level >= 0:  # the binding sees what requires a gradient, not what carries a tangent
            self.refuse_gradients(arguments, out)
        try:
            for tensor in out:
                if tensor is None:
                    out = self._filled(arguments, out)
                    break
            if self.workspace_size is None:
                on_device = self.native(*arguments, *out)
            else:
                memory = workspace
                if memory is None and not getattr(arguments[0], "is_cuda", True):
                    memory = torch.zeros(self.workspace_bytes(arguments), dtype=torch.uint8, device="cpu")
                on_device = self.native(*arguments, memory, *out)
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            return self._run_otherwise(arguments, given, workspace, error, dispatched)
        if not on_device:
            self.run_on_cpu(arguments, out)
        # As torch's own in-place functions: autograd learns that what it may have saved has changed.
        _mark_written(given)
        if self.mutated:
            _mark_written(self._select_mutated(arguments))
        return out  # type: ignore[return-value]  # no None is left

    def run_on_cpu(self, arguments: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        """The CPU implementation, for host tensors that passed the checks."""
        self._require_torch(arguments, out)
        with torch.no_grad():
            by_name(self.cpu, self._values(arguments, out))

    def _require_torch(self, arguments: tuple[Any, ...], out: tuple[Any, ...]) -> None:
        """Raises InvalidArgumentError for arrays of other frameworks, on the host."""
        for name, _, value in self._named(arguments, out):
            if not isinstance(value, torch.Tensor) and hasattr(value, "__dlpack__"):
                raise InvalidArgumentError(
                    f"{self.name}: {name}: expected a torch tensor in host memory, got {_describe(value)}; "
                    "torch.from_dlpack makes one of the same memory"
                )

    def _filled(self, arguments: tuple[Any, ...], out: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor, ...]:
        """out with a new tensor in place of each None."""
        results = self.outputs(arguments, out)
        return results if len(self.results) > 1 else (results,)

    def allocate(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """Uninitialised outputs for these inputs, where the inputs are."""
        return self._filled(arguments, (None,) * len(self.results)) if self.results else ()

    def _values(self, arguments: tuple[Any, ...], out: tuple[Any, ...] = ()) -> dict[str, Any]:
        return dict(zip((*self.names, *self.results), (*arguments, *out), strict=False))

    @cached_property
    def mutated(self) -> tuple[int, ...]:
        """Positions of the inputs that the op changes in place."""
        return tuple(i for i, parameter in enumerate(self.parameters) if parameter.mutated)

    def mutated_of(self, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """The tensors among these inputs that the op changes in place."""
        return tuple(arguments[i] for i in self.mutated if i < len(arguments) and arguments[i] is not None)

    @cached_property
    def _select_mutated(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        """mutated_of without its care, for all inputs: None stays in it."""
        first, *rest = self.mutated
        return itemgetter(first, *rest) if rest else lambda arguments: (arguments[first],)

    @cached_property
    def cpu(self) -> Callable[..., None]:
        """The CPU implementation: takes inputs and outputs by name, and writes the outputs in whatever float dtype they
        have.
        """
        function: Callable[..., None] = getattr(importlib.import_module(f"dsv4_kernels.cpu.{self.module}"), self.name)
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
            size = self.workspace_bytes(arguments)
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

    def refuse_gradients(self, arguments: tuple[Any, ...], out: tuple[Any, ...] = ()) -> None:
        """Raises InvalidArgumentError if gradients are recorded and would end here: no op has a backward."""
        recorded, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
        if not recorded and not forward:
            return
        for name, _, value in self._named(arguments, out):
            if not isinstance(value, torch.Tensor):
                continue
            if (recorded and value.requires_grad) or (forward and forward_ad.unpack_dual(value).tangent is not None):
                raise InvalidArgumentError(
                    f"{self.name}: {name}: expected a tensor without a gradient, got one that "
                    f"{'requires one' if value.requires_grad else 'carries a tangent'}; {self.name} has no derivative: "
                    f"give it {name}.detach()" + (", or call it under torch.no_grad()" if value.requires_grad else "")
                )

    def _named(self, arguments: tuple[Any, ...], out: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
        """Name, type in torch's schema language and value of inputs and outputs."""
        inputs = zip(self.parameters, arguments, strict=False)  # trailing ones that have their defaults may be absent
        return [(parameter.name, parameter.type, value) for parameter, value in inputs] + [
            (name, "Optional[Tensor]", value) for name, value in zip(self.results, out, strict=False)
        ]

    def _run_otherwise(
        self, arguments: tuple[Any, ...], out: tuple[Any, ...], workspace: Any, error: Exception, dispatched: bool
    ) -> tuple[torch.Tensor, ...]:
        """After an error: through the dispatcher, if a tensor is one that only it can read. Else raises why not."""
        if workspace is None and str(error).startswith(f"{self.name}: workspace: expected a tensor, got none"):
            self._require_torch(arguments, out)  # for which host workspace is made
        named = self._named(arguments, out)
        unread = [(name, value) for name, _, value in named if _is_for_dispatcher(value)]
        if not unread or (isinstance(error, KernelError) and not isinstance(error, InvalidArgumentError)):
            self._explain(arguments, out, workspace, error)
        self.refuse_gradients(arguments, out)
        if dispatched:
            # A subclass whose __torch_dispatch__ has handed itself on.
            plain = [_as_plain(value) for value in (*arguments, *out)]
            if not any(_is_for_dispatcher(value) for value in plain):
                count = len(arguments)
                return self.run(tuple(plain[:count]), tuple(plain[count:]), workspace, dispatched=True)
        name, value = unread[0]
        refusal: Exception = error
        written = {id(tensor) for tensor in (*out, *self.mutated_of(arguments))}
        if value.is_neg() and id(value) in written:
            refusal = TypeError("it is written to; resolve_neg() makes a plain one")  # torch's fallback cannot write it
        elif not dispatched:
            try:
                return self._call_torch_op(arguments, out, workspace)
            except InvalidArgumentError:
                raise
            except Exception as by_torch:
                refusal = by_torch
        why = (str(refusal).splitlines() or [type(refusal).__name__])[0]
        raise InvalidArgumentError(
            f"{self.name}: {name}: expected a plain tensor, got {_describe(value)} ({why})"
        ) from refusal

    def _explain(self, arguments: tuple[Any, ...], out: tuple[Any, ...], workspace: Any, error: Exception) -> NoReturn:
        """Raises what is wrong with the arguments in the package's words; `error` itself if they are not the cause."""
        if isinstance(error, (KernelError, torch.OutOfMemoryError)):
            raise error
        self.refuse_gradients(arguments, out)
        for name, kind, value in (*self._named(arguments, out), ("workspace", "Optional[Tensor]", workspace)):
            need, holds = _ARGUMENT_KINDS[kind]
            if not holds(value):
                raise InvalidArgumentError(f"{self.name}: {name}: expected {need}, got {_describe(value)}") from None
        absent = [name for name, tensor in zip(self.results, out, strict=True) if tensor is None]
        if not isinstance(arguments[0], torch.Tensor) and absent:
            raise InvalidArgumentError(
                f"{self.name}: {absent[0]}: expected a tensor to write to, got None; "
                "outputs are allocated for torch tensors only"
            ) from None
        # Outputs could not be allocated. If it is because of the inputs, the C checks say why; else `error` does.
        try:
            self.native(*arguments, *((workspace,) if self.workspace_size else ()), *out)
        except InvalidArgumentError as refusal:
            if not str(refusal).startswith(tuple(f"{self.name}: {name}: " for name in absent)):
                raise refusal from None
        raise error


def by_name(function: Callable[..., Any], values: dict[str, Any]) -> Any:
    """Calls a function with those of the values that it names as parameters."""
    return function(**{name: values[name] for name in _parameter_names(function)})


@cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


# Of each annotation that a parameter may have: the type in torch's terms, and whether the op changes it.
_ANNOTATIONS = {
    "Tensor": ("Tensor", False),
    "Tensor | None": ("Optional[Tensor]", False),
    "InOut": ("Tensor", True),
    "InOut | None": ("Optional[Tensor]", True),
    "int": ("int", False),
    "bool": ("bool", False),
    "float": ("float", False),
}


def _parse(
    name: str,
    function: Callable[..., Any],
    signature: inspect.Signature,
    workspace_size: Callable[..., int] | None,
) -> Op:
    """The op that a typed function declares."""
    parameters, results = [], []
    for parameter in signature.parameters.values():
        if parameter.name == "workspace":
            continue
        if parameter.name == "out" or parameter.name.startswith("out_"):
            results.append(parameter.name)
            continue
        if parameter.annotation not in _ANNOTATIONS:
            raise TypeError(f"{name}: {parameter.name}: an op takes no {parameter.annotation}")
        optional = parameter.default is not parameter.empty
        default = parameter.default if optional else None
        parameters.append(Parameter(parameter.name, *_ANNOTATIONS[parameter.annotation], optional, default))
    module = function.__module__.removeprefix("dsv4_kernels.")
    return Op(name, module, tuple(parameters), tuple(results), function, workspace_size)


def _generate(declared: Op, function: Callable[P, R], signature: inspect.Signature) -> Callable[P, R]:
    """The function that callers get, which packs its arguments for Op.__call__; and of the op, outputs and
    workspace_bytes, which unpack them for the function's body and for workspace_size. Their source is written once,
    here, as dataclasses write theirs, so that a call binds its arguments as any function's does.
    """
    given = signature.parameters.values()
    positional = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_keyword = [p.name for p in given if p.kind is p.KEYWORD_ONLY]
    inputs, out = ("".join(f"{name}, " for name in names) for names in (declared.names, declared.results))
    workspace = ", workspace" if declared.workspace_size else ""
    call = f"op(({inputs}), ({out}){workspace})" + ("[0]" if len(declared.results) == 1 else "")
    body = ", ".join([*positional, *(f"{name}={name}" for name in by_keyword if name != "workspace")])
    sized = ", ".join(_parameter_names(declared.workspace_size) if declared.workspace_size else ())
    source = f"""
def create(op, body, size):
    def {function.__name__}({", ".join([*positional, *(["*", *by_keyword] if by_keyword else [])])}):
        {"return " if declared.results else ""}{call}
    def outputs(inputs, out):
        ({inputs}), ({out}) = inputs, out
        return body({body})
    def workspace_bytes(inputs):
        ({inputs}) = inputs
        return size({sized})
    return {function.__name__}, outputs, workspace_bytes
"""
    made: dict[str, Any] = {}
    exec(source, function.__globals__, made)
    wrapper, outputs, workspace_bytes = made["create"](declared, function, declared.workspace_size)
    vars(declared).update(outputs=outputs, workspace_bytes=workspace_bytes)
    wrapper.__defaults__, wrapper.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    public: Callable[P, R] = update_wrapper(wrapper, function)
    return public


# What a tensor has among its dispatch keys if its memory is not its value.
_KEYS_OF_THE_DISPATCHER = (
    "Python",
    "Conjugate",
    "Negative",
    "ZeroTensor",
    "Functionalize",
    "FuncTorchBatched",
    "FuncTorchGradWrapper",
)


def _is_for_dispatcher(value: object) -> bool:
    """Whether it is a tensor of which only torch's dispatcher knows what it means: of a subclass with a
    __torch_dispatch__, lazily negated, of functorch.
    """
    if not isinstance(value, torch.Tensor):
        return False
    keys = torch._C._dispatch_keys(value)
    own = type(value).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return own or any(keys.has(key) for key in _KEYS_OF_THE_DISPATCHER)


def _as_plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if _is_for_dispatcher(value) else value


def _is_tensor(value: object) -> bool:
    """Whether the binding can read it: memory of the host or of a CUDA device, with plain strides."""
    if isinstance(value, torch.Tensor):
        dense = value.layout == torch.strided and not value.is_nested and not value.is_quantized
        return dense and value.device.type in ("cpu", "cuda")
    return hasattr(value, "__dlpack__")


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        named = f"{type(value).__module__}.{type(value).__name__}"
        return f"int {value}" if type(value) is int else named.removeprefix("builtins.")
    if _is_for_dispatcher(value):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return f"one of type {type(value).__name__}"
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            return "one of a functorch transform"
        return "one that is lazily negated, conjugated or zero"
    for attribute, word in (("is_nested", "nested"), ("is_quantized", "quantized")):
        if getattr(value, attribute):
            return f"a {word} {value.device.type} tensor"
    return f"a {value.device.type} tensor with layout {str(value.layout).removeprefix('torch.')}"


# Of each type in torch's schema language: what an argument must be, in words and as a test.
_ARGUMENT_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a dense tensor on cpu or cuda", _is_tensor),
    "Optional[Tensor]": ("a dense tensor on cpu or cuda, or None", lambda value: value is None or _is_tensor(value)),
    "int": ("an int of 32 bits", lambda value: type(value) is int and -(2**31) <= value < 2**31),
    "bool": ("a bool", lambda value: type(value) is bool),
    "float": ("a float", lambda value: type(value) in (int, float)),
}
