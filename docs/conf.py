"""Sphinx: the pages of this folder, with the API read from the docstrings of the installed package.

sphinx-build -W docs build/docs        (pip install 'dsv4-kernels[docs]')
"""

import importlib.metadata
import sys
from pathlib import Path

import torch
from dsv4_kernels import ops, torch_ops

project = "dsv4-kernels"
author = "the dsv4-kernels developers"
release = version = importlib.metadata.version("dsv4-kernels")

sys.path.insert(0, str(Path(__file__).resolve().parent / "extensions"))
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "op_pages"]
myst_enable_extensions = ["dollarmath", "substitution"]
torch_ops.register()
schemas = [str(getattr(torch.ops.dsv4, op).default._schema) for op in ops.OPS]
myst_substitutions = {"torch_ops": "\n".join(["```text", *schemas, "```"])}
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"dsv4-kernels {release}"
exclude_patterns = ["_build", "drawings", "extensions"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# Pages of the repository are shown as they are; their links lead to files beside them.
suppress_warnings = ["myst.xref_missing", "myst.header"]
