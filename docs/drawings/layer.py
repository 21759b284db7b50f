"""How a token goes through the parts of a layer that this package computes."""

from __future__ import annotations

from docs.drawings.svg import OTHERS, OURS, Drawing

# Ops in the drawing; test_docs.py checks that they exist.
COMPRESSION = ("compress_flush",)
ROUTING = ("dense_router_decode", "hash_router_fused")
EXPERTS = ("moe_sort", "moe_grouped_gemm", "moe_grouped_gemm", "moe_finalize")
STASH = ("paged_stash_copy", "paged_stash_pop")
SEAM = ("hyper_connection_post_pre",)


def draw() -> Drawing:
    """The drawing."""
    drawing = Drawing(940, 470, "A token's way through a layer")
    drawing.box(20, 30, 170, 50, OURS, f"{SEAM[0]}\nstreams to hidden states", 11)
    drawing.box(250, 30, 170, 50, OTHERS, "projections\nkv, score, query")
    drawing.box(500, 30, 190, 50, OTHERS, "sparse attention\nof pages and window")
    drawing.box(755, 30, 170, 50, OURS, f"{SEAM[0]}\nupdate, collapse, norm", 11)
    drawing.arrow((190, 55), (250, 55))
    drawing.arrow((420, 55), (500, 55))
    drawing.arrow((690, 55), (755, 55))
    drawing.box(250, 130, 170, 66, OURS, f"{COMPRESSION[0]}\ncompress, norm, rotate,\nquantise: one launch", 11)
    drawing.box(500, 138, 190, 50, OURS, "pages of the cache\nfp8_ds_mla, v41_fp4, ...")
    drawing.arrow((335, 80), (335, 130))
    drawing.arrow((420, 163), (500, 163))
    drawing.arrow((595, 138), (595, 80))
    drawing.arrow((845, 80), (845, 240), (170, 240), (170, 262))
    drawing.words(500, 232, "hidden states after attention", 11, "middle")
    drawing.box(60, 262, 220, 60, OURS, f"{ROUTING[0]} or\n{ROUTING[1]}: gate product,\nscores, top-k: one launch", 11)
    steps = [
        f"{EXPERTS[0]}\nrows by expert",
        f"{EXPERTS[1]}\nFP4 weights, SwiGLU",
        f"{EXPERTS[2]}\nback to hidden width",
        f"{EXPERTS[3]}\nweighted sum",
    ]
    for i, text in enumerate(steps):
        x = 340 + i * 150
        drawing.box(x, 262, 136, 60, OURS, text, 11)
        drawing.arrow((x - (60 if i == 0 else 14), 292), (x, 292))
    drawing.words(310, 284, "ids", 11, "middle")
    drawing.arrow((170, 322), (170, 345), (858, 345), (858, 322))
    drawing.words(515, 360, "weights of the chosen experts", 11, "middle")
    drawing.words(340, 256, "Nvfp4MoE: four launches", 12)
    drawing.box(340, 385, 136, 56, OURS, f"{STASH[0]}\nforward", 11)
    drawing.box(490, 385, 136, 56, OURS, "pages on device or\nin pinned host memory", 11)
    drawing.box(640, 385, 136, 56, OURS, f"{STASH[1]}\nbackward", 11)
    drawing.arrow((476, 413), (490, 413))
    drawing.arrow((626, 413), (640, 413))
    drawing.words(60, 408, "training: activations whose number of", 12)
    drawing.words(60, 424, "rows only the device knows", 12)
    drawing.box(800, 385, 20, 20, OURS)
    drawing.words(828, 400, "this package", 12)
    drawing.box(800, 415, 20, 20, OTHERS)
    drawing.words(828, 430, "the engine", 12)
    return drawing
