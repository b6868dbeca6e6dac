# Builds the trainer, its tests and the data tools; `make help` lists what there is.
# dev/configure_check.in finds the libraries; a missing one only removes a feature.
# Objects live in a folder named after compiler, flags and CPU, so variants never mix and an
# option may be switched at any time.

# Options: make OPTION=value
CXX      := $(if $(filter default,$(origin CXX)),g++,$(CXX))
MARCH    ?= native#     what -march says; empty for none
SANITIZE ?= 0#          1: address and undefined-behaviour sanitizers
OPENMP   ?= 1#          0 leaves the feature out even where it is found
ONEDNN   ?= 1
MPI      ?= 1
CUDA     ?= $(if $(filter-out 0 no,$(strip $(SANITIZE))),0,1)#  0 or 1; the sanitizers do not look into a GPU
NCCL     ?= 1
SIM      ?= 1#          0: no tests of the simulated GPU
CUDA_ARCH ?= sm_80 sm_90a compute_90#  GPUs to compile for; compute_N: for newer ones, when it starts
WERROR   ?= 1#          0: a warning of a compiler newer than ours does not stop the build
BUILD    ?= build
V        ?= 0#          1: print whole commands
JOBS     ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 1) + 1)))#  tests at a time; many spend their time waiting

.DEFAULT_GOAL := train_gpt
comma := ,
.DELETE_ON_ERROR:
.PHONY: all deps test test-oracles bench fuzz fuzz-binary compile_commands tidy format check-format clean help FORCE
MAKEFLAGS += --no-builtin-rules
ifeq ($(MAKELEVEL)$(findstring -j,$(MAKEFLAGS)),0)
MAKEFLAGS += -j$(shell nproc 2>/dev/null || echo 2)
endif

ifneq ($(filter deps,$(MAKECMDGOALS)),)
# `make deps train_gpt`: the other goals start afresh, once what they need has been installed.
others := $(filter-out deps,$(MAKECMDGOALS))
.PHONY: $(others) after-deps
deps:
	@dev/deps.sh
after-deps: deps
	@+$(MAKE) --no-print-directory $(others)
$(others): after-deps
	@:
else ifneq ($(filter-out help clean format check-format,$(or $(MAKECMDGOALS),all)),)

# What this machine has. `$(call found,ONEDNN)` is a version, or empty.
pkg = $(shell pkg-config $1 2>/dev/null)
yes = $(filter-out 0 no,$(strip $1))
word_of = $(patsubst $1=%,%,$(filter $1=%,$(checked)))
cpu := $(addprefix -march=,$(strip $(MARCH)))
cpu := $(if $(cpu),$(shell $(CXX) $(cpu) -E -x c++ /dev/null >/dev/null 2>&1 && echo $(cpu)))
openmp := $(if $(call yes,$(OPENMP)),-fopenmp)
mpi_cflags := $(if $(call yes,$(MPI)),$(shell mpicc -showme:compile 2>/dev/null || \
    pkg-config --cflags ompi-c 2>/dev/null || pkg-config --cflags mpich 2>/dev/null))
mpi_libs := $(if $(call yes,$(MPI)),$(shell mpicc -showme:link 2>/dev/null || \
    pkg-config --libs ompi-c 2>/dev/null || pkg-config --libs mpich 2>/dev/null))
nvcc := $(if $(call yes,$(CUDA)),$(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc)))
cuda_home := $(if $(nvcc),$(abspath $(dir $(realpath $(nvcc)))..))
checked := $(shell $(CXX) -std=c++20 $(CPPFLAGS) $(openmp) $(mpi_cflags) \
    $(if $(cuda_home),-I$(cuda_home)/include -DCHECK_CUDA) -E -P -x c++ dev/configure_check.in \
    2>/dev/null | sed -n 's/^found \([A-Z0-9]*\) /\1=/; T; s/[ "]//g; p')
found = $(if $(call yes,$(or $($1),1)),$(call word_of,$1))
openmp := $(if $(call found,OPENMP),$(openmp))#     clang may have the flag, and not the library
python := $(firstword $(wildcard $(BUILD)/venv/bin/python3) python3)
cuda := $(if $(nvcc),$(shell $(nvcc) --version | sed -n 's/.*release \([0-9.]*\).*/\1/p'))
cuda_lacks := $(if $(cuda),$(if $(filter 7.% 8.% 9.% 10.% 11.%,$(cuda)),CUDA 12 or newer,$(if \
    $(call word_of,CUBLASLT),,cuBLASLt)))
