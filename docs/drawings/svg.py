"""A drawing as SVG text: boxes, lines and words, readable on light and dark pages."""

from __future__ import annotations

from html import escape

# Fills: what is stored or computed. Text is black on all of them.
VALUES, BFLOAT16, SCALES, NOTHING, OURS, OTHERS = "#9ecae1", "#fdd0a2", "#a1d99b", "#f0f0f0", "#c6dbef", "#e0e0e0"
PALETTE = ("#9ecae1", "#fdae6b", "#a1d99b", "#bcbddc")


class Drawing:
    """Collects shapes; str() is the SVG file."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str, text: str = "", size: int = 12) -> None:
        """A filled rectangle with lines of text in its middle."""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="#555" rx="2"/>'
        )
        lines = text.split("\n") if text else []
        for i, line in enumerate(lines):
            at = y + height / 2 + size * 0.36 + (i - (len(lines) - 1) / 2) * size * 1.25
            self.words(x + width / 2, at, line, size, "middle")

    def words(self, x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> None:
        """A line of text."""
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polyline points="{path}" fill="none" stroke="#555" marker-end="url(#head)"/>')

    def __str__(self) -> str:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>'
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'font-family="sans-serif" role="img">',
                f"<title>{escape(self.title)}</title>",
                head,
                f'<rect width="{self.width}" height="{self.height}" fill="white"/>',
                *self.shapes,
                "</svg>",
                "",
            ]
        )
