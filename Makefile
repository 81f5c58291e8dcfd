# crisp: what can be made. `make` alone lists it.

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
SYSTEMDUNITDIR ?= /lib/systemd/system
INITDIR ?= /etc/init.d
DESTDIR ?=
CARGO ?= cargo
TARGET = $(or $(CARGO_TARGET_DIR),target)
RELEASE = $(TARGET)/release
SHIM = target/crisp-shim

.DEFAULT_GOAL := help
.PHONY: help build shim deps doctor check test host fuzz test-vm test-systemd test-selinux bench demo run install uninstall clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: shim ## Build crispd and crisp (release) and the static crisp-shim
	$(CARGO) build --locked --release --bin crispd --bin crisp

shim:
	@scripts/build-shim $(SHIM)

deps: ## Install with apt what building, testing and running need
	@scripts/install-deps

doctor: ## Tell what this host lacks, and change nothing
	@scripts/check-host

# The development profile alone wherever gRPC is linked: its C++ core costs minutes per profile.
check: shim ## Format, lints, documentation, unit tests, the daemon in process, the repository's own rules
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --no-deps --lib --document-private-items
	$(CARGO) test --locked --lib --bins
	$(CARGO) test --locked --test cri --test tidy
	scripts/install/test

test: deps check host test-vm test-systemd test-selinux ## Install what is missing, then run every suite

host: shim ## Real runtimes, plugins, overlayfs and a registry on this host (root)
	@scripts/check-host test
	@scripts/image
	CRISP_SHIM=$(abspath $(SHIM)) scripts/with-hugetlb $(CARGO) test --locked --test host -- --test-threads=1

define in-vm
@scripts/image
$(CARGO) test --locked --test host --no-run
@scripts/vm/run "$$($(CARGO) test --locked --test host --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$$/\1/p')" \
	$(TARGET)/debug/crispd $(SHIM) '$(ONLY)'
endef

test-vm: shim ## The suite of this host again, on cgroup v2 in a virtual machine (ONLY=part of a name)
	@scripts/check-host vm
	$(in-vm)

test-systemd: export VM_SYSTEMD = 1
test-systemd: shim ## What concerns cgroups there once more, under systemd and its cgroup driver
	@scripts/check-host systemd
	$(in-vm)

test-selinux: export VM_SELINUX = 1
test-selinux: shim ## Labels and what they hold apart, under an SELinux that enforces them
	@scripts/check-host selinux
	$(in-vm)

fuzz: ## Fuzz what takes strangers' bytes apart, FUZZ_SECONDS for each target (default 60; FUZZ="TARGET...")
	@scripts/fuzz $(FUZZ)

bench: build ## Measure beside containerd: a table, and target/bench.json (BENCH="--quick ...")
	@scripts/install-deps bench
	@scripts/check-host bench
	@scripts/image
	CRISP_SHIM=$(abspath $(SHIM)) scripts/with-hugetlb $(CARGO) bench --locked --bench bench -- $(BENCH)

demo: ## From an image to a sandbox that answers, and back to a clean host
	@scripts/install-deps
	@scripts/check-host demo
	@$(MAKE) --no-print-directory build
	@RELEASE=$(RELEASE) SHIM=$(SHIM) scripts/with-hugetlb scripts/demo

run: build ## Run crispd in the foreground: CONFIG=FILE, RUN="--log-level debug ..."
	@test -n '$(CONFIG)' || printf 'shim = "%s"\n' '$(abspath $(SHIM))' > target/run.toml
	$(RELEASE)/crispd --config $(or $(CONFIG),target/run.toml) $(RUN)

install: build ## Install under DESTDIR and PREFIX (default /usr/local)
	@PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' SYSTEMDUNITDIR='$(SYSTEMDUNITDIR)' INITDIR='$(INITDIR)' DESTDIR='$(DESTDIR)' \
		RELEASE='$(RELEASE)' SHIM='$(SHIM)' scripts/install/install

uninstall: ## Remove exactly what install put there; a changed configuration stays
	@PREFIX='$(PREFIX)' SYSCONFDIR='$(SYSCONFDIR)' SYSTEMDUNITDIR='$(SYSTEMDUNITDIR)' INITDIR='$(INITDIR)' DESTDIR='$(DESTDIR)' \
		scripts/install/uninstall

clean: ## Remove what was built
	$(CARGO) clean
	rm -rf $(SHIM) target/images target/python target/registry target/vm
