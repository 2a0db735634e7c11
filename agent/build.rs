//! Links the agent at a fixed address.
//!
//! A static program that can be loaded anywhere relocates itself before it runs: here some 16,000 pointers in 70
//! pages, on the path of every start, and each of those pages copied again for every fork. PID 1 of a guest of its
//! own gains nothing from a random address that is worth that.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // After rustc's own -static-pie, which the first of the two takes back.
    println!("cargo:rustc-link-arg-bins=-no-pie");
    println!("cargo:rustc-link-arg-bins=-static");
}
