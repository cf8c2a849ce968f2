# Everything a developer does. `make demo` and `make test` need nothing but python3 (3.10 to 3.13) and set up .venv.

PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed
# Processes that run tests beside each other.
JOBS   ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv lock licences sbom wheel demo test test-all lint types bench bench-full bench-sweep bench-compiled clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(STAMP)  ## make .venv with everything that the demo and the tests need

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt tools/install.py $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "$(PYTHON) is not supported: 3.10 to 3.13 is needed. Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m tools.install
	@touch $(STAMP)

# What is locked, and for whom: requirements/README.md.
PYTHONS ?= $(VENV)/bin/python

lock: venv  ## pin every package with its hash, for the Pythons of PYTHONS="python3.11 ...": requirements/*.txt
	$(VENV)/bin/python -m tools.lock $(PYTHONS)

licences: venv  ## list every package with its licence: docs/dependencies.md
	$(VENV)/bin/python -m tools.page

sbom: wheel  ## the bills of materials, CycloneDX: dist/magicface_rt*.cdx.json
	$(VENV)/bin/python -m tools.sbom dist/magicface_rt-*.whl dist/magicface_rt.cdx.json

wheel: venv  ## the wheel, the same bytes every time: dist/*.whl
	rm -f dist/*.whl
	$(VENV)/bin/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

demo: venv  ## the whole chain on the miniature that is shipped: export, pictures, sheet, parity
	$(VENV)/bin/magicface-rt demo

# A file's tests share what they made. The files that take long come first, as tests/conftest.py has them.
BESIDE  := -n $(JOBS) --dist loadfile --no-loadscope-reorder
RESUMED := $(if $(RESUME),--resume)

test: lint types  ## lint, types and the quick tests
	$(VENV)/bin/python -m pytest -q $(BESIDE) -m "not slow and not full and not gpu"

# Hours on two cores. RESUME=1 leaves out what passed before at this very commit: tests/record.py.
# The full-size network alone: two at once would not fit into 24 GB.
test-all: lint types  ## all tests that need no GPU: every recording, the full-size network, the slow properties
	@failed=0; set -x; \
	$(VENV)/bin/python -m pytest -q $(RESUMED) $(BESIDE) -m "not gpu and not full" || failed=1; \
	$(VENV)/bin/python -m pytest -q $(RESUMED) -m "full and not gpu" || failed=1; \
	exit $$failed

lint: venv  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet benchmarks engines export magicface_rt tests tools

types: venv  ## mypy, strict on the runtime and the tools
	$(VENV)/bin/mypy

# What is measured, and how to read it: benchmarks/README.md.
BENCH := .cache/bench

bench: $(BENCH)/tiny/bundle/bundle.json  ## time the SDK beside PyTorch on a small random model, into bench-out
	$(VENV)/bin/magicface-rt bench $(BENCH)/tiny/bundle --checkpoint $(BENCH)/tiny/checkpoint --out bench-out --torch-device cpu \
	  --concepts 0,3 --steps 4 --rounds 6 --requests 1 --parity-steps 2

# One-step measurements of the full-size network: 24 GB of memory, and hours on two cores. (a) runs alone.
# BUNDLE and CHECKPOINT name a float32 bundle and what it was made from; without them random ones are made.
BUNDLE       ?= $(BENCH)/sd15/bundle
CHECKPOINT   ?= $(BENCH)/sd15/checkpoint
CONCEPTS     ?= 0,1,2,3,4
CONTENDERS   ?= authors,strong,plain,kept
ROUNDS       ?= 6
ALONE_ROUNDS ?= 3

bench-full: $(BUNDLE)/bundle.json  ## the same with the full-size network, single steps
	$(VENV)/bin/magicface-rt bench $(BUNDLE) --checkpoint $(CHECKPOINT) --out bench-out/full --torch-device cpu \
	  --contenders $(CONTENDERS) --concepts $(CONCEPTS) --mask-share 30 --steps 50 --requests 0 \
	  --rounds $(ROUNDS) --parity-steps 2 --oracle strong --alone authors --alone-rounds $(ALONE_ROUNDS)

# The small model's own size and half of it. Without (a), which would take most of the time.
bench-sweep: $(BENCH)/tiny/bundle/bundle.json $(BENCH)/tiny/bundle-128/bundle.json  ## masks of 10 to 100 %, batches of 1 to 8, 20 and 50 steps, two sizes, every backend, on the small model
	$(VENV)/bin/magicface-rt bench $(BENCH)/tiny/bundle $(BENCH)/tiny/bundle-128 --checkpoint $(BENCH)/tiny/checkpoint \
	  --out bench-out/sweep --torch-device cpu --contenders strong,plain,bare,kept --backends all \
	  --one-at-a-time --concepts 3,0,1,2,4 --mask-share 30,10,60,100 \
	  --images 1,2,4,8 --steps 20,50 --rounds 6 --requests 1

bench-compiled: $(BENCH)/tiny/bundle/bundle.json  ## torch.compile of the strong baseline beside us, on the small model
	$(VENV)/bin/magicface-rt bench $(BENCH)/tiny/bundle --checkpoint $(BENCH)/tiny/checkpoint --out bench-out/compiled --torch-device cpu \
	  --contenders strong,compiled,kept --concepts 3,1 --steps 4 --rounds 6 --requests 6

$(BENCH)/tiny/bundle-128/bundle.json: $(BENCH)/tiny/bundle/bundle.json
	rm -rf $(@D)
	$(VENV)/bin/magicface-rt export $(BENCH)/tiny/checkpoint --out $(@D) --dtype fp32 --height 128 --width 128

$(BENCH)/%/bundle/bundle.json: | $(STAMP)
	rm -rf $(BENCH)/$*
	mkdir -p $(BENCH)/$*
	$(VENV)/bin/magicface-rt checkpoint $* --out $(BENCH)/$*/checkpoint --seed 0
	$(VENV)/bin/magicface-rt export $(BENCH)/$*/checkpoint --out $(BENCH)/$*/bundle --dtype fp32

clean:  ## remove .venv and everything that was made here
	rm -rf $(VENV) build dist demo-out bench-out .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
