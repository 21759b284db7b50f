"""Writes every drawing beside its source: python -m docs.drawings. test_docs.py fails while one differs."""

from __future__ import annotations

from pathlib import Path

from docs.drawings import layer, page_layouts, weight_order

DRAWINGS = {"layer": layer, "page_layouts": page_layouts, "weight_order": weight_order}


def main() -> None:
    """Writes the SVG files."""
    for name, module in DRAWINGS.items():
        Path(__file__).with_name(f"{name}.svg").write_text(str(module.draw()))


if __name__ == "__main__":
    main()