cuda_source := $(if $(cuda),$(if $(cuda_lacks),,$(wildcard train_gpt.cu)))
nccl := $(if $(cuda_source),$(if $(call found,MPI),$(call found,NCCL)))

# Compiler and linker
warnings := -Wall -Wextra $(if $(openmp),,-Wno-unknown-pragmas) $(if $(call yes,$(WERROR)),-Werror)
# g++ 12 and 13 warn wrongly about overlapping copies in std::string (GCC bug 105651); clang warns
# where it makes no vectors of a loop marked `omp simd`.
clang := $(findstring clang,$(shell $(CXX) --version 2>/dev/null))
warnings += $(if $(clang),-Wno-pass-failed,-Wno-restrict)
ifneq ($(call yes,$(SANITIZE)),)
# With clang the objects serve `make fuzz` too.
optimize := -O1 -g1 -fsanitize=address,undefined$(if $(clang),$(comma)fuzzer-no-link) -fno-sanitize-recover=all \
    -fno-omit-frame-pointer
warnings += $(if $(clang),,-Wno-maybe-uninitialized)
else
optimize := -O3 -fno-math-errno -fno-trapping-math
# Compilers make 32-byte vectors of AVX-512 unless told: with 64 GELU and SwiGLU are 1.3 times faster.
ifneq ($(shell $(CXX) $(cpu) -dM -E -x c++ /dev/null 2>/dev/null | grep -w __AVX512F__),)
optimize += -mprefer-vector-width=512
endif
endif
quick := $(optimize:-O3=-O1)
# Under sanitizers -O1 takes twice as long to compile as -O0, which suffices for tests.
quickest := $(quick:-O1=$(if $(call yes,$(SANITIZE)),-O0,-O1))
built_with := $(optimize)#     for the run record; `optimize` differs by target
flags := -std=c++20 $(cpu) $(warnings) $(openmp) -I. $(CPPFLAGS) $(CXXFLAGS)
libs := $(LDFLAGS) $(if $(filter Linux,$(shell uname)),-Wl$(comma)--as-needed) -lpthread
ifneq ($(call found,ONEDNN),)
flags += -DLNS_ONEDNN
libs += -ldnnl
endif
ifneq ($(call found,MPI),)
flags += -DLNS_MPI -DOMPI_SKIP_MPICXX -DMPICH_SKIP_MPICXX $(addprefix -isystem ,$(patsubst -I%,%,$(filter -I%,$(mpi_cflags))))
libs += $(mpi_libs)
endif
ifneq ($(call found,PCRE2),)
flags += -DLNS_PCRE2 $(call pkg,--cflags libpcre2-8)
libs += $(or $(call pkg,--libs libpcre2-8),-lpcre2-8)
endif
ifneq ($(call found,UTF8PROC),)
flags += -DLNS_UTF8PROC $(call pkg,--cflags libutf8proc)
libs += $(or $(call pkg,--libs libutf8proc),-lutf8proc)
endif
ifneq ($(call found,SENTENCEPIECE),)
flags += -DLNS_SENTENCEPIECE
libs += $(filter -L%,$(call pkg,--libs sentencepiece)) -lsentencepiece
endif
ifneq ($(call found,LIBEDIT),)
flags += -DLNS_LIBEDIT
libs += $(or $(call pkg,--libs libedit),-ledit)
endif
ifneq ($(cuda_source),)
# nvcc compiles train_gpt.cu, and calls the host's compiler for what is not a kernel.
flags += -DLNS_CUDA
cuda_lib := $(firstword $(dir $(wildcard $(foreach d,lib64 lib,$(cuda_home)/$d/libcublasLt.so))))
libs += $(if $(cuda_lib),-L$(cuda_lib) -Wl$(comma)-rpath$(comma)$(cuda_lib:%/=%)) \
    $(if $(nccl),-lnccl) -lcublasLt -lcudart_static -ldl -lrt
