#!/bin/bash
# The stages behind the Makefile's targets: tests/stages.sh run|test|conformance|fuzz|bench|image|lab.
#
# Each stage makes what is missing, reuses what is there, and at the end one table tells what was done and how
# long it took. What takes minutes (guest kernel, lab image) is kept by the tools that make it in
# ${STOCKADE_CACHE:-/var/cache/stockade}, outside the checkout. The rest lands under ${CARGO_TARGET_DIR:-target}.
# $STOCKADE_STAGE, for the programs started here, is the directory that has bin/ and lib/stockade/ as an
# installation has them; it is also what the lab gets as its payload.
set -euo pipefail
cd "$(dirname "$0")/.."

# Every Debian package that any target needs; only what is missing is installed.
packages=(
    # Rust's linker, the C library to link statically against, and libcontainer's seccomp library (with its .a)
    gcc libc6-dev libseccomp-dev make ca-certificates
    # The guest kernel: its source, and what kbuild runs. libelf is for objtool.
    linux-source-6.12 binutils flex bison bc libelf-dev xz-utils perl
    # The lab: emulator, root file systems, disk images, modules
    qemu-system-x86 mmdebstrap debian-archive-keyring e2fsprogs busybox-static kmod zstd
    # The second opinion of the initrd's unit test
    cpio
)

CARGO_TARGET_DIR=$(realpath -m "${CARGO_TARGET_DIR:-target}")
export CARGO_TARGET_DIR
release=$CARGO_TARGET_DIR/x86_64-unknown-linux-gnu/release
export STOCKADE_STAGE=$CARGO_TARGET_DIR/stage
demo=$CARGO_TARGET_DIR/demo
logs=$CARGO_TARGET_DIR/logs
mkdir -p "$logs"

goal=${1:-}
trap at_exit EXIT

summary=()
did=
passed=0 failed=0
current=

at_exit() {
    local status=$?
    [ "$status" = 0 ] || [ -z "$current" ] || echo "stockade: the stage \`$current\` failed" >&2
    if [ "$goal" = test ]; then
        [ -z "$current" ] || failed=$((failed + 1))
        printf '\n%s passed, %s failed\n' "$passed" "$failed"
    fi
}

# stage NAME FUNCTION: runs it and notes what it says in $did. A stage that fails ends everything; failed tests
# are counted instead.
stage() {
    local begin=$SECONDS
    did=done
    current=$1
    printf '\n== %s\n' "$1" >&2
    "$2"
    current=
    summary+=("$(printf '%-14s %-68s %5s s' "$1" "$did" "$((SECONDS - begin))")")
}

report() {
    echo
    printf '%s\n' "${summary[@]}"
    printf '%-14s %-68s %5s s\n' total '' "$SECONDS"
}

die() {
    printf 'stockade: %s\n' "$*" >&2
    exit 1
}

# A command whose output matters only when it fails.
quietly() {
    local log=$logs/$1.log
    shift
    if ! "$@" >"$log" 2>&1 </dev/null; then
        tail -n 30 "$log" >&2
        die "\`$*\` failed; above is the end of $log"
    fi
}

