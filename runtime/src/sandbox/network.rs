//! A sandbox's network, from what its namespace has to what the guest has.
//!
//! When the VM boots it is wired once; from then on it follows ([`Sandbox::rewire_network`]): the guest lets go of what is
//! gone before its slot is emptied, and what is new is in its slot before the guest is told to look.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use oci_spec::runtime::Spec;
use stockade_agent_protocol::RESOLVER_PORT;
use stockade_agent_protocol::messages::SetNetworkRequest;
use tokio::time::timeout;

use super::{Error, Sandbox, agent, forward};
use crate::network::resolver::{self, ResolvConf};
use crate::network::{self, Change, Demand, News, Removal, Traffic};

/// How long a guest may take to follow a change of its network. Removing an interface waits for who still uses it.
const NETWORK_TIMEOUT: Duration = Duration::from_secs(60);

impl Sandbox {
    /// Wires the network as it is now: what is new is attached to the VM. Returns what to tell the agent of it, by
    /// [`Self::set_network`]. `save` is given what there will be to take back before any of it is made. Answered
    /// while [`Self::watch`] runs.
    pub async fn wire_network(
        &self,
        save: impl FnOnce(network::Record) -> Result<(), Error>,
    ) -> Result<Option<SetNetworkRequest>, Error> {
        let news = self.network.wire(Demand::Strict, save)?;
        self.attach(news.taps).await?;
        Ok(news.request)
    }

    async fn attach(&self, taps: Vec<(u8, OwnedFd)>) -> Result<(), Error> {
        for (slot, tap) in taps {
            if let Some(device) = self.network.device(slot) {
                self.vmm.attach_network(slot, device, tap).await?;
            }
        }
        Ok(())
    }

    /// The same of a sandbox whose network has been set, with all that has changed since. The agent is told of it.
    pub async fn rewire_network(
        &self,
        demand: Demand,
        save: impl FnOnce(network::Record) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let _alone = self.rewiring.lock().await;
        let news = self.network.wire(demand, save)?;
        let brought = match timeout(NETWORK_TIMEOUT, self.bring(news)).await {
            Ok(brought) => brought,
            Err(_) => Err(Error::Agent { what: "set up the guest's network", source: agent::Error::Slow }),
        };
        if brought.is_err() {
            self.network.doubt();
        }
        brought
    }

    async fn bring(&self, news: News) -> Result<(), Error> {
        if let Some(Removal { request, slots }) = news.removal {
            let told = self.set_network(Some(request)).await;
            slots.into_iter().try_for_each(|slot| self.vmm.detach_network(slot))?;
            told?;
        }
        for (slot, up) in news.carriers {
            self.vmm.set_link(slot, up)?;
        }
        for (slot, _) in &news.taps {
            // It may still have what could not be brought to its end.
            self.vmm.detach_network(*slot)?;
        }
        self.attach(news.taps).await?;
        self.set_network(news.request).await
    }

    /// Has the agent make the guest's network the same as the namespace's.
    pub async fn set_network(&self, request: Option<SetNetworkRequest>) -> Result<(), Error> {
        let Some(request) = request else { return Ok(()) };
        let set = self.agent.set_network(&request).await;
        self.timeline.mark_once("network_set");
        if request.forward && set.is_ok() {
            self.dialled.notify_one();
        }
        set.map_err(|source| Error::Agent { what: "set up the guest's network", source })
    }

    /// A container's `/etc/resolv.conf`. Those of a VM share its network, so the first is everyone's.
    pub fn know_resolv_conf(&self, spec: &Spec) {
        let mut known = self.resolv_conf.borrow_mut();
        if known.is_none() {
            *known = ResolvConf::of(spec);
        }
    }

    /// Gives the guest Docker's name server, once `/etc/resolv.conf` names it.
    pub async fn set_resolver(&self) -> Result<(), Error> {
        let named = self.resolv_conf.borrow().as_ref().is_some_and(ResolvConf::names_resolver);
        if !named || self.has_resolver.replace(true) {
            return Ok(());
        }
        let relayed = self.agent.relay_resolver().await;
        relayed.map_err(|source| Error::Agent { what: "have names resolved by Docker", source })?;
        let os = |e| Error::Os("have names resolved by Docker", e);
        let stream = std::os::unix::net::UnixStream::from(self.vmm.connect(RESOLVER_PORT)?);
        stream.set_nonblocking(true).map_err(os)?;
        let stream = tokio::net::UnixStream::from_std(stream).map_err(os)?;
        tokio::task::spawn_local(async move {
            if let Err(e) = resolver::carry(stream).await {
                tracing::warn!("names are not resolved by Docker any more: {e}");
            }
        });
        Ok(())
    }

    /// Carries the connections that are made within the namespace to the guest's ports, where there is somebody who makes
    /// them.
    pub async fn forward_ports(self: Rc<Self>) {
        self.dialled.notified().await;
        forward::serve(move |to| self.connect_port(to).map_err(|e| e.to_string())).await;
    }

    /// From now on what changes in the namespace reaches the guest, while [`Self::watch`] runs.
    pub fn follow_network(&self) {
        self.network.follow();
    }

    /// What has gone over the interfaces of the sandbox so far.
    pub fn traffic(&self) -> Result<Vec<Traffic>, Error> {
        Ok(self.network.traffic()?)
    }

    /// Takes back what was wired; false if that is left to [`network::clean_up`].
    pub fn unwire_network(&self) -> bool {
        let done = self.network.unwire();
        done.inspect_err(|e| tracing::warn!("{e}")).is_ok()
    }

    /// Lets the guest's network follow the host's.
    pub(super) async fn watch_network(&self, save: impl Fn(network::Record) -> Result<(), Error>) -> Error {
        loop {
            match self.network.change().await {
                Ok(Change::Carrier { slot, up }) => {
                    if let Err(e) = self.vmm.set_link(slot, up) {
                        return e.into();
                    }
                }
                Ok(Change::Settled) => {
                    if let Err(e) = self.rewire_network(Demand::Lenient, &save).await {
                        tracing::warn!("a change of the network namespace does not reach the VM: {e}");
                    }
                    // Docker has written its name server's address before it adds an interface.
                    if let Err(e) = self.set_resolver().await {
                        tracing::warn!("{e}");
                    }
                }
                Err(e) => return e.into(),
            }
        }
    }
}
