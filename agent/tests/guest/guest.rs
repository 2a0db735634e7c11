//! The guest's side: becomes the agent, and beside it a host that dials the agent.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, VsockAddr, connect, shutdown, socket};
use nix::unistd::{ForkResult, execv, fork};
use serde_json::{Value, json};
use stockade_agent_protocol::messages::{
    ContainerRequest, CreateContainerRequest, DeleteContainerRequest, ExecRequest, HandshakeRequest,
    ProcessRequest, SetupSandboxRequest, Stdio, WaitResponse,
};
use stockade_agent_protocol::service::AgentClient;
use stockade_agent_protocol::{PROTOCOL_VERSION, STDIO_PORT, Stream, StreamHeader};
use ttrpc::context::with_timeout;

/// The guest itself, VMADDR_CID_LOCAL.
const CID_LOCAL: u32 = 1;

pub fn main() {
    // SAFETY: this process has one thread.
    match unsafe { fork() }.expect("fork") {
        ForkResult::Parent { .. } => {
            let agent = CString::new("/agent").expect("no NUL");
            let Err(e) = execv(&agent, &[&agent, &CString::new("nomodule").expect("no NUL")]);
            panic!("executing the agent: {e}");
        }
        ForkResult::Child => {
            mount(Some("devtmpfs"), "/client", Some("devtmpfs"), MsFlags::empty(), None::<&str>)
                .expect("devtmpfs");
            std::fs::create_dir_all("/proc").expect("/proc");
            mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), None::<&str>).expect("proc");
            std::panic::set_hook(Box::new(|info| say(&format!("panic: {info}"))));
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(crate::cases::run());
            say("done");
            let _ = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT);
        }
    }
}

/// Writes to the console, whatever its log level.
pub fn say(message: &str) {
    let mut kmsg = File::options().write(true).open("/client/kmsg").expect("/dev/kmsg");
    for line in message.lines() {
        let line: String = line.chars().take(900).collect();
        let _ = kmsg.write_all(format!("<0>guest-test: {line}\n").as_bytes());
    }
}

/// Connects to the agent, which may not listen yet.
pub async fn dial() -> AgentClient {
    loop {
        match ttrpc::asynchronous::Client::connect(&format!("vsock://{CID_LOCAL}:1024")).await {
            Ok(client) => return AgentClient::new(client),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// A connection that has done its handshake.
pub async fn greet() -> AgentClient {
    let agent = dial().await;
    let request = HandshakeRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
    agent.handshake(ctx(), &request).await.expect("handshake");
    agent
}

pub async fn set_up(agent: &AgentClient) {
    let request = SetupSandboxRequest {
        realtime_ns: 1_700_000_000_000_000_000,
        entropy: vec![7; 64],
        ..Default::default()
    };
    agent.setup_sandbox(ctx(), &request).await.expect("setup");
}

pub fn ctx() -> ttrpc::context::Context {
    with_timeout(120_000_000_000)
}

/// A configuration that runs `script` in busybox.
pub fn config(script: &str) -> Value {
    args_config(&["/bin/sh", "-c", script])
}

pub fn args_config(args: &[&str]) -> Value {
    let caps = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_MKNOD",
        "CAP_NET_BIND_SERVICE"
    ]);
    json!({
        "ociVersion": "1.0.2",
        "root": {"path": "/rootfs", "readonly": false},
        "hostname": "box",
        "process": {
            "terminal": false, "cwd": "/", "args": args, "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/usr/bin:/bin", "WHO=world"], "noNewPrivileges": true,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}]
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
                {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rw"},
                {"allow": true, "type": "c", "major": 5, "minor": 0, "access": "rw"},
                {"allow": true, "type": "c", "major": 5, "minor": 2, "access": "rw"},
                {"allow": true, "type": "c", "major": 136, "access": "rw"}
            ]}
        }
    })
}

/// What an exec of these tests usually has.
pub fn only_stdout() -> Stdio {
    Stdio { stdout: true, ..Default::default() }
}

pub fn all_streams() -> Stdio {
    Stdio { stdin: true, stdout: true, stderr: true, ..Default::default() }
}

/// Opens a stream as the host does.
pub fn open(stream: Stream, container_id: &str, exec_id: &str) -> File {
    let socket: OwnedFd =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("vsock socket");
    connect(socket.as_raw_fd(), &VsockAddr::new(CID_LOCAL, STDIO_PORT))
        .expect("connecting to the stdio port");
    let mut file = File::from(socket);
    let header = StreamHeader { stream, container_id: container_id.into(), exec_id: exec_id.into() };
    file.write_all(header.encode().as_bytes()).expect("sending a header");
    file
}

/// Reads a stream to its end, beside everything else.
pub fn read_all(mut file: File) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let _ = file.read_to_end(&mut all);
        all
    })
}

/// Writes all and half-closes, beside everything else.
pub fn write_all(mut file: File, data: Vec<u8>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let _ = file.write_all(&data);
        let _ = shutdown(file.as_raw_fd(), Shutdown::Write);
        // Dropping the file now would be more than a half-close.
        let _ = file.read(&mut [0]);
    })
}

/// What a process did.
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub wait: WaitResponse,
}

pub async fn create(agent: &AgentClient, id: &str, config: &Value, stdio: Stdio) -> ttrpc::Result<u32> {
    let request = CreateContainerRequest {
        container_id: id.into(),
        spec: config.to_string().into_bytes(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    Ok(agent.create_container(ctx(), &request).await?.pid)
}

pub fn named(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.into(), ..Default::default() }
}

pub async fn start(agent: &AgentClient, id: &str) -> ttrpc::Result<()> {
    agent.start_container(ctx(), &named(id)).await.map(drop)
}

pub async fn wait(agent: &AgentClient, id: &str, exec_id: &str) -> WaitResponse {
    let request = ProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
    agent.wait(ctx(), &request).await.expect("wait")
}

pub async fn delete(agent: &AgentClient, id: &str, force: bool) -> ttrpc::Result<()> {
    let request = DeleteContainerRequest { container_id: id.into(), force, ..Default::default() };
    agent.delete_container(ctx(), &request).await.map(drop)
}

/// Runs a container from create to delete.
pub async fn run(agent: &AgentClient, id: &str, config: &Value, stdin: &[u8]) -> ttrpc::Result<Outcome> {
    let input = write_all(open(Stream::Stdin, id, ""), stdin.to_vec());
    let (stdout, stderr) = (read_all(open(Stream::Stdout, id, "")), read_all(open(Stream::Stderr, id, "")));
    create(agent, id, config, all_streams()).await?;
    let started = start(agent, id).await;
    let wait = wait(agent, id, "").await;
    delete(agent, id, false).await?;
    started?;
    drop(input);
    Ok(Outcome { stdout: text(stdout), stderr: text(stderr), wait })
}

/// Starts an exec of a shell script.
pub async fn exec(
    agent: &AgentClient,
    id: &str,
    exec_id: &str,
    process: Value,
    stdio: Stdio,
) -> ttrpc::Result<u32> {
    let request = ExecRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        process: process.to_string().into_bytes(),
        stdio: Some(stdio).into(),
        ..Default::default()
    };
    Ok(agent.exec(ctx(), &request).await?.pid)
}

pub fn text(reader: JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().expect("reader")).into_owned()
}
