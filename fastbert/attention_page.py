"""Attention of a sentence as a page to look at and a picture: what `fastbert attention` runs."""

import base64
import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from fastbert import files
from fastbert.data.texts import Texts, encode
from fastbert.data.tokenizer import load_tokenizer
from fastbert.models.auto import ENCODERS, class_of
from fastbert.models.encoder import Encoder
from fastbert.models.layers import MultiHeadAttention
from fastbert.page import with_data
from fastbert.pretrain.settings import expect

LONGEST = 128  # tokens; a page of more is large, and too fine to be read
# For the picture, those of them that are installed; the first comes with matplotlib, the others have Chinese.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei",
    "Microsoft YaHei", "PingFang SC", "Arial Unicode MS",
)  # fmt: skip
MOST_PIXELS = 40_000_000  # of the picture; more maps or tokens make it coarser than 150 dots an inch
TEMPLATE = Path(__file__).with_suffix(".html")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Settings of `fastbert attention`; its --help shows them."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A model folder, of this program or of transformers."""
    text: Annotated[str, tyro.conf.Positional]
    """The sentence."""
    second: Annotated[str | None, tyro.conf.Positional] = None
    """A second text, where the model is to read a pair."""
    output: Path = Path("attention.html")
    """The page to write: one file that needs no network."""
    png: Path | None = None
    """A picture of all layers and heads to write beside it."""

    def check(self) -> None:
        """Raises ValueError where a setting does not hold."""
        for name, suffix in (("output", ".html"), ("png", ".png")):
            path = getattr(self, name)
            if path is not None:
                is_file = path.suffix == suffix and not path.is_dir()
                expect(is_file, name, f"a file that ends in {suffix}, not a folder", str(path))
                if not path.absolute().parent.is_dir():
                    raise ValueError(f"the folder of {path} does not exist: make it, or choose another --{name}")


def attention(config: AttentionConfig) -> None:
    """Writes the page, and the picture where it is asked for.

    Raises:
        FileNotFoundError, ValueError, OSError: settings, folder or texts that do not hold.
    """
    config.check()
    model = class_of(config.folder, ENCODERS).from_pretrained(config.folder, add_pooling_layer=False)
    tokenizer = load_tokenizer(config.folder)
    texts = Texts([1], [config.text], None if config.second is None else [config.second], None)
    longest = min(LONGEST, model.config.longest)
    encoded = encode(tokenizer, texts, longest, model.config.vocab_size)[0]
    if encoded.cut:
        raise ValueError(f"the text has more than {longest} tokens, too many to be looked at: give a shorter one")
    ids = torch.tensor([encoded.ids])
    types = torch.tensor([encoded.type_ids]).clamp(max=model.config.type_vocab_size - 1)
    found = probabilities(model, ids, types)
    tokens = [tokenizer.decode([i], skip_special_tokens=False) or tokenizer.id_to_token(i) for i in encoded.ids]
    name = config.folder.resolve().name
    files.write(config.output.parent, {config.output.name: page(found, tokens, encoded.type_ids, name).encode()})
    print(f"written: {config.output}")
    if config.png is not None:
        draw(found, tokens, config.png)
        print(f"picture: {config.png}")


@torch.inference_mode()
def probabilities(model: Encoder, ids: Tensor, types: Tensor) -> Tensor:
    """Attention of one text, int64 [1, S] each -> float32 [layers, heads, S, S]; row q is query q's, and sums to 1.

    Raises:
        ValueError: a model with relative positions (XLNet).
    """
    found: list[Tensor] = []

    def keep(module: MultiHeadAttention, arguments: tuple, _: Tensor) -> None:
        x = arguments[0]
        q, k, _ = module.qkv(x).view(len(x), 3, module.heads, -1).permute(1, 2, 0, 3)  # [N, S, D] each
        scores = (q.float() @ k.float().transpose(1, 2)) / q.shape[-1] ** 0.5
        if module.causal:
            later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        found.append(scores.softmax(-1))

    attentions = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    if not attentions:
        raise ValueError(
            f"{model.names.article} attends by relative positions, of which no page is made so far: give a folder "
            "of BERT, ALBERT, RoBERTa or ERNIE"
        )
    hooks = [module.register_forward_hook(keep) for module in attentions]
    try:
        model(ids, token_type_ids=types)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def page(found: Tensor, tokens: Sequence[str], type_ids: Sequence[int], model: str) -> str:
    """The page as HTML, with the probabilities [layers, heads, S, S] in it, in 65,535ths."""
    packed = (found * 65535).round().to(torch.int32).numpy().astype("<u2").tobytes()
    data = {
        "model": model, "tokens": list(tokens), "layers": found.shape[0], "heads": found.shape[1],
        "second": next((place for place, kind in enumerate(type_ids) if kind), 0),
        "probabilities": base64.b64encode(packed).decode(),
    }  # fmt: skip
    return with_data(TEMPLATE, data)


def draw(found: Tensor, tokens: Sequence[str], path: Path) -> None:
    """All layers (rows) and heads (columns) as one picture for print; tokens at the outer maps, where they are few."""
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers, heads, size, _ = found.shape
    installed = set(font_manager.get_font_names())
    families = [name for name in FONTS if name in installed]
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in families]
    shown = tokens if size <= 24 else []
    boxes = sorted(c for c in set("".join(shown)) if not any(font.get_char_index(ord(c)) for font in fonts))
    if boxes:
        print(f"no font here has {' '.join(boxes)}: boxes stand for them in the picture until one is installed")
    inches = max(1.1, 0.16 * size) if size <= 24 else 1.6
    width, height = inches * heads + 1.2, inches * layers + 1.2
    dots = min(150.0, math.sqrt(MOST_PIXELS / (width * height)))  # an inch
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = panels[layer, head]
            axes.imshow(found[layer, head].numpy(), cmap="Blues", vmin=0, vmax=1)
            below, left = (shown if outer else [] for outer in (layer == layers - 1, head == 0))
            text = {"fontsize": 7, "fontfamily": families, "parse_math": False}  # "$$" is no formula
            axes.set_xticks(range(len(below)), below, rotation=90, **text)
            axes.set_yticks(range(len(left)), left, **text)
            axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # said above
        figure.savefig(path, dpi=dots)
