"""What lets the engines' modules be imported on a machine without a GPU; imported ahead of them."""

from __future__ import annotations

import os

# The engines' Triton kernels run in Triton's interpreter, which reads this when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"

import torch

# Of torchvision, which SGLang's configurations import, only the compiled part does not load beside torch for CPUs; its
# Python part wants these operators to exist, and nothing calls them.
_library = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
