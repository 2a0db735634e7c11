//! What a container is in its sandbox, by the annotations of containerd's CRI plugin, of CRI-O, and of ctr.

use std::collections::HashMap;

/// Keys for the kind of container and for its sandbox, by caller.
const CRI: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];
/// What groups containers that are no pod.
const GROUP: &str = "io.containerd.runc.v2.group";

/// A container's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It has a VM of its own, which ends with it.
    Single,
    /// Containers of the same group share a VM, which ends with the last of them.
    Group(String),
    /// It is a pod: the VM without a process, which kubelet calls the pause container.
    Pod,
    /// It runs in the pod of that id.
    InPod(String),
    /// It is a pod of containerd's sandbox API: what it is to be comes with a call, and there is no pause container.
    Announced,
}

impl Role {
    /// Reads the annotations of a bundle.
    pub fn of(annotations: Option<&HashMap<String, String>>) -> Result<Self, String> {
        let get = |key: &str| annotations.and_then(|all| all.get(key)).filter(|value| !value.is_empty());
        for (kind_key, sandbox_key) in CRI {
            match get(kind_key).map(String::as_str) {
                None => {}
                Some("sandbox") => return Ok(Role::Pod),
                Some("container") => {
                    let sandbox = get(sandbox_key).ok_or_else(|| {
                        format!("annotation {sandbox_key} is missing: it must name the container's pod")
                    })?;
                    return Ok(Role::InPod(sandbox.clone()));
                }
                Some(other) => {
                    return Err(format!(
                        "annotation {kind_key} is {other:?}: it must be sandbox or container"
                    ));
                }
            }
        }
        Ok(get(GROUP).map_or(Role::Single, |group| Role::Group(group.clone())))
    }

    /// Whether it is a pod, which other containers join.
    pub fn is_pod(&self) -> bool {
        matches!(self, Role::Pod | Role::Announced)
    }

    /// The sandbox of the container `id`.
    pub fn sandbox<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Role::Single | Role::Pod | Role::Announced => id,
            Role::Group(sandbox) | Role::InPod(sandbox) => sandbox,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn role(annotations: &[(&str, &str)]) -> Result<Role, String> {
        let annotations = annotations.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Role::of(Some(&annotations))
    }

    #[test]
    fn pods_of_containerd_and_of_cri_o_are_told_from_their_containers() {
        for (kind, sandbox) in CRI {
            assert_eq!(role(&[(kind, "sandbox"), (sandbox, "p")]).unwrap(), Role::Pod);
            let inside = role(&[(kind, "container"), (sandbox, "p")]).unwrap();
            assert_eq!((inside.sandbox("c"), &inside), ("p", &Role::InPod("p".into())));
            assert!(role(&[(kind, "container")]).unwrap_err().contains(sandbox));
            assert!(role(&[(kind, "spaceship")]).unwrap_err().contains(kind));
        }
    }

    #[test]
    fn what_is_no_pod_is_alone_unless_it_is_grouped() {
        assert_eq!(Role::of(None).unwrap(), Role::Single);
        assert_eq!(role(&[(GROUP, "")]).unwrap().sandbox("c"), "c");
        assert_eq!(role(&[(GROUP, "g")]).unwrap().sandbox("c"), "g");
    }
}
