# Castellan. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

export GOTOOLCHAIN := local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
BUILD   := build
TOOLS   := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/castellan/tools
export CASTELLAN_TOOLS := $(TOOLS)
export PATH := $(TOOLS)/bin:$(PATH)

GOTESTSUM := $(TOOLS)/bin/gotestsum-v1.13.0
LINTER    := $(TOOLS)/bin/golangci-lint-v2.15.0
CRDGEN    := $(TOOLS)/bin/controller-gen-v0.23.0

# Without grpcnotrace gRPC links html/template, and with it everything reachable by
# reflection: three megabytes of a proxy's memory.
TAGS := grpcnotrace

COMPILE := CGO_ENABLED=0 go build -trimpath -tags $(TAGS) -ldflags "-s -w -X castellan.dev/internal/cli.Version=$(VERSION)"

BINARIES := castellan castellan-server castellan-agent castellan-proxy
# Modules that exist only for their binaries to be built: testing or linting them
# would compile all of Kubernetes.
PARTS    := certs-test/kube certs-test/etcd certs-test/coredns certs-test/helm
# Every other module of the tree; the first is the product.
MODULES  := . $(filter-out $(PARTS),$(patsubst %/go.mod,%,$(wildcard certs-test/*/go.mod)))

.DEFAULT_GOAL := help
.PHONY: help build images up test unit lint race fuzz bench bench-cluster generate clean tools cluster-up cluster-down cluster-load cluster-castellan

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-17s %s\n", $$1, $$2}'

build: ## build the four binaries into build/
	@mkdir -p $(BUILD)
	$(COMPILE) -o $(BUILD)/ $(addprefix ./cmd/,$(BINARIES))

# Platforms of the images, and their tag.
PLATFORMS ?= amd64 arm64
TAG       ?= dev

images: ## pack build/images/NAME.tar for this machine and build/images/oci/NAME for PLATFORMS
	@for arch in $(sort $(PLATFORMS) $(shell go env GOARCH)); do \
	  GOOS=linux GOARCH=$$arch $(COMPILE) -o $(BUILD)/linux-$$arch/ $(addprefix ./cmd/,$(BINARIES)) ./deploy/samples/hello; \
	done
	@go run ./deploy/images -release -bin $(BUILD) -tag $(TAG) -platforms "$(PLATFORMS)" -o $(BUILD)/images

up: build ## run a whole mesh on this machine until Ctrl-C
	@exec $(BUILD)/castellan up $(UPFLAGS)

# Tests outside the product's module run programs that go test does not know they
# depend on, so their results are never taken from its cache.
test: tools build ## install what tests need, then run every test of every module
	@failed=; \
	for m in $(MODULES); do \
	  echo "== $$m"; \
	  count=; [ $$m = . ] || count=-count=1; \
	  (cd $$m && $(GOTESTSUM) --format pkgname-and-test-fails -- -race $$count -timeout 60m ./...) || failed="$$failed $$m"; \
	done; \
	echo "== what the race detector's own allocations would hide"; \
	$(GOTESTSUM) --format pkgname-and-test-fails -- -run Alloc ./... || failed="$$failed allocations"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

unit: ## the quick tests, without race detector and real peers
	go test -short ./...

race: ## the product's tests under the race detector
	go test -race ./...

lint: $(LINTER) ## vet and lint every module
	@for m in $(MODULES); do echo "== $$m"; (cd $$m && go vet ./... && $(LINTER) run --config $(CURDIR)/.golangci.yml ./...) || exit 1; done

generate: $(CRDGEN) ## write deploy/crds anew from the types in api/crd
	$(CRDGEN) crd paths=./api/crd/... output:crd:dir=deploy/crds

fuzz: ## run every fuzz target for FUZZTIME (default 20s) each
	@certs-test/tools/fuzz $(or $(FUZZTIME),20s)

bench: build tools ## measure speed and memory against peers, as ratios of one run
	@cd certs-test/bench && go run . -bin $(CURDIR)/$(BUILD)

bench-cluster: tools ## measure what is promised on Kubernetes, on a cluster of its own
	@cd certs-test/kubernetes && CASTELLAN_RESULTS=$(CURDIR)/certs-test/kubernetes/results.md \
	  go test -count=1 -timeout 60m -run '^$$' -bench . -benchtime 1x .

clean: ## remove what make build and make up made
	rm -rf $(BUILD) .castellan

tools: $(GOTESTSUM) $(CRDGEN)
	@certs-test/tools/install
	@certs-test/tools/parts >/dev/null

CLUSTER := cd certs-test/cluster && go run ./cmd/cluster $(if $(NAME),-name $(NAME))

cluster-up: ## start a Kubernetes cluster of two nodes (NAME=... for a second one)
	@certs-test/tools/install >&2
	@$(CLUSTER) up

cluster-down: ## stop it and remove all of it
	@$(CLUSTER) down

cluster-load: ## import the image TAR=FILE into its nodes
	@$(CLUSTER) load $(abspath $(or $(TAR),$(error TAR=FILE is missing)))

# The tag is the same each time, so the pods are told of what is new in it.
cluster-castellan: build ## load our images into it and install Castellan, or what has changed of it
	@$(MAKE) --no-print-directory images PLATFORMS=$(shell go env GOARCH)
	@$(CLUSTER) load $(addprefix $(CURDIR)/$(BUILD)/images/,castellan-server.tar castellan-agent.tar castellan-proxy.tar hello.tar)
	@eval "$$($(CLUSTER) env)" && export KUBECONFIG && \
	stamp() { sha256sum <$(BUILD)/images/castellan-$$1.tar | cut -c1-12; } && \
	$(BUILD)/castellan install $(INSTALLFLAGS) \
	  --set-string "server.podAnnotations.castellan\.dev/build=$$(stamp server)" \
	  --set-string "agent.podAnnotations.castellan\.dev/build=$$(stamp agent)"

# Tools are built once and kept outside the tree.
$(GOTESTSUM):
	@mkdir -p $(@D)
	GOBIN=$(@D) go install gotest.tools/gotestsum@v1.13.0 && mv -f $(@D)/gotestsum $@

$(LINTER):
	@mkdir -p $(@D)
	GOBIN=$(@D) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0 && mv $(@D)/golangci-lint $@

$(CRDGEN):
	@mkdir -p $(@D)
	GOBIN=$(@D) go install sigs.k8s.io/controller-tools/cmd/controller-gen@v0.23.0 && mv -f $(@D)/controller-gen $@
