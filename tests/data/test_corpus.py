"""Documents and sentences out of text files, folders and tables."""

import bz2
import csv
import gzip
import io
import lzma
import time
import tracemalloc
import zipfile

import pytest

from fastbert.data import iter_documents, split_sentences
from fastbert.data.corpus import MAX_CHARACTERS, check_corpus


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("", []),
        (" \t ", []),
        ("no end", ["no end"]),
        ('He said "Stop!" and left. "Why?" She ran.', ['He said "Stop!" and left.', '"Why?"', "She ran."]),
        ("Mr. Smith met Dr. J. R. Jones, e.g. Bob. So did I. We left.",
         ["Mr. Smith met Dr. J. R. Jones, e.g. Bob.", "So did I.", "We left."]),
        ("seized by U.S. Customs at 3.50 dollars", ["seized by U.S. Customs at 3.50 dollars"]),
        ("well... not bad... But why?! Yes", ["well... not bad...", "But why?!", "Yes"]),
        ("already tokenised . in lower case !", ["already tokenised .", "in lower case !"]),
        ("first line\nsecond<br /><br/>third <BR> fourth", ["first line", "second", "third", "fourth"]),
        ("你好。“你是谁？”他问！没有", ["你好。", "“你是谁？”", "他问！", "没有"]),
        (". Odd", [".", "Odd"]),
    ],
)  # fmt: skip
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_blank_lines_separate_documents(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeff\n\nOne. Two.\r\nThree.\r\n \r\n\r\nFour.\n".encode())
    assert list(iter_documents(file)) == [["One.", "Two.", "Three."], ["Four."]]


def test_folder_is_read_recursively_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.TXT").write_text("Third.")
    (tmp_path / "a.text").write_text("Second.")
    (tmp_path / "A.txt").write_text("First.")
    (tmp_path / "notes.json").write_text("{}")
    assert list(iter_documents(tmp_path)) == [["First."], ["Second."], ["Third."]]


def test_table_rows_are_documents(tmp_path):
    file = tmp_path / "reviews.csv"
    long = "word " * 40_000 + "end."  # beyond the csv module's own limit
    with open(file, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(
            [["id", "text"], ["1", 'A "quoted"\nline. And, more.<br /><br />End'], ["2", " "], [], ["3", long]]
        )
    assert list(iter_documents(file, "text")) == [['A "quoted"', "line.", "And, more.", "End"], [long]]
    file.rename(tmp_path / "reviews.tsv")
    (tmp_path / "reviews.tsv").write_text("a\ttext\n1\tOne, two. Three.\n")
    assert list(iter_documents(tmp_path / "reviews.tsv", "text")) == [["One, two.", "Three."]]
    assert list(iter_documents(tmp_path, "text")) == [["One, two.", "Three."]]


@pytest.mark.parametrize("line", ["word " * 9 + "end.\n", "word ", "字"], ids=["lines", "one line", "no space"])
def test_memory_is_bounded_without_blank_lines(tmp_path, line):
    file = tmp_path / "large.txt"
    repeats = 3_000_000 // len(line.encode())
    file.write_text(line * repeats, encoding="utf-8")
    tracemalloc.start()
    words = documents = 0
    for document in iter_documents(file):
        assert sum(map(len, document)) < 3 * MAX_CHARACTERS
        words += sum(sentence.count(line.split()[0]) for sentence in document)
        documents += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert words == repeats * line.split().count(line.split()[0])
    assert documents > 10
    assert peak < 1_500_000


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "column", "error", "says"),
    [
        ("a.txt", "Text.", "text", ValueError, "which has no column 'text'"),
        ("a.csv", "id,text\n1,Text.\n", None, ValueError, r"one of \['id', 'text'\]"),
        ("a.csv", "id,text\n1,Text.\n", "body", ValueError, r"no column 'body'.*\['id', 'text'\]"),
        ("a.csv", "id,text\n1,Text.\n2\n", "text", ValueError, "line 3: the row has 1 cell, its header 2.*--separator"),
        ("a.csv", "id,text\n1,Text, it\n2,Text.\n3,a,b,c\n", "text", ValueError, r"line 2: .*has 3 cells.*lines 4\)"),
        ("a.csv", 'id,text\n1,"Text.\n2,More.\n', "text", ValueError, "a.csv, line 2: .*--quoting none"),
        ("a.csv", 'id,text\n1,"One.\n2,Two.\n3,Three."\n', "text", ValueError, "line 2: .*whole rows"),
        ("a.tsv", '"id"\t"text"\n1\t"One\n2\tTwo"\n', "text", ValueError, "line 2: .*whole rows"),
        ("a.jsonl", '{"text": "One."}\n{"text": 2}\n{"body": "x"}\n', "text", ValueError, "line 2: .*string.*lines 3"),
        ("a.jsonl", '[{"text": "One."}]\n', "text", ValueError, "line 1: .*jq"),
        ("a.jsonl", '{"text": "One."}\n', None, ValueError, r"is a table: .*\['text'\]"),
        ("a.txt", " \n\n", None, ValueError, "holds no text"),
        ("a.csv", "text\n", "text", ValueError, "holds no text"),
        ("a.csv", "", "text", ValueError, r"is empty: expected a header with the column 'text'"),
        ("a.txt", b"Fine.\nCaf\xe9.\n", None, ValueError, r"not UTF-8: line 2, byte 4 \(0xe9\); convert it"),
        ("a.csv", b"text\n\"Fine\nand\"\n\xff\n", "text", ValueError, r"not UTF-8: line 4, byte 1 \(0xff\)"),
    ],
)  # fmt: skip
def test_bad_corpus(tmp_path, name, content, column, error, says):
    with pytest.raises(error, match=says):
        list(iter_documents(write(tmp_path / name, content), column))


