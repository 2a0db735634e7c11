//! A sandbox: one VM and the containers in it. The heart of the host side.
//!
//! The VMM is started as early as possible, and everything else is prepared while it boots; what the agent is to do
//! lies ready for it in the streams before it runs. A container's files can be put into the share at any time,
//! because the VMM was started in the mount namespace in which they are mounted.
//!
//! [`Sandbox`] is the VM with what the host shows it. Who uses it says what runs in it and when it ends: [`single`]
//! for the command line, whose sandboxes are made for one container; those that share namespaces with it come in by
//! [`join`].

mod adopt;
pub mod agent;
pub mod attach;
mod boot;
pub mod cgroup;
pub mod console;
mod container;
pub mod control;
mod enter;
pub mod forward;
mod further;
pub mod idmap;
pub mod join;
pub mod launch;
pub mod memory;
mod meter;
mod network;
mod oom_score;
pub mod pidfd;
pub mod poll;
mod relay;
pub mod reservation;
pub mod share;
pub mod signals;
pub mod single;
mod spawn;
pub(crate) mod stats;
pub mod stdio;
mod supervisor;
pub mod terminal;
pub mod timeline;
mod view;
mod vmm;
pub mod volumes;

use std::cell::{Cell, RefCell};
use std::io::{self, Read};
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use stockade_agent_protocol::messages::SetPodRequest;
use stockade_agent_protocol::{FORWARD_PORT, STDIO_PORT};
use stockade_vmm::control::StopReason;
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;

use crate::bundle::guest::{Bind, Shown};
use crate::bundle::pod::Shared;
use crate::bundle::{self, Bundle, hooks};
use crate::config;
use crate::guest_files;
use crate::network::resolver::ResolvConf;
use crate::network::{Error as NetworkError, Network, Record as NetworkRecord};
use crate::records::{self, Record};
use crate::size;
use crate::state;
use crate::thread;
pub use adopt::Adopted;
use agent::Agent;
pub use boot::Wishes;
use console::Console;
pub use enter::{NOT_ALLOWED, enter};
use memory::Memory;
use oom_score::OomScore;
pub use share::Share;
use timeline::Timeline;
use view::View;
use vmm::{Ending, Vmm};

/// Fresh random bytes for the guest's generator: 256 bits, which is what its ChaCha20 takes as key.
const ENTROPY: usize = 32;
/// How long a guest may take from its first instruction to the agent's first answer. On hardware it is milliseconds,
/// in an emulator on a busy machine a minute.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a guest may take to write back after its container's end.
const SYNC_TIMEOUT: Duration = Duration::from_secs(60);
/// Lines of the console that explain an error.
const CONSOLE_LINES: usize = 30;

