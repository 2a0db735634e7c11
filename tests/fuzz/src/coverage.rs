//! What code an input reaches, if the program was built to count that (`make fuzz` has LLVM do it, see
//! tests/stages.sh): a counter for each branch, of which the compiler tells the functions here at start.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

/// Where the counters lie: begin and end.
static COUNTERS: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// Called by every instrumented module (`-sanitizer-coverage-inline-8bit-counters`, clang's SanitizerCoverage).
#[unsafe(no_mangle)]
extern "C" fn __sanitizer_cov_8bit_counters_init(begin: *mut u8, end: *mut u8) {
    let mut all = COUNTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let range = (begin as usize, end as usize);
    if !all.contains(&range) && range.0 < range.1 {
        all.push(range);
    }
}

/// What has been reached so far: for each counter the magnitudes that it was seen with, a bit each.
#[derive(Default)]
pub struct Reached {
    seen: Vec<u8>,
    /// Counters that were ever more than zero.
    pub branches: usize,
}

/// Sets all counters to zero.
pub fn clear() {
    each(|_, counter| *counter = 0);
}

/// The counters that are more than zero.
pub fn branches() -> HashSet<usize> {
    let mut branches = HashSet::new();
    each(|index, counter| {
        if *counter != 0 {
            branches.insert(index);
        }
    });
    branches
}

/// Whether the program counts at all.
pub fn is_on() -> bool {
    !COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
}

impl Reached {
    /// Adds what the counters say now; whether any of it is new.
    pub fn add(&mut self) -> bool {
        let mut news = false;
        each(|index, counter| {
            if *counter == 0 {
                return;
            }
            // 1, 2, 3, 4-7, 8-15, 16-31, 32-127, more.
            let magnitude = match *counter {
                n @ 1..=3 => 1 << (n - 1),
                4..=7 => 8,
                8..=15 => 16,
                16..=31 => 32,
                32..=127 => 64,
                _ => 128,
            };
            if self.seen.len() <= index {
                self.seen.resize(index + 1, 0);
            }
            let seen = &mut self.seen[index];
            self.branches += usize::from(*seen == 0);
            news |= *seen & magnitude == 0;
            *seen |= magnitude;
        });
        news
    }
}

fn each(mut act: impl FnMut(usize, &mut u8)) {
    let mut index = 0;
    for (begin, end) in COUNTERS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        for address in *begin..*end {
            // SAFETY: the compiler said that a counter lies there. Other threads of the program may count in it
            // meanwhile; a count more or less does no harm, and every bit pattern is a value.
            act(index, unsafe { &mut *(address as *mut u8) });
            index += 1;
        }
    }
}
