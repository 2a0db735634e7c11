//! What the black-box suites and the benchmarks stand on. The suites themselves are in `tests/tests`.

pub mod bench;
pub mod conformance;
pub mod cri;
pub mod lab;
