"""NDJSON and CSV files: read line by line, bad lines named, written whole or not at all."""

import gzip
import json
import math
import pickle
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lazy import LazyCollection
from utils import BadLineError, LazyError, Page, col, from_csv, from_ndjson

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).resolve().parent.parent
ROWS: list[Any] = [{"a": 1, "b": 'x\ny,"z"'}, {"a": None, "b": "ü\u2028"}, {"a": 2.5, "b": ""}]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_ndjson_goes_out_and_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.ndjson{suffix}"

    assert LazyCollection(ROWS).to_ndjson(path) == 3

    assert from_ndjson(path).collect() == ROWS
    assert from_ndjson(str(path)).filter(col("a") > 1).map(col("a")).collect() == [2.5]
    assert (path.read_bytes()[:2] == b"\x1f\x8b") is bool(suffix)
    assert from_ndjson(path).count() == 3  # it can be read again


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv_goes_out_and_comes_back_as_texts(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.csv{suffix}"

    assert LazyCollection(ROWS).to_csv(path) == 3

    rows = from_csv(path).collect()
    assert [row["b"] for row in rows] == [row["b"] for row in ROWS]
    assert [row["a"] for row in rows] == ["1", "", "2.5"]


def test_other_elements_can_be_written(tmp_path: Path) -> None:
    LazyCollection([(1, 2), "x", 5]).to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text() == "1,2\nx\n5\n"
    LazyCollection([[1], None, "x", True]).to_ndjson(tmp_path / "a.ndjson")
    assert (tmp_path / "a.ndjson").read_text() == '[1]\nnull\n"x"\ntrue\n'


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        (b'{"a":1}\n\n{"a"}\n{"a":2}\n', 3, "not a JSON value"),
        (b'{"a":1}\n{"a":NaN}\n{"a":2}\n', 2, "NaN is not JSON"),
        (b'{"a":1}\n{"a":"\xff"}\n{"a":2}\n', 2, "not UTF-8"),
        (b'{"a":1}\n' + b"[" * 100_000 + b'\n{"a":2}', 2, "too deep"),
        (b'{"a":1}\n{"a":2} x\n{"a":2}\n', 2, "Extra data"),
        (b'{"a":1}\n"' + b"x" * (17 * 1024 * 1024) + b'"\n{"a":2}\n', 2, "longer than"),
    ],
)
def test_a_bad_ndjson_line_is_named_or_skipped(
    tmp_path: Path, lines: bytes, line: int, reason: str
) -> None:
    path = tmp_path / "bad.ndjson"
    path.write_bytes(lines)

    with pytest.raises(BadLineError, match=rf"bad\.ndjson, line {line}: .*{reason}") as caught:
        from_ndjson(path).collect()

    assert caught.value.line == line
    assert pickle.loads(pickle.dumps(caught.value)).line == line
    assert from_ndjson(path, bad_lines="skip").collect() == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (b"a,b\n1,2\n3\n5,6\n", 3, "1 fields, where the header names 2"),
        (b"a,b\n1,2\n3,4,5\n5,6\n", 3, "3 fields"),
        (b"a,b\n1,2\n3,\xff\n5,6\n", 3, "not UTF-8"),
        (b'a,b\n1,2\n"x"y,4\n5,6\n', 3, "not a CSV record"),
    ],
)
def test_a_bad_csv_line_is_named_or_skipped(
    tmp_path: Path, text: bytes, line: int, reason: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text)

    with pytest.raises(BadLineError, match=f"line {line}: .*{reason}"):
        from_csv(path).collect()

    rows = [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    assert from_csv(path, bad_lines="skip").collect() == rows


def test_csv_details(tmp_path: Path) -> None:
    path = tmp_path / "details.csv"
    path.write_bytes('\ufeffa;b\r\n1;"x\r\ny"\r\n\r\n2;z'.encode())

    assert from_csv(path, delimiter=";").collect() == [
        {"a": "1", "b": "x\r\ny"},
        {"a": "2", "b": "z"},
    ]
    path.write_bytes(b"")
    assert from_csv(path).collect() == []
    path.write_bytes(b"a,a\n1,2\n")
    with pytest.raises(BadLineError, match="twice"):
        from_csv(path).collect()
    path.write_bytes(b"a\n" + b'"x\n' + b"y\n" * (9 * 1024 * 1024))
    with pytest.raises((BadLineError, LazyError), match="line"):
        from_csv(path).collect()


def test_files_are_opened_late_and_closed_early(tmp_path: Path) -> None:
    chain = from_ndjson(tmp_path / "later.ndjson").map(col("a"))
    with pytest.raises(FileNotFoundError):
        chain.collect()
    LazyCollection(ROWS).to_ndjson(tmp_path / "later.ndjson")

    assert chain.first() == 1

    with pytest.raises(ValueError, match="bad_lines"):
        from_ndjson(tmp_path / "x", bad_lines="ignore")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b'{"a":1}\n' * 1000)[:-20])
    with pytest.raises(LazyError, match="whole gzip"):
        from_ndjson(tmp_path / "cut.gz").collect()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.ndjson"
    LazyCollection([1]).to_ndjson(path)

    with pytest.raises(ZeroDivisionError):
        LazyCollection([1, 0]).map(lambda n: 1 / n).to_ndjson(path)
    with pytest.raises(ValueError, match="not JSON compliant") as caught:
        LazyCollection([1.0, math.nan]).to_ndjson(path)
    assert "element 2" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="no JSON form"):
        LazyCollection([object()]).to_ndjson(path)
    with pytest.raises(ValueError, match=r"record 2: .*b"):
        LazyCollection([{"a": 1}, {"a": 1, "b": 2}]).to_csv(path)

    assert path.read_text() == "1\n"
    assert [each.name for each in tmp_path.iterdir()] == ["out.ndjson"]


def test_pages_and_rows_have_a_json_form(tmp_path: Path) -> None:
    LazyCollection([1, 2, 3]).paginate(2).map(list).to_ndjson(tmp_path / "pages")

    assert [json.loads(line) for line in (tmp_path / "pages").read_text().splitlines()] == [
        [1, 2],
        [3],
    ]
    assert Page([1], 1, 1, has_next=False) == Page([1], 1, 1, has_next=False)


@pytest.mark.load
def test_a_large_file_passes_in_flat_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.ndjson"
    line = json.dumps({"n": 1, "pad": "x" * 100}) + "\n"
    with path.open("w") as file:
        for _ in range(300):
            file.write(line * 1000)
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\n"
        "from utils import from_ndjson, col\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "chain = from_ndjson(sys.argv[2]).filter(col('n') == 1).batch(100)\n"
        "chain.take(5).collect(); before = peak()\n"
        "print(chain.map(len).sum(), peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(FOLDER), str(path)],
                          capture_output=True, text=True, check=True)  # fmt: skip

    count, grown = map(int, done.stdout.split())
    assert count == 300_000
    assert grown <= 2048
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def test_the_source_is_named_in_the_plan(tmp_path: Path) -> None:
    chain: Any = from_csv(tmp_path / "a.csv").select("x", y=col("z")).sort(col("x"), reverse=True)

    assert repr(chain) == (
        "LazyCollection(CSV a.csv).select(x=col('x'), y=col('z')).sort(col('x'), reverse)"
    )
    cached = LazyCollection([1, 2]).map(str).cache()
    assert "computed from (list of 2).map(str)" in cached.take(1).explain()
