//! What the fuzz targets in `tests/fuzz` reach of this crate: behind the feature `fuzzing`, which no program that
//! ships is built with.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::bundle::{Bundle, guest};
use crate::printable::error_line;
use crate::sandbox::agent::{Agent, Error};

/// Longer than any call takes whose answer is there already.
const HANG: Duration = Duration::from_secs(20);

/// Loads a bundle as `create` does, and splits it into the host's and the guest's part. The error is what the user
/// would read.
pub fn load_bundle(dir: &Path) -> Result<(), String> {
    let bundle = Bundle::load(dir).map_err(|e| error_line(&e))?;
    guest::adapt(&bundle, "fuzz").map(drop).map_err(|e| error_line(&e))
}

/// Talks to an agent that says `bytes`, whatever it is asked, and then hangs up. Returns what is shown of it, or
/// `None` if a call did not end.
pub fn talk_to_agent(bytes: &[u8]) -> Option<Vec<String>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let (ours, mut guest) = UnixStream::pair().ok()?;
    ours.set_nonblocking(true).ok()?;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // Fails when the connection was given up, as it may be.
            let _ = guest.write_all(bytes);
            let _ = guest.shutdown(std::net::Shutdown::Write);
            // Takes the requests, so that sending them does not fail first.
            let _ = std::io::copy(&mut guest, &mut std::io::sink());
        });
        let talk = async {
            let agent = Agent::new(ours.into()).ok()?;
            let (shake, set_up, created, exit, stats, list, events) = tokio::join!(
                biased;
                agent.handshake(),
                agent.setup_sandbox(0, Vec::new(), Default::default()),
                agent.create("c", Vec::new(), [true; 3]),
                agent.wait("c", ""),
                agent.stats("c"),
                agent.processes("c"),
                agent.out_of_memory(|_| ()),
            );
            let stats = stats.map(|stats| drop(crate::sandbox::stats::as_runc_has_it(&stats, &[])));
            Some(said([
                shake.map(drop),
                set_up,
                created.map(drop),
                exit.map(drop),
                stats,
                list.map(drop),
                events,
            ]))
        };
        let shown = runtime.block_on(async { tokio::time::timeout(HANG, talk).await.ok().flatten() });
        // With it goes the connection, for whose end the guest waits.
        drop(runtime);
        shown
    })
}

fn said(results: [Result<(), Error>; 7]) -> Vec<String> {
    results.into_iter().filter_map(|result| result.err()).map(|error| error.to_string()).collect()
}
