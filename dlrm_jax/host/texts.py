"""Tables as text, and texts in pictures."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows of cells below each other, two spaces between columns; those of `left` begin in line, the others end so."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in cells))
    return "\n".join(line.rstrip() for line in lines)


def drawn(text: str) -> str:
    """A text that a picture shows as it stands: between two dollars matplotlib would find a formula."""
    return text.replace("$", r"\$")
