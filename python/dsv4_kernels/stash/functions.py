"""The two ops of the paged stash.

Shared rules: the number of rows, the free pages and all flags live on the device and are int64; nothing is synchronised
and nothing allocated, so a captured CUDA graph follows them. Rows are moved as bytes: any dtype. No gradient flows
through the ops; see PagedStash.saved_activations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_kernels import _native
from dsv4_kernels.op import InOut, op
from dsv4_kernels.workspace import Workspace

__all__ = ["paged_stash_copy", "paged_stash_pop"]

# What the C interface has a name for. Of every other dtype it is shown the bytes.
_NAMED = frozenset(
    {
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.float8_e4m3fn,
    }
)


def _movable(rows: Tensor, cuda_pool: Tensor, host_pool: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same memory in a dtype that the ops take; tensors that no op takes stay, for the op to refuse."""
    if isinstance(rows, Tensor) and rows.dtype in _NAMED:
        return rows, cuda_pool, host_pool
    given = [rows, cuda_pool, *([] if host_pool is None else [host_pool])]
    for tensor in given:
        if not isinstance(tensor, Tensor) or tensor.dtype != rows.dtype or not tensor.dim() or tensor.stride(-1) != 1:
            return rows, cuda_pool, host_pool
    return (
        rows.view(torch.uint8),
        cuda_pool.view(torch.uint8),
        None if host_pool is None else host_pool.view(torch.uint8),
    )


def _workspace_size() -> int:
    return _native.paged_stash_workspace_size()


@op(_native.paged_stash_copy, workspace_size=_workspace_size)
def _paged_stash_copy(
    src: Tensor,
    cuda_dst: InOut,
    host_dst: InOut | None,
    num_tokens: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_head: InOut,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    page_record: InOut,
    overflow: InOut,
    host_spill_global: InOut,
    spilled_to_host: InOut,
    new_free_list_head: InOut | None = None,
    high_water: InOut | None = None,
    *,
    workspace: Workspace | Tensor | None = None,
) -> None:
    """paged_stash_copy of rows in a dtype that the C interface has a name for."""


def paged_stash_copy(
    src: Tensor,
    cuda_dst: Tensor,
    host_dst: Tensor | None,
    num_tokens: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_head: Tensor,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    page_record: Tensor,
    overflow: Tensor,
    host_spill_global: Tensor,
    spilled_to_host: Tensor,
    new_free_list_head: Tensor | None = None,
    high_water: Tensor | None = None,
    *,
    workspace: Workspace | Tensor | None = None,
) -> None:
    """Stashes the first num_tokens rows of src in pages that it takes from a free list on the device, in one launch.

    A free list is circular: free pages = tail - head, the s-th one is list[(head + s) % capacity]; it starts as
    arange(pages), head 0, tail = capacity = pages. ceil(num_tokens / page_size) pages are taken.

        overflow is set: nothing happens.
        all pages fit into the CUDA pool: its head advances, spilled_to_host = 0.
        else all fit into the host pool: its head advances, spilled_to_host = host_spill_global = 1.
        else: overflow = spilled_to_host = 1, nothing is copied or recorded.

    Source: paged_stash_copy_kernel of Megatron-LM (core.transformer.moe.ops.paged_stash), by its documentation.

    Args:
        src: [rows, hidden], contiguous, any dtype.
        cuda_dst: [pages, page_size, hidden] of the same dtype; page_size up to 65536.
        host_dst: [host pages, page_size, hidden] in pinned host memory, or None.
        num_tokens: one int64, of rank 0 or 1; outside [0, rows] it acts as the nearest end. 0 changes nothing.
        free_list_cuda: [pages] int64.
        free_list_host: [host pages] int64, on the device; None if host_dst is.
        free_list_head: [2] int64: CUDA, host. Advanced in place, unless new_free_list_head is given.
        free_list_tail: [2] int64.
        free_list_capacity: [2] int64. A list whose numbers contradict each other has no free pages.
        page_record: [at least ceil(rows / page_size)] int64; entry i becomes the page of rows i * page_size and on.
        overflow: one int64, only ever set.
        host_spill_global: one int64, only ever set.
        spilled_to_host: one int64, where this tensor's rows are.
        new_free_list_head: [2] int64 to write the heads to instead.
        high_water: [2] int64, raised to the pages in use after the copy: capacity - (tail - new head). CUDA, host.
        workspace: a Workspace, or paged_stash_workspace_size() zeroed bytes, uint8, aligned to 16; zero again
            afterwards. Calls that may run at the same time need one each. By default the library lends one to each
            stream, and one to each stream of a captured graph.

    A page id outside the pool is recorded as it is; the rows of that page are not copied.
    """
    src, cuda_dst, host_dst = _movable(src, cuda_dst, host_dst)
    _paged_stash_copy(
        src,
        cuda_dst,
        host_dst,
        num_tokens,
        free_list_cuda,
        free_list_host,
        free_list_head,
        free_list_tail,
        free_list_capacity,
        page_record,
        overflow,
        host_spill_global,
        spilled_to_host,
        new_free_list_head,
        high_water,
        workspace=workspace,
    )


