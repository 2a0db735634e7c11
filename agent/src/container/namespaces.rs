//! Namespaces that are made before the container that is to be in them: its own users, and what a pod's containers share.

use std::fs;

use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::LinuxNamespace;
use stockade_agent_protocol::POD_USER_NAMESPACE;

use super::Containers;
use crate::error::Error;
use crate::helper::{Helper, Record};
use crate::pod;
use crate::spec::{Adapted, Ids};

/// User namespaces of containers that are being made.
const USERS_DIR: &str = "/run/stockade/users";

/// Those of the pod that are there.
#[derive(Default)]
pub(super) struct PodNamespaces {
    /// With these mappings.
    user: Option<[String; 2]>,
    pid: bool,
}

/// A namespace that is kept in a file, which goes when this is dropped.
pub(super) struct Kept(String);

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = umount2(self.0.as_str(), MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&self.0);
    }
}

impl Containers {
    /// Makes a container's own user namespace, because libcontainer leaves that to programs that are not here where it
    /// has more than one range of ids. The container's init keeps it.
    pub(super) async fn user_namespace(
        &self,
        id: &str,
        namespace: &mut LinuxNamespace,
        ids: &Ids,
    ) -> Result<Kept, Error> {
        let file = Kept(format!("{USERS_DIR}/{id}"));
        let (ids, path) = (ids.clone(), file.0.clone());
        self.aside(move || pod::make_user_namespace(&ids, &path)).await?;
        namespace.set_path(Some(file.0.clone().into()));
        Ok(file)
    }

    /// Makes the namespaces that a pod's containers share, with the first that wants them.
    pub(super) async fn pod_namespaces(&self, wanted: &Adapted) -> Result<(), Error> {
        let mut made = self.pod_namespaces.lock().await;
        if wanted.in_pod_user_namespace {
            let maps = wanted.ids.maps();
            if made.user.as_ref().is_some_and(|others| *others != maps) {
                return Err(Error::Invalid(
                    "linux.uidMappings and gidMappings must be those of the pod's other containers, with which it shares a \
                     user namespace"
                        .into(),
                ));
            }
            if made.user.is_none() {
                let ids = wanted.ids.clone();
                self.aside(move || pod::make_user_namespace(&ids, POD_USER_NAMESPACE)).await?;
                made.user = Some(maps);
            }
        }
        if wanted.in_pod_pid_namespace && !made.pid {
            let users = made.user.is_some();
            let mut helper = Helper::fork(&self.reaper, move |_| match pod::make_pid_namespace(users) {
                Ok(init) => Record::Done(Some(init)),
                Err(e) => Record::Failed(e.to_string()),
            })?;
            helper.outcome().await?;
            made.pid = true;
        }
        Ok(())
    }
}
