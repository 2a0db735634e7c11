//! From an image in a warm store to `echo`: `stockade run --image`, and Podman with the other runtimes.

use super::program;
use super::runtimes::{GREETING, Runtime, says_greeting};
use super::{Context, Plan, result::Results};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs;
use std::path::Path;
use std::process::Command;

const CASE: &str = "run-image";

/// Process start to process exit, without a network.
pub fn measure(plan: &Plan, runtime: &Runtime, results: &mut Results) -> Result<(), String> {
    // Podman makes a name of the path, which must be lower-case. In memory: while the lab waits for its disk the
    // virtual clock jumps.
    let folder = tempfile::Builder::new().prefix("bench-image").rand_bytes(0).tempdir();
    let folder = folder.or_say("make a folder")?;
    let at = folder.path();
    let reference = layout(&at.join("layout"))?;
    let command = || match runtime.name.as_str() {
        "stockade" => {
            let mut command = runtime.command(&["run", "--image", &reference, "--", "echo", GREETING]);
            command.env("STOCKADE_IMAGE_STORE", at.join("store"));
            command
        }
        name => {
            let mut command = podman(at, name);
            command.args(["run", "--rm", "--network", "none", &reference, "echo", GREETING]);
            command
        }
    };
    let once = || {
        let mut command = command();
        let ended = program::succeed(&mut command)?;
        says_greeting(&command, ended)
    };
    // Fills the store too.
    once()?;
    let mut times = Vec::new();
    for _ in 0..plan.runs {
        times.push(once()?.seconds());
    }
    let name =
        if runtime.name == "stockade" { "stockade".into() } else { format!("podman+{}", runtime.name) };
    results.add(CASE, &name, "time", "virtual_s", &times);
    Ok(())
}

/// Podman with a store and a state of its own.
fn podman(at: &Path, runtime: &str) -> Command {
    let mut command = Command::new("podman");
    command.arg("--root").arg(at.join("storage")).arg("--runroot").arg(at.join("run"));
    command.args(["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--runtime", runtime]);
    command
}

/// An OCI layout of one image with one layer, busybox; gives its reference. Its own command is one that stays, as the
/// process must that stands for a pod.
pub fn layout(at: &Path) -> Result<String, String> {
    fs::create_dir_all(at.join("blobs/sha256")).or_say("make a layout")?;
    let blob = |kind: &str, bytes: &[u8]| {
        let digest = hex(bytes);
        fs::write(at.join("blobs/sha256").join(&digest), bytes).or_say("write a blob")?;
        let kind = format!("application/vnd.oci.image.{kind}");
        Ok::<_, String>(
            json!({ "mediaType": kind, "size": bytes.len(), "digest": format!("sha256:{digest}") }),
        )
    };
    let tar = Command::new("tar").args(["-C", "/bundles/busybox/rootfs", "-cf", "-", "."]).output();
    let tar = tar.or_say("run tar")?.stdout;
    let config = json!({
        "os": "linux", "architecture": "amd64", "config": { "Cmd": ["sleep", "100000"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&tar))] },
    });
    let layer = blob("layer.v1.tar", &tar)?;
    let config = blob("config.v1+json", config.to_string().as_bytes())?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
    let mut entry = blob("manifest.v1+json", manifest.to_string().as_bytes())?;
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(at.join("index.json"), index.to_string()).or_say("write the index")?;
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).or_say("write the layout")?;
    Ok(format!("oci:{}:latest", at.display()))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
