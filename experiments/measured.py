"""README's table of what was measured, from the tables of experiments/README.md: `python experiments/measured.py`.

With `--check` it writes nothing, and exits 1 if README's table is not that of today. A number is typed nowhere: each
line below names a section that another script wrote, and takes cells out of it.
"""

import argparse
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from experiments.measure import ROOT, replace_section

Row = dict[str, str]
_STAMP = re.compile(r"(20\d\d-\d\d-\d\d),? (?:compiled )?(?:on )?(\d+ (?:x86_64 )?cores)")


class Measured:
    """What experiments/README.md says."""

    def __init__(self, page: str) -> None:
        self._page = page

    def section(self, name: str) -> str:
        """What stands between a section's marks."""
        return self._page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0]

    def row(self, name: str, **cells: str) -> list[str]:
        """The cells of the first row of a section's tables that begins with these cells."""
        return self._first_row(self.section(name), list(cells.values()), name)

    def below(self, heading: str, *first: str) -> list[str]:
        """The same of a table below a heading."""
        return self._first_row(self._page.split(f"## {heading}\n")[1].split("\n## ")[0], list(first), heading)

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
    out = ["| what | here | beside it | measured |", "|---|---|---|---|"]

    def add(what: str, ours: str, beside: str, stamp: str) -> None:
        out.append(f"| {what} | {ours} | {beside} | {stamp} |")

    frappe = here.row("published", a="`frappe_dlrm.flags`")
    add(
        "DLRM on Frappe, test AUC",
        f"**{_bare(frappe[2])}**, mean of {frappe[1]} seeds",
        f"{frappe[3]}, as published of FuxiCTR",
        here.stamp("published"),
    )
    whole, capped = here.found("row_free", r"sgd: .*?, ([\d.]+ ms) a step at 34 M rows, ([\d.]+ ms) capped")
    (slower,) = here.found("row_free", r"dense gradient: .*?, (\d+)x")
    add(
        "Criteo Kaggle's 34 M rows, a step of SGD",
        f"**{whole}**",
        f"{capped} with tables of 10,000 rows; a dense gradient takes {slower} times as long",
        here.stamp("row_free"),
    )
    for name, words in (("kaggle_b2048", "the same, batch 2048"), ("rm2", "RM2: 32 tables, bags of 120")):
        peer = here.row("peers", a=name, b="rowwise-adagrad")
        ours, native = peer[2].removesuffix(" ms").split(", ")
        ratios = _bare(peer[4]).split(";")[0].split(", ")
        add(
            f"{words}, row-wise Adagrad",
            f"**{ours} ms**, {native} by C++",
            f"PyTorch {peer[3]}, eager: {ratios[0]}, {ratios[1]}",
            here.stamp("peers"),
        )
    prepared = here.row("preparation", a="5,000,000", b="vocabulary")
    add(
        "a raw log of 5 M rows, 39 columns, prepared",
        f"**{_bare(prepared[2])} rows/s**, {prepared[5]}",
        f"{prepared[4].rstrip('x')} times the reference's rate",
        here.stamp("preparation"),
    )
    fed, (milliseconds,) = here.row("feeding", a="2,048", b="now"), here.found("feeding", r"sleeps of ([\d.]+) ms")
    add(
        f"a simulated device whose step of 2,048 takes {milliseconds} ms",
        f"it works **{fed[2]}** of the time",
        f"{fed[3]} M rows/s from a prepared log",
        here.stamp("feeding"),
    )
    pod = here.row("pod_sizes", a="mlperf_dcnv2", b="v5p:8x8x16")
    add(
        f"MLPerf's DCNv2 on {pod[2]} TPU chips, compiled without one",
        f"memory a chip **{pod[5]}** predicted",
        f"{pod[4]} by XLA; bytes sent {pod[8]}, {pod[7]} by XLA",
        here.stamp("pod_sizes"),
    )
    served = here.row("serving_server", a="1")
    add(
        "served with a p99 below 25 ms, one row a request",
        f"**{_bare(served[1].split(';')[0])} requests/s**",
        f"{_bare(served[3].split(';')[0])} by FastAPI and PyTorch",
        here.stamp("serving_server"),
    )
    last = here.row("period_by_period", a="19")
    add(
        "AUC below the optimum after 20 periods of a log that drifts",
        f"**{last[3]}** trained on",
        f"{last[5]} frozen after five",
        here.stamp("period_by_period"),
    )
    halved = here.row("table_memory", a="bfloat16")
    add(
        "tables and optimizer in bfloat16, of float32",
        f"**{halved[2]}** of the bytes",
        f"AUC {halved[4].split('(')[1].rstrip(')')} planted, {halved[5].split('(')[1].rstrip(')')} Frappe",
        here.stamp("table_memory"),
    )
    gpu, dcn = here.below("On a GPU", "Kaggle, B=2048"), "DCNv2 whole (104.5 GB of tables), B=8192"
    (date,) = re.findall(r"One NVIDIA H200.*?(20\d\d-\d\d-\d\d)", page, re.DOTALL)[:1]
    add(
        "on a GPU: Kaggle, batch 2048; MLPerf's DCNv2, all 104.5 GB of tables",
        f"**{gpu[1].split(';')[0]}** a step; {here.below('On a GPU', dcn)[1].removeprefix('bfloat16 ')}",
        f"{gpu[2].split(';')[0]}, {here.below('On a GPU', dcn)[2]} samples/s, steps alone",
        f"{date}, one H200",
    )
    return out


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
