"""What ops raise. Every text names the op, the argument, what it needs and what it got."""

from __future__ import annotations


class KernelError(RuntimeError):
    """Base of all errors of this package."""


class InvalidArgumentError(KernelError, ValueError):
    """An argument that the op cannot take: dtype, shape, stride, device or value."""


class CheckpointError(KernelError, ValueError):
    """A checkpoint or state dict that cannot be read: the text names the file and the tensor."""


class NoDriverError(KernelError):
    """No CUDA driver, none new enough, or no device."""


class NoImageError(KernelError):
    """The package holds no compiled image for this device."""


class CudaError(KernelError):
    """A CUDA call failed; the text carries CUDA's own words."""