install_packages() {
    command -v apt-get >/dev/null || die "this machine has no apt-get; install by other means: ${packages[*]}"
    local missing=() package
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
    done
    if [ ${#missing[@]} = 0 ]; then
        did='all there'
        return
    fi
    [ "$(id -u)" = 0 ] || die "as root, run: apt-get install --no-install-recommends ${missing[*]}"
    echo "installing ${#missing[@]} packages (a minute or two): ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    quietly apt-update apt-get -q -o DPkg::Lock::Timeout=300 update
    quietly apt-install apt-get -q -o DPkg::Lock::Timeout=300 install --yes --no-install-recommends "${missing[@]}"
    did="installed ${missing[*]}"
    [ ${#did} -le 68 ] || did="installed ${#missing[@]}"
}

# Builds what ships and the tools. All in one call, so that every crate is built with one set of features.
build_binaries() {
    command -v cargo >/dev/null || die 'no cargo on PATH; install the stable Rust toolchain'
    touch "$logs/before-build"
    cargo build --release --locked --workspace --bins
    mkdir -p "$STOCKADE_STAGE/bin"
    install -C -m 755 "$release/stockade" "$STOCKADE_STAGE/bin/stockade"
    did='up to date'
    [ -z "$(find "$release" -maxdepth 1 -type f -executable -newer "$logs/before-build")" ] || did='built'
}

# Kernel and initrd, into the stage.
make_guest_files() {
    local said
    said=$("$release/stockade-image" all --agent "$release/stockade-agent" --out "$STOCKADE_STAGE/lib/stockade")
    echo "$said" >&2
    did="kernel $(sed -n 's/^guest kernel: \(.*\) [^ ]*$/\1/p' <<<"$said")"
}

make_lab_image() {
    local image before
    before=$(date +%s)
    image=$("$release/stockade-lab" image)
    did='reused from the cache'
    [ "$(stat -c %Z "$image")" -lt "$before" ] || did='made'
    [ "$goal" != test ] || ! "$release/stockade-lab" kvm >/dev/null || lay_out_root_file_systems "$image"
}

# Where the tests run directly on this machine they need the root file systems that the lab's image holds.
lay_out_root_file_systems() {
    local image=$1 to=$CARGO_TARGET_DIR/bundles
    export STOCKADE_E2E_BUNDLES=$to
    if [ "$(cat "$to/from" 2>/dev/null)" != "$image" ]; then
        rm -rf "$to"
        mkdir -p "$to"
        # Mounted where nobody else sees it, and gone with the shell. (debugfs would lose set-user-ID bits.)
        quietly bundles unshare --mount sh -euc \
            'mount -o loop,ro "$1" /mnt; cp -a /mnt/bundles/. "$2"' sh "$image/root.ext4" "$to"
        echo "$image" >"$to/from"
    fi
}

# A bundle of the real kind: busybox's root file system and a config.json.
make_demo_bundle() {
    did='reused'
    if ! cmp -s /bin/busybox "$demo/rootfs/bin/busybox"; then
        rm -rf "$demo"
        mkdir -p "$demo/rootfs"/{bin,dev,etc,proc,sys,tmp}
        cp /bin/busybox "$demo/rootfs/bin/busybox"
        local applet
        for applet in $(/bin/busybox --list); do
            [ "$applet" = busybox ] || ln -s busybox "$demo/rootfs/bin/$applet"
        done
        did='made'
    fi
    cp tests/demo/config.json "$demo/config.json"
}

run_demo() {
    local why
    if why=$("$release/stockade-lab" kvm); then
        echo "this machine has usable KVM: running directly on it" >&2
        "$STOCKADE_STAGE/bin/stockade" run --bundle "$demo" "demo-$$"
        did='ran in a microVM on this machine'
    else
        echo "no usable KVM here (${why:-unknown reason}): running in the lab, an emulated KVM host" >&2
        "$release/stockade-lab" run --timeout 300 --payload "$STOCKADE_STAGE" --add "$demo=bundle" -- \
            stockade run --bundle /payload/bundle demo
        did='ran in a microVM in the lab'
    fi
}

# check NAME COMMAND...: one check that passes or fails as a whole.
check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $name" >&2
    fi
}

# cargo_test NAME ARGUMENTS...: adds up the results that each test program prints. A failure without a failed
# test (it does not compile, it crashed) counts as one.
cargo_test() {
    local log=$logs/$1.log status=0 good bad
    shift
    cargo test --locked --workspace --no-fail-fast "$@" 2>&1 </dev/null | tee "$log" || status=$?
    # The last word on each test counts: a part of the suite may run again, and says why.
    read -r good bad < <(awk '/^ *Running /{ program = $NF }
        /^test .* \.\.\. (ok|FAILED)/ { last[program, $2] = $NF }
        END { for (test in last) if (last[test] == "ok") good++; else bad++; print good + 0, bad + 0 }' "$log")
    [ "$status" = 0 ] || [ "$bad" != 0 ] || bad=1
    passed=$((passed + good)) failed=$((failed + bad))
    did="$good passed, $bad failed"
}

check_style() {
    local before=$failed
    check 'cargo fmt --check' cargo fmt --all --check
    check 'cargo clippy' cargo clippy --locked --workspace --all-targets -- -D warnings
    did="2 checks, $((failed - before)) failed"
}

run_benchmark() {
    local cases
    read -ra cases <<<"${CASES:-}"
    PATH=$STOCKADE_STAGE/bin:$PATH "$release/stockade-bench" "${cases[@]}"
    did="in $CARGO_TARGET_DIR/bench"
}

# runc's own suite or Podman's, in the lab whatever this machine has: they make cgroups and mounts wherever they run.
run_conformance() {
    local arguments=() files log=$logs/conformance-${SUITE:-runc}.log
    [ -z "${SUITE:-}" ] || arguments+=(--suite "$SUITE")
    [ -z "${RUNC:-}" ] || arguments+=(--runtime "$RUNC")
    read -ra files <<<"${FILES:-}"
    "$release/stockade-conformance" "${arguments[@]}" "${files[@]}" | tee "$log"
    did="see $log"
}

# With the fuzz targets over their corpora (tests/fuzz): the same few inputs each time.
unit_tests() { cargo_test unit --lib --bins --test fuzz --test rules; }
end_to_end_tests() { PATH=$STOCKADE_STAGE/bin:$PATH cargo_test end-to-end --test e2e; }

# Looks for inputs that the fuzz targets fail with, $T seconds each. LLVM's pass that counts branches is in the stable
# compiler too; it needs a build of its own, in which every crate has it.
search_with_fuzzers() {
    local counters='-C passes=sancov-module -C llvm-args=-sanitizer-coverage-level=3'
    counters+=' -C llvm-args=-sanitizer-coverage-inline-8bit-counters'
    local how=(env "STOCKADE_FUZZ_SECONDS=${T:-60}")
    [ -z "${KEEP:-}" ] || how=(env STOCKADE_FUZZ_KEEP=1)
    RUSTFLAGS="-C target-feature=+crt-static $counters" CARGO_TARGET_DIR=$CARGO_TARGET_DIR/fuzz \
        "${how[@]}" cargo test --locked --profile fuzz -p stockade-fuzz --test fuzz -- ${ONLY:-} | tee "$logs/fuzz.log"
    did="see $logs/fuzz.log"
}

prepare() {
    stage packages install_packages
    stage binaries build_binaries
    stage 'guest files' make_guest_files
}

case $goal in
image)
    prepare
    report
    ;;
run)
    prepare
    "$release/stockade-lab" kvm >/dev/null || stage 'lab image' make_lab_image
    stage bundle make_demo_bundle
    stage container run_demo
    report
    ;;
test)
    stage packages install_packages
    # What needs no VM comes first: it fails soonest.
    stage style check_style
    stage 'unit tests' unit_tests
    stage binaries build_binaries
    stage 'guest files' make_guest_files
    stage 'lab image' make_lab_image
    stage 'end to end' end_to_end_tests
    report
    [ "$failed" = 0 ]
    ;;
conformance)
    prepare
    stage 'lab image' make_lab_image
    stage conformance run_conformance
    report
    ;;
fuzz)
    stage packages install_packages
    stage 'fuzz targets' search_with_fuzzers
    report
    ;;
bench)
    prepare
    stage 'lab image' make_lab_image
    stage benchmark run_benchmark
    report
    ;;
lab)
    prepare
    stage 'lab image' make_lab_image
    report
    exec "$release/stockade-lab" shell --payload "$STOCKADE_STAGE"
    ;;
*)
    die "usage: $0 run|test|conformance|fuzz|bench|image|lab"
    ;;
esac