architectures := $(foreach a,$(CUDA_ARCH),-gencode=arch=$(a:sm_%=compute_%)$(comma)code=$a)
nvcc_flags := -std=c++20 -O3 -t0 --expt-relaxed-constexpr $(architectures) $(addprefix -ccbin ,$(filter %g++ g++-%,$(firstword $(CXX)))) \
    $(addprefix -Xcompiler ,-Wall -Wextra $(openmp)) $(if $(call yes,$(WERROR)),-Werror all-warnings -Xcompiler -Werror) \
    $(if $(nccl),-DLNS_NCCL) -DLNS_CUDA -I. $(NVCCFLAGS)
cuda_object := $(BUILD)/cuda-$(shell echo $(nvcc) $(cuda) $(nvcc_flags) | cksum | cut -d' ' -f1)/train_gpt.cu.o
endif

variant := $(if $(call yes,$(SANITIZE)),sanitize,release)-$(shell (echo $(CXX) $(flags) $(optimize) $(libs) $(checked); \
    $(CXX) $(flags) $(optimize) -E -dM -x c++ /dev/null 2>/dev/null) | cksum | cut -d' ' -f1)
O := $(BUILD)/$(variant)
ifeq ($(call yes,$(V)),)
say = @printf '  %-5s %s\n' $1 $2;
endif

