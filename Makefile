# Every target builds .venv first where it is missing; nothing but Python >= 3.11 is needed.
PYTHON ?= python3
PY := .venv/bin/python
RUN := $(PY) -W ignore -m scripts
DEMO ?= runs/demo
DEMO_DATA := --data phantom --scale demo --dataset-dir $(DEMO)/train --set overwrite=true
DEMO_TEST := --data phantom --scale demo --dataset-dir $(DEMO)/test --threads 1 --set overlap=0.25

.PHONY: env bench-env demo test test-real test-faults viewer browser-test bids-test benchmark-test gpu-check release-test pacs-test nnunet-env nnunet-test lint type bench release clean label label-env label-test

env: .venv/ready
.venv/ready: pyproject.toml requirements.txt requirements-dev.txt requirements-fast.txt requirements-dicom.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

# The packages that `python -m benchmarks inference` and `metrics` compare the bundle with. torch and torchvision are
# named because nnunetv2 would otherwise install builds with CUDA.
bench-env: env
	$(PY) -m pip install -q --disable-pip-version-check -e ".[benchmark,fast]" torch==2.13.0 torchvision==0.28.0

# The main job on phantoms: three teachers and the student alone, two at a time on one thread each, then the student
# with its teachers, all five on phantoms that none has seen, one report.
demo: env
	@echo "demo: 4 to 10 minutes on two cores, environment included"
	$(RUN) phantom --cases 20 --seed 1 --output-dir $(DEMO)/train
	$(RUN) phantom --cases 8 --seed 2 --first 101 --output-dir $(DEMO)/test
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(DEMO)/teacher_mr/model.pt $(DEMO)/teacher_pet/model.pt $(DEMO)/teacher_ct/model.pt $(DEMO)/alone/model.pt
	$(MAKE) --no-print-directory $(DEMO)/distilled/model.pt
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(foreach n,ct pet mr,$(DEMO)/eval/teacher_$(n)/summary.json) $(DEMO)/eval/alone/summary.json $(DEMO)/eval/distilled/summary.json
	$(RUN) report --data phantom --dataset-dir $(DEMO)/test --output-dir $(DEMO) --title "Demo on phantoms" \
	  --evaluations $(foreach n,teacher_ct teacher_pet teacher_mr alone distilled,$(DEMO)/eval/$(n)) \
	  --curves $(foreach n,teacher_ct teacher_pet teacher_mr alone distilled,$(DEMO)/$(n)/curves.csv)

DEMO_EPOCHS ?= 10
ARCH_ct := unetr
ARCH_pet := hdenseformer
ARCH_mr := swinunetr

$(DEMO)/teacher_%/model.pt:
	$(RUN) teacher $(DEMO_DATA) --architecture $(ARCH_$*) --modalities $* --epochs $(DEMO_EPOCHS) --threads 1 --output-dir $(@D)

$(DEMO)/alone/model.pt:
	$(RUN) train $(DEMO_DATA) --epochs $(DEMO_EPOCHS) --threads 1 --output-dir $(@D)

$(DEMO)/distilled/model.pt: $(foreach m,ct pet mr,$(DEMO)/teacher_$(m)/model.pt)
	$(RUN) distill $(DEMO_DATA) --epochs $(DEMO_EPOCHS) --teachers-dir $(DEMO) --output-dir $(@D)

$(DEMO)/eval/teacher_%/summary.json: $(DEMO)/teacher_%/model.pt
	$(RUN) evaluate $(DEMO_TEST) --architecture $(ARCH_$*) --modalities $* --weights $< --name "teacher $*" --output-dir $(@D)

$(DEMO)/eval/%/summary.json: $(DEMO)/%/model.pt
	$(RUN) evaluate $(DEMO_TEST) --weights $< --name "student $*" --output-dir $(@D)

# Two processes, each on one thread; a file's tests stay together, since they share what they prepare.
test: env
	$(PY) -m pytest -n 2 --dist loadfile

test-real: env
	$(PY) -m pytest -m "real or slow"

# Every fault of docs/reliability.md made for real, and 12,000 damaged files and 5,000 damaged DICOM folders, counted by
# kind in docs/results/reliability/fuzz.json.
test-faults: env
	$(PY) -m pytest -m "faults or not faults" tests/end_to_end/runs tests/end_to_end/faults tests/end_to_end/fuzz
	$(PY) -W ignore -m benchmarks fuzz --mutations 12000 --dicom-mutations 5000 \
	  --json docs/results/reliability/fuzz.json

# The environment of MONAI Label. torch is installed first, so that no other package chooses its build. The build
# constraint is for sam2, which pip builds from source and which would otherwise install another torch for its build.
LABEL ?= runs/label
LABEL_PORT ?= 8000
LABEL_STUDIES ?= $(LABEL)/studies
LABEL_PY := .venv-label/bin/python

