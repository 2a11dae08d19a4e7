"""Text in other encodings is read as the same text in UTF-8, from any position on; what is no text names its line."""

import bz2
import dataclasses
import gzip
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlrm_jax.config import ConfigError
from dlrm_jax.data.formats import text_source
from dlrm_jax.data.formats.encoding import Decoded, guess_encoding
from dlrm_jax.data.formats.text_source import TextSource
from dlrm_jax.data.infer.infer import infer
from dlrm_jax.data.prepare.preparation import Options, prepare
from dlrm_jax.data.read.prepared import is_prepared, read_json
from dlrm_jax.data.schema.schema import Dense, Sparse, Split
from tests.data.restart_test import Killed, dies_at
from tests.prepared_helpers import digest, prepare_text, schema

CITIES = ["Köln", "Zürich", "Orléans", "Bonn", "Łódź", "日本", "Ωmega", 'in "quotes"']
ENCODINGS = {
    "cp1252": CITIES[:4],
    "latin-1": CITIES[:4],
    "utf-16": CITIES,
    "utf-16-le": CITIES,
    "utf-16-be": CITIES,
    "utf-32": CITIES,
    "utf-8-sig": CITIES,
    "iso8859-2": ["Łódź", "Köln"],
    "shift_jis": ["日本", "Bonn"],
    "gb18030": ["日本", "Köln"],
}
_BY_DEFAULT = ("cp1252", "utf-16-le", "gb18030")
"""Of one byte a character, of two or four, of one to four: also cut into small chunks."""


def csv_text(cities: list[str], num_rows: int = 400, newline: str = "\n") -> str:
    cells = ['"' + city.replace('"', '""') + '"' for city in cities]
    rows = [f"{i % 2},{i / 4},{cells[i % len(cells)]}" for i in range(num_rows)]
    return newline.join(["label,x,c", *rows]) + newline


def as_json(cities: list[str]) -> str:
    rows = (f'{{"label": {i % 2}, "x": {i}, "c": "{cities[i % 2]}"}}' for i in range(300))
    return "\n".join(rows) + "\n"


@given(
    st.text(st.characters(codec="utf8"), max_size=200),
    st.sampled_from(["utf-16", "utf-32", "utf-16-be", "utf-8-sig", "utf-7"]),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
)
def test_a_decoded_stream_is_the_text(text, encoding, sizes):
    """Read in pieces of any size, each full but the last."""
    stream = Decoded(io.BytesIO(text.encode(encoding)), encoding)
    parts = []
    while not parts or len(parts[-1]) == sizes[(len(parts) - 1) % len(sizes)]:
        parts.append(stream.read(sizes[len(parts) % len(sizes)]))
    assert b"".join(parts) == text.encode(encoding).decode(encoding).encode("utf8")
    assert stream.read(10) == b""


@pytest.mark.parametrize(
    ("encoding", "chunk_bytes"),
    [
        *((encoding, 1 << 20) for encoding in ENCODINGS),
        *((encoding, 64) for encoding in _BY_DEFAULT),
        *(pytest.param(one, 64, marks=pytest.mark.exhaustive) for one in ENCODINGS if one not in _BY_DEFAULT),
    ],
)
@pytest.mark.sample(4)
def test_a_log_in_another_encoding_is_the_same_log(tmp_path, monkeypatch, encoding, chunk_bytes):
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, chunk_bytes))
    for name, newline, squeeze in (("a", "\n", bytes), ("b", "\r\n", gzip.compress), ("c", "\n", bz2.compress)):
        text = csv_text(ENCODINGS[encoding], newline=newline)
        (tmp_path / name).mkdir()
        ours = prepare_text(tmp_path / name, squeeze(text.encode(encoding)), schema(encoding=encoding))
        (tmp_path / f"{name}8").mkdir()
        plain = prepare_text(tmp_path / f"{name}8", text, schema())
        ours, plain = digest(ours), digest(plain)
        for same in ("vocabularies/c.parquet", "log-train.array_record-00000-of-00001"):
            assert ours[same] == plain[same]


