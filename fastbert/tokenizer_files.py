"""The files of a tokenizer, as `transformers` and older readers of BERT folders expect them.

Works on any object with the methods of `tokenizers.Tokenizer`, so that a model is saved without that package.
"""

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

# What `transformers` reads: tokenizer.json, tokenizer_config.json, tokenizer.<version>.json, and the files beside them.
_PATTERNS = (
    "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "tokenizer*.json",
)  # fmt: skip
_ROLES = ("pad", "unk", "cls", "sep", "mask")
_ROBERTAS = {"cls": "<s>", "sep": "</s>"}
_FLAGS = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")


def special_tokens(tokens: Container[str]) -> dict[str, str]:
    """Which token has which role: pad, unk, cls, sep, mask; without those that no token has.

    BERT spells them `[PAD]`, SentencePiece `<pad>`, ALBERT's published vocabularies have some of either kind, and
    RoBERTa has `<s>` and `</s>` for cls and sep.
    """
    spelled = {role: (f"[{role.upper()}]", f"<{role}>", _ROBERTAS.get(role, "")) for role in _ROLES}
    known = {role: [token for token in forms if token in tokens] for role, forms in spelled.items()}
    return {role: found[0] for role, found in known.items() if found}


def make(tokenizer: Any, max_length: int | None = None, padding_side: str = "right") -> dict[str, bytes]:
    """The files from which `transformers` gives the same ids as `tokenizer`.

    `transformers` builds its BertTokenizer, AlbertTokenizer and RobertaTokenizer from settings, a vocabulary and added
    tokens and not from all that is in tokenizer.json. A tokenizer that does more than these can gets the class that
    takes tokenizer.json as it is.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        max_length: the model's longest sequence in tokens; None for no limit.
        padding_side: "right", `transformers`' own, or "left".

    Returns:
        File name -> content: vocab.txt (a token's line is its id; a line is blank where no token has the id), of BPE
        vocab.json and merges.txt; added_tokens.json where tokens were added to the vocabulary, special_tokens_map.json,
        tokenizer_config.json and tokenizer.json, in this order.

    Raises:
        TypeError: another kind of tokenizer.
        ValueError: two tokens have the same id.
    """
    if not hasattr(tokenizer, "to_str") or not hasattr(tokenizer, "token_to_id"):
        raise TypeError(
            f"tokenizer must be a tokenizers.Tokenizer, a folder or None, got {type(tokenizer).__name__}; a fast "
            "tokenizer of transformers holds one as `backend_tokenizer`"
        )
    whole = json.loads(tokenizer.to_str())
    vocabulary, tokens = tokenizer.get_vocab(with_added_tokens=False), tokenizer.get_vocab()
    owners: dict[int, str] = {}
    for token, i in tokens.items():
        if owners.setdefault(i, token) != token:
            raise ValueError(
                f"the tokens {owners[i]!r} and {token!r} have the same id {i}: the vocabulary had unused ids when a "
                "token was added to it; give every id a token first"
            )
    added = {token["content"]: token for token in whole["added_tokens"]}
    special: dict[str, Any] = {f"{role}_token": token for role, token in special_tokens(tokens).items()}
    if special.get("cls_token") == _ROBERTAS["cls"]:
        special |= {"bos_token": special["cls_token"], "eos_token": special.get("sep_token")}
    more = [token for token, fields in added.items() if fields["special"] and token not in special.values()]
    special |= {"additional_special_tokens": more} if more else {}
    config = {
        **_settings(whole, tokens),
        **({} if max_length is None else {"model_max_length": max_length}),
        **({} if padding_side == "right" else {"padding_side": padding_side}),
        "added_tokens_decoder": {str(x["id"]): {flag: x[flag] for flag in _FLAGS} for x in added.values()},
        **special,
    }
    contents = _vocabulary(whole["model"], vocabulary)
    if beyond := {token: tokens[token] for token in added if token not in vocabulary}:
        contents["added_tokens.json"] = _json(beyond)
    contents |= {
        "special_tokens_map.json": _json(special),
        "tokenizer_config.json": _json(config),
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    return {name: text.encode() for name, text in contents.items()}


def _vocabulary(model: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, str]:
    if model["type"] == "BPE":
        merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
        return {"vocab.json": _json(dict(sorted(vocabulary.items(), key=lambda item: item[1]))), "merges.txt": merges}
    lines = [""] * (1 + max(vocabulary.values(), default=-1))
    for token, i in vocabulary.items():
        lines[i] = token
    return {"vocab.txt": "".join(f"{token}\n" for token in lines)}


def _settings(whole: dict[str, Any], tokens: dict[str, int]) -> dict[str, Any]:
    """The class that `transformers` loads the tokenizer with, and what that class must be told."""
    normalizer, model = whole["normalizer"] or {}, whole["model"]
    if (alberts := _albert_settings(whole)) is not None:
        return alberts
    if (robertas := _roberta_settings(whole)) is not None:
        return robertas
    berts = (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and whole["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and model.get("type") == "WordPiece"
        and (model["unk_token"], model["continuing_subword_prefix"]) == ("[UNK]", "##")
        and model["max_input_chars_per_word"] == 100
        and _frames_like_bert(whole["post_processor"] or {})
        and all(f"[{role.upper()}]" in tokens for role in _ROLES)
    )
    if not berts:
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


# AlbertTokenizer's parts, as tokenizer.json has them.
_QUOTES = [{"type": "Replace", "pattern": {"String": pair}, "content": '"'} for pair in ("``", "''")]
_PLAIN, _LOWER = [{"type": "NFKD"}, {"type": "StripAccents"}], [{"type": "Lowercase"}]
_SPACES = {"type": "Sequence", "pretokenizers": [
    {"type": "WhitespaceSplit"}, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
]}  # fmt: skip


def _albert_settings(whole: dict[str, Any]) -> dict[str, Any] | None:
    """What AlbertTokenizer must be told to be this tokenizer; None where it cannot be."""
    model, normalizer = whole["model"], whole["normalizer"] or {}
    steps = normalizer.get("normalizers")
    forms = {  # (keeps accents, lower-cases) -> normaliser
        (keep, lower): _QUOTES + (_PLAIN if not keep else []) + (_LOWER if lower else [])
        for keep in (True, False)
        for lower in (True, False)
    }
    form = next((form for form, expected in forms.items() if steps == expected), None)
    same = model.get("type") == "Unigram" and model["unk_id"] == 1 and model["vocab"][1][0] in ("[UNK]", "<unk>")
    same = same and not model.get("byte_fallback") and whole["pre_tokenizer"] == _SPACES
    if form is None or not same or not _frames_like_bert(whole["post_processor"] or {}):
        return None
    return {"tokenizer_class": "AlbertTokenizer", "keep_accents": form[0], "do_lower_case": form[1]}


def _roberta_settings(whole: dict[str, Any]) -> dict[str, Any] | None:
    """What RobertaTokenizer must be told to be this tokenizer; None where it cannot be."""
    model, splits, frames = whole["model"], whole["pre_tokenizer"] or {}, whole["post_processor"] or {}
    same = model.get("type") == "BPE" and whole["normalizer"] is None and splits.get("type") == "ByteLevel"
    same = same and splits["use_regex"] and frames.get("type") == "RobertaProcessing"
    if not same or (frames["cls"][0], frames["sep"][0]) != (_ROBERTAS["cls"], _ROBERTAS["sep"]):
        return None
    if model["dropout"] or model["unk_token"] or model["fuse_unk"] or model["byte_fallback"] or model["ignore_merges"]:
        return None
    spaces = {name: frames[name] for name in ("add_prefix_space", "trim_offsets")}
    if splits["add_prefix_space"] != spaces["add_prefix_space"]:
        return None
    return {"tokenizer_class": "RobertaTokenizer", **spaces}


def _frames_like_bert(post_processor: dict[str, Any]) -> bool:
    """Whether the special tokens of one and of two texts are [CLS] A [SEP] and [CLS] A [SEP] B [SEP]."""
    if post_processor.get("type") == "BertProcessing":
        return post_processor["cls"][0] == "[CLS]" and post_processor["sep"][0] == "[SEP]"
    if post_processor.get("type") != "TemplateProcessing":
        return False
    single, pair = (
        " ".join(f"{x['id']}:{x['type_id']}" for piece in post_processor[form] for x in piece.values())
        for form in ("single", "pair")
    )
    return (single, pair) == ("[CLS]:0 A:0 [SEP]:0", "[CLS]:0 A:0 [SEP]:0 B:1 [SEP]:1")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read(folder: str | os.PathLike) -> dict[str, bytes]:
    """Every file in `folder` that `transformers` reads for its tokenizer, to be copied: name -> content.

    Raises:
        FileNotFoundError: neither tokenizer.json nor a vocabulary is there.
    """
    contents = {path.name: path.read_bytes() for path in _present(folder)}
    if not contents.keys() & {"tokenizer.json", "vocab.txt", "vocab.json"}:
        raise FileNotFoundError(f"{folder} has no tokenizer: expected the file tokenizer.json or vocab.txt")
    return contents


def remove_others(folder: str | os.PathLike, contents: Mapping[str, bytes]) -> None:
    """Removes an earlier tokenizer's files that `contents` did not replace: their tokens would be read with the new."""
    for path in _present(folder):
        if path.name not in contents:
            path.unlink()


def _present(folder: str | os.PathLike) -> list[Path]:
    found = [path for pattern in _PATTERNS for path in sorted(Path(folder).glob(pattern)) if path.is_file()]
    return sorted(found, key=lambda path: path.name == "tokenizer.json")  # last, as readers look for it first
