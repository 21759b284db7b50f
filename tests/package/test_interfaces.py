"""The faces of an op agree: its declaration, the C struct, the binding, the binding's stub, the CPU implementation."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable

import pytest
from dsv4_kernels import _native
from dsv4_kernels.op import Op
from dsv4_kernels.ops import OPS

from tests.package import abi, stub

pytestmark = pytest.mark.torch

# Inputs that are part of an output's shape or dtype in C.
OF_OUTPUTS = {"int64_ids", "with_values", "indexer_head_dim", "dtype"}
IN_C = {"k": "top_k"}
C_TYPES = {
    "dsv4_tensor": {"Tensor", "Tensor | None"},
    "int32_t": {"int", "bool"},
    "int64_t": {"int"},
    "float": {"float"},
    "size_t": {"int"},
}
BINDING_TYPES = {
    "Tensor | None": {"Tensor", "Tensor | None"},
    "typing.SupportsInt | typing.SupportsIndex": {"int"},
    "typing.SupportsFloat | typing.SupportsIndex": {"float"},
    "bool": {"bool"},
}


def struct_fields(header: str) -> dict[str, dict[str, str]]:
    """Name to type of the fields of each struct."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return {name: {f: of for of, f in re.findall(r"(\w+) (\w+);", body)} for name, body in abi.STRUCT.findall(text)}


def struct_faults(op: Op, fields: dict[str, str]) -> list[str]:
    """Where the C struct is not what the op declares."""
    wanted = {IN_C.get(name, name): of for name, of in stub.parameters(op).items() if name not in OF_OUTPUTS}
    wanted = {"struct_size": "int"} | wanted
    names = [f"{op.name}: {name} is in one of them" for name in sorted(fields.keys() ^ wanted.keys())]
    both = fields.keys() & wanted.keys()
    return names + [f"{op.name}: {name}: {wanted[name]}" for name in both if wanted[name] not in C_TYPES[fields[name]]]


def binding_faults(op: Op, signature: str) -> list[str]:
    """Where the binding's parameters, as pybind11 words them, are not what the op declares."""
    found = re.findall(r"arg\d+: (.*?)(?=, arg\d+: |\) ->)", signature)
    wanted = list(stub.parameters(op).items())
    if len(found) != len(wanted):
        return [f"{op.name}: {len(found)} parameters, not {len(wanted)}"]
    return [
        f"{op.name}: {name}: {of}, not {got}"
        for (name, of), got in zip(wanted, found, strict=True)
        if of not in BINDING_TYPES[got]
    ]


def bound_members(source: str) -> dict[str, list[tuple[str, str]]]:
    """Of each op that csrc/python binds by a list of members: their names in the order of Python's values."""
    lists = re.findall(r'bind\(module, "(\w+)", dsv4_\w+,\s*(.*?)\);', source, re.DOTALL)
    return {op: re.findall(r"&A::(\w+)|/\* (\w+) \*/", members) for op, members in lists}


def member_faults(op: Op, members: list[tuple[str, str]]) -> list[str]:
    """Where a list of members is in another order than the op's parameters, or names others."""
    wanted = [IN_C.get(name, name) for name in stub.parameters(op)]
    found = [member or unused for member, unused in members]
    return [f"{op.name}: {found}, not {wanted}"] if found != wanted else []


def stub_faults(text: str) -> list[str]:
    """Where the stub is not what the module has."""
    functions = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    present = {name for name in dir(_native) if not name.startswith("_")}
    faults = [f"{name} is in one of them" for name in sorted(functions.keys() ^ present)]
    for op in OPS.values():
        if op.name in functions:
            arguments = {a.arg: ast.unparse(a.annotation or ast.Name("Any")) for a in functions[op.name].args.args}
            if list(arguments.items()) != list(stub.parameters(op).items()):
                faults.append(f"{op.name} is not {stub.parameters(op)}")
    return faults


@pytest.fixture(scope="module")
def header() -> str:
    return "".join(path.read_text() for path in (abi.HEADERS / "dsv4").glob("*.h"))


def signature(name: str) -> str:
    return str(getattr(_native, name).__doc__).splitlines()[0]


def test_c_structs_are_those_declared(header: str) -> None:
    fields = struct_fields(header)
    assert [fault for op in OPS.values() for fault in struct_faults(op, fields[f"dsv4_{op.name}_args"])] == []


def test_binding_takes_what_is_declared() -> None:
    assert [fault for op in OPS.values() for fault in binding_faults(op, signature(op.name))] == []


# Bound by a function written by hand, since one of its outputs is absent on demand.
BY_HAND = {"topk_select"}


@pytest.fixture(scope="module")
def members() -> dict[str, list[tuple[str, str]]]:
    return bound_members("".join(path.read_text() for path in sorted(stub.BINDING.glob("*.cpp"))))


def test_binding_stores_each_value_in_the_member_of_its_name(members: dict[str, list[tuple[str, str]]]) -> None:
    assert members.keys() == OPS.keys() - BY_HAND
    assert [fault for name, of in members.items() for fault in member_faults(OPS[name], of)] == []


def test_swapped_members_are_seen(members: dict[str, list[tuple[str, str]]]) -> None:
    first, second, *rest = members["append"]
    assert member_faults(OPS["append"], [second, first, *rest]) != []
    assert member_faults(OPS["append"], [first, *rest]) != []


def test_stub_is_of_the_binding() -> None:
    assert stub_faults(stub.STUB.read_text()) == [], "write it anew: python -m tests.package.stub"


def cpu_faults(op: Op, function: Callable[..., None]) -> list[str]:
    """Where the CPU implementation names parameters that the op has not, or gives them other types."""
    declared = {name: of.replace("InOut", "Tensor") for name, of in inspect.get_annotations(op.function).items()}
    written = dict.fromkeys(op.results, "Tensor")
    found = inspect.get_annotations(function)
    return [
        f"{op.name}: {name}: {of}, not {(declared | written).get(name)}"
        for name, of in found.items()
        if name != "return" and of != (declared | written).get(name)
    ]


def test_cpu_implementations_take_what_is_declared() -> None:
    assert [fault for op in OPS.values() for fault in cpu_faults(op, op.cpu)] == []


def test_another_cpu_implementation_is_seen() -> None:
    for other in ("append", "moe_finalize"):
        assert cpu_faults(OPS["hash_router"], OPS[other].cpu) != []


def test_differences_are_seen(header: str) -> None:
    op = OPS["hash_router_scored"]
    name = f"dsv4_{op.name}_args"
    for old, new in (("float scale;", ""), ("float scale;", "int32_t scale;"), ("float scale;", "float factor;")):
        assert struct_faults(op, struct_fields(header.replace(old, new))[name]) != []
    assert binding_faults(op, signature("hash_router")) == ["hash_router_scored: 6 parameters, not 12"]
    assert len(binding_faults(op, signature(op.name).replace("arg4: bool", "arg4: Tensor | None"))) == 1
    text = stub.STUB.read_text()
    for old, new in (("def hash_router(", "def router("), ("scale: float", "scale: int"), ("def version()", "def v()")):
        assert old in text
        assert stub_faults(text.replace(old, new)) != []
