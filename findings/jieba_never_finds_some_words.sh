#!/usr/bin/env bash
# A word that was added to jieba is never found where it holds one of certain characters, whatever its frequency.
#
# Guess: jieba.add_word(word, freq) with a very high frequency makes the word come out wherever it stands.
# Seen, jieba 0.42.1: the text is first cut into runs of [一-鿕a-zA-Z0-9+#&._%-] and the rest, and words are looked for
# within a run. A word with 〇 (2008 in Chinese numerals), the dot of foreign names, a rare character beyond 鿕, a Greek or
# full-width letter or a slash lies over such a cut and is never found. Nothing says so.
# So: match names of a list on the text itself (Aho-Corasick), not through a segmenter's dictionary.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet setuptools==80.9.0 jieba==0.42.1
cd "$folder"
TMPDIR="$folder" venv/bin/python -W ignore - <<'PYTHON'
import logging

import jieba

jieba.setLogLevel(logging.WARNING)
found = {}
for word in ["诸葛孔明", "二〇〇八年", "列奥纳多·达芬奇", "𠮷野家", "α粒子", "Ｃ语言", "甲/乙"]:
    jieba.add_word(word, 10**9)
    found[word] = word in jieba.lcut(f"我看{word}好") or word in jieba.lcut(f"我看{word}好", HMM=False)
    print(f"{word}: {'found' if found[word] else 'never found'}")
assert [word for word, there in found.items() if there] == ["诸葛孔明"], found
PYTHON
