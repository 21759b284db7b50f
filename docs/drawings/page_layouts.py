"""The bytes of an entry in each page layout, and where they lie in a page, from the library's own table."""

from __future__ import annotations

from dsv4_kernels.cache import PAGE_LAYOUTS, PageLayout

from docs.drawings.svg import BFLOAT16, NOTHING, SCALES, VALUES, Drawing

NAMES = {
    "float8_e4m3fn": "E4M3",
    "float4_e2m1fn_x2": "E2M1",
    "float8_e8m0fnu": "E8M0",
    "float32": "float32",
    "bfloat16": "bfloat16",
}
LEFT, WIDTH, ROW = 130, 800, 62


def parts(layout: PageLayout) -> list[tuple[str, int, str]]:
    """Fill, bytes and words of the parts of an entry: quantised values, bfloat16 values, scales, padding."""
    rest = layout.head_dim - layout.quantized_dims
    padding = layout.scale_bytes - layout.written_scale_bytes
    found = [
        (
            VALUES,
            layout.quantized_bytes if layout.quantized_dims else 0,
            f"{layout.quantized_dims} {NAMES[layout.element]}",
        ),
        (BFLOAT16, layout.rest_bytes, f"{rest} bfloat16"),
        (SCALES, layout.written_scale_bytes, f"{layout.groups} {NAMES.get(layout.scale, layout.scale)}"),
        (NOTHING, padding, "padding"),
    ]
    return [part for part in found if part[1]]


def draw() -> Drawing:
    """The drawing."""
    layouts = list(PAGE_LAYOUTS.values())
    most = max(layout.entry_bytes for layout in layouts)
    page_top = 60 + ROW * len(layouts)
    drawing = Drawing(LEFT + WIDTH + 20, page_top + 130, "Page layouts of the compressed cache")
    drawing.words(10, 24, "Bytes of one entry, to scale", 15)
    for i, layout in enumerate(layouts):
        y = 44 + ROW * i
        drawing.words(10, y + 18, layout.name, 13)
        apart = ", in separate tensors" if layout.separate else ""
        drawing.words(10, y + 34, f"{layout.entry_bytes} bytes", 11)
        x, words = float(LEFT), []
        for fill, size, text in parts(layout):
            width = WIDTH * size / most
            drawing.box(x, y, width, 30, fill, text if width > 8 * len(text) else "")
            words.append(f"{text} ({size})")
            x += width
        drawing.words(LEFT, y + 45, " + ".join(words) + apart, 11)
    drawing.words(10, page_top + 10, "A page of n entries", 15)
    x = float(LEFT)
    for fill, width, text in (
        (VALUES, 110, "values 0"),
        (VALUES, 110, "values 1"),
        (VALUES, 60, "..."),
        (VALUES, 110, "values n - 1"),
        (SCALES, 80, "scales 0"),
        (SCALES, 80, "scales 1"),
        (SCALES, 50, "..."),
        (SCALES, 90, "scales n - 1"),
        (NOTHING, 110, "to the alignment"),
    ):
        drawing.box(x, page_top + 24, width, 34, fill, text)
        x += width
    drawing.words(
        LEFT, page_top + 78, "Values include the bfloat16 ones. Separate layouts keep scales and bfloat16 values in", 11
    )
    drawing.words(
        LEFT,
        page_top + 94,
        "tensors of their own, by page and slot. No op touches what fills a page to its alignment.",
        11,
    )
    return drawing
