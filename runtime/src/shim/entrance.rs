//! The door for who may enter a shim's sandbox: a control socket, which is there only if the host allows it.

use std::rc::Rc;

use super::pod::Pod;
use crate::sandbox::control::{AsyncConversation, Listener, Reply, Request};
use crate::sandbox::enter;
use crate::state::StateDir;

/// What others are told that take the shim for a command's supervisor.
const NOT_OURS: &str = "the containers of this sandbox are containerd's to command: use its tools";

/// Opens the door of a sandbox whose state is in `dir`. Who comes before the guest is up waits.
pub fn open(pod: &Rc<Pod>, dir: &StateDir) {
    match Listener::bind(dir) {
        Ok(listener) => drop(tokio::task::spawn_local(serve(pod.clone(), listener))),
        Err(e) => tracing::warn!("nobody can enter this sandbox: cannot make its control socket: {e}"),
    }
}

/// Lets in who comes, as long as the sandbox lives.
async fn serve(pod: Rc<Pod>, listener: Listener) {
    let mut count = 0;
    let each = listener.each(|talk| {
        let (pod, exec_id) = (pod.clone(), format!("enter-{count}"));
        count += 1;
        tokio::task::spawn_local(async move { answer(&pod, &talk, &exec_id).await });
    });
    if let Err(e) = each.await {
        tracing::warn!("nobody can enter this sandbox any more: {e}");
    }
}

async fn answer(pod: &Pod, talk: &AsyncConversation, exec_id: &str) {
    let result = match talk.recv::<Request>().await {
        Ok(Some((Request::Enter { stdio }, fds))) => match pod.ready().await {
            Ok(vm) => enter(vm, talk, fds, stdio, exec_id).await,
            Err(e) => Err(e.to_string()),
        },
        Ok(Some(_)) => Err(NOT_OURS.into()),
        Ok(None) => return,
        Err(e) => return tracing::warn!("a command was not understood: {e}"),
    };
    if let Err(message) = result {
        let _ = talk.send(&Reply::Failed { message }, &[]);
    }
}