label-env: .venv-label/ready
.venv-label/ready: requirements-label.txt
	$(PYTHON) -m venv .venv-label
	$(LABEL_PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	PIP_CONSTRAINT=$(CURDIR)/requirements-label.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/requirements-label.txt \
	  $(LABEL_PY) -m pip install -q --disable-pip-version-check -r requirements-label.txt
	touch $@

# Start a server for 3D Slicer and OHIF on this machine only: see docs/clinic.md.
label: label-env
	$(LABEL_PY) -m monai_label.install $(LABEL)
	$(LABEL_PY) -m monailabel.main start_server --app $(LABEL)/apps/monaibundle --studies $(LABEL_STUDIES) \
	  --conf models distilled_segmentation --conf zoo_source local --conf sam2 false --host 127.0.0.1 --port $(LABEL_PORT)

label-test: env label-env
	$(PY) -m pytest -m label tests/monai_label

# The tests of benchmarks/, which `make test` leaves out.
benchmark-test: env
	$(PY) -m pytest -m "not slow" tests/benchmarks

# Training steps, memory and masks on one GPU, in minutes; it needs an environment with PyTorch for that GPU.
gpu-check:
	$(PYTHON) -m benchmarks gpu --output-dir runs/gpu

# The zip for the model zoo, unpacked and put through the checks of the zoo; `make test` leaves it out. With a clone of
# the zoo's repository, `make release-test ZOO=FOLDER`, its own programs run too.
release-test: env
	$(PY) -m pytest -m "release or not release" tests/tools

# The viewer of the report, NiiVue, from the npm registry: this version, checked by the registry's own hash. Nothing of it is
# in the repository; reports written without it hold still images.
NIIVUE := 0.69.0
NIIVUE_SHA512 := YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==

viewer: build/viewer/niivue.js
build/viewer/niivue.js: Makefile
	mkdir -p build/viewer
	npm pack --silent --pack-destination build/viewer @niivue/niivue@$(NIIVUE)
	echo "$(NIIVUE_SHA512)" | base64 -d | od -An -v -tx1 | tr -d ' \n' > build/viewer/sha512
	echo "$$(cat build/viewer/sha512)  build/viewer/niivue-niivue-$(NIIVUE).tgz" | sha512sum --check --quiet
	tar -xzf build/viewer/niivue-niivue-$(NIIVUE).tgz -C build/viewer package/dist/niivue.umd.js
	(echo "/*! NiiVue $(NIIVUE). Copyright (c) 2021, Niivue. All rights reserved. SPDX-License-Identifier: BSD-2-Clause."; \
	  echo "    The licence: https://github.com/niivue/niivue/blob/main/LICENSE */"; \
	  cat build/viewer/package/dist/niivue.umd.js) > $@.part
	mv $@.part $@
	rm -r build/viewer/package build/viewer/niivue-niivue-$(NIIVUE).tgz build/viewer/sha512

# Needs Chromium, and says so where it is absent: apt-get install chromium. Where npm is absent, the viewer's tests are skipped.
browser-test: env
	-$(MAKE) --no-print-directory viewer
	$(PY) -m pytest -m browser -rs tests/report/test_browser.py

# The validator of BIDS, in an environment of its own. The tests that need it say so where it cannot be installed.
bids-test: env
	-[ -f .venv-bids/ready ] || $(MAKE) --no-print-directory .venv-bids/ready
	$(PY) -m pytest -m bids -rs tests/end_to_end/test_bids_validator.py

.venv-bids/ready:
	$(PYTHON) -m venv .venv-bids
	.venv-bids/bin/python -m pip install -q --disable-pip-version-check "bids-validator-deno>=3.0.2"
	touch $@

# An Orthanc is started on a free port of this machine and ended; it says so where none is installed:
# apt-get install orthanc orthanc-dicomweb
pacs-test: env
	$(PY) -m pytest -m "pacs or not pacs" -rs tests/end_to_end/test_pacs.py tests/image_io/test_dicomweb.py tests/cli/test_segment_pacs.py

# An nnU-Net is trained on phantoms, cached and distilled from, in an environment of its own. torch is installed first, so
# that no other package chooses its build.
NNUNET_PY := .venv-nnunet/bin/python

nnunet-env: .venv-nnunet/ready
.venv-nnunet/ready: pyproject.toml requirements.txt requirements-nnunet.txt
	$(PYTHON) -m venv .venv-nnunet
	$(NNUNET_PY) -m pip install -q --disable-pip-version-check torch==2.13.0 torchvision==0.28.0
	$(NNUNET_PY) -m pip install -q --disable-pip-version-check -e ".[nnunet]" pytest pytest-timeout torch==2.13.0 torchvision==0.28.0
	touch $@

nnunet-test: nnunet-env
	$(NNUNET_PY) -m pytest -m nnunet -s tests/distillation/test_nnunet_teacher.py

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

type: env
	.venv/bin/mypy

clean:
	rm -rf runs build *.egg-info

# Write the zip for the MONAI model zoo, runs/release/<bundle>_v<version>.zip, and what goes with it. Needs a checkout without changes.
release: env
	$(PY) -W ignore -m tools.release

# Time the student and the teachers on one preprocessed case. `python -m benchmarks --help` lists all benchmarks.
bench: env
	$(PY) -m benchmarks networks
