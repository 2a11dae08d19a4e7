"""A notebook, run from its first cell to its last in a process that is new:

    python tests/notebook_process.py NOTEBOOK PARAMETERS ASKED

PARAMETERS is Python that follows the cell with the tag `parameters`. The last line it prints is JSON: the value of the
expression ASKED behind the last cell, and how many pictures were shown. Needs no Jupyter: cells are plain Python.
"""

import json
import pathlib
import subprocess
import sys
import types

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

PNG = b"\x89PNG"


def main(notebook: str, parameters: str, asked: str) -> None:
    shown: list = []

    def show() -> None:
        """What Jupyter shows of figures: those that are open, each once."""
        shown.extend(PNG for number in pyplot.get_fignums() if pyplot.figure(number).axes)
        pyplot.close("all")

    display = types.ModuleType("IPython.display")
    display.__dict__.update(Image=lambda path: pathlib.Path(path).read_bytes(), Markdown=str)
    display.__dict__["display"] = lambda *things: shown.extend(things)
    ipython = types.ModuleType("IPython")
    ipython.__dict__.update(version_info=(9, 0), get_ipython=lambda: None)  # matplotlib asks for both.
    sys.modules |= {"IPython": ipython, "IPython.display": display}
    pyplot.show = show
    names: dict = {"__name__": "__main__"}
    try:
        for cell in json.loads(pathlib.Path(notebook).read_text())["cells"]:
            if cell["cell_type"] == "code":
                exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                exec(parameters, names)
        pictures = sum(isinstance(one, bytes) and one.startswith(PNG) for one in shown)
        print(json.dumps({"found": eval(asked, names), "pictures": pictures}))
    finally:
        for value in names.values():  # A server that a notebook did not come to stop.
            if isinstance(value, subprocess.Popen) and value.poll() is None:
                value.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
