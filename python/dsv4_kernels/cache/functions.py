"""The ops of the tail-counting cache state.

Shared rules: request_slots says which slot of the state each request of the batch owns; a slot outside the state is
padding, which has no effect; the slots of one call are distinct. What happens to a request is decided on the device,
so a call captured in a CUDA graph is right for every replay. Nothing is synchronised. Arguments that an op cannot take
raise InvalidArgumentError.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_kernels.op_table import OPS

_csa_compress_tail = OPS["csa_compress_tail"]


def csa_compress_tail(
    tail_ka: Tensor,
    tail_za: Tensor,
    tail_kb: Tensor,
    tail_zb: Tensor,
    tail_len: Tensor,
    request_slots: Tensor,
    m: int,
    indexer_head_dim: int = 128,
    *,
    out_entry: Tensor | None = None,
    out_indexer_key: Tensor | None = None,
    out_valid_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The entry and the indexer key of each request whose tail is full: tail_len >= m.

        entry[c] = sum over 2m rows of softmax(z[:, c]) * k[:, c]

    in float32: the b rows of the block before, then the a rows of the current one. Rows of entry and indexer key lie
    side by side in the tail buffers, and the softmax is per column, so one pass gives both. Source: equations 11, 12
    and 20 to 23 of the DeepSeek-V4 report; class Compressor of the models' published inference code.

    Args:
        tail_ka: [slots, rows >= m, width] float32, values of the current block; width a multiple of 4.
        tail_za: like tail_ka, scores of the current block.
        tail_kb: like tail_ka, values of the block before; 0 for the first block.
        tail_zb: like tail_ka, scores of the block before; -inf for the first block. Where all scores of a column are
            -inf the result is 0.
        tail_len: [slots] int32, rows that the current block holds.
        request_slots: [requests] int32.
        m: tokens a block.
        indexer_head_dim: how many of the last columns are the indexer key; 0 for none.
        out_entry: [requests, width - indexer_head_dim] bfloat16 to write to.
        out_indexer_key: [requests, indexer_head_dim] bfloat16 to write to.
        out_valid_mask: [requests] bool to write to: whose tail was full.

    Returns:
        entry, indexer_key. Rows of requests whose tail is not full are not written; in an allocated tensor they are
        undefined.
    """
    entry, indexer_key, _ = _csa_compress_tail(
        (tail_ka, tail_za, tail_kb, tail_zb, tail_len, request_slots, m, indexer_head_dim),
        (out_entry, out_indexer_key, out_valid_mask),
    )
    return entry, indexer_key