@op(_native.paged_stash_pop, workspace_size=_workspace_size)
def _paged_stash_pop(
    cuda_src: Tensor,
    host_src: Tensor | None,
    dst: InOut,
    num_tokens: Tensor,
    page_record: Tensor,
    spilled_to_host: Tensor,
    overflow: Tensor,
    free_list_cuda: InOut,
    free_list_host: InOut | None,
    free_list_tail: InOut,
    free_list_capacity: Tensor,
    new_free_list_tail: InOut | None = None,
    zero_rest: bool = False,
    *,
    workspace: Workspace | Tensor | None = None,
) -> None:
    """paged_stash_pop of rows in a dtype that the C interface has a name for."""


def paged_stash_pop(
    cuda_src: Tensor,
    host_src: Tensor | None,
    dst: Tensor,
    num_tokens: Tensor,
    page_record: Tensor,
    spilled_to_host: Tensor,
    overflow: Tensor,
    free_list_cuda: Tensor,
    free_list_host: Tensor | None,
    free_list_tail: Tensor,
    free_list_capacity: Tensor,
    new_free_list_tail: Tensor | None = None,
    zero_rest: bool = False,
    *,
    workspace: Workspace | Tensor | None = None,
) -> None:
    """Brings back what paged_stash_copy stashed and returns its pages to the free list, in one launch.

    Each id goes to list[(tail + s) % capacity], then tail grows by the number of pages. Tensors may come back in any
    order. Source: paged_stash_pop_kernel of Megatron-LM, by its documentation.

    Args:
        cuda_src: [pages, page_size, hidden], contiguous, any dtype.
        host_src: [host pages, page_size, hidden] in pinned host memory, or None.
        dst: [rows, hidden] of the same dtype.
        num_tokens: one int64, of rank 0 or 1, as in the copy; outside [0, rows] it acts as the nearest end.
        page_record: [at least ceil(rows / page_size)] int64, as the copy wrote it.
        spilled_to_host: one int64, as the copy wrote it: which pool the rows are in.
        overflow: one int64. Set: nothing is read or written, the step has to run again.
        free_list_cuda: [pages] int64.
        free_list_host: [host pages] int64, on the device; None if host_src is.
        free_list_tail: [2] int64: CUDA, host. Advanced in place, unless new_free_list_tail is given.
        free_list_capacity: [2] int64. If it is outside [1, pages] or below the number of pages to give back, if the
            tail is negative, or if the rows should be in a host pool that is None, nothing is read or written.
        new_free_list_tail: [2] int64 to write the tails to instead.
        zero_rest: zero the rows from num_tokens on; else they are left alone.
        workspace: a Workspace, or paged_stash_workspace_size() zeroed bytes, uint8, aligned to 16; zero again
            afterwards. Calls that may run at the same time need one each. By default the library lends one to each
            stream, and one to each stream of a captured graph.

    A page id outside the pool is given back as it is; the rows of that page are left alone.
    """
    dst, cuda_src, host_src = _movable(dst, cuda_src, host_src)
    _paged_stash_pop(
        cuda_src,
        host_src,
        dst,
        num_tokens,
        page_record,
        spilled_to_host,
        overflow,
        free_list_cuda,
        free_list_host,
        free_list_tail,
        free_list_capacity,
        new_free_list_tail,
        zero_rest,
        workspace=workspace,
    )
