#!/usr/bin/env bash
# Whole word masking of Chinese text hides all of a text or nothing of it.
#
# Guess: DataCollatorForLanguageModeling(whole_word_mask=True) takes the tokenizer's words, which for BERT's pre-tokenizer
# are a Chinese character each (word_ids says so), or leaves the choice of words to the user.
# Seen, transformers 5.23.0: a word is what has no gap in the offsets. Chinese is written without spaces, so all of a
# text, its commas and full stops among it, is one word: at mlm_probability 0.15 most texts have no label at all, and the
# others nothing but labels.
# So: bring word boundaries of your own, and look at the number of labels a text before a long run.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 numpy
cd "$folder"
venv/bin/python - <<'PYTHON'
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

text = "诸葛亮说明天下雨，我们在此等他。孔明笑曰，此人可用。"
special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
vocab = {token: i for i, token in enumerate([*special, *sorted(set(text))])}
tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
tokenizer.normalizer = normalizers.BertNormalizer()
tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
names = {f"{token.strip('[]').lower()}_token": token for token in special}
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

encoded = fast(text, return_offsets_mapping=True, return_special_tokens_mask=True)
words = [word for word in encoded.word_ids() if word is not None]
collator = DataCollatorForLanguageModeling(fast, whole_word_mask=True, seed=1, return_tensors="np")
labels = (collator([dict(encoded) for _ in range(100)])["labels"] != -100).sum(1)
print(f"{len(words)} words by word_ids; labels in 100 copies of the text: {sorted(set(labels.tolist()))}, ", end="")
print(f"none in {(labels == 0).sum()}")
assert len(set(words)) == len(text) and set(labels.tolist()) == {0, len(text)}
PYTHON