def test_json_lines_in_another_encoding(tmp_path):
    text = as_json(["Köln", "日本"])
    (tmp_path / "8").mkdir()
    plain = digest(prepare_text(tmp_path / "8", text, schema(), name="log.jsonl"))
    ours = digest(prepare_text(tmp_path, text.encode("utf-16"), schema(encoding="utf-16"), name="log.jsonl"))
    assert ours["vocabularies/c.parquet"] == plain["vocabularies/c.parquet"]


LOG = schema(
    dense=(Dense("x", transform="standardise", missing="mean"),),
    sparse=(Sparse("c", min_count=2, oov=True, order="frequency"),),
    split=Split("random", val=0.2, test=0.2),
)


@pytest.mark.parametrize("squeeze", [bytes, gzip.compress])
@pytest.mark.parametrize("encoding", ["utf8", "utf-16", "cp1252"])
def test_dying_before_each_file_changes_nothing(tmp_path, monkeypatch, encoding, squeeze):
    """Positions count bytes of the decoded text, and a restart cuts the same chunks from there."""
    monkeypatch.setattr(TextSource.__init__, "__defaults__", (False, 10_000))
    monkeypatch.setattr("dlrm_jax.data.prepare.first_pass.CHUNKS_PER_FILE", 2)
    rows = [f"{i % 2},{i * i % 977 / 7:.4f},Käse {i * 7 % 991}" for i in range(6000)]
    log = tmp_path / "log.csv"
    log.write_bytes(squeeze(("label,x,c\n" + "\n".join(rows) + "\n").encode(encoding)))
    of = dataclasses.replace(LOG, encoding=encoding)
    prepare((str(log),), tmp_path / "whole", of)
    output, deaths = tmp_path / "stopped", 0
    while not is_prepared(output):
        with monkeypatch.context() as patch:
            dies_at(patch, deaths)
            try:
                prepare((str(log),), output, of)
            except Killed:
                deaths += 1
    assert deaths >= 8
    assert digest(output) == digest(tmp_path / "whole")


@pytest.mark.parametrize("encoding", ["utf8", "cp1252", "utf-16-le"])
def test_what_cannot_be_decoded_names_its_line(tmp_path, encoding):
    wrong = {"utf8": b"\xf6", "cp1252": b"\x81", "utf-16-le": b"\x00\xdc"}[encoding]
    rows = ["label,x,c\n0,1,a\n1,2,".encode(encoding), wrong, "b\n1,3,d\n".encode(encoding)]
    with pytest.raises(ConfigError) as error:
        prepare_text(tmp_path, b"".join(rows), schema(encoding=encoding))
    byte = {"utf8": "0xf6", "cp1252": "0x81", "utf-16-le": "0x00"}[encoding]
    shown = "UTF-8" if encoding == "utf8" else encoding
    assert f"log.csv, line 3: byte {byte} is not {shown}; mend the row" in str(error.value)
    assert ("say it in the schema (as encoding: cp1252)" in str(error.value)) == (encoding == "utf8")
    (tmp_path / "skipping").mkdir()
    output = prepare_text(tmp_path / "skipping", b"".join(rows), schema(encoding=encoding), on_bad_row="skip_and_count")
    statistics = read_json(output / "statistics.json")
    assert statistics["skipped"]["rows"] == 1 and statistics["splits"]["train"]["rows"] == 2


def test_a_cut_letter_at_the_end_is_a_bad_row(tmp_path):
    with pytest.raises(ConfigError, match="line 3: byte 0x64 is not utf-16-le"):
        prepare_text(tmp_path, "label,x,c\n0,1,a\n1,2,d".encode("utf-16-le")[:-1], schema(encoding="utf-16-le"))


