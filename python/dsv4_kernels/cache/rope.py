"""The models' rotary tables: cosines and sines by position, as compress_flush and engines take them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4_kernels.errors import InvalidArgumentError
from dsv4_kernels.host_values import integer
from dsv4_kernels.presets import Preset, find_preset

__all__ = ["Rope", "rope_frequencies", "rope_table"]

_FORMS = ("halves", "interleaved", "complex")


@dataclass(frozen=True)
class Rope:
    """A rotation's frequencies.

    theta: base. dims: channels that are rotated, two for each frequency. factor: by which YaRN extends the positions;
    1 for none. original_length: positions that the model was trained on before. beta_fast, beta_slow: rotations within
    original_length from which a frequency stays as it is, and up to which it is divided by factor.
    """

    theta: float
    dims: int = 64
    factor: float = 1.0
    original_length: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


# Of layers that attend to a window alone, and of those with compressed entries: for all of the latter's rows, queries
# too. The same in every public model, V4.1 included.
WINDOW = Rope(10000.0)
COMPRESSED = Rope(160000.0, factor=16.0)


def rope_frequencies(rope: str | Preset | Rope, *, compressed: bool = True) -> Tensor:
    """[dims / 2] float32: the angle of one position, for each pair of channels.

        g[i] = theta^(-2 i / dims)
        f[i] = g[i] / factor * ramp[i] + g[i] * (1 - ramp[i]), or g[i] without YaRN
        ramp[i] = clamp((i - low) / (high - low), 0, 1)
        low  = floor(dims * ln(original_length / (2 pi beta_fast)) / (2 ln theta)), at least 0
        high = ceil(dims * ln(original_length / (2 pi beta_slow)) / (2 ln theta)), at most dims - 1

    in float32, as the models' published code (precompute_freqs_cis) has it, without a factor on the table itself.

    Args:
        rope: a public model, by name or by its sizes, or the numbers themselves.
        compressed: of a model: whether of the layers with compressed entries, or of those with a window alone.
    """
    if not isinstance(rope, Rope):
        find_preset("rope_frequencies", rope)  # says which there are
        rope = COMPRESSED if compressed else WINDOW
    exponents = torch.arange(0, rope.dims, 2, dtype=torch.float32, device="cpu") / rope.dims
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.factor == 1.0:
        return frequencies

    def turning(beta: float) -> float:
        """The pair that turns so often within the original positions."""
        return rope.dims * math.log(rope.original_length / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(turning(rope.beta_fast)), 0)
    high = min(math.ceil(turning(rope.beta_slow)), rope.dims - 1)
    pairs = torch.arange(rope.dims // 2, dtype=torch.float32, device="cpu")
    ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def rope_table(
    rope: str | Preset | Rope | Tensor,
    positions: int | Tensor,
    *,
    compressed: bool = True,
    form: str = "halves",
    device: torch.device | str | None = None,
) -> Tensor:
    """Cosines and sines by position.

    The angle is float32(position) times the float32 frequency, rounded to float32, as in the models' published code;
    cosine and sine are those of that angle, rounded once.

    Args:
        rope: as in rope_frequencies; or frequencies, [dims / 2] float32.
        positions: how many, from 0; or which, [positions] of integers. A row's position is where a token stands: for
            the first token of a block, what compress_flush rotates its entry by.
        compressed: as in rope_frequencies.
        form: "halves": a row's cosines, then its sines, which compress_flush takes, and vLLM. "interleaved": cosine and
            sine of each pair side by side, which SGLang takes. "complex": [positions, dims / 2] complex64, as the
            published code has it.
        device: of the table; default that of positions or frequencies, else the default device.

    Returns:
        [positions, dims] float32.

    Raises:
        InvalidArgumentError: an unknown model or form, negative positions.
    """
    if form not in _FORMS:
        raise InvalidArgumentError(f"rope_table: form: expected one of {', '.join(_FORMS)}, got {form!r}")
    if device is None:
        given = next((value for value in (positions, rope) if isinstance(value, Tensor)), None)
        device = torch.get_default_device() if given is None else given.device
    frequencies = rope if isinstance(rope, Tensor) else rope_frequencies(rope, compressed=compressed)
    if not isinstance(positions, Tensor):
        positions = torch.arange(integer("rope_table", "positions", positions, 0), device=device)
    elif positions.dim() != 1 or positions.is_floating_point():
        got = f"{str(positions.dtype).removeprefix('torch.')} {list(positions.shape)}"
        raise InvalidArgumentError(f"rope_table: positions: expected a number, or integers [positions], got {got}")
    at = positions.to(device=device, dtype=torch.float32)
    angles = (at[:, None] * frequencies.to(device=device, dtype=torch.float32)).to(torch.float64)
    cosines, sines = angles.cos().to(torch.float32), angles.sin().to(torch.float32)
    if form == "complex":
        return torch.complex(cosines, sines)
    if form == "interleaved":
        return torch.stack((cosines, sines), dim=2).flatten(1)
    return torch.cat((cosines, sines), dim=1)
