//! Links the agent at a fixed address and, but for debug builds, without tables for unwinding.
//!
//! A static program that can be loaded anywhere relocates itself before it runs: here some 16,000 pointers in 70
//! pages, on the path of every start, and each of those pages copied again for every fork. PID 1 of a guest of its
//! own gains nothing from a random address that is worth that.
//!
//! A release aborts where it panics and has no symbols, so that nothing reads the tables; but the whole file is in
//! every guest's memory, and they would be a twelfth of it.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=discard.ld");
    // After rustc's own -static-pie, which the first of the two takes back.
    println!("cargo:rustc-link-arg-bins=-no-pie");
    println!("cargo:rustc-link-arg-bins=-static");
    let [profile, here] = ["PROFILE", "CARGO_MANIFEST_DIR"].map(|name| env::var(name).unwrap_or_default());
    if profile == "release" {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{here}/discard.ld");
    }
}
