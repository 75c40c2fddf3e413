# make serve    a disk to use: builds, makes a 10 GiB disk.qcow2 if there is none, serves it
# make test     everything that has to pass before a change goes in
# make bench    Platter and qemu-nbd in turn, with the ratios
# make build    the program, in bin/platter
# make fuzz     every fuzz target for FUZZTIME each
# make cover    coverage of the engine's packages
# make help     this list

GO       ?= go
FUZZTIME ?= 3s
DISK     ?= disk.qcow2
SIZE     ?= 10G
SOCKET   ?= $(CURDIR)/platter.sock

export CGO_ENABLED ?= 0

.PHONY: help build serve test bench fuzz cover lint cross race

help:
	@sed -n 's/^# make/make/p' Makefile

build:
	$(GO) build -trimpath -o bin/platter ./cmd/platter

serve: build
	@DISK='$(DISK)' SIZE='$(SIZE)' SOCKET='$(SOCKET)' scripts/serve.sh

test:
	@scripts/prepare.sh
	@$(MAKE) --no-print-directory lint cross
	@$(MAKE) --no-print-directory fuzz
	@$(MAKE) --no-print-directory race

# Format, vet, staticcheck.
lint:
	@files=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	    if [ -n "$$files" ]; then echo "gofmt -w these files:"; echo "$$files"; exit 1; fi
	$(GO) vet ./...
	$(GO) tool staticcheck ./...

# Every package for the systems that have to build, and its tests as far as the compiler checks them.
cross:
	GOOS=linux $(GO) build ./...
	GOOS=darwin $(GO) build ./...
	GOOS=darwin $(GO) vet ./...
	GOOS=windows $(GO) build ./...
	GOOS=windows $(GO) vet ./...

# All tests with the race detector, which needs a C compiler, and the coverage of the engine.
race:
	scripts/test.sh

cover:
	RACE= scripts/test.sh

fuzz:
	FUZZTIME=$(FUZZTIME) scripts/fuzz.sh

bench: build
	@scripts/bench.sh
