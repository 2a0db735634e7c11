# `make run` and `make test` set everything up on a fresh Debian 12 with Rust and git. What the targets do is
# in tests/stages.sh; see there for the packages and for where things are kept.

PREFIX ?= /usr/local
CARGO_TARGET_DIR ?= target
STAGE = $(CARGO_TARGET_DIR)/stage
export CARGO_TARGET_DIR

.DEFAULT_GOAL := help
.PHONY: help run test conformance fuzz bench image install lab lint fmt

help:
	@echo 'make run          set everything up and run a container in a microVM'
	@echo 'make test         set everything up and run all tests'
	@echo "make conformance  runc's own test suite against runc, crun and stockade; SUITE=podman: Podman's"
	@echo '                  (RUNC=stockade: only that one; FILES="exec.bats": only these files of it)'
	@echo 'make fuzz         look for inputs that harm the host, T=60 seconds a target; ONLY=vsock one of them'
	@echo 'make bench        measure on the virtual clock, beside runc and crun (CASES="…": some cases only)'
	@echo 'make image        build the binaries, the guest kernel and the initrd'
	@echo 'make install      copy binary and guest files to PREFIX ($(PREFIX))'
	@echo 'make lab          a shell on an emulated KVM host, with stockade on PATH'
	@echo 'make lint         formatting, clippy, and cargo-deny where it is installed'
	@echo 'make fmt          format the code'

run test conformance fuzz bench image lab:
	@tests/stages.sh $@

# Installs what `make image` left, so that `sudo make install` needs no Rust toolchain.
install:
	@test -e $(STAGE)/lib/stockade/manifest.json || tests/stages.sh image
	install -D -m 755 $(STAGE)/bin/stockade $(DESTDIR)$(PREFIX)/bin/stockade
	ln -sfn stockade $(DESTDIR)$(PREFIX)/bin/containerd-shim-stockade-v2
	install -d $(DESTDIR)$(PREFIX)/lib/stockade
	install -m 644 $(addprefix $(STAGE)/lib/stockade/,vmlinux initrd.img manifest.json) \
		$(DESTDIR)$(PREFIX)/lib/stockade

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny --all-features check licenses bans sources; \
	else echo 'cargo-deny is not installed: licences and duplicates were not checked'; fi

fmt:
	cargo fmt --all
