//! A small fuzzer: makes inputs from a corpus, runs them, keeps those that reach code which none reached before, and
//! says which one failed. The doors that are fuzzed with it are in `targets/`.
//!
//! It is guided by the counters that the stable compiler's own LLVM can put into a program ([`coverage`]); without
//! them it still runs, and does the same each time.

pub mod corpus;
pub mod coverage;
pub mod engine;
pub mod mutate;

/// One door.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Has an input done to it. Panics if something happened that must not.
    pub run: fn(&[u8]),
}
