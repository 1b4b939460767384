#!/usr/bin/env bash
# The same texts, the same settings, the same process: four trainings give four WordPiece vocabularies.
#
# Guess: training is a deterministic count and merge; at worst ids differ, not which pieces there are.
# Seen, tokenizers 0.23.3: ids differ, and so do pieces, because pairs of equal count are merged in the order of ids,
# and the ids of the characters behind ## follow the order of a hash table that is seeded anew each time. No setting
# has a seed.
# So: two runs of a pretraining script do not train the same model; keep the tokenizer, or sort words before the
# trainer and declare the ## characters as special tokens in sorted order, after which it is deterministic.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
cd "$folder"
venv/bin/python - <<'PYTHON'
import pydoc_data.topics

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

texts = list(pydoc_data.topics.topics.values())
found = []
for _ in range(4):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    found.append(tokenizer.get_vocab())
ids = len({tuple(sorted(vocabulary.items())) for vocabulary in found})
pieces = len({frozenset(vocabulary) for vocabulary in found})
print(f"4 trainings: {ids} different vocabularies, {pieces} different sets of pieces")
assert ids > 1 and pieces > 1, "changed, or very lucky: run it again"
PYTHON
