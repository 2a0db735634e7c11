//! Further containers in the VM that a command made for another: the supervisor's side.
//!
//! Each has a process on the host that its command left behind, at the other end of a conversation, which carries its
//! streams ([`join`](super::join) is that side). When that is gone, so is the container, and the other way round.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::adopt::adopt;
use super::agent::{self, Exit};
use super::container::Container;
use super::control::{self, AsyncConversation, Listener, Reply, Request};
use super::{Error, enter, join};
use crate::bundle::{Bundle, guest, hooks};
use crate::size;
use crate::state::{StateDir, Status};

/// The tasks of a container's conversations. They end with it.
#[derive(Default)]
struct Tasks(Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

impl Container {
    /// Makes a container that shares namespaces with this one, for the command at the other end of `talk`, and follows it
    /// to its end.
    pub async fn take_in(
        self: Rc<Self>,
        talk: AsyncConversation,
        fds: Vec<OwnedFd>,
        id: &str,
        wanted: [bool; 3],
    ) {
        let mine = Rc::new(Notify::new());
        // One of the same name that has been deleted may not be gone yet.
        loop {
            let Some(other) = self.vm.further.borrow().get(id).cloned() else { break };
            other.notified().await;
        }
        self.vm.further.borrow_mut().insert(id.into(), mine.clone());
        if let Err(e) = self.run_further(&talk, fds, id, wanted).await {
            let _ = talk.send(&Reply::Failed { message: e.to_string() }, &[]);
        }
        self.vm.further.borrow_mut().remove(id);
        mine.notify_waiters();
    }

    async fn run_further(
        self: &Rc<Self>,
        talk: &AsyncConversation,
        mut fds: Vec<OwnedFd>,
        id: &str,
        wanted: [bool; 3],
    ) -> Result<(), Error> {
        let os = |what| move |e: io::Error| Error::Os(what, e);
        let is_there =
            matches!(self.state.borrow().status, Status::Created | Status::Running | Status::Paused);
        if !is_there || self.ended.get() {
            return Err(join::Error::Ended(self.id().to_string()).into());
        }
        let outside = fds.split_off(fds.len().min(1));
        let bundle = control::read_attachment(fds).map_err(os("read the bundle"))?;
        let mut bundle: Bundle =
            serde_json::from_slice(&bundle).map_err(|e| Error::Os("read the bundle", e.into()))?;
        bundle.joined.with = self.init.get();
        let root = self.dir.path().parent().unwrap_or(self.dir.path());
        let dir = Rc::new(StateDir::open(root, id)?);
        let state = dir.load()?;
        let listener = Listener::bind(&dir).map_err(os("make the control socket"))?;
        let further = self.further(dir, state, outside);

        let result = match further.be_admitted(&bundle).await {
            Ok(()) => further.live(talk, &bundle, wanted, &listener).await,
            Err(e) => Err(e),
        };
        let _ = further.sandbox.agent.delete(id).await;
        let mut parts = self.vm.volumes.borrow_mut().leave(id);
        parts.push(PathBuf::from(id));
        if let Err(e) = further.sandbox.unshare(&parts).await {
            tracing::warn!(container = id, "{e}");
        }
        further.sandbox.discount(id);
        // Last: who waits for this container's end waits for this.
        drop(listener);
        further.give_memory_back();
        result
    }

    /// Has the VM have the memory that the container may use.
    async fn be_admitted(&self, bundle: &Bundle) -> Result<(), Error> {
        self.sandbox.admit(&self.id(), size::memory_limit(&bundle.limits())?).await?;
        self.save_size()
    }

    /// Has the VM have less memory again. Nobody waits for that.
    fn give_memory_back(self: &Rc<Self>) {
        let me = self.clone();
        tokio::task::spawn_local(async move {
            me.sandbox.shrink().await;
            if let Err(e) = me.save_size() {
                tracing::debug!("{e}");
            }
        });
    }

    /// The container's life, from its files in the share to its exit.
    async fn live(
        self: &Rc<Self>,
        talk: &AsyncConversation,
        bundle: &Bundle,
        wanted: [bool; 3],
        listener: &Listener,
    ) -> Result<(), Error> {
        let id = &*self.id();
        let spec = self.share_files(bundle)?;
        self.sandbox.add_oom_score(&bundle.spec);
        let hooks = bundle.spec.hooks().clone().unwrap_or_default();
        for (kind, list) in hooks::early(&hooks) {
            self.run_hooks(kind, list).await?;
        }
        *self.poststart.borrow_mut() = hooks.poststart().clone().unwrap_or_default();

        let streams = self.sandbox.connect_streams(wanted, id, "")?;
        let created = self.sandbox.agent.create(id, spec, wanted).await;
        let init = created.map_err(|source| Error::Agent { what: "create the container", source })?;
        self.init.set(init);
        self.set_status(Status::Created)?;
        let alive = enter::begun(talk, streams);

        let exit = self.follow(talk, listener, alive).await?;
        self.finish_execs().await;
        self.sandbox.write_back().await?;
        if let Err(e) = self.set_status(Status::Stopped) {
            // Its directory went with its process.
            tracing::debug!(container = id, "{e}");
        }
        let _ = talk.send(&Reply::Exited { code: exit.code, signal: exit.signal }, &[]);
        // The output that there still is has been taken when the process hangs up.
        while let Ok(Some(_)) = talk.recv::<Request>().await {}
        Ok(())
    }

    /// Puts the container's files into the share. Returns its configuration in the guest.
    fn share_files(&self, bundle: &Bundle) -> Result<Vec<u8>, Error> {
        let id = &*self.id();
        let mut volumes = self.vm.volumes.borrow_mut();
        let volumes = &mut *volumes;
        // Volumes in the guest's memory are a pod's of Kubernetes, which this is not.
        let mut no_pods = Vec::new();
        let theirs = self.outside.first().map(|namespace| namespace.as_fd());
        self.sandbox.with_share(|share| {
            let _here_for_it = theirs.map(|theirs| adopt(theirs, &bundle.paths())).transpose()?;
            let adapted = guest::adapt_with(bundle, id, |bind| volumes.place(bind, id, &mut no_pods))?;
            adapted.binds.iter().try_for_each(|bind| share.bind(bind))?;
            Ok(adapted.spec)
        })
    }

    /// Answers commands and the process at the other end of `talk` until the container has ended.
    async fn follow(
        self: &Rc<Self>,
        talk: &AsyncConversation,
        listener: &Listener,
        alive: bool,
    ) -> Result<Exit, Error> {
        let id = self.id();
        let mut tasks = Tasks::default();
        let commands = listener.each(|talk| {
            tasks.0.retain(|task| !task.is_finished());
            tasks.0.push(tokio::task::spawn_local(self.clone().converse(talk)).abort_handle());
        });
        tokio::select! {
            exit = enter::until_exit(&self.sandbox.agent, talk, (&id, ""), alive) => exit.map_err(|source| {
                if matches!(source, agent::Error::Silent | agent::Error::Lingers) {
                    // Then the VM is killed, and with it the container.
                    self.vm.given_up.notify_one();
                }
                Error::Agent { what: "wait for the container", source }
            }),
            Err(e) = commands => Err(Error::Os("answer commands", e)),
        }
    }
}
