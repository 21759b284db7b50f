"""The order of FP4 weights in checkpoints and after interleave_weights, read from what the function does."""

from __future__ import annotations

import torch
from dsv4_kernels.moe import interleave_weights

from docs.drawings.svg import PALETTE, Drawing

BLOCK, WORDS, ROWS = 128, 16, 16
CELL, LEFT = 27, 96


def positions_of_bits() -> list[list[int]]:
    """For each of the 16 words of a row, for each of its 32 bits, the inner position whose code holds the bit."""
    weight = torch.zeros((BLOCK, ROWS, BLOCK // 2), dtype=torch.uint8, device="cpu")
    for position in range(BLOCK):  # expert `position` has a code of ones there and zeros elsewhere
        weight[position, :, position // 2] = 0xF << 4 * (position % 2)
    scale = torch.full((BLOCK, ROWS, BLOCK // 32), 127, dtype=torch.uint8, device="cpu")
    words = interleave_weights(weight, scale).weight[:, 0, 0].tolist()
    found = [[-1] * 32 for _ in range(WORDS)]
    for position, row in enumerate(words):
        for word, bits in enumerate(row):
            for bit in range(32):
                if bits >> bit & 1:
                    found[word][bit] = position
    return found


def draw() -> Drawing:
    """The drawing."""
    bits = positions_of_bits()
    drawing = Drawing(LEFT + 32 * CELL + 20, 690, "Orders of FP4 weights")
    drawing.words(10, 24, "Checkpoint: two codes per byte along K, low nibble first", 15)
    drawing.words(10, 56, "row n, k =")
    for byte in range(12):
        x = LEFT + byte * 68
        drawing.box(x, 38, 34, 28, PALETTE[0], str(2 * byte))
        drawing.box(x + 34, 38, 34, 28, PALETTE[1], str(2 * byte + 1))
        drawing.words(x + 34, 82, f"byte {byte}", 11, "middle")
    drawing.words(LEFT + 12 * 68 + 6, 56, "...", 14)
    drawing.words(10, 116, "Interleaved: 16 words of 32 bits per row and block of 128 inner positions k", 15)
    drawing.words(10, 136, "Which code of word 0 each bit belongs to, bit 31 on the left:")
    for bit, position in enumerate(bits[0]):
        drawing.box(LEFT + (31 - bit) * CELL, 146, CELL, 28, PALETTE[position // 8], str(position), 11)
    drawing.words(10, 200, "Which eight positions each word holds; a colour is one pair of neighbouring codes:")
    for word, row in enumerate(bits):
        y = 212 + word * 28
        drawing.words(10, y + 18, f"word {word}")
        for i, position in enumerate(sorted(set(row))):
            drawing.box(LEFT + i * 68, y, 68, 28, PALETTE[i // 2], str(position))
    return drawing
