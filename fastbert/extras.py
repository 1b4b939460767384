"""The one place that says what to install where an optional package is missing."""

from importlib.util import find_spec

# What others than `pretrain` bring.
EXTRAS = {
    "finetune": {"sklearn", "scipy"}, "chinese": {"jieba", "ahocorasick_rs"}, "patch": {"transformers"},
    "onnx": {"onnx", "onnxscript"}, "formats": {"pyarrow", "zstandard"},
    "cluster": {"distributed"}, "lamb": {"pytorch_optimizer"},
}  # fmt: skip


def missing(what: str, *packages: str) -> str | None:
    """What an ImportError is to say where some of these packages are not here; None where all are.

    Args:
        what: what needs them, as the beginning of a sentence: "reading model folders needs".
        packages: their import names.
    """
    absent = [name for name in packages if find_spec(name) is None]
    if not absent:
        return None
    extra = next((extra for extra, names in EXTRAS.items() if names & set(absent)), "pretrain")
    return (
        f"{what} {', '.join(absent)}: pip install '.[{extra}]' in a checkout of this package. It is not on PyPI yet, "
        "and what PyPI calls fastbert is another project"
    )