# What there is to build
objects = $(patsubst %.cpp,$O/%.o,$1)
library := $(call objects,$(wildcard gpt/*/*.cpp))
sim_tests := $(wildcard dev/test/sim_test.cpp dev/test/cuda_*_test.cpp)
tests := $(call objects,$(filter-out $(sim_tests),$(wildcard dev/test/*_test.cpp)))
programs := train_gpt test_gpt $(patsubst %.cpp,%,$(wildcard data/tokenize.cpp data/stories.cpp data/vocabulary.cpp))
existing := $(foreach p,$(programs),$(if $(wildcard $p.cpp),$p))
-include $(patsubst %.o,%.d,$(cuda_object) $(library) $(tests) $(call objects,$(addsuffix .cpp,$(existing)) dev/fuzz/fuzz.cpp dev/oracles/tokens.cpp))

# The program itself is a hard link to the variant built last.
.PHONY: $(programs)
$(programs): %: $O/% FORCE
	@[ $< -ef $@ ] || ln -f $< $@ 2>/dev/null || cp -f $< $@

$(addprefix $O/,$(programs) dev/oracles/tokens): $O/%: $O/%.o $O/libgpt.a
	$(call say,LINK,$*)$(CXX) $(optimize) $(flags) $(filter %.o,$^) $O/libgpt.a -o $@ $(libs)
ifneq ($(call found,SENTENCEPIECE),)
$O/data/vocabulary: libs += -lsentencepiece_train
endif
$O/unit_tests: $(tests) $O/libgpt.a
	$(call say,LINK,unit_tests)$(CXX) $(optimize) $(flags) $(filter %.o,$^) $O/libgpt.a -o $@ -lgtest_main -lgtest $(libs)
$O/train_gpt $O/test_gpt $O/unit_tests: $(cuda_object)
$O/libgpt.a: $(library)
	@rm -f $@
	$(call say,AR,libgpt.a)$(AR) crs $@ $^

$O/%.o: %.cpp | $O/.found
	@mkdir -p $(@D)
	$(call say,CXX,$<)$(CXX) $(optimize) $(flags) -MMD -MP -c $< -o $@
# Code that mostly waits for files or people is compiled with -O1, test_gpt with -O2.
computes := $(addprefix gpt/,base/checksum.cpp run/probe.cpp run/checkpoint.cpp run/safetensors.cpp run/export.cpp)
$(call objects,$(filter-out $(computes),$(wildcard gpt/base/*.cpp data/*.cpp))): optimize := $(quick)
$(tests) $(call objects,$(filter-out $(computes),$(wildcard gpt/run/*.cpp))): optimize := $(quickest)
$O/test_gpt.o: optimize := $(optimize:-O3=-O2) -DTESTING
ifneq ($(cuda_source),)
$(cuda_object): train_gpt.cu | $O/.found
	@mkdir -p $(@D)
	$(call say,NVCC,$<)$(nvcc) $(nvcc_flags) -MMD -MP -c $< -o $@
endif

# What the run record says about the build: gpt/base/build.cpp alone sees it, and it is only
# touched when it changes.
$O/gpt/base/build.o: flags += -I$O
$O/gpt/base/build.o: $O/build_info.h
version := $(shell sed -n 's/^## \([0-9][0-9.]*\).*/\1/p; T; q' CHANGELOG.md 2>/dev/null)
features := {"OpenMP", "$(or $(call found,OPENMP),no)"}, {"oneDNN", "$(or $(call found,ONEDNN),no)"}, \
    {"MPI", "$(or $(subst -, ,$(subst _, ,$(call found,MPI))),no)"}, {"PCRE2", "$(or $(call found,PCRE2),no)"}, \
    {"utf8proc", "$(or $(call found,UTF8PROC),no)"}, \
    {"libedit", "$(or $(call found,LIBEDIT),no)"}, \
    {"SentencePiece", "$(if $(call found,SENTENCEPIECE),$(or $(call pkg,--modversion sentencepiece),yes),no)"}, \
    {"CUDA", "$(or $(if $(cuda_source),$(cuda)),no)"}, {"NCCL", "$(or $(nccl),no)"}
$O/build_info.h: FORCE | $O/.found
	@{ echo '#define LNS_VERSION "'$(version)$$(git describe --always --exclude='*' --dirty=-dirty --abbrev=10 2>/dev/null | sed 's/^/+/')'"'; \
	echo '#define LNS_COMPILER "'$$($(CXX) --version | head -1)'"'; \
	echo '#define LNS_FLAGS "'$(built_with) $(filter-out -I$O,$(flags))'"'; \
	echo '#define LNS_FEATURES $(features)'; } > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# Said once for each variant, before its first object.
missing = $(if $(call found,$1),,echo '  without $2: $3';)
$O/.found: | $(firstword $(foreach l,CLI11 JSON XXHASH,$(if $(call word_of,$l),,no-$l)))
	@mkdir -p $O
	@echo '$(variant): $(if $(cpu),$(cpu),generic CPU) · OpenMP $(or $(call found,OPENMP),no) · oneDNN $(or $(call found,ONEDNN),no) · MPI $(or $(subst -, ,$(subst _, ,$(call found,MPI))),no) · PCRE2 $(or $(call found,PCRE2),no) · utf8proc $(or $(call found,UTF8PROC),no) · SentencePiece $(or $(call found,SENTENCEPIECE),no) · CUDA $(if $(cuda_source),$(cuda) ($(nvcc): $(CUDA_ARCH)) · NCCL $(or $(nccl),no),no)'
	@$(call missing,OPENMP,OpenMP,one thread only)\
	$(call missing,ONEDNN,oneDNN,matmuls in plain loops$(comma) many times slower)\
	$(call missing,MPI,MPI,one process only)\
	$(call missing,PCRE2,PCRE2,no --tokenizer gpt2:DIR or tokenizer.json)\
	$(call missing,UTF8PROC,utf8proc,no tokenizer.json with NFC$(comma) lowercase and the like)\
	$(call missing,SENTENCEPIECE,SentencePiece,no --tokenizer FILE.model)\
	$(call missing,LIBEDIT,libedit,no line editing in train_gpt chat)\
	$(if $(cuda_lacks),echo '  CUDA $(cuda) ($(nvcc)) is not used: $(cuda_lacks) is needed';)
	@touch $@
.PHONY: no-CLI11 no-JSON no-XXHASH no-GTEST
no-CLI11 no-JSON no-XXHASH no-GTEST:
	@command -v $(CXX) >/dev/null || { echo 'There is no C++ compiler $(CXX) here: run make deps.'; exit 1; }
	@echo 'The library $(patsubst no-%,%,$(@:no-JSON=no-nlohmann-json)) is missing: run make deps.'; exit 1
$(tests): | $(if $(call word_of,GTEST),,no-GTEST)

# The simulated GPU (dev/sim/README.md): train_gpt.cu compiled by the host's compiler. Its objects
# have a folder of their own, named after what they are compiled with.
sim_optimize := $(if $(call yes,$(SANITIZE)),$(optimize),-O2 -fsanitize=alignment -fno-sanitize-recover=alignment)
sim_flags := $(filter-out -DLNS_CUDA,$(flags)) -Idev/sim -DLNS_CUDA -DLNS_SIM -fno-strict-aliasing -Wno-unknown-pragmas \
    $(if $(call found,MPI),-DLNS_NCCL) $(if $(call word_of,BOOSTCONTEXT),-DLNS_BOOST_CONTEXT)
sim_libs := $(filter-out -lnccl -lcublasLt -lcudart_static,$(libs)) $(if $(call word_of,BOOSTCONTEXT),-lboost_context)
S := $O/sim-$(shell echo $(sim_optimize) $(sim_flags) $(sim_libs) | cksum | cut -d' ' -f1)
sim_library := $(patsubst %.cpp,$S/%.o,$(wildcard dev/sim/*.cpp))
sim_programs := train_gpt_sim test_gpt_sim
# Fibers and the names of kernels are Linux's. Under sanitizers test_gpt_sim takes ten minutes:
# `make SANITIZE=1 test_gpt_sim` builds it for whoever wants to wait.
sim_test_programs := $(if $(and $(call yes,$(SIM)),$(filter Linux,$(shell uname))),$(if $(wildcard train_gpt.cu),$(sim_tests:dev/test/%.cpp=$S/%) \
    $(if $(call yes,$(SANITIZE)),,$S/test_gpt_sim)))
-include $(wildcard $S/*.d $S/dev/*/*.d)

.PHONY: $(sim_programs)
$(sim_programs): %: $S/% FORCE
	@[ $< -ef $@ ] || ln -f $< $@ 2>/dev/null || cp -f $< $@
$S/train_gpt_sim: $O/train_gpt.o $S/train_gpt.cu.o
$S/test_gpt_sim: $O/test_gpt.o $S/train_gpt.cu.o
$(sim_tests:dev/test/%.cpp=$S/%): $S/%: $S/dev/test/%.o
$(sim_tests:dev/test/%.cpp=$S/%): sim_libs += -lgtest_main -lgtest
$(addprefix $S/,$(sim_programs)) $(sim_tests:dev/test/%.cpp=$S/%): $(sim_library) $O/libgpt.a
	$(call say,LINK,$(@F))$(CXX) $(sim_optimize) $(sim_flags) $(filter %.o,$^) $O/libgpt.a -o $@ $(sim_libs)
$S/%.o: %.cpp | $O/.found
	@mkdir -p $(@D)
	$(call say,SIM,$<)$(CXX) $(sim_optimize) $(sim_flags) -MMD -MP -c $< -o $@
$S/%.cu.o: %.cu | $O/.found
	@mkdir -p $(@D)
	$(call say,SIM,$<)$(CXX) $(sim_optimize) $(sim_flags) -MMD -MP -x c++ -c $< -o $@
$S/dev/sim/products.o: sim_optimize := -O3 -g
$(sim_tests:%.cpp=$S/%.o): | $(if $(call word_of,GTEST),,no-GTEST)

test: $(if $(call yes,$(SANITIZE)),,$(existing) $(if $(sim_test_programs),train_gpt_sim)) $O/unit_tests $(sim_test_programs)
	@JOBS="$(JOBS)" dev/run_tests.sh $(if $(call yes,$(SANITIZE)),,test_gpt) $(filter %/test_gpt_sim,$(sim_test_programs)) $O/unit_tests \
	    $(filter-out %/test_gpt_sim,$(sim_test_programs)) $(if $(call yes,$(SANITIZE)),,$(wildcard dev/test/*.sh))

all: $(existing) $(if $(sim_test_programs),$(sim_programs))

# For editors and clang-tidy: how each file is compiled.
compiled := $(wildcard train_gpt.cpp test_gpt.cpp gpt/*/*.cpp data/*.cpp dev/test/*_test.cpp dev/sim/*.cpp)
compile_commands: $O/build_info.h
	@$(file >compile_commands.json,[)$(foreach f,$(compiled),$(file >>compile_commands.json,{"directory": "$(CURDIR)"$(comma) "file": "$f"$(comma) \
	    "command": "$(CXX) $(filter-out -Wno-restrict,$(optimize) $(if $(filter dev/sim/% $(sim_tests),$f),$(sim_flags),$(flags))) -I$O \
	    -c $f"}$(if $(filter $f,$(lastword $(compiled))),,$(comma))))$(file >>compile_commands.json,])
tidy: compile_commands
	@printf '%s\n' $(filter-out dev/%,$(compiled)) | xargs -P $(JOBS) -n 1 clang-tidy -p . --quiet --warnings-as-errors='*'

# Against PyTorch, transformers and TensorBoard, in an environment of their own.
test-oracles: train_gpt $O/dev/oracles/tokens
	@dev/venv.sh $(BUILD)/oracles dev/oracles/requirements.txt
	@TOKENS="$O/dev/oracles/tokens" PATH="$(abspath $(BUILD))/oracles/bin:$$PATH" dev/run_tests.sh $(wildcard dev/oracles/*.sh)

# Options of its own: DEVICE=cuda, QUICK=1, TORCH=new (installs PyTorch under $(BUILD)),
# ARGS='--only tiny --rounds 5'.
bench: train_gpt
	@$(python) dev/bench/bench$(if $(filter cuda,$(DEVICE)),_gpu).py $(if $(call yes,$(QUICK)),--quick) \
	    $(if $(filter new,$(TORCH)),--install-torch) --out $(BUILD)/bench$(addprefix -,$(DEVICE)).json $(ARGS)

# Every parser under libFuzzer (dev/fuzz/fuzz.cpp), with clang: SECONDS of each, TARGETS="json flags"
# for some. What they learn and find stays in $(BUILD)/fuzz; the same command goes on with it.
fuzz: train_gpt data/tokenize
	@if ! command -v clang++ >/dev/null; then \
	    echo 'SKIPPED: fuzzing: there is no clang++ (make deps)'; echo '0 passed, 0 failed, 1 skipped'; \
	else \
	    $(MAKE) --no-print-directory fuzz-binary SANITIZE=1 CXX="$(if $(clang),$(CXX),clang++)" && dev/fuzz/run.sh $(BUILD)/fuzz $(or $(SECONDS),60) $(TARGETS); \
	fi
fuzz-binary: $O/fuzz
	@mkdir -p $(BUILD)/fuzz && cp $< $(BUILD)/fuzz/fuzz
$O/fuzz: $O/dev/fuzz/fuzz.o $O/libgpt.a
	$(call say,LINK,$(@F))$(CXX) $(optimize) -fsanitize=fuzzer $(flags) $^ -o $@ $(libs)

endif

sources = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')
format:
	clang-format -i $(sources)
check-format:
	clang-format --dry-run -Werror $(sources)
clean: # not what `make deps` brought, nor what fuzzing found
	rm -rf $(filter-out $(addprefix $(BUILD)/,venv oracles fuzz),$(wildcard $(BUILD)/*)) train_gpt test_gpt train_gpt_sim test_gpt_sim data/tokenize data/stories data/vocabulary

help:
	@echo 'make [train_gpt]     the trainer'
	@echo 'make deps            install what is missing (apt; elsewhere, say what to install; Python'"'"'s'
	@echo '                     packages into build/venv)'
	@echo 'make test            build and run every test, JOBS at a time; make test_gpt builds the'
	@echo '                     gradient checks alone'
	@echo 'make test-oracles    against PyTorch, transformers and TensorBoard, installed under build/oracles'
	@echo 'make fuzz            every parser under libFuzzer (clang): SECONDS=60 of each, TARGETS="json flags"'
	@echo 'make bench           time training steps, beside PyTorch; QUICK=1: in minutes; TORCH=new: get it;'
	@echo '                     DEVICE=cuda: on the GPU'
	@echo 'make train_gpt_sim test_gpt_sim'
	@echo '                     the same on a simulated GPU (dev/sim/README.md)'
	@echo 'make data/tokenize   text to token shards'
	@echo 'make data/vocabulary learns a SentencePiece model from text'
	@echo 'make data/stories    the generator of the embedded corpus'
	@echo 'make all             every program, the simulated GPU too; make compile_commands: for editors'
	@echo 'make tidy            clang-tidy, with .clang-tidy'"'"'s checks'
	@echo 'make format          clang-format in place; make check-format only looks'
	@echo 'make clean           remove what was built, not what was installed under build/'
	@echo
	@echo 'Options: SANITIZE=1 (address, undefined) · OPENMP=0 ONEDNN=0 MPI=0 CUDA=0 NCCL=0 SIM=0'
	@echo '         (leave out) · CUDA_ARCH="sm_80 sm_90a compute_90" (GPUs to compile for) ·'
	@echo '         MARCH=native (or x86-64-v3, …) · CXX=clang++ · WERROR=0 · BUILD=build · V=1'
