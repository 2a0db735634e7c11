//! The supervisor of a single container: what happens between the start of its VMM and the end of its container.
//!
//! One thread, one event loop. The container's story is one function from handshake to exit; beside it run the
//! relays, the signals, the console, and a task for each conversation of another command. The first that ends the
//! sandbox wins: the story, the VM, or a signal before there is a container.

use std::cell::Cell;
use std::future::pending;
use std::rc::Rc;
use std::time::Duration;

use nix::sys::signal::Signal;
use oci_spec::runtime::Hooks;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::Error;
use super::agent::{self, Exit};
use super::cgroup::Membership;
use super::container::Container;
use super::control::Listener;
use super::reservation::Reservation;
use super::signals::Signals;
use super::stdio::{HostStdio, Relays};
use crate::bundle::guest::Shown;
use crate::bundle::hooks;
use crate::state::Status;

/// How long the VMM may take to report what the broken connection to the agent means.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);
/// How long other containers may live on in a VM whose first has ended and been killed. Engines wait for 5 s and more.
const KILL_GRACE: Duration = Duration::from_secs(2);

/// A running sandbox, shared by the tasks of its event loop.
pub(super) struct Supervisor {
    container: Rc<Container>,
    interrupted: Notify,
    interrupt: Cell<Option<Signal>>,
}

/// What is to happen with the container.
pub(super) struct Story<'a> {
    pub hooks: Option<Hooks>,
    pub spec: Vec<u8>,
    pub wanted: [bool; 3],
    pub start: bool,
    /// What this process's mount namespace is to show, if not what it is.
    pub shown: Option<Shown>,
    pub ready: Box<dyn FnOnce() -> Result<(), Error>>,
    pub kept: &'a dyn Fn(),
}

impl Supervisor {
    pub(super) fn new(container: Rc<Container>) -> Rc<Self> {
        Rc::new(Supervisor { container, interrupted: Notify::new(), interrupt: Cell::new(None) })
    }

