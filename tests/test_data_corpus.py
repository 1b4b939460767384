"""Documents and sentences out of text files, folders and tables."""

import csv
import tracemalloc

import pytest

from fastbert.data import iter_documents, split_sentences
from fastbert.data.corpus import MAX_CHARACTERS


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
        ("a.csv", "id,text\n1,Text.\n2\n", "text", ValueError, "line 3: the row has 1 cells, 'text' is column 2"),
        ("a.csv", 'id,text\n1,"Text.\n2,More.\n', "text", ValueError, "a.csv, line 3: .*quote"),
        ("a.txt", " \n\n", None, ValueError, "holds no text"),
        ("a.csv", "text\n", "text", ValueError, "holds no text"),
        ("a.csv", "", "text", ValueError, r"no column 'text': expected one of \[\]"),
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