@pytest.mark.parametrize("row", ["1,2,ö", "1,2"])
def test_lines_are_looked_up_once_a_chunk(tmp_path, monkeypatch, row):
    """Many bad rows in one chunk: their number must not multiply with the chunk's length."""
    looked_up = []
    of_records = text_source.record_starts
    monkeypatch.setattr(text_source, "record_starts", lambda *a: looked_up.append(1) or of_records(*a))
    text = "label,x,c\n0,1,a\n" + f"{row}\n" * 500
    output = prepare_text(tmp_path, text.encode("latin-1"), schema(), on_bad_row="skip_and_count")
    skipped = read_json(output / "statistics.json")["skipped"]
    assert skipped["rows"] == 500 and "log.csv, line 3: " in skipped["examples"][0]
    assert len(looked_up) <= 2


def test_all_rows_skipped_says_why(tmp_path):
    with pytest.raises(ConfigError, match=r"no rows in .*; all were skipped, the first: .*log\.csv, line 2: byte 0xf6"):
        prepare_text(tmp_path, "label,x,c\n0,1,ö\n".encode("latin-1"), schema(), on_bad_row="skip_and_count")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"label,c\n1,a\n", "utf8"),
        ("label,c\n1,Köln\n".encode(), "utf8"),
        ("\ufeffc\n1\n".encode(), "utf8"),
        ("label,c\n1,Köln\n".encode("latin-1"), "cp1252"),
        ("label,c\n1,10 €\n".encode("cp1252"), "cp1252"),
        (b"label,c\n1,\x81\x9d\xe4\n", "latin-1"),
        ("label\n1\n".encode("utf-16"), "utf-16"),
        (b"\xfe\xff" + "label\n1\n".encode("utf-16-be"), "utf-16"),
        ("label\n1\n".encode("utf-16-le"), "utf-16-le"),
        ("label\n1\n".encode("utf-16-be"), "utf-16-be"),
        ("label\n1\n".encode("utf-32"), "utf-32"),
        ("Köln, Zürich, ".encode() + b"\xff", "utf8"),
        ("Köln".encode()[:2], "utf8"),
        (b"", "utf8"),
    ],
)
def test_the_first_bytes_tell_the_encoding(head, expected):
    assert guess_encoding(head)[0] == expected


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_infer_says_and_writes_the_encoding(tmp_path, encoding):
    rows = [f"{i * 7 % 3 % 2}\t{CITIES[i % 3]}" for i in range(2000)]
    (tmp_path / "log.csv").write_bytes(("click\tcity\n" + "\n".join(rows) + "\n").encode(encoding))
    found = infer((str(tmp_path / "log.csv"),))
    assert found.encoding == encoding and found.delimiter == "\t"
    assert any(reason.startswith(f"encoding {encoding}: log.csv has ") for reason in found.reasons)
    prepare((str(tmp_path / "log.csv"),), tmp_path / "out", found, Options())


def test_files_of_several_encodings_are_refused_by_infer(tmp_path):
    for name, encoding in (("a.csv", "utf-16"), ("b.csv", "cp1252")):
        (tmp_path / name).write_bytes("click,city\n1,Köln\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"several encodings \(.*a\.csv in utf-16, .*b\.csv in cp1252\)"):
        infer((str(tmp_path / "a.csv"), str(tmp_path / "b.csv")))


@pytest.mark.parametrize("encoding", ["utf9", "base64", "rot13", "", "ut\0f"])
def test_an_unknown_encoding_is_refused(encoding):
    with pytest.raises(ConfigError, match=r"schema: encoding is .*; write utf8, cp1252"):
        schema(encoding=encoding)


def test_an_encoding_of_parquet_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has format parquet; encoding is for text and JSON lines"):
        prepare_text(tmp_path, b"PAR1", schema(encoding="cp1252"), name="log.parquet")


def test_utf_16_without_its_mark_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.csv: the file is not utf-16: .* start with BOM"):
        prepare_text(tmp_path, "label,x,c\n", schema(encoding="utf-16"))
