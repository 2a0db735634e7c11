//! Runs inputs: the same few in a test, as many as possible in a search.

use std::panic;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::mutate::{Random, mutate};
use crate::{Target, corpus, coverage};

/// Inputs made from the corpus in a test: a second or less a target.
const REPLAYED: usize = 60;

/// Most kept inputs of a target, and the longest of them.
const KEPT: usize = 24;
const KEPT_LENGTH: usize = 2 << 10;

/// Longer than any input takes, in seconds.
const HANG: u64 = 120;

/// The input at work.
static CURRENT: Mutex<Option<(Target, Vec<u8>)>> = Mutex::new(None);
/// When it began, in seconds since the epoch of [`now`]; 0 for none.
static BEGAN: AtomicU64 = AtomicU64::new(0);

/// From now on the input that fails, on whatever thread, or does not end, is written to a file and named.
pub fn watch_for_failures() {
    for signal in [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL] {
        // SAFETY: the handler has the type that the flag-less form of signal(2) wants.
        unsafe { libc::signal(signal, killed as *const () as libc::sighandler_t) };
    }
    let before = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        before(info);
        report();
        // Only on the thread that runs the input does a panic get to who waits for it.
        if !std::thread::current().name().is_some_and(|name| name == "main" || name.starts_with("fuzz")) {
            std::process::abort();
        }
    }));
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let began = BEGAN.load(Ordering::Relaxed);
            if began != 0 && now() > began + HANG {
                eprintln!("fuzz: an input has not ended within {HANG} s");
                report();
                std::process::abort();
            }
        }
    });
}

/// What a signal of the process' own making does: the last words, and then what it does by itself.
extern "C" fn killed(signal: libc::c_int) {
    // SAFETY: no pointers. The rest allocates, which a handler should not; but the process is at its end, and if that
    // hangs it is the watcher that ends it.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    report();
    // SAFETY: no pointers.
    unsafe { libc::raise(signal) };
}

fn report() {
    let current = CURRENT.try_lock();
    if let Ok(Some((target, input))) = current.as_deref() {
        let path = corpus::write(&corpus::beside_the_program().join("failed").join(target.name), input);
        eprintln!("fuzz: {} failed with {}", target.name, path.display());
    }
}

fn now() -> u64 {
    std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs())
}

/// Runs one input.
pub fn run(target: Target, input: &[u8]) {
    *CURRENT.lock().unwrap_or_else(PoisonError::into_inner) = Some((target, input.to_vec()));
    BEGAN.store(now(), Ordering::Relaxed);
    (target.run)(input);
    BEGAN.store(0, Ordering::Relaxed);
}

/// Runs the kept inputs, and some made from them.
pub fn replay(target: Target) {
    let inputs = corpus::read(&corpus::kept(target.name));
    assert!(!inputs.is_empty(), "there is no corpus in {}", corpus::kept(target.name).display());
    for input in &inputs {
        run(target, input);
    }
    let mut random = Random(1);
    for _ in 0..REPLAYED {
        run(target, &mutate(&mut random, &inputs, corpus::LONGEST));
    }
}

/// Looks for inputs that fail, for some time.
pub fn search(target: Target, time: Duration) {
    if !coverage::is_on() {
        eprintln!("fuzz: this build does not count what code is reached; `make fuzz` makes one that does");
    }
    let mut inputs = corpus::read(&corpus::kept(target.name));
    inputs.extend(corpus::read(&corpus::found(target.name)));
    let mut reached = coverage::Reached::default();
    for input in &inputs {
        coverage::clear();
        run(target, input);
        reached.add();
    }
    let (begin, before) = (Instant::now(), inputs.len());
    let mut random = Random(now());
    let mut runs = 0u64;
    while begin.elapsed() < time {
        let input = mutate(&mut random, &inputs, corpus::LONGEST);
        coverage::clear();
        run(target, &input);
        runs += 1;
        if reached.add() {
            corpus::write(&corpus::found(target.name), &input);
            inputs.push(input);
        }
    }
    println!(
        "fuzz: {}: {runs} inputs in {} s, none failed; {} branches reached, {} inputs found beside {before}",
        target.name,
        begin.elapsed().as_secs(),
        reached.branches,
        inputs.len() - before,
    );
}

/// Keeps, of the inputs that searches have found, few that reach much.
pub fn keep(target: Target) {
    let mut inputs = corpus::read(&corpus::found(target.name));
    inputs.extend(corpus::read(&corpus::kept(target.name)));
    inputs.retain(|input| input.len() <= KEPT_LENGTH);
    let mut reached: Vec<_> = inputs
        .into_iter()
        .map(|input| {
            coverage::clear();
            run(target, &input);
            (input, coverage::branches())
        })
        .collect();
    std::fs::remove_dir_all(corpus::kept(target.name)).expect("remove the corpus that was kept");
    // Whoever adds most comes first.
    for _ in 0..KEPT {
        let best =
            reached.iter().enumerate().max_by_key(|(_, (input, new))| (new.len(), usize::MAX - input.len()));
        let Some((index, _)) = best else { break };
        let (input, new) = reached.swap_remove(index);
        if new.is_empty() {
            break;
        }
        corpus::write(&corpus::kept(target.name), &input);
        for (_, others) in &mut reached {
            others.retain(|branch| !new.contains(branch));
        }
    }
}
