"""Files read in pieces: the documents of the whole, and errors that name the file's lines."""

import gzip
import json

import pytest
from shard_stores import TEXTS

from fastbert.data import Reading, iter_documents
from fastbert.data.corpus import piece_documents
from fastbert.data.pieces import cut, in_shards


def write_table(folder, texts):
    (folder / "t.jsonl").write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts))
    quoted = "".join('"{}",1\r\n'.format(text.replace('"', '""')) for text in texts)
    (folder / "t.csv").write_text("\ufefftext,id\r\n" + quoted, newline="")
    (folder / "t.tsv").write_text("id\ttext\n" + "".join(f"1\t{text.replace(chr(10), '<br>')}\n" for text in texts))


def halves(file):
    """A compressed file may be several in a row, which need not end where a line does."""
    data = file.read_bytes()
    return data[: len(data) // 2], data[len(data) // 2 :]


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.jsonl.gz", "t.csv.zst", "t.parquet", "t.txt.gz"])
def test_a_file_in_pieces_is_the_file(tmp_path, name):
    """Compressed or not, whatever the size of the pieces; those after the first begin in the middle of the file."""
    texts = [text.strip().replace("\t", " ") for text in TEXTS[:12]] + ['"Köln", said he.\nUnd 中文。 So!'] * 40
    write_table(tmp_path, texts)
    (tmp_path / "t.txt").write_text("\n \n".join(texts))
    kind = name.split(".")[1]
    file, plain = tmp_path / name, tmp_path / f"t.{kind}"
    if kind == "parquet":
        table, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = [*texts, None, ""]
        parquet.write_table(table.table({"id": range(len(rows)), "text": rows}), file, row_group_size=3)
        plain = tmp_path / "t.jsonl"
    elif name.endswith(".gz"):
        file.write_bytes(b"".join(map(gzip.compress, halves(plain))))
    elif name.endswith(".zst"):
        file.write_bytes(b"".join(map(pytest.importorskip("zstandard").compress, halves(plain))))
    column = None if kind == "txt" else "text"
    expected = list(iter_documents(plain, column))
    assert len(expected) >= len(texts) and list(iter_documents(file, column)) == expected
    for size in (500, 5_000, 10**7):
        pieces = cut(file, Reading(column), size)
        assert kind == "parquet" or len(pieces) <= pieces[-1].end // size + 1
        shards = in_shards(pieces, size)
        assert [d for pieces in shards for piece in pieces for d in piece_documents(piece, Reading(column))] == expected
        assert len(shards) > {500: 3, 5_000: 1, 10**7: 0}[size]
        assert [piece.start for pieces in shards for piece in pieces][1:] == [
            piece.end for pieces in shards for piece in pieces
        ][:-1]


def test_an_error_behind_the_first_piece_names_the_line_of_the_file(tmp_path):
    write_table(tmp_path, ["One\nline."] * 50 + ["bad"] + ["More."] * 50)
    file = tmp_path / "t.jsonl"
    file.write_text(file.read_text().replace('"bad"', "7"))
    pieces = cut(file, Reading("text"), 300)
    with pytest.raises(ValueError, match=r"t\.jsonl, line 51: the field 'text' must be a string"):
        [list(piece_documents(piece, Reading("text"))) for piece in pieces]
    file = tmp_path / "t.csv"
    file.write_bytes(file.read_bytes().replace(b'"bad",1', b'"bad",1,2'))
    with pytest.raises(ValueError, match=r"t\.csv, line 102: the row has 3 cells"):
        [list(piece_documents(piece, Reading("text"))) for piece in cut(file, Reading("text"), 300)]


@pytest.mark.parametrize("name", ["t.txt.gz", "t.txt.zst"])
def test_a_compressed_file_that_was_cut_off_is_named(tmp_path, name):
    data = ("A sentence. " * 2000).encode()
    compress = gzip.compress if name.endswith("gz") else pytest.importorskip("zstandard").compress
    (tmp_path / name).write_bytes(compress(data)[:-6])
    with pytest.raises(ValueError, match=rf"{name} is damaged or was cut off .*: fetch or write it again"):
        list(iter_documents(tmp_path / name))
