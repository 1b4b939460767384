#!/usr/bin/env bash
# ctranslate2 4.8.5 cannot convert a BERT folder that transformers 5.23.0 wrote.
#
# Guess: BERT is the oldest architecture both know, and the converter loads the folder by transformers itself; it
# works.
# Seen: AttributeError, "BertConfig object has no attribute position_embedding_type". transformers 5 removed that
# field from BertConfig and writes it no more; the converter still reads it. With "position_embedding_type":
# "absolute" in config.json, as transformers 4 wrote it, the same folder converts.
# So: who writes BERT folders for others should keep the field.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5
cd "$folder"
venv/bin/python - <<'PYTHON'
import json
from pathlib import Path

from ctranslate2.converters import TransformersConverter
from transformers import BertConfig, BertModel

sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained("model")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]
Path("model/vocab.txt").write_text("".join(f"{word}\n" for word in words))
Path("model/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
try:
    TransformersConverter("model").convert("converted")
    raise SystemExit("changed: it converts now")
except AttributeError as error:
    print("as written:", error)
    assert "position_embedding_type" in str(error)

config = json.loads(Path("model/config.json").read_text())
Path("model/config.json").write_text(json.dumps(config | {"position_embedding_type": "absolute"}))
TransformersConverter("model").convert("converted")
print("with the field: converted,", sorted(path.name for path in Path("converted").iterdir()))
PYTHON
