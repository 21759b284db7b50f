"""What each op with a tuning policy launches, by architecture, preset and batch: a line each.

    python -m tests.package.policies        writes policies.txt anew, for the architectures of the installed library

Ops are called through the window of testing.h with tensors that are never read, so this needs neither a GPU nor memory.
A line is what the policies of csrc/<family>/<op>_policy.h, and the shapes of the aot kernels, come to.
"""

from __future__ import annotations

import math
import mmap
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from dsv4_kernels import cache, mhc, moe, router, stash
from dsv4_kernels.images import read_images
from dsv4_kernels.presets import PRESETS, Preset
from torch import Tensor

from tests.launches import Launch, observed

RECORD = Path(__file__).with_name("policies.txt")

# Multiprocessors of a device of each architecture: H100 and H200, B200, B300, RTX PRO 6000, GB10.
MULTIPROCESSORS = {"sm_90a": 132, "sm_100a": 148, "sm_103a": 148, "sm_120a": 188, "sm_121a": 48}

TOKENS = (1, 2, 16, 64, 512, 8192)


class Room:
    """Address space for tensors that nobody reads: no memory stands behind it."""

    SIZE = 1 << 37
    ALIGNMENT = 256
    NO_RESERVE = 0x4000  # MAP_NORESERVE, which the module mmap lacks before Python 3.13

    def __init__(self) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | self.NO_RESERVE
        self._bytes = torch.frombuffer(mmap.mmap(-1, self.SIZE, flags=flags), dtype=torch.uint8)
        self._used = 0

    def tensor(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + -(-size // self.ALIGNMENT) * self.ALIGNMENT
        return self._bytes[begin : begin + size].view(dtype).view(shape)

    def ints(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.int32)

    def floats(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.float32)

    def longs(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.int64)

    def codes(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.uint8)

    def scales(self, *shape: int) -> Tensor:
        return self.tensor(*shape, dtype=torch.float8_e4m3fn)


Case = tuple[str, Callable[[Room], object]]


def dense_cases(preset: Preset, tokens: int) -> Iterator[Case]:
    """The gate and its top-k."""
    experts, hidden, k = preset.experts, preset.hidden_size, preset.top_k
    if tokens <= 64:
        yield (
            "dense_router_decode",
            lambda room: router.dense_router_decode(
                room.tensor(tokens, hidden), room.tensor(experts, hidden), room.floats(experts), k
            ),
        )
    yield "activation_topk", lambda room: router.activation_topk(room.floats(tokens, experts), room.floats(experts), k)
    yield (
        "hash_router_fused",
        lambda room: router.hash_router_fused(
            room.ints(tokens),
            room.ints(preset.vocab_size, k),
            room.tensor(tokens, hidden),
            room.tensor(experts, hidden),
        ),
    )


def expert_cases(preset: Preset, tokens: int) -> Iterator[Case]:
    """The routed experts of a layer: sort, and both products in every format."""
    experts, hidden, inter, k = preset.experts, preset.hidden_size, preset.expert_intermediate, preset.top_k

    def routes(tile: int) -> tuple[int, int]:
        tiles = moe.max_tiles(tokens * k, experts, tile)
        return tiles, tiles * tile

    def layer(activations: str) -> int:
        return moe.Nvfp4MoE(experts, hidden, inter, top_k=k, activations=activations, device="meta").tile_size(tokens)

    tile = layer("bfloat16")
    yield (
        f"moe_sort, tiles of {tile}",
        lambda room: moe.moe_sort(room.ints(tokens, k), experts, tile),
    )
    for weights, words in (("mxfp4", 2), ("nvfp4", 4)):
        for name, rows, inner, swiglu in (("first", 2 * inter, hidden, True), ("second", hidden, inter, False)):

            def interleaved(
                room: Room, words: int = words, rows: int = rows, inner: int = inner, swiglu: bool = swiglu
            ) -> None:
                blocks = -(-inner // 128)
                tiles, slots = routes(tile)
                run = moe.run_fused_swiglu_grouped_gemm if swiglu else moe.run_nvfp4_grouped_gemm
                run(
                    room.tensor(tokens if swiglu else slots, inner),
                    room.ints(experts, blocks, rows, 16),
                    room.ints(experts, blocks, rows, words),
                    room.ints(tiles),
                    room.ints(slots),
                    top_k=k if swiglu else 0,
                    out=room.tensor(slots, rows // 2 if swiglu else rows),
                )

            yield f"moe_grouped_gemm, {name}, bf16 x {weights}", interleaved
    for x_format, activations, group in (("e2m1", "nvfp4", 16), ("e4m3", "mxfp8", 32)):
        tall = layer(activations)

        def quantized(room: Room, first: bool, x_format: str = x_format, group: int = group, tall: int = tall) -> None:
            tiles, slots = routes(tall)
            rows, inner = (2 * inter, hidden) if first else (hidden, inter)
            x_rows = tokens if first else slots
            fp4 = x_format == "e2m1"
            x = room.codes(x_rows, inner // 2) if fp4 else room.scales(x_rows, inner)
            of_weights = room.scales if fp4 else room.codes
            given = (x, room.codes(experts, rows, inner // 2), of_weights(experts, rows, inner // group))
            maps = room.ints(tiles), room.ints(slots)
            x_scale = of_weights(x_rows, inner // group)
            if first:
                scale = room.floats(1) if fp4 else None
                moe.moe_grouped_gemm_quantized(
                    *given,
                    *maps,
                    x_scale,
                    scale,
                    top_k=k,
                    out=room.codes(slots, inter // 2 if fp4 else inter),
                    out_scale=room.codes(slots, inter // group),
                )
            else:
                out = room.tensor(slots, rows)
                moe.run_nvfp4_grouped_gemm(*given, *maps, x_scale=x_scale, out=out)

        yield f"moe_grouped_gemm_quantized, {x_format}", lambda room, run=quantized: run(room, True)
        yield f"moe_grouped_gemm, second, {x_format}", lambda room, run=quantized: run(room, False)


def activation_cases(preset: Preset, tokens: int) -> Iterator[Case]:
    """What streams rows: quantisation and the activations of padded rows."""
    hidden, inter = preset.hidden_size, preset.expert_intermediate
    one = ("quantize_nvfp4", lambda room: moe.quantize_nvfp4(room.tensor(tokens, hidden), room.floats(1)))
    yield one
    yield "quantize_mxfp8", lambda room: moe.quantize_mxfp8(room.tensor(tokens, hidden))
    yield "quantize_fp8_per_token", lambda room: moe.quantize_fp8_per_token(room.tensor(tokens, hidden))
    yield "quantize_nvfp4_gpu_fused", lambda room: moe.quantize_nvfp4_gpu_fused(room.tensor(tokens, hidden))
    rows = tokens * preset.top_k
    for name, columns in (
        ("padded_squared_relu", inter),
        ("padded_swiglu", 2 * inter),
        ("squared_relu_and_quantize_mxfp8", inter),
        ("swiglu_and_quantize_mxfp8", 2 * inter),
    ):
        yield (
            name,
            lambda room, name=name, columns=columns: getattr(moe, name)(
                room.tensor(rows, columns), room.ints(rows), room.ints(1)
            ),
        )


def compress_cases(preset: Preset, tokens: int) -> Iterator[Case]:
    """Tokens of as many requests, and of one."""
    for ratio in sorted({ratio for ratio in preset.compress_ratios if ratio}):
        overlap = ratio == 4
        for requests in sorted({1, tokens}):

            def compress(room: Room, ratio: int = ratio, overlap: bool = overlap, requests: int = requests) -> None:
                width = 512 * (1 + overlap)
                cache.compress_flush(
                    room.tensor(tokens, width),
                    room.tensor(tokens, width),
                    None,
                    room.ints(requests + 1),
                    room.longs(requests),
                    room.floats(requests * 4, 128, 2, width),
                    room.ints(requests, 4),
                    room.floats(512),
                    room.floats(1024, 64),
                    room.codes(64, 64 * 1024),
                    room.ints(requests, 64),
                    ratio=ratio,
                    overlap=overlap,
                    layout="fp8_ds_mla",
                    entries_per_page=64,
                )

            yield f"compress_flush, ratio {ratio}, {requests} requests", compress


def selection_cases() -> Iterator[Case]:
    """topk_select, which knows no preset."""
    for rows in (1, 64, 1024):
        for columns, k in ((256, 6), (4096, 512), (32768, 2048), (262144, 2048), (1 << 20, 2048)):
            yield (
                f"topk_select, {rows} x {columns}, k {k}",
                lambda room, rows=rows, columns=columns, k=k: router.topk_select(room.floats(rows, columns), k),
            )


def stash_cases() -> Iterator[Case]:
    """Rows of 7168 bfloat16 in pages of 64, copied and taken back."""
    for rows in (1, 128, 1024, 65536):
        pages = rows // 64 + 1

        def copy(room: Room, rows: int = rows, pages: int = pages) -> None:
            pair, one = lambda: room.longs(2), lambda: room.longs(1)
            stash.paged_stash_copy(
                room.tensor(rows, 7168), room.tensor(pages, 64, 7168), None, one(), room.longs(pages), None,
                pair(), pair(), pair(), room.longs(pages), one(), one(), one(), workspace=room.codes(64),
            )  # fmt: skip

        def pop(room: Room, rows: int = rows, pages: int = pages) -> None:
            pair, one = lambda: room.longs(2), lambda: room.longs(1)
            stash.paged_stash_pop(
                room.tensor(pages, 64, 7168), None, room.tensor(rows, 7168), one(), room.longs(pages), one(), one(),
                room.longs(pages), None, pair(), pair(), workspace=room.codes(64),
            )  # fmt: skip

        yield f"paged_stash_copy, {rows} rows", copy
        yield f"paged_stash_pop, {rows} rows", pop


def seam_cases() -> Iterator[Case]:
    """Hyper-connections: the ops whose schedule is a policy."""
    for sizes in mhc.HYPER_CONNECTIONS.values():
        hidden = sizes.hidden_size
        for tokens in TOKENS:

            def seam(room: Room, tokens: int = tokens, hidden: int = hidden) -> None:
                mhc.hyper_connection_post_pre(
                    room.tensor(tokens, hidden), room.tensor(tokens, 4, hidden), room.floats(tokens, 4),
                    room.floats(tokens, 4, 4), room.floats(24, 4 * hidden), room.floats(24), room.floats(3),
                    norm_weight=room.floats(hidden), out_streams=room.tensor(tokens, 4, hidden),
                    out_layer_input=room.tensor(tokens, hidden),
                )  # fmt: skip

            def head(room: Room, tokens: int = tokens, hidden: int = hidden) -> None:
                mhc.hyper_connection_head(
                    room.tensor(tokens, 4, hidden), room.floats(4, 4 * hidden), room.floats(4), room.floats(1),
                    out_hidden=room.tensor(tokens, hidden),
                )  # fmt: skip

            yield f"{sizes.name}, {tokens} tokens: hyper_connection_post_pre", seam
            if sizes.head == "projection":
                yield f"{sizes.name}, {tokens} tokens: hyper_connection_head", head


def cases() -> Iterator[Case]:
    """Every case, by name."""
    for preset in PRESETS.values():
        for tokens in TOKENS:
            for kind in (dense_cases, expert_cases, activation_cases, compress_cases):
                for name, call in kind(preset, tokens):
                    yield f"{preset.name}, {tokens} tokens: {name}", call
    yield from selection_cases()
    yield from stash_cases()
    yield from seam_cases()


def launched_by(call: Callable[[Room], object], architecture: str) -> list[Launch]:
    with observed(architecture, MULTIPROCESSORS[architecture]) as launches:
        call(Room())
    return launches


def readable(symbols: list[str]) -> dict[str, str]:
    """Kernels' names with their template arguments, without namespaces and parameters."""
    printed = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    found = {}
    for symbol, text in zip(symbols, printed.splitlines(), strict=True):
        found[symbol] = re.sub(
            r"\(anonymous namespace\)::|dsv4::|^void |\(.*", "", re.sub(r"\((bool|dsv4::\w+)\)", "", text)
        )
    return found


def table() -> dict[tuple[str, str], str]:
    """(case, architecture) to launches, for the architectures of the library."""
    held = {image["architecture"] for image in read_images()}
    architectures = [name for name in MULTIPROCESSORS if name in held]
    launches = {(name, a): launched_by(call, a) for name, call in cases() for a in architectures}
    names = readable(sorted({launch.symbol for several in launches.values() for launch in several}))

    def describe(launch: Launch) -> str:
        parts = [names[launch.symbol], "grid " + "x".join(map(str, launch.grid)).removesuffix("x1").removesuffix("x1")]
        parts += [f"block {launch.block[0]}"]
        parts += [f"cluster {launch.cluster[0]}"] if launch.cluster[0] > 1 else []
        chosen = launch.language == "cuda" and launch.dynamic_shared  # else it is the compiler's
        parts += [f"shared {launch.dynamic_shared}"] if chosen else []
        return ", ".join(parts)

    return {key: "; then ".join(map(describe, several)) for key, several in launches.items()}


def read(text: str) -> dict[tuple[str, str], str]:
    """What write() wrote."""
    found, case = {}, ""
    for line in text.splitlines():
        if line.startswith("  "):
            architectures, _, policy = line.strip().partition(": ")
            found.update({(case, architecture): policy for architecture in architectures.split()})
        else:
            case = line
    return found


def write(policies: dict[tuple[str, str], str]) -> str:
    """A case a paragraph: architectures that launch the same share a line."""
    lines = []
    for case in dict.fromkeys(case for case, _ in policies):
        lines.append(case)
        shared: dict[str, list[str]] = {}
        for architecture in MULTIPROCESSORS:
            if (case, architecture) in policies:
                shared.setdefault(policies[case, architecture], []).append(architecture)
        lines += [f"  {' '.join(architectures)}: {policy}" for policy, architectures in shared.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Lines of architectures that the library does not hold stay as they are."""
    recorded = read(RECORD.read_text()) if RECORD.exists() else {}
    current = table()
    known = {case for case, _ in current}
    kept = {key: policy for key, policy in recorded.items() if key[0] in known}
    order = list(dict.fromkeys(case for case, _ in current))
    merged = kept | current
    RECORD.write_text(write({key: merged[key] for key in sorted(merged, key=lambda key: order.index(key[0]))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
