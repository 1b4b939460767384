"""The best that plain PyTorch does with a packed pretraining step on a GPU, as a peer: no kernel of this package.

FlashAttention-2 as torch carries it, heads only where they are read, bfloat16 weights beside float32 ones, a vocabulary
padded to a multiple of 8, torch's fused AdamW, and no wait for the device, so that the step can be captured whole.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def losses(model: nn.Module, p: float, decoder: Tensor, bias: Tensor, batch: dict) -> Tensor:
    """Of a `BertForPreTraining` wholly in bfloat16, of which the parameters are taken; decoder and bias are padded."""
    bert, heads = model.bert, model.config.num_attention_heads
    cu_seqlens, longest = batch["cu_seqlens"], batch["max_seqlen"]

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)

    def dense(module: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x, module.weight, module.bias)

    tables = bert.embeddings
    x = F.embedding(batch["input_ids"], tables.word_embeddings.weight)
    x = x + F.embedding(batch["position_ids"], tables.position_embeddings.weight)
    x = x + F.embedding(batch["token_type_ids"], tables.token_type_embeddings.weight)
    x = F.dropout(norm(tables.LayerNorm, x), p)
    first = cu_seqlens[:-1].long()
    read = torch.cat([first, batch["masked_positions"]])
    for number, layer in enumerate(bert.encoder["layer"]):
        q, k, v = dense(layer.attention["self"].qkv, x).view(len(x), 3, heads, -1).unbind(1)
        attended = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, longest, longest, p, False, False
        )[0].flatten(1)
        if number == len(bert.encoder["layer"]) - 1:
            attended, x = attended.index_select(0, read), x.index_select(0, read)
        behind = layer.attention["output"]
        x = norm(behind.LayerNorm, x + F.dropout(dense(behind.dense, attended), p))
        inner = F.gelu(dense(layer.intermediate["dense"], x))
        x = norm(layer.output.LayerNorm, x + F.dropout(dense(layer.output.dense, inner), p))
    first, masked = x.split([len(first), len(batch["masked_positions"])])
    pooled = torch.tanh(dense(bert.pooler["dense"], first))
    transform = model.cls["predictions"].transform
    masked = norm(transform["LayerNorm"], F.gelu(dense(transform["dense"], masked)))
    words = F.linear(masked, decoder, bias)[:, : model.config.vocab_size].float()
    pairs = dense(model.cls["seq_relationship"], pooled).float()
    return F.cross_entropy(words, batch["labels"]) + F.cross_entropy(pairs, batch["next_sentence_label"])


class PlainStep:
    """Forward, backward, clipping, fused AdamW, and the copies of weights and gradients, for `fastbert.capture`."""

    def __init__(self, model: nn.Module, lr: float, clip: float, is_compiled: bool = False) -> None:
        self.losses = torch.compile(losses, dynamic=False) if is_compiled else losses
        self.p, self.clip = model.config.hidden_dropout_prob, clip
        self.masters, self.model = list(model.parameters()), copy.deepcopy(model).bfloat16()
        self.copies = list(self.model.parameters())
        self.padding = -model.config.vocab_size % 8
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=torch.tensor(lr), weight_decay=0.01, fused=True, capturable=True
        )
        for master in self.masters:
            master.grad = torch.zeros_like(master)

    def __call__(self, batch: dict) -> Tensor:
        words = self.model.bert.embeddings.word_embeddings.weight
        decoder = F.pad(words, (0, 0, 0, self.padding))
        bias = F.pad(self.model.cls["predictions"].bias, (0, self.padding))
        loss = self.losses(self.model, self.p, decoder, bias, batch)
        loss.backward()
        torch._foreach_copy_([master.grad for master in self.masters], [own.grad for own in self.copies])
        nn.utils.clip_grad_norm_(self.masters, self.clip, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.copies, self.masters)
        for own in self.copies:
            own.grad = None
        return loss.detach()
