"""README's table of what was measured, from the tables of experiments/README.md: `python experiments/measured.py`.

With `--check` it writes nothing, and exits 1 if README's table is not that of today. A number is typed nowhere: each
line below names a section that another script wrote, and takes cells out of it.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments.measure import ROOT, replace_section

Row = tuple[str, str, str, str]
"""What, here, beside it, when and where."""
_STAMP = re.compile(r"(20\d\d-\d\d-\d\d),? (?:compiled )?(?:on )?(\d+ (?:x86_64 )?cores)")


class Measured:
    """What experiments/README.md says."""

    def __init__(self, page: str) -> None:
        self.page = page

    def section(self, name: str) -> str:
        """What stands between a section's marks."""
        return self.page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]

    def row(self, name: str, **cells: str) -> list[str]:
        """The cells of the first row of a section's tables that begins with these cells."""
        return self._first_row(self.section(name), list(cells.values()), name)

    def below(self, heading: str, *first: str) -> list[str]:
        """The same of a table below a heading."""
        return self._first_row(self.page.split(f"## {heading}\n")[1].split("\n## ")[0], list(first), heading)

    def found(self, name: str, pattern: str) -> tuple[str, ...]:
        """The groups of a pattern in a section's text."""
        match = re.search(pattern, self.section(name))
        assert match, f"no {pattern!r} in {name}"
        return match.groups()

    def stamp(self, name: str) -> str:
        """When a section was measured, and on what."""
        match = _STAMP.search(self.section(name))
        assert match, f"no date in {name}"
        return f"{match[1]}, {match[2]}"

    def _first_row(self, text: str, cells: list[str], where: str) -> list[str]:
        for line in text.splitlines():
            found = [cell.strip() for cell in line.strip("| ").split(" | ")]
            if line.startswith("|") and found[: len(cells)] == cells:
                return found
        raise AssertionError(f"no row {cells} in {where}")


def _bare(cell: str) -> str:
    return cell.replace("*", "").split(" (")[0]


def lines(page: str) -> list[str]:
    """The table."""
    here = Measured(page)
    rows = [row for part in (quality, steps, data, pods, serving, living, gpu) for row in part(here)]
    return ["| what | here | beside it | measured |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]


def quality(here: Measured) -> Iterator[Row]:
    """A published result."""
    frappe = here.row("published", a="`frappe_dlrm.flags`")
    ours, beside = f"**{_bare(frappe[2])}**, mean of {frappe[1]} seeds", f"{frappe[3]}, as published of FuxiCTR"
    yield "DLRM on Frappe, test AUC", ours, beside, here.stamp("published")


def steps(here: Measured) -> Iterator[Row]:
    """Steps on a CPU."""
    whole, capped = here.found("row_free", r"sgd: .*?, ([\d.]+ ms) a step at 34 M rows, ([\d.]+ ms) capped")
    (slower,) = here.found("row_free", r"dense gradient: .*?, (\d+)x")
    beside = f"{capped} with tables of 10,000 rows; a dense gradient takes {slower} times as long"
    yield "Criteo Kaggle's 34 M rows, a step of SGD", f"**{whole}**", beside, here.stamp("row_free")
    for name, words in (("kaggle_b2048", "the same, batch 2048"), ("rm2", "RM2: 32 tables, bags of 120")):
        peer = here.row("peers", a=name, b="rowwise-adagrad")
        beside = f"PyTorch {peer[3]}, eager: {_bare(peer[4]).split(';')[0]}"
        yield f"{words}, row-wise Adagrad", f"**{peer[2]}**", beside, here.stamp("peers")


def data(here: Measured) -> Iterator[Row]:
    """A raw log, and how it is fed."""
    prepared = here.row("preparation", a="5,000,000", b="vocabulary")
    ours, beside = (
        f"**{_bare(prepared[2])} rows/s**, {prepared[5]}",
        f"{prepared[4].rstrip('x')} times the reference's rate",
    )
    yield "a raw log of 5 M rows, 39 columns, prepared", ours, beside, here.stamp("preparation")
    fed, (milliseconds,) = here.row("feeding", a="2,048", b="now"), here.found("feeding", r"sleeps of ([\d.]+) ms")
    what = f"a simulated device whose step of 2,048 takes {milliseconds} ms"
    yield what, f"it works **{fed[2]}** of the time", f"{fed[3]} M rows/s from a prepared log", here.stamp("feeding")


def pods(here: Measured) -> Iterator[Row]:
    """A pod that is not there."""
    pod = here.row("pod_sizes", a="mlperf_dcnv2", b="v5p:8x8x16")
    what = f"MLPerf's DCNv2 on {pod[2]} TPU chips, compiled without one"
    beside = f"{pod[4]} by XLA; bytes sent {pod[8]}, {pod[7]} by XLA"
    yield what, f"memory a chip **{pod[5]}** predicted", beside, here.stamp("pod_sizes")


def serving(here: Measured) -> Iterator[Row]:
    """A server."""
    served = here.row("serving_server", a="1")
    ours, beside = (_bare(served[i].split(";")[0]) for i in (1, 3))
    what = "served with a p99 below 25 ms, one row a request"
    yield what, f"**{ours} requests/s**", f"{beside} by FastAPI and PyTorch", here.stamp("serving_server")


def living(here: Measured) -> Iterator[Row]:
    """Models that go on, and small ones."""
    last = here.row("period_by_period", a="06")
    what, beside = "AUC below the optimum after 7 periods of a log that drifts", f"{last[5]} frozen after two"
    yield what, f"**{last[3]}** trained on", beside, here.stamp("period_by_period")
    halved = here.row("table_memory", a="bfloat16")
    planted, frappe = (halved[i].split("(")[1].rstrip(")") for i in (4, 5))
    what, beside = "tables and optimizer in bfloat16, of float32", f"AUC {planted} planted, {frappe} Frappe"
    yield what, f"**{halved[2]}** of the bytes", beside, here.stamp("table_memory")


def gpu(here: Measured) -> Iterator[Row]:
    """On a GPU."""
    kaggle, dcn = (here.below("On a GPU", a) for a in ("Kaggle, B=2048", "DCNv2 whole (104.5 GB of tables), B=8192"))
    (date,) = re.findall(r"One NVIDIA H200.*?(20\d\d-\d\d-\d\d)", here.page, re.DOTALL)[:1]
    what = "on a GPU: Kaggle, batch 2048; MLPerf's DCNv2, all 104.5 GB of tables"
    ours = f"**{kaggle[1].split(';')[0]}** a step; {dcn[1].removeprefix('bfloat16 ')}"
    yield what, ours, f"{kaggle[2].split(';')[0]}, {dcn[2]} samples/s, steps alone", f"{date}, one H200"


def main() -> None:
    """Write README's table, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is not current")
    check = parser.parse_args().check
    readme, table = ROOT / "README.md", "\n".join(lines((ROOT / "experiments" / "README.md").read_text()))
    current = f"<!-- measured -->\n{table}\n<!-- /measured -->" in readme.read_text()
    if check:
        print("current" if current else "README.md's table is not current; run python experiments/measured.py")
        sys.exit(not current)
    replace_section(readme, "measured", table)


if __name__ == "__main__":
    main()
