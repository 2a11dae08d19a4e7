"""Draw architecture.svg, how data flows and where tables lie: `python docs/draw_architecture.py`."""

import pathlib
import sys

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

OUT = pathlib.Path(__file__).resolve().parent / "architecture.svg"
INK, GREY, BACK = "#1f2933", "#7b8794", "#c0392b"
DATA, DENSE, TABLES, SERVED = "#e8eef5", "#dff0e3", "#fde8c8", "#ece4f7"
DEVICES = ("#8ab6e0", "#f2b872", "#93c9a1", "#c5a6e0")


def box(
    axes: plt.Axes, x: float, y: float, width: float, height: float, colour: str, text: str, size: float = 9
) -> None:
    """A rounded box with a text in its middle; its first line is bold where there are several."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec=INK, lw=0.8)
    )
    first, _, rest = text.partition("\n")
    lines = rest.count("\n") + 1 if rest else 0
    middle = y + height / 2
    axes.text(
        x + width / 2, middle + 0.15 * lines, first, ha="center", va="center", size=size, color=INK, weight="bold"
    )
    if rest:
        axes.text(x + width / 2, middle - 0.17, rest, ha="center", va="center", size=size - 1.5, color=INK)


def arrow(axes: plt.Axes, start: tuple, end: tuple, text: str = "", colour: str = INK, above: float = 0.16) -> None:
    """An arrow, with what travels along it."""
    style = {"arrowstyle": "-|>", "mutation_scale": 10, "color": colour, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **style))
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + above, text, ha="center", va="center", size=7.5, color=colour, family="monospace")


def draw_flow(axes: plt.Axes) -> None:
    """From the raw log to the loss, and the gradients back."""
    axes.text(0.1, 8.75, "A step: what flows", size=11, weight="bold", color=INK)
    box(axes, 0.1, 6.9, 1.6, 1.1, DATA, "raw log\nCSV, Parquet, ...")
    box(axes, 2.5, 6.9, 2.0, 1.1, DATA, "dataset\nblocks, vocabularies")
    box(axes, 5.4, 6.9, 1.9, 1.1, DATA, "window\non the device")
    box(axes, 8.2, 6.9, 1.7, 1.1, DATA, "batch\nB examples")
    arrow(axes, (1.7, 7.45), (2.5, 7.45), "prepare")
    arrow(axes, (4.5, 7.45), (5.4, 7.45), "permuted")
    arrow(axes, (7.3, 7.45), (8.2, 7.45), "cut")

    box(axes, 11.0, 7.6, 2.0, 0.9, DENSE, "bottom MLP")
    box(axes, 11.0, 5.7, 2.0, 1.1, TABLES, "tables\nlook up and pool")
    box(axes, 14.5, 6.6, 1.7, 1.1, DENSE, "interaction\ndot, cross, ...")
    box(axes, 16.9, 6.7, 1.2, 0.9, DENSE, "top MLP")
    box(axes, 19.0, 6.7, 1.0, 0.9, DENSE, "loss")
    arrow(axes, (9.9, 7.75), (11.0, 8.05), "dense_BxN", above=0.3)
    arrow(axes, (9.9, 7.1), (11.0, 6.4), "ids_BxK", above=-0.3)
    arrow(axes, (13.0, 8.05), (14.5, 7.4), "x_BxD", above=0.3)
    arrow(axes, (13.0, 6.25), (14.5, 6.9), "pooled_BxFxD", above=-0.42)
    arrow(axes, (16.2, 7.15), (16.9, 7.15))
    arrow(axes, (18.1, 7.15), (19.0, 7.15), "logits_B")

    box(axes, 14.1, 4.1, 2.5, 1.0, TABLES, "rows' gradients\nrepeats are summed once")
    box(axes, 10.9, 4.1, 2.2, 1.0, TABLES, "rule of the tables\ntouched rows, in place")
    box(axes, 17.5, 4.1, 2.5, 1.0, DENSE, "optax\nMLPs, interaction")
    arrow(axes, (19.45, 6.7), (19.1, 5.1), "", BACK)
    arrow(axes, (18.95, 6.7), (16.3, 5.1), "", BACK)
    axes.text(16.9, 5.95, "d loss / d pooled", ha="right", size=7.5, color=BACK, family="monospace")
    arrow(axes, (14.1, 4.6), (13.1, 4.6), "", BACK)
    arrow(axes, (12.0, 5.1), (12.0, 5.7), "", BACK)

    box(axes, 0.1, 4.1, 2.4, 1.0, SERVED, "server\ntakes raw values")
    box(axes, 3.4, 4.1, 2.4, 1.0, SERVED, "version\nStableHLO, vocabularies")
    box(axes, 6.7, 4.1, 2.4, 1.0, SERVED, "checkpoint\nresume is bit-exact")
    arrow(axes, (10.9, 4.6), (9.1, 4.6), "save")
    arrow(axes, (6.7, 4.6), (5.8, 4.6), "export")
    arrow(axes, (3.4, 4.6), (2.5, 4.6), "serve")
    axes.text(10.9, 3.7, "No array of a table's shape is made in a step.", size=8, color=GREY, style="italic")


def draw_table(axes: plt.Axes, x: float, owners: list[list[int]]) -> None:
    """A table as cells, each in the colour of the device that holds it; all devices: each has a copy."""
    for row, cells in enumerate(owners):
        for column, owner in enumerate(cells):
            place = (x + column * 0.5, 1.75 - row * 0.34)
            axes.add_patch(Rectangle(place, 0.5, 0.34, fc=DEVICES[owner], ec="white", lw=1))


def draw_placement(axes: plt.Axes) -> None:
    """The mesh's two axes, and the ways in which a table lies on four devices."""
    axes.text(0.1, 2.95, "Many devices: where a table lies", size=11, weight="bold", color=INK)
    for i, colour in enumerate(DEVICES):
        axes.add_patch(Rectangle((0.1 + i * 0.75, 1.55), 0.65, 0.6, fc=colour, ec=INK, lw=0.8))
        axes.text(0.425 + i * 0.75, 1.85, str(i), ha="center", va="center", size=9, color=INK)
    axes.text(0.1, 1.2, "MLPs: a copy on each device;\nits share of the batch's examples.", size=8, va="top", color=INK)
    ways = (
        ("data_parallel", "a copy on each", None),
        ("table_wise", "a table on one device", [[2] * 4] * 4),
        ("row_wise", "row r on device r mod N", [[0] * 4, [1] * 4, [2] * 4, [3] * 4]),
        ("table_row_wise", "rows, in a group", [[0] * 4, [1] * 4, [0] * 4, [1] * 4]),
        ("column_wise", "slices of columns", [[0, 1, 2, 3]] * 4),
    )
    for i, (name, words, owners) in enumerate(ways):
        x = 4.3 + i * 3.2
        if owners is None:
            for copy, colour in enumerate(DEVICES):
                place = (x + copy * 0.16, 0.73 + copy * 0.12)
                axes.add_patch(Rectangle(place, 1.5, 1.0, fc=colour, ec="white", lw=1))
        else:
            draw_table(axes, x, owners)
        axes.text(x, 2.45, name, size=8.5, weight="bold", color=INK, family="monospace")
        axes.text(x, 0.35, words, size=8, color=INK)
    axes.text(
        4.3, -0.1, "--sharding=auto chooses for each table by its predicted cost.", size=8, color=GREY, style="italic"
    )


def main() -> None:
    """Write the picture; with a name, as PNG too."""
    matplotlib.rcParams |= {"svg.hashsalt": "architecture", "svg.fonttype": "none"}  # Each drawing has the same bytes.
    figure, axes = plt.subplots(figsize=(13.4, 6.2))
    axes.set(xlim=(0, 20.2), ylim=(-0.4, 9.1))
    axes.axis("off")
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.995)
    draw_flow(axes)
    draw_placement(axes)
    figure.savefig(OUT, facecolor="white", metadata={"Date": None, "Creator": None})
    for name in sys.argv[1:]:
        figure.savefig(name, facecolor="white", dpi=110)


if __name__ == "__main__":
    main()
