#!/usr/bin/env bash
# transformers lower-cases the text of a cased tokenizer.json.
#
# Guess: tokenizer.json says it all (normalizer, pre-tokenizer, model), and AutoTokenizer reads it as the tokenizers
# library does.
# Seen, transformers 5.23.0: with "tokenizer_class": "BertTokenizer" in tokenizer_config.json and no do_lower_case
# there, the default of that class, true, replaces the normalizer of tokenizer.json: "Köln" becomes "koln", whatever
# the file says. With the class PreTrainedTokenizerFast, or with do_lower_case false beside it, the file holds.
# So: who exports a BERT tokenizer writes do_lower_case, strip_accents and tokenize_chinese_chars twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Köln", "liegt", "am", "Rhein", "koln", "rhein"]
ours = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
ours.normalizer = normalizers.BertNormalizer(lowercase=False)
ours.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
Path("folder").mkdir()
ours.save("folder/tokenizer.json")
text = "Köln liegt am Rhein"
cased, lowered = ["Köln", "liegt", "am", "Rhein"], ["koln", "liegt", "am", "rhein"]
assert ours.encode(text).tokens == cased
for config, expected in (
    ({"tokenizer_class": "BertTokenizer"}, lowered),
    ({"tokenizer_class": "BertTokenizer", "do_lower_case": False}, cased),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, cased),
):
    Path("folder/tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "[UNK]"}))
    tokens = AutoTokenizer.from_pretrained("folder").tokenize(text)
    print(config, "->", tokens)
    assert tokens == expected, "changed"
PYTHON