def test_what_can_be_seen_at_once_is_raised_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        iter_documents(tmp_path / "none.txt")
    write(tmp_path / "a.csv", "text\nOne.\n")
    with pytest.raises(FileNotFoundError, match=r"no \.text or \.txt files.*name the column"):
        iter_documents(tmp_path)
    with pytest.raises(ValueError, match="is a table"):
        iter_documents(tmp_path / "a.csv")


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize(
    "piece", [".", "!", "?!", ". ", "。", "<br", "a.", "J. ", '."', "('", " ", "\u3000"], ids=lambda piece: repr(piece)
)
def test_sentences_take_time_in_proportion_to_the_text(piece):
    """A million characters of whatever a pattern could try again and again: quadratic would be hours."""
    text = piece * (1_000_000 // len(piece))
    assert seconds(lambda: split_sentences(text)) < 10


def test_tables_by_separator_quoting_and_json_lines(tmp_path):
    texts = [["One; two."], ['Say "three".']]
    write(tmp_path / "a.csv", 'id;text\n1;"One; two."\n2;"Say ""three""."\n')
    assert list(iter_documents(tmp_path / "a.csv", "text", separator=";")) == texts
    write(tmp_path / "a.psv", 'id|text\n1|One; two.\n2|Say "three".\n')
    assert list(iter_documents(tmp_path / "a.psv", "text", separator="|", quoting="none")) == texts
    write(tmp_path / "b.csv", 'id,text\n1,"One; two."\n2,"Say \\"three\\"."\n')
    assert list(iter_documents(tmp_path / "b.csv", "text", quoting="backslash")) == texts
    write(tmp_path / "c.jsonl", '{"text": "One; two."}\n\n{"text": null}\n{"id": 1, "text": "Say \\"three\\"."}\n')
    assert list(iter_documents(tmp_path / "c.jsonl", "text")) == texts
    # A quote that opens a cell is a character between tabs, where no quote stands in the header.
    write(tmp_path / "d.tsv", 'id\ttext\n1\t"Wow" said he.\n2\t"Unclosed.\n3\tFine.\n')
    assert list(iter_documents(tmp_path / "d.tsv", "text")) == [['"Wow" said he.'], ['"Unclosed.'], ["Fine."]]
    write(tmp_path / "e.tsv", '"id"\t"text"\n1\t"Two\nlines."\n')
    assert list(iter_documents(tmp_path / "e.tsv", "text")) == [["Two", "lines."]]
    with pytest.raises(ValueError, match="a separator is one character"):
        list(iter_documents(tmp_path / "a.csv", "text", separator="ab"))
    with pytest.raises(ValueError, match="leave the separator out"):
        iter_documents(write(tmp_path / "x.txt", "Text.").parent, separator=";")


def test_a_folder_gives_its_texts_alone_and_says_what_it_left_out(tmp_path):
    write(tmp_path / "a.txt", "First.")
    write(tmp_path / "._a.txt", b"\x00\x05\x16\x07")
    write(tmp_path / "notes.md", "No.")
    write(tmp_path / "wiki_00", "No.")
    for folder in (".ipynb_checkpoints", "run", "run/tokenizer"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "vocab.txt", "No.")
    write(tmp_path / "run/config.json", "{}")
    files = check_corpus(tmp_path)
    assert files.read == [tmp_path / "a.txt"] and list(iter_documents(tmp_path)) == [["First."]]
    assert files.left_out == {"hidden": 2, ".md": 1, "without suffix": 1, "folders of runs, models or tokenizers": 1}
    assert str(files).startswith("read: 1 .txt; left out: 2 hidden, ")


def zipped(name):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(name, "Text.")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("Köln.".encode("utf-16"), "UTF-16: convert it, iconv -f UTF-16 -t UTF-8"),
        ("Köln.".encode("utf-32"), "UTF-32: convert it, iconv -f UTF-32"),
        ("A longer text.".encode("utf-16-le"), "UTF-16LE without a byte order mark"),
        (gzip.compress(b"Text."), "compressed by gzip: convert it, gzip -dc"),
        (bz2.compress(b"Text."), "compressed by bzip2: convert it, bzip2 -dc"),
        (lzma.compress(b"Text."), "compressed by xz: convert it, xz -dc"),
        (zipped("a.txt"), "a zip archive: convert it, unzip -p"),
        (zipped("[Content_Types].xml"), "an Office document"),
        (b"%PDF-1.7\n", "a PDF document: convert it, pdftotext"),
        (b"PAR1\x15\x04", "a Parquet table"),
        ("Müßig, äußerst öde. ".encode() * 20 + b"\xff.", "the file is damaged or of several encodings"),
        ("Fine. Käse".encode()[:-3], "it was cut off"),
    ],
)
def test_what_is_not_utf8_is_recognised(tmp_path, content, says):
    with pytest.raises(ValueError, match=says):
        list(iter_documents(write(tmp_path / "a.txt", content)))


def test_no_encoding_is_named_as_a_fact(tmp_path):
    """In Chinese bytes ISO-8859-1 is letters, and iconv would ruin the file without a word."""
    file = write(tmp_path / "a.txt", "我们今天去看电影，电影很好看。".encode("gb18030") * 20)
    with pytest.raises(ValueError, match="not UTF-8") as error:
        list(iter_documents(file))
    assert "8859" not in str(error.value) and ("guess" in str(error.value) or "-f ENCODING" in str(error.value))
