# PYTHON picks the interpreter (3.11 or newer) that the virtual environment is made with.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
BIN := $(VENV)/bin
# Files in the order that tests/conftest.py gives them; tests of a file share what they trained.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# On Linux the C library then asks for large pages: steps on a CPU are a fifth faster.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
PRETRAINED := $(RUNS)/demo/pretrain
TRANSFERRED := $(RUNS)/demo/transfer

.PHONY: install demo docs test test-all lint golden reference clean

install: $(VENV)/installed

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

# Pretrain on invented letters, transfer to ten real digits of each kind with four seeds beside the
# same recipe from random parameters, draw what happened.
demo: install
	$(BIN)/python -m big_vit.train --config configs/pretrain_fdsl.py:source=glyphs,patch=8 \
		--workdir $(PRETRAINED)
	$(BIN)/python -m big_vit.transfer --config 'configs/transfer_digits.py:split=train[:100]' \
		--config.total_steps=150 --config.batch_size=50 --config.transfer.random_features=false \
		--config.init=$(PRETRAINED) --seeds 4 --workdir $(TRANSFERRED)
	$(BIN)/python -m big_vit.explore $(PRETRAINED) --png $(RUNS)/demo
	$(BIN)/python -m big_vit.report $(TRANSFERRED)
	@echo
	@echo "pictures     $(RUNS)/demo/curves.png  $(RUNS)/demo/images.png"
	@echo "report       $(TRANSFERRED)/report.html"
	@echo "checkpoint   $(PRETRAINED)/checkpoints"
	@echo "next         $(BIN)/python -m big_vit.report $(PRETRAINED)"
	@echo "             $(BIN)/python -m big_vit.train --config configs/fashion_mnist.py --workdir $(RUNS)/fashion"

# The documentation as a site, in build/site; a broken link or anchor is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "wrote   build/site/index.html; to look at it: $(BIN)/python -m mkdocs serve"

test: install
	$(PYTEST) -m 'not slow'

test-all: install
	$(PYTEST)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Rewrites tests/golden/ from the code; look at the difference before committing it.
golden: install
	UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/test_golden.py tests/test_docs.py

# Rewrites docs/reference.md from the docstrings.
reference: install
	$(BIN)/python docs/make_reference.py

clean:
	rm -rf $(VENV) $(RUNS) .cache .pytest_cache .ruff_cache .mypy_cache build *.egg-info
