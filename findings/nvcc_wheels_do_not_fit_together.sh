#!/usr/bin/env bash
# `pip install nvidia-cuda-nvcc==13.0.88` installs an nvcc that cannot compile an empty kernel for sm_90.
#
# Guess: a pinned wheel of a compiler brings the parts that it is released with.
# Seen, nvidia-cuda-nvcc 13.0.88: the wheel holds nvcc and ptxas, and requires nvidia-nvvm (the compiler proper),
# nvidia-cuda-crt and nvidia-cuda-runtime without versions. pip takes the newest, whose NVVM writes PTX 9.x of its own
# release; the older ptxas refuses it: "Unsupported .version". With the same version for all parts it compiles.
# So: pin nvidia-nvvm and nvidia-cuda-crt to the release of nvidia-cuda-nvcc.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
echo '__global__ void empty() {}' > empty.cu
compiles() {  # by the wheels that pip resolves from "$@"
  rm -rf venv
  python3 -m venv venv
  venv/bin/pip install --quiet "$@"
  venv/bin/pip list 2> /dev/null | grep nvidia
  "$(echo venv/lib/python3*/site-packages/nvidia/cu13/bin/nvcc)" -cubin -arch=sm_90 empty.cu -o empty.cubin 2> message
}
if compiles nvidia-cuda-nvcc==13.0.88; then
  echo "it compiles now: changed"
  exit 1
fi
cat message
grep -q "Unsupported .version" message
compiles nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88
echo "with all parts of one release: compiled"
