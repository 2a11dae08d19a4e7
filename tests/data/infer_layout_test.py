"""Headers that are rows, and names of datasets."""

import pytest

from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.infer.layout import FALLBACK_NAME, guess_layout, guess_name
from dlrm_jax.data.schema.schema import Label
from tests.prepared_helpers import schema


def layout_of(path, text: str):
    path.write_text(text)
    return guess_layout((str(path),), "text", [])


def rows(row) -> str:
    return "".join(",".join(map(str, row(i))) + "\n" for i in range(60))


@pytest.mark.parametrize(
    "row",
    [
        lambda i: (i % 2, f"2024-01-{1 + i % 28:02d}", f"u{i % 9}", i / 7),
        lambda i: (i % 2, f"2024-01-{1 + i % 28:02d}T10:00:00Z", f"u{i % 9}"),
        lambda i: (f"u{i % 9}", f"{1 + i % 28}.1.2024", i % 2),
        lambda i: (i % 2, f"10:{i % 60:02d}:00", "a b"[:: 1 + 2 * (i % 2)]),
        lambda i: (f"u{i % 9}", i % 2, f"{i * 7654321:08x}"),
        lambda i: (i % 2, i, f"{i * 7654321:08x}"),
        lambda i: (i % 2, f"unique text {i}", i / 2),
    ],
)
def test_a_first_line_of_values_is_a_row(tmp_path, row):
    layout = layout_of(tmp_path / "log.csv", rows(row))
    assert layout.fields["header"] is False and layout.names[0] == "column_1"
    found = infer((str(tmp_path / "log.csv"),))
    assert found.label.column.startswith("column_") and len(found.columns) == len(row(0))


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("click,user", lambda i: (i % 2, f"u{i}")),
        ("click,2019,2020", lambda i: (i % 2, i, i * 2)),
        ("id,2024-01-01,2024-01-02", lambda i: (i, i % 2, i)),
        ("user,1,2", lambda i: (f"u{i % 9}", i % 2, i)),
        ("deadbeef,click", lambda i: (f"u{i % 9}", i % 2)),
        (",click,0", lambda i: (i, i % 2, f"u{i % 9}")),
    ],
)
def test_a_first_line_with_names_is_a_header(tmp_path, header, row):
    layout = layout_of(tmp_path / "log.csv", header + "\n" + rows(row))
    assert layout.names == header.split(",") and "header" not in layout.fields


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("logs/clicks_2024.csv.gz", "clicks_2024"),
        ("My Log-File.PARQUET", "my_log_file"),
        ("shop/train.csv", "shop_train"),
        ("shop/part-00000.csv", "shop_part_00000"),
        ("shop/2024-01-01.csv", "shop_2024_01_01"),
        ("2024/01.csv", "log_2024_01"),
        ("Größe.csv", "gr_e"),
        ("logs/日本.csv", "logs"),
        ("日/本.csv", FALLBACK_NAME),
        ("x" * 300 + ".csv", "x" * 100),
        ("class.csv", "class"),
    ],
)
def test_a_dataset_is_named_after_its_file(path, name):
    assert guess_name(f"/{path}" if "/" in path else f"/somewhere/{path}") == name
    assert schema(name=guess_name(path), label=Label("label")).name.islower()


def test_columns_without_a_name_are_left_out(tmp_path):
    """As a spreadsheet appends them."""
    (tmp_path / "log.csv").write_text("click,user,,\n" + rows(lambda i: (i % 2, f"u{i % 9}", "", "")))
    found = infer((str(tmp_path / "log.csv"),))
    assert [s.name for s in found.sparse] == ["user"] and "2 columns without a name are left out" in found.reasons
