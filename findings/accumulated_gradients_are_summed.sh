#!/usr/bin/env bash
# Trainer adds BERT's gradients over gradient_accumulation_steps up and never divides: the gradient is N times as large.
#
# Guess: four micro-batches of 2 make the step that one batch of 8 makes, as they do in every other loop.
# Seen, transformers 5.23.0: loss and gradient norm are 4 times those of the whole batch. Trainer divides by the number
# of micro-batches unless the model's forward takes **kwargs, which it reads as "the model divides by the number of
# items itself"; BERT's heads take **kwargs, drop num_items_in_batch and return a plain mean.
# So: Adam hardly shows it, but max_grad_norm=1.0, the default, clips nearly every step, logged losses are N times too
# high, and whoever changes N for a smaller GPU trains another way. model.accepts_loss_kwargs = False mends it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
venv/bin/python - <<'PYTHON'
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DATA = [{"input_ids": torch.arange(8) + i, "labels": i % 2} for i in range(8)]


def first_step(size, micro_batches, mended=False):
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **SIZES, **NO_DROPOUT))
    if mended:
        model.accepts_loss_kwargs = False
    arguments = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=micro_batches,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=DATA)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"]


whole, parts, mended = first_step(8, 1), first_step(2, 4), first_step(2, 4, mended=True)
for name, (loss, norm) in (("8", whole), ("4 x 2", parts), ("4 x 2, accepts_loss_kwargs=False", mended)):
    print(f"{name}: loss {loss:.4f}, gradient norm {norm:.4f}")
for one, four, right in zip(whole, parts, mended):
    assert abs(four / one - 4) < 1e-3 and abs(right / one - 1) < 1e-3, "changed"
PYTHON
