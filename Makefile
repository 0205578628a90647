# `make demo`, `make test` and most others build .venv first where it is missing. They need Python >= 3.11 with venv, and git.
PYTHON ?= python3
NEW_ENOUGH := sys; sys.exit(sys.version_info < (3, 11))
PY := .venv/bin/python
RUN := $(PY) -W ignore -m scripts
DEMO ?= runs/demo
DEMO_TASK := --data phantom --scale demo --threads 1
DEMO_TEACHER := $(DEMO_TASK) --dataset-dir $(DEMO)/elsewhere --architecture hdenseformer --epochs 40 --set overwrite=true
DEMO_STUDENT := $(DEMO_TASK) --dataset-dir $(DEMO)/hospital --set learning_rate=0.01 --set overwrite=true
DEMO_TEST := $(DEMO_TASK) --dataset-dir $(DEMO)/test --set overlap=0.25

.PHONY: env bench-env demo test test-real test-faults viewer browser-test bids-test benchmark-test gpu-check release-test pacs-test nnunet-env nnunet-test lint type bench release clean label label-env label-test

env: .venv/ready
.venv/ready: pyproject.toml requirements.txt requirements-dev.txt requirements-fast.txt requirements-dicom.txt
	@$(PYTHON) -c 'import $(NEW_ENOUGH)' || { echo "$$($(PYTHON) --version) is too old: Python 3.11 or newer is needed. Name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@.venv/bin/python -c 'import pip, $(NEW_ENOUGH)' 2> /dev/null || $(PYTHON) -m venv --clear .venv
	$(PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install -q --disable-pip-version-check -e ".[dev]"
	touch $@

# The packages that `python -m benchmarks inference` and `metrics` compare the bundle with. torch and torchvision are
# named because nnunetv2 would otherwise install builds with CUDA.
bench-env: env
	$(PY) -m pip install -q --disable-pip-version-check -e ".[benchmark,fast]" torch==2.13.0 torchvision==0.28.0

# The main job on phantoms. Four large teachers learn from 16 of 20 phantoms "elsewhere" (the others validate): one sees all
# modalities, three see one each. A small student learns from the 6 labelled phantoms of a "hospital": alone, with one
# teacher, with all four, and with the label in the teacher's place (the control); three seeds each. All are tested on 8
# phantoms that no network has seen, in one report. Two trainings run at a time, on one thread each.
demo: env
	@echo "demo: 10 to 15 minutes on two cores, environment included"
	@made=$$({ git rev-parse HEAD:scripts HEAD:configs; git diff HEAD -- scripts configs; \
	    echo '$(DEMO_TEACHER) $(DEMO_STUDENT) $(DEMO_METHOD) $(DEMO_TEST)'; } 2>&1 | cksum); \
	  if [ -e $(DEMO)/made_with ] && [ "$$made" != "$$(cat $(DEMO)/made_with)" ]; then \
	    echo "$(DEMO) holds networks of other code or settings. Remove it, or choose another: make demo DEMO=FOLDER"; \
	    exit 1; \
	  fi; \
	  mkdir -p $(DEMO) && echo "$$made" > $(DEMO)/made_with
	$(RUN) phantom --cases 20 --seed 1 --output-dir $(DEMO)/elsewhere
	$(RUN) phantom --cases 8 --seed 2 --first 101 --output-dir $(DEMO)/test
	$(RUN) phantom --cases 8 --seed 3 --first 201 --output-dir $(DEMO)/hospital
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(DEMO_TEACHERS:%=$(DEMO)/teacher_%/model.pt)
	$(MAKE) --no-print-directory $(DEMO)/cache/all/manifest.json
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 $(DEMO_RUNS:%=$(DEMO)/eval/%/summary.json)
	$(RUN) report --data phantom --dataset-dir $(DEMO)/test --output-dir $(DEMO) --title "Demo on phantoms" \
	  --evaluations $(DEMO_RUNS:%=$(DEMO)/eval/%) --average-seeds --baseline "student alone" \
	  --curves $(foreach run,$(DEMO_TEACHERS:%=teacher_%) $(filter %_0,$(DEMO_STUDENTS)),$(DEMO)/$(run)/curves.csv)

# Otherwise Make would delete the weights of the networks after their evaluation.
.SECONDARY:

DEMO_TEACHERS := all ct mr pet
MODALITIES_all := ct pet mr
MODALITIES_ct := ct
MODALITIES_mr := mr
MODALITIES_pet := pet
TEACHER_all := --teacher all=hdenseformer=$(DEMO)/teacher_all/model.pt
TEACHERS := $(TEACHER_all) $(foreach m,ct mr pet,--teacher $(m)=hdenseformer:$(m)=$(DEMO)/teacher_$(m)/model.pt)
NAME_alone := student alone
NAME_one := student, one teacher
NAME_four := student, four teachers
NAME_control := student, label as teacher
DEMO_STUDENTS := $(foreach arm,alone one four control,$(arm)_0 $(arm)_1 $(arm)_2)
DEMO_RUNS := $(DEMO_TEACHERS:%=teacher_%) $(DEMO_STUDENTS)
DEMO_METHOD := --method hinton --method dist --set loss\#weighting=confidence

$(DEMO)/teacher_%/model.pt:
	$(RUN) teacher $(DEMO_TEACHER) --modalities $(MODALITIES_$*) --output-dir $(@D)

$(DEMO)/cache/all/manifest.json: $(DEMO_TEACHERS:%=$(DEMO)/teacher_%/model.pt)
	$(RUN) cache-teachers $(DEMO_STUDENT) $(TEACHERS) --set overlap=0.25 --output-dir $(DEMO)/cache

$(DEMO)/alone_%/model.pt:
	$(RUN) train $(DEMO_STUDENT) --seed $* --output-dir $(@D)

$(DEMO)/one_%/model.pt: $(DEMO)/cache/all/manifest.json
	$(RUN) distill $(DEMO_STUDENT) $(DEMO_METHOD) $(TEACHER_all) --cache-dir $(DEMO)/cache --seed $* --output-dir $(@D)

$(DEMO)/four_%/model.pt: $(DEMO)/cache/all/manifest.json
	$(RUN) distill $(DEMO_STUDENT) $(DEMO_METHOD) $(TEACHERS) --cache-dir $(DEMO)/cache --seed $* --output-dir $(@D)

$(DEMO)/control_%/model.pt:
	$(RUN) distill $(DEMO_STUDENT) $(DEMO_METHOD) --teacher label --seed $* --output-dir $(@D)

$(DEMO)/eval/teacher_%/summary.json: $(DEMO)/teacher_%/model.pt
	$(RUN) evaluate $(DEMO_TEST) --architecture hdenseformer --modalities $(MODALITIES_$*) --weights $< --name "teacher $*" --output-dir $(@D)

$(DEMO)/eval/%/summary.json: $(DEMO)/%/model.pt
	$(RUN) evaluate $(DEMO_TEST) --weights $< --name "$(NAME_$(firstword $(subst _, ,$*)))" --output-dir $(@D)

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
SPACE := $(subst ,, )
LABEL_CONSTRAINT := file://$(subst $(SPACE),%20,$(CURDIR))/requirements-label.txt  # a list: its items hold no spaces

label-env: .venv-label/ready
.venv-label/ready: requirements-label.txt
	$(PYTHON) -m venv .venv-label
	$(LABEL_PY) -m pip install -q --disable-pip-version-check torch==2.13.0
	PIP_CONSTRAINT=$(LABEL_CONSTRAINT) PIP_BUILD_CONSTRAINT=$(LABEL_CONSTRAINT) \
	  $(LABEL_PY) -m pip install -q --disable-pip-version-check -r requirements-label.txt
	touch $@

# Start a server for 3D Slicer and OHIF on this machine only: see docs/clinic.md.
label: label-env
	$(LABEL_PY) -m monai_label.install $(LABEL)
	MONAI_LABEL_CORS_ORIGINS='["http://127.0.0.1:$(LABEL_PORT)"]' \
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
build/viewer/niivue.js: Makefile tools/niivue_licence.txt
	mkdir -p build/viewer
	npm pack --silent --pack-destination build/viewer @niivue/niivue@$(NIIVUE)
	echo "$(NIIVUE_SHA512)" | base64 -d | od -An -v -tx1 | tr -d ' \n' > build/viewer/sha512
	echo "$$(cat build/viewer/sha512)  build/viewer/niivue-niivue-$(NIIVUE).tgz" | sha512sum --check --quiet
	tar -xzf build/viewer/niivue-niivue-$(NIIVUE).tgz -C build/viewer package/dist/niivue.umd.js
	(echo "/*! NiiVue $(NIIVUE)"; cat tools/niivue_licence.txt; echo "*/"; cat build/viewer/package/dist/niivue.umd.js) > $@.part
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

# Results stay: they are in runs/.
clean:
	rm -rf build *.egg-info

# Write the zip for the MONAI model zoo, runs/release/<bundle>_v<version>.zip, and what goes with it. Needs a checkout without changes.
release: env
	$(PY) -W ignore -m tools.release

# Time the student and the teachers on one preprocessed case. `python -m benchmarks --help` lists all benchmarks.
bench: env
	$(PY) -m benchmarks networks
