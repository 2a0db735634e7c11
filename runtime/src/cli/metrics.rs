//! `stockade metrics`: an endpoint for Prometheus, for all sandboxes of this host (text exposition format 0.0.4).
//!
//! What there is now is looked up with each question; what has happened is counted from the host's records, as far back
//! as they go when this begins.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::Path;

use clap::Args;
use tiny_http::{Header, Method, Response, Server};

use super::sandboxes::{self, Shown};
use super::{Error, Global, Outcome, print};
use crate::records::{self, Reader, Record};

/// Upper bounds of the buckets for the time of a boot, in seconds.
const BOUNDS: [f64; 11] = [0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Serve figures of all sandboxes of this host to Prometheus, at /metrics
#[derive(Args)]
pub struct Metrics {
    /// Address and port to listen on
    #[arg(long, default_value = "127.0.0.1:9464", value_name = "ADDRESS")]
    listen: SocketAddr,
}

/// What has been counted.
struct Counts {
    reader: Reader,
    boots: [u64; BOUNDS.len()],
    boot_count: u64,
    boot_seconds: f64,
    failures: BTreeMap<String, u64>,
}

impl Counts {
    fn new(dir: &Path) -> Self {
        Self {
            reader: Reader::new(dir),
            boots: Default::default(),
            boot_count: 0,
            boot_seconds: 0.0,
            failures: BTreeMap::new(),
        }
    }

    fn catch_up(&mut self) -> Result<(), Error> {
        for record in self.reader.read().map_err(Error::io("read the host's records"))? {
            match record {
                Record::Booted(ns) => {
                    let seconds = ns as f64 / 1e9;
                    let within = |bound: &f64| seconds <= *bound;
                    BOUNDS
                        .iter()
                        .zip(&mut self.boots)
                        .filter(|(bound, _)| within(bound))
                        .for_each(|(_, n)| *n += 1);
                    self.boot_count += 1;
                    self.boot_seconds += seconds;
                }
                Record::Failed(what) => *self.failures.entry(what).or_default() += 1,
            }
        }
        Ok(())
    }
}

pub fn metrics(global: &Global, args: Metrics) -> Outcome {
    let listen = |e: Box<dyn std::error::Error + Send + Sync>| {
        Error::Refused(format!("cannot listen on {}: {e}; name another address with --listen", args.listen))
    };
    let server = Server::http(args.listen).map_err(listen)?;
    print(&format!("serving http://{}/metrics\n", server.server_addr()))?;
    let mut counts = Counts::new(Path::new(records::DIR));
    loop {
        let request = server.recv().map_err(Error::io("wait for a request"))?;
        let response = match (request.method(), request.url()) {
            (Method::Get, "/metrics") => match answer(global, &mut counts) {
                Ok(text) => {
                    let kind = Header::from_bytes("Content-Type", "text/plain; version=0.0.4; charset=utf-8");
                    kind.into_iter().fold(Response::from_string(text), Response::with_header)
                }
                Err(e) => {
                    tracing::error!("{e}");
                    Response::from_string(format!("{e}\n")).with_status_code(500)
                }
            },
            _ => Response::from_string("there is /metrics\n").with_status_code(404),
        };
        // Who asked may have gone.
        let _ = request.respond(response);
    }
}

fn answer(global: &Global, counts: &mut Counts) -> Result<String, Error> {
    counts.catch_up()?;
    Ok(exposition(&sandboxes::all(global)?, counts))
}

fn exposition(all: &[Shown], counts: &Counts) -> String {
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[String]| {
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        samples.iter().for_each(|sample| text.extend([name, sample, "\n"]));
    };
    let mut by_status: BTreeMap<_, u64> = BTreeMap::new();
    all.iter().for_each(|shown| *by_status.entry(shown.status.as_str()).or_default() += 1);
    let samples: Vec<_> =
        by_status.iter().map(|(status, n)| format!("{{status=\"{status}\"}} {n}")).collect();
    family("stockade_sandboxes", "gauge", "Sandboxes of this host.", &samples);
    let of_each = |value: fn(&Shown) -> u64| -> Vec<_> {
        all.iter().map(|shown| format!("{{{}}} {}", labels(shown), value(shown))).collect()
    };
    family("stockade_sandbox_vcpus", "gauge", "vCPUs of a VM.", &of_each(|shown| shown.vcpus.into()));
    family(
        "stockade_sandbox_size_bytes",
        "gauge",
        "Memory that a VM has.",
        &of_each(|shown| shown.memory_bytes),
    );
    let parts = all.iter().flat_map(|shown| {
        let parts = [("vmm", shown.vmm_bytes), ("supervisor", shown.used_bytes - shown.vmm_bytes)];
        parts.map(|(part, bytes)| format!("{{{},part=\"{part}\"}} {bytes}", labels(shown)))
    });
    family(
        "stockade_sandbox_memory_bytes",
        "gauge",
        "Memory that a sandbox takes of the host, as a proportional set size; the VMM's has the guest's.",
        &parts.collect::<Vec<_>>(),
    );
    let buckets = BOUNDS.iter().zip(&counts.boots).map(|(bound, n)| format!("_bucket{{le=\"{bound}\"}} {n}"));
    let rest = [
        format!("_bucket{{le=\"+Inf\"}} {}", counts.boot_count),
        format!("_sum {}", counts.boot_seconds),
        format!("_count {}", counts.boot_count),
    ];
    family(
        "stockade_boot_seconds",
        "histogram",
        "From the start of a sandbox's first process to the first answer of its guest.",
        &buckets.chain(rest).collect::<Vec<_>>(),
    );
    let failures = counts.failures.iter().map(|(what, n)| format!("{{reason=\"{}\"}} {n}", escaped(what)));
    family("stockade_failures_total", "counter", "Sandboxes that failed.", &failures.collect::<Vec<_>>());
    text
}

fn labels(shown: &Shown) -> String {
    let mut labels = format!("sandbox=\"{}\"", escaped(&shown.id));
    for (name, value) in [("namespace", &shown.namespace), ("pod", &shown.pod)] {
        if let Some(value) = value {
            let _ = write!(labels, ",{name}=\"{}\"", escaped(value));
        }
    }
    labels
}

/// As the format has it in a label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_the_form_that_prometheus_reads() {
        let dir = tempfile::tempdir().unwrap();
        let mut counts = Counts::new(dir.path());
        counts.catch_up().unwrap();
        let lines = [r#"{"booted":120000000}"#, r#"{"booted":700000000}"#, r#"{"failed":"vm_ended"}"#];
        std::fs::write(dir.path().join("records"), lines.join("\n") + "\n").unwrap();
        counts.catch_up().unwrap();
        let shown = Shown {
            id: "c1".into(),
            namespace: Some("k8s.io".into()),
            pod: Some("shop/ca\"rt".into()),
            status: crate::state::Status::Running,
            pid: 7,
            vcpus: 2,
            memory_bytes: 256 << 20,
            used_bytes: 50,
            vmm_bytes: 40,
            created: String::new(),
        };
        let text = exposition(&[shown], &counts);
        for line in [
            "# TYPE stockade_boot_seconds histogram",
            "stockade_sandboxes{status=\"running\"} 1",
            "stockade_sandbox_vcpus{sandbox=\"c1\",namespace=\"k8s.io\",pod=\"shop/ca\\\"rt\"} 2",
            "stockade_sandbox_memory_bytes{sandbox=\"c1\",namespace=\"k8s.io\",pod=\"shop/ca\\\"rt\",part=\"supervisor\"} 10",
            "stockade_boot_seconds_bucket{le=\"0.1\"} 0",
            "stockade_boot_seconds_bucket{le=\"0.15\"} 1",
            "stockade_boot_seconds_bucket{le=\"+Inf\"} 2",
            "stockade_boot_seconds_count 2",
            "stockade_failures_total{reason=\"vm_ended\"} 1",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line}: {text}");
        }
    }
}