/// Errors of a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// of the state directory
    #[error(transparent)]
    State(#[from] state::Error),
    /// of the bundle
    #[error(transparent)]
    Bundle(#[from] bundle::Error),
    /// of the settings
    #[error(transparent)]
    Config(#[from] config::Error),
    /// of the guest files
    #[error(transparent)]
    GuestFiles(#[from] guest_files::Error),
    /// of the VM's size
    #[error(transparent)]
    Size(#[from] size::Error),
    /// of the share
    #[error(transparent)]
    Share(#[from] share::Error),
    /// of the VMM process
    #[error(transparent)]
    Vmm(#[from] vmm::Error),
    /// of the network
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// of a hook
    #[error(transparent)]
    Hook(#[from] hooks::Error),
    /// of a terminal
    #[error(transparent)]
    Terminal(#[from] terminal::Error),
    /// of the host's cgroup
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    /// of what the container's host process shows
    #[error(transparent)]
    View(#[from] view::Error),
    /// of a pidfd socket
    #[error(transparent)]
    PidFd(#[from] pidfd::Error),
    /// the agent said no to something
    #[error("cannot {what}: {source}")]
    Agent { what: &'static str, source: agent::Error },
    /// the VM ended before its container
    #[error("{what}")]
    VmEnded { what: String, console: Vec<String> },
    /// of what is shared with another container
    #[error(transparent)]
    Join(#[from] join::Error),
    /// a signal came before there was anything to pass it on to
    #[error("interrupted by {0} before the container was created")]
    Interrupted(nix::sys::signal::Signal),
    /// memory that the VM was given lies idle
    #[error("the guest does not take {} MiB of memory that its VM was given: {why}", bytes >> 20)]
    NotUsed { bytes: u64, why: String },
    /// too early for it
    #[error("the VM has not booted yet: containers cannot be added")]
    NotBooted,
    /// something of the operating system
    #[error("cannot {0}: {1}")]
    Os(&'static str, #[source] io::Error),
    /// the process that was to say so is gone
    #[error("the supervisor ended without a word: it may have been killed")]
    SupervisorGone,
    /// what the supervisor said
    #[error("{message}")]
    Supervisor { message: String, console: Vec<String> },
}

impl Error {
    /// At what a sandbox failed, in one word for those who count; nothing where it is what the caller asked for that
    /// cannot be.
    pub fn part(&self) -> Option<&'static str> {
        match self {
            Error::GuestFiles(_) => Some("guest_files"),
            Error::Share(_) => Some("share"),
            Error::Vmm(_) => Some("vmm"),
            Error::Network(_) => Some("network"),
            Error::Cgroup(_) => Some("cgroup"),
            Error::Agent { source: agent::Error::Closed(_), .. } => Some("agent"),
            Error::VmEnded { .. } => Some("vm_ended"),
            Error::Os(..) => Some("host"),
            _ => None,
        }
    }

    /// The last lines of the guest's console, where they explain the error.
    pub fn console(&self) -> &[String] {
        match self {
            Error::VmEnded { console, .. } | Error::Supervisor { console, .. } => console,
            _ => &[],
        }
    }
}

/// A VM that boots or runs, and what of the host it sees.
pub struct Sandbox {
    /// Who makes containers in it.
    pub agent: Agent,
    /// When what happened.
    pub timeline: Rc<Timeline>,
    vmm: Vmm,
    console: Console,
    share: Share,
    network: Network,
    resolv_conf: RefCell<Option<ResolvConf>>,
    has_resolver: Cell<bool>,
    /// One change of the network after the other.
    rewiring: Mutex<()>,
    /// The guest has been told that its ports are dialled on the host.
    dialled: Notify,
    outside: Rc<[OwnedFd]>,
    first_run_ns: Cell<u64>,
    oom_score: OomScore,
    memory: Memory,
    enter: bool,
    /// What the guest is called, where that is as the host is.
    names: [String; 2],
    view: RefCell<Option<View>>,
}

impl Sandbox {
    /// Whether programs of the host can run in the guest, outside of its containers.
    pub fn can_be_entered(&self) -> bool {
        self.enter
    }

    /// Puts the files of a container into the share of a VM that runs.
    pub fn share(&self, bundle: &Bundle, binds: &[Bind]) -> Result<(), Error> {
        // Before its first instruction the VMM may not have the share yet, and would miss what is mounted in it.
        if self.first_run_ns.get() == 0 {
            return Err(Error::NotBooted);
        }
        Ok(self.share.add(bundle, binds)?)
    }

    /// Does `work` where things can be put into the share and taken out: what this process shows instead is no place for
    /// that.
    fn with_share<T: Send>(&self, work: impl FnOnce(&Share) -> Result<T, Error> + Send) -> Result<T, Error> {
        let view = self.view.borrow();
        let (Some(view), share) = (&*view, &self.share) else { return work(&self.share) };
        thread::aside(|| view.before().map_err(Error::View).and_then(|()| work(share)))
            .map_err(|e| Error::Os("start a thread for the share", e))?
    }

    /// Has a container's word count on how soon the host may take the VM's memory.
    pub fn add_oom_score(&self, spec: &Spec) {
        self.oom_score.add(self.vmm.id(), spec);
    }

    /// Takes parts of the share away again, such as a container's files, which are in a directory of its name. As long
    /// as the guest knows files of them the host keeps them, so it is made to forget.
    pub async fn unshare(&self, parts: &[PathBuf]) -> Result<(), Error> {
        self.with_share(|share| {
            parts.iter().for_each(|part| share.remove(part));
            Ok(())
        })?;
        let paths = parts.iter().map(|part| part.display().to_string()).collect();
        let forgotten = self.agent.forget(paths).await;
        forgotten.map_err(|source| Error::Agent { what: "have the guest forget files", source })
    }

    /// Lets who enters this process's mount namespace find a container's files there and no others.
    pub fn show(&self, shown: &Shown) -> Result<(), Error> {
        let view = View::enter(self.share.path(), shown)?;
        self.timeline.mark("view_entered");
        self.view.replace(Some(view));
        Ok(())
    }

    /// Streams of one process to the guest, their headers in them already. An empty `exec_id` is the container's
    /// init.
    pub fn connect_streams(
        &self,
        wanted: [bool; 3],
        id: &str,
        exec_id: &str,
    ) -> Result<[Option<OwnedFd>; 3], Error> {
        let connect = |index: usize| -> Result<Option<OwnedFd>, vmm::Error> {
            if !wanted[index] {
                return Ok(None);
            }
            let stream = self.vmm.connect(STDIO_PORT)?;
            let header = stdio::header(index, id, exec_id);
            nix::unistd::write(&stream, header.as_bytes()).map_err(|e| vmm::Error::Stream(e.into()))?;
            Ok(Some(stream))
        };
        Ok([connect(0)?, connect(1)?, connect(2)?])
    }

    /// A stream to a TCP port of the guest, once the agent has answered `DIALLED` on it.
    pub fn connect_port(&self, to: SocketAddrV4) -> Result<OwnedFd, Error> {
        let stream = self.vmm.connect(FORWARD_PORT)?;
        let header = format!("{to}\n");
        nix::unistd::write(&stream, header.as_bytes()).map_err(|e| vmm::Error::Stream(e.into()))?;
        Ok(stream)
    }

    /// Greets the agent and prepares the guest for containers. The requests are in the stream when this has been
    /// polled once, so that what is asked for afterwards is answered afterwards.
    pub async fn set_up(&self) -> Result<(), Error> {
        let entropy = entropy().map_err(|e| Error::Os("read /dev/urandom", e))?;
        let (hello, set_up) = tokio::join!(
            biased;
            self.first_answer(),
            self.agent.setup_sandbox(crate::clock::realtime_ns(), entropy, self.names.clone()),
        );
        hello?;
        set_up.map_err(|source| Error::Agent { what: "set up the guest", source })
    }

    async fn first_answer(&self) -> Result<(), Error> {
        let hello = match timeout(BOOT_TIMEOUT, self.agent.handshake()).await {
            Ok(answer) => answer.map_err(|source| Error::Agent { what: "greet the agent", source })?,
            Err(_) => {
                let seconds = BOOT_TIMEOUT.as_secs();
                return Err(self.vm_ended(format!(
                    "the guest did not answer within {seconds} s: see its console with --debug, and `stockade check`"
                )));
            }
        };
        let since_first_run = |ns: u64| self.first_run_ns.get().saturating_add(ns);
        self.timeline.mark_at("guest_init_started", since_first_run(hello.init_started_ns));
        self.timeline.mark_at("agent_listening", since_first_run(hello.listening_ns));
        self.timeline.mark("agent_ready");
        if let Some(ns) = self.timeline.since_begin() {
            records::append(&Record::Booted(ns));
        }
        Ok(())
    }

    /// The namespaces that this process came from, where programs of the host run.
    pub fn outside(&self) -> &[OwnedFd] {
        &self.outside
    }

    /// Runs hooks outside of this process's namespaces; `state` is what they read.
    pub async fn run_hooks(&self, kind: &'static str, list: &[Hook], state: Vec<u8>) -> Result<(), Error> {
        run_hooks_in(&self.outside, kind, list, state).await
    }

    /// Has here what the host shows at these paths, while the answer lives.
    pub fn adopt(&self, paths: &[PathBuf]) -> Result<Adopted, Error> {
        let Some(outside) = self.outside.first() else { return Ok(Adopted::default()) };
        Ok(adopt::adopt(outside.as_fd(), paths)?)
    }

    /// Has the agent prepare what the containers of a pod share.
    pub async fn set_pod(&self, shared: &Shared) -> Result<(), Error> {
        let request = SetPodRequest {
            hostname: shared.hostname.clone(),
            domainname: shared.domainname.clone(),
            sysctls: shared.sysctls.clone(),
            shm_bytes: shared.shm_bytes,
            ..Default::default()
        };
        let set = self.agent.set_pod(&request).await;
        set.map_err(|source| Error::Agent { what: "set up the pod", source })
    }

    /// Follows the VM to its end and says why it came. Only the first call of this sees the end. `save` is that of
    /// [`Self::wire_network`], for what comes to the network meanwhile.
    pub async fn watch(&self, save: impl Fn(NetworkRecord) -> Result<(), Error>) -> Error {
        let ending = self.vmm.watch(&self.timeline, &self.first_run_ns);
        let beside = async {
            let error = self.watch_network(save).await;
            tracing::warn!("the guest's network stays as it is: {error}");
            std::future::pending().await
        };
        let ending = tokio::select! {
            ending = ending => ending,
            never = beside => never,
        };
        self.explain(ending)
    }

    /// Has what the guest's console says in files of this directory too.
    pub fn keep_console(&self, dir: &Path) {
        self.console.keep_in(dir);
    }

    /// Keeps what the guest's console says, until the VM is gone.
    pub async fn read_console(&self) {
        self.console.read_all().await;
    }

    /// Has everything that the guest's containers wrote lie in the host's files.
    pub async fn write_back(&self) -> Result<(), Error> {
        match timeout(SYNC_TIMEOUT, self.agent.sync()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(Error::Agent { what: "have the guest write back", source }),
            Err(_) => Err(self.vm_ended("the guest did not write back its files".into())),
        }
    }

    /// Ends the VM at once and takes the share away; what the guest has not written back is lost.
    pub fn kill(&self) {
        self.vmm.kill();
        self.timeline.mark("vmm_killed");
        if let Some(view) = self.view.take() {
            view.leave();
        }
        self.share.unmount();
    }

    /// Waits until the VMM is gone with all that it holds.
    pub fn reap(&self) {
        if let Err(e) = self.vmm.wait() {
            tracing::warn!("cannot wait for the VMM: {e}");
        }
    }

    fn explain(&self, ending: Ending) -> Error {
        self.console.read();
        let what = match (ending, self.console.panic()) {
            (Ending::Failed(message), _) => return Error::VmEnded { what: message, console: Vec::new() },
            (Ending::Stopped(_), Some(message)) => format!("the guest kernel panicked: {message}"),
            (Ending::Stopped(StopReason::Error(message)), _) => format!("the VM cannot go on: {message}"),
            (Ending::Stopped(reason), _) => {
                let how = match reason {
                    StopReason::Reset => "reset itself",
                    StopReason::Shutdown => "powered itself off",
                    StopReason::Halted => "halted",
                    StopReason::Error(_) => "failed",
                };
                format!("the guest {how} before its container had ended")
            }
            (Ending::Died(how), _) => format!("the VMM process ended before its container had: {how}"),
        };
        self.vm_ended(what)
    }

    /// An error with what the console said last.
    pub fn vm_ended(&self, what: String) -> Error {
        self.console.read();
        let mut console = self.console.lines();
        console.drain(..console.len().saturating_sub(CONSOLE_LINES));
        Error::VmEnded { what, console }
    }
}

/// Runs hooks in these namespaces, beside what else this process does.
async fn run_hooks_in(
    namespaces: &[OwnedFd],
    kind: &'static str,
    list: &[Hook],
    state: Vec<u8>,
) -> Result<(), Error> {
    if list.is_empty() {
        return Ok(());
    }
    let list = list.to_vec();
    let namespaces = namespaces.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
    let namespaces = namespaces.map_err(|e| Error::Os("keep the namespaces for hooks", e))?;
    let run = move || hooks::run(kind, &list, &state, &namespaces);
    let (done, result) = tokio::sync::oneshot::channel();
    // None of the event loop's, which waits for its threads at its end: a hook need not come to one.
    std::thread::Builder::new()
        .spawn(move || done.send(run()))
        .map_err(|e| Error::Os("start a thread for hooks", e))?;
    match result.await {
        Ok(result) => Ok(result?),
        Err(e) => Err(Error::Os("run hooks", io::Error::other(e))),
    }
}

fn entropy() -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; ENTROPY];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