    /// What marks the first byte of output.
    pub(super) fn first_byte_mark(&self) -> impl Fn() + Clone + 'static {
        let timeline = self.container.sandbox.timeline.clone();
        move || timeline.mark_once("first_byte")
    }

    /// Runs everything until the sandbox ends.
    pub(super) async fn serve(
        self: &Rc<Self>,
        story: Story<'_>,
        relays: Relays,
        stdio: &HostStdio,
        signals: &Signals,
        listener: &Listener,
    ) -> Result<Exit, Error> {
        let ending = self.container.sandbox.watch(|record| self.container.save_network(record));
        let mut ending = std::pin::pin!(ending);
        let beside = async {
            let conversations = listener.each(|talk| {
                tokio::task::spawn_local(self.container.clone().converse(talk));
            });
            let signals = signals.each(async |signal| self.on_signal(signal, stdio).await);
            let ports = self.container.sandbox.clone().forward_ports();
            let _ = tokio::join!(conversations, signals, ports, self.container.sandbox.read_console());
            pending::<()>().await
        };
        let result = tokio::select! {
            biased;
            result = self.story(story, relays, stdio) => result,
            ending = &mut ending => return Err(ending),
            () = self.interrupted.notified() => {
                Err(Error::Interrupted(self.interrupt.get().unwrap_or(Signal::SIGTERM)))
            }
            () = self.container.vm.given_up.notified() => {
                let what = "have the container killed";
                Err(self.container.sandbox.vm_ended(Error::Agent { what, source: agent::Error::Silent }.to_string()))
            }
            () = beside => Err(Error::SupervisorGone),
        };
        match result {
            // The connection broke because the VM did: the VMM knows why.
            Err(Error::Agent { source: agent::Error::Closed(reason), .. }) => {
                match timeout(ENDING_TIMEOUT, ending).await {
                    Ok(ending) => Err(ending),
                    Err(_) => Err(self.container.sandbox.vm_ended(format!(
                        "the agent in the guest broke off its connection ({reason}), but the VM still runs"
                    ))),
                }
            }
            other => other,
        }
    }

    /// The container's life.
    async fn story(&self, story: Story<'_>, relays: Relays, stdio: &HostStdio) -> Result<Exit, Error> {
        let id = &*self.container.id();
        let hooks = story.hooks.unwrap_or_default();
        for (kind, list) in hooks::early(&hooks) {
            self.container.run_hooks(kind, list).await?;
        }
        *self.container.poststart.borrow_mut() = hooks.poststart().clone().unwrap_or_default();

        let sandbox = &self.container.sandbox;
        let network = sandbox.wire_network(|record| self.container.save_network(record)).await?;
        // All of it lies in the stream before the guest is up, and is answered in order.
        let (set_up, network_set, created) = tokio::join!(
            biased;
            self.container.sandbox.set_up(),
            self.container.sandbox.set_network(network),
            self.container.sandbox.agent.create(id, story.spec, story.wanted),
        );
        set_up?;
        network_set?;
        sandbox.follow_network();
        let init = created.map_err(|source| Error::Agent { what: "create the container", source })?;
        self.container.init.set(init);
        self.container.sandbox.timeline.mark("container_created");
        if let Some((rows, columns)) = stdio.terminal_size() {
            // A size that cannot be set is no reason not to run.
            let _ = self.container.sandbox.agent.resize(id, "", rows, columns).await;
        }

        if let Some(shown) = &story.shown {
            self.container.sandbox.show(shown)?;
        }

        let exit = self.container.sandbox.agent.wait(id, "");
        let mut exit = std::pin::pin!(exit);
        self.container.set_status(Status::Created)?;
        if story.start {
            self.container.start().await?;
        }
        (story.ready)()?;
        (story.kept)();

        let exit =
            (&mut exit).await.map_err(|source| Error::Agent { what: "wait for the container", source })?;
        self.container.sandbox.timeline.mark("container_exited");
        relays.drain().await;
        self.container.sandbox.timeline.mark("output_drained");
        self.container.finish_execs().await;
        self.outlive_others().await;
        self.container.sandbox.write_back().await?;
        self.container.sandbox.timeline.mark("synced");
        Ok(exit)
    }

    /// Waits for the end of the containers that share the VM. Who stops a pod stops all of its containers at once, and
    /// those that take their time are not to lose the VM because this one has ended.
    async fn outlive_others(&self) {
        self.container.ended.set(true);
        let vm = &self.container.vm;
        let others = async {
            loop {
                let Some(one) = vm.further.borrow().values().next().cloned() else { return };
                one.notified().await;
            }
        };
        let mut others = std::pin::pin!(others);
        tokio::select! {
            () = &mut others => {}
            // Who kills this one may be about to kill the others too.
            () = vm.unwanted.notified() => drop(timeout(KILL_GRACE, others).await),
        }
    }

    async fn on_signal(&self, signal: Signal, stdio: &HostStdio) {
        let status = self.container.state.borrow().status;
        let result = match (signal, status) {
            (Signal::SIGWINCH, _) => match stdio.terminal_size() {
                Some((rows, columns)) => {
                    self.container.sandbox.agent.resize(&self.container.id(), "", rows, columns).await
                }
                None => Ok(()),
            },
            (_, Status::Creating) => {
                self.interrupt.set(Some(signal));
                self.interrupted.notify_one();
                Ok(())
            }
            _ => self.container.sandbox.agent.signal(&self.container.id(), "", signal as i32, false).await,
        };
        if let Err(e) = result {
            tracing::debug!("{signal} was not passed on: {e}");
        }
    }

    /// Ends the VM and leaves what this mode leaves. The exit is known by now: whatever fails here is logged.
    pub(super) fn end(&self, reservation: &Reservation, cgroup: Option<&Membership>, error: Option<&Error>) {
        self.container.sandbox.kill();
        if self.container.sandbox.unwire_network() {
            self.container.state.borrow_mut().network = None;
        }
        self.container.state.borrow_mut().error = error.map(Error::to_string);
        if reservation.is_kept() {
            if let Err(e) = self.container.set_status(Status::Stopped) {
                tracing::warn!("{e}");
            }
        } else {
            // It is removed here and now, as is one that could not be made.
            self.container.state.borrow_mut().status = Status::Stopped;
            let state = self.container.state.borrow();
            hooks::run_last(&state.poststop, &state.to_oci_json(), &self.container.outside);
        }
        if let Some(cgroup) = cgroup {
            if reservation.is_kept() {
                cgroup.keep();
            } else {
                // Before the state goes, from which `delete` would know of it.
                self.container.sandbox.reap();
                cgroup.leave();
            }
        }
        reservation.release();
        self.container.sandbox.reap();
        self.container.sandbox.timeline.mark("cleaned_up");
        self.container.sandbox.timeline.write(&self.container.id());
    }
}
