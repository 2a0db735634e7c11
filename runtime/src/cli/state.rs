//! `stockade state`: one container's state as JSON, with the fields that runc has.

use serde::Serialize;

use super::{Error, Global, Outcome, open, print};
use crate::state::{State, Status};

/// What callers read, also in lists.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown<'a> {
    oci_version: &'a str,
    pub id: &'a str,
    /// 0 for a container that has stopped.
    pub pid: i32,
    pub status: Status,
    pub bundle: String,
    rootfs: String,
    pub created: &'a str,
    /// Not in runc's state: why the sandbox ended before its workload.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    annotations: &'a std::collections::BTreeMap<String, String>,
    pub owner: String,
}

impl<'a> From<&'a State> for Shown<'a> {
    fn from(state: &'a State) -> Self {
        let status = state.status();
        Shown {
            oci_version: &state.oci_version,
            id: &state.id,
            pid: if status == Status::Stopped { 0 } else { state.supervisor.pid },
            status,
            bundle: state.bundle.display().to_string(),
            rootfs: state.rootfs.display().to_string(),
            created: &state.created,
            error: state.error.as_deref(),
            annotations: &state.annotations,
            owner: match state.owner {
                0 => "root".into(),
                uid => uid.to_string(),
            },
        }
    }
}

pub fn state(global: &Global, args: liboci_cli::State) -> Outcome {
    let (_, state) = open(global, &args.container_id)?;
    let text = serde_json::to_string_pretty(&Shown::from(&state))
        .map_err(|e| Error::Io("show the state".into(), e.into()))?;
    print(&(text + "\n"))
}
